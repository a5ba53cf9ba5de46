"""Every Pallas kernel of ours on every case, as a program to compile: forward and backward in one.

The tests that lower and compile for CUDA share these, and so does `deviceless.py`.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax

from jaxablate_kernels import dispatch

PALLAS = "pallas"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A case of an operation, with the Pallas implementation's own choice of blocks for a device.

    Attributes:
        op: the operation.
        case: the name of the case, and its dtype.
        spec: what the implementation is asked for.
        arrays: the arguments with gradients, abstract.
        constants: the other arrays, abstract.
        call: ``(arrays, constants, config) -> result``.
    """

    op: str
    case: str
    spec: Any
    arrays: Any
    constants: Any
    call: Callable[[Any, Any, Any], Any]

    @property
    def id(self) -> str:
        """For test ids and tables."""
        return f"{self.op}-{self.case}"

    def program(self, device: str) -> Callable[[Any, Any], Any]:
        """``(arrays, constants) -> (result, gradients)`` with the config for a `jax.Device.device_kind`."""
        candidates = dispatch.load(self.op, PALLAS).candidates
        assert candidates is not None
        return self.program_with(candidates(self.spec, device)[0])

    def program_with(self, config: Any) -> Callable[[Any, Any], Any]:
        """The same with a config of one's own."""

        def value_and_gradients(arrays, constants):
            result, pullback = jax.vjp(lambda arrays: self.call(arrays, constants, config), arrays)
            return result, pullback(result)  # any cotangent of the right shapes

        return value_and_gradients


def operations() -> tuple[str, ...]:
    """The operations that have a Pallas implementation."""
    return tuple(op for op in dispatch.operations() if PALLAS in dispatch.implementations(op))


def problems(op: str, group: str, dtype: str | None = None) -> list[Problem]:
    """The problems of an operation.

    Args:
        op: one of `operations()`.
        group: a tuple of cases in the operation's module `cases`, such as ``PAPER``.
        dtype: instead of each case's own.
    """
    cases = getattr(importlib.import_module(f"jaxablate_kernels.{op}.cases"), group)
    if dtype is not None:
        cases = [dataclasses.replace(case, dtype=dtype) for case in cases]
    return [_MAKE[op](case) for case in cases]


def problem(op: str, case: str, dtype: str | None = None) -> Problem:
    """The problem with this name of a case."""
    (found,) = [p for p in problems(op, "CASES", dtype) if p.case.rpartition("-")[0] == case]
    return found


def _attention(case: Any) -> Problem:
    x = case.inputs()
    keywords = case.keywords(x)
    arrays = {"q": x.q, "k": x.k, "v": x.v} | {name: keywords.pop(name) for name in ("bias", "qk_norm")}
    constants = {name: keywords.pop(name) for name in ("kv_mask", "segment_ids", "rotary")}

    def call(arrays, constants, config):
        implementation = dispatch.load("attention", PALLAS)
        return implementation.call(**arrays, **constants, **keywords, config=config)

    return _problem("attention", case, case.spec, arrays, constants, call)


def _norm(case: Any) -> Problem:
    x = case.inputs()
    arrays = {name: getattr(x, name) for name in ("x", "residual", "scale", "bias")}
    keywords = {name: getattr(case, name) for name in ("kind", "eps", "eps_at")}

    def call(arrays, constants, config):
        return dispatch.load("norm", PALLAS).call(**arrays, **constants, **keywords, config=config)

    return _problem("norm", case, case.spec, arrays, {}, call)


def _gated(case: Any) -> Problem:
    def call(arrays, constants, config):
        return dispatch.load("gated", PALLAS).call(**arrays, **constants, kind=case.kind, config=config)

    return _problem("gated", case, case.spec, {"h": case.inputs().h}, {}, call)


def _problem(op: str, case: Any, spec: Any, arrays: Any, constants: Any, call: Any) -> Problem:
    arrays, constants = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (arrays, constants))
    return Problem(op, f"{case.name}-{case.dtype}", spec, arrays, constants, call)


_MAKE: dict[str, Callable[[Any], Problem]] = {"attention": _attention, "norm": _norm, "gated": _gated}
