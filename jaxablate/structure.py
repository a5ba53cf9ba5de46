"""Nested mappings -> frozen dataclasses, strictly: all fields, no others, and of their declared types."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxablate.errors import UserError, suggestion

_NONE: Mapping[str, Any] = types.MappingProxyType({})


def from_mapping(
    cls: Any, values: Mapping[str, Any], prefix: str, types_of: Mapping[str, Any] = _NONE
) -> Any:
    """An instance of the dataclass `cls` from a mapping that must hold its fields, all of them and no other.

    Args:
      cls: a dataclass whose annotations are dataclasses, Literals, tuples, mappings, unions and plain types.
      values: the fields; ints are taken where a float is meant, nothing else is converted.
      prefix: what messages put before a field's name, such as `config.`.
      types_of: types of fields that the annotations leave open.

    Raises:
      UserError: with the field, the value and what it must be.
    """
    hints = {**typing.get_type_hints(cls, vars(sys.modules[cls.__module__])), **types_of}
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise UserError(f"{prefix}{key}: no such field; {suggestion(key, names)}")
    for name in names:
        if name not in values:
            raise UserError(f"{prefix}{name}: missing; it must be given")
    return cls(**{name: convert(hints[name], values[name], f"{prefix}{name}") for name in names})


def convert(kind: Any, value: Any, path: str) -> Any:
    """`value` as the annotated type `kind`, or a UserError that names `path`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise UserError(f"{path}={value!r}: is a section; set one of its fields")
        return from_mapping(kind, value, f"{path}.")
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return convert(next(a for a in arguments if a is not type(None)), value, path)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{path}={value!r}: {suggestion(str(value), map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise UserError(f"{path}={value!r}: must be a tuple")
        kinds = (arguments[0],) * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise UserError(f"{path}={value!r}: must have {len(kinds)} values")
        return tuple(convert(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{path}={value!r}: must be a mapping")
        return {str(k): convert(arguments[1], v, f"{path}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{path}={value!r}: must be {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{path}={value!r}: must be finite")
    return value
