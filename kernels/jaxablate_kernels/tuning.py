"""Which configuration and which implementation were fastest: measured once, looked up ever after.

One JSON file per device holds two lists:

* ``configs``: the best `Config` found by `trials.tune` for an (operation, implementation, problem);
* ``measurements``: seconds of an (operation, implementation, problem), as a benchmark found them;
  `fastest` reads them for the name ``auto``.

Files shipped with the package are in ``jaxablate_kernels/tuned/<device>.json`` and hold only what was
measured on that device.  A user's own are in the folder ``$JAXABLATE_TUNED`` or, without it,
``~/.cache/jaxablate/tuned``, and come first; copied to ``jaxablate_kernels/tuned/`` such a file is a shipped
one.  An entry counts only under the versions that it was measured with: of jax, jaxlib and its GPU plugin (the
Triton that compiles Pallas kernels is part of them), for a measurement also of the libraries that compete.
Which block is fastest changes between compilers, and who is between libraries.

Lookups happen while a program is traced.  A file is read once per process; what a lookup answered is kept
and listed by `used_configs`, since another configuration means other rounding: a run that is to be
repeated to the bit records it.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import re
import tempfile
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from jaxablate_kernels.trials import Timing

SHIPPED = Path(__file__).parent / "tuned"
FOLDER_VARIABLE = "JAXABLATE_TUNED"

# A problem that was tuned or measured speaks for another if each of its sizes is within this factor.
NEAR = 4.0

# What decides how fast a kernel of ours is, and what else may decide which implementation is the fastest.
_COMPILERS = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin")
_LIBRARIES = ("tokamax", "jax-triton", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")

C = TypeVar("C")
Direction = Literal["forward", "backward", "both"]
Section = Literal["configs", "measurements"]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """How long one implementation took for one problem.

    Attributes:
        op, implementation: as in `dispatch`.
        spec: the fields of the operation's spec, see `spec_fields`.
        direction: what was timed; ``both`` is forward and backward together.
        seconds: of one call.
    """

    op: str
    implementation: str
    spec: Mapping[str, Any]
    direction: Direction
    seconds: float


def config_for(op: str, name: str, spec: Any, device: str, cls: type[C]) -> C | None:
    """The tuned configuration of this problem, or None, for the implementation's own heuristic.

    Tuned is also what was tuned at another batch within a factor of 4; the nearest counts.

    Args:
        op, name: operation and implementation.
        spec: the operation's spec, a frozen dataclass of numbers, words and tuples of numbers, whose
            ``batch_fields`` names those that hold the batch.
        device: a `jax.Device.device_kind`.
        cls: the implementation's frozen ``Config``; one inside another is built as well.

    Raises:
        ValueError: a file that cannot be read, or an entry that does not fit `cls`; the file is named.
    """
    mine, answer, source = spec_fields(spec), None, "heuristic"
    for path in _files(device):
        near = [
            (distance, tuned)
            for tuned in _read(path).configs
            if (tuned.op, tuned.implementation) == (op, name)
            and (distance := _distance(mine, tuned.spec, spec.batch_fields)) is not None
        ]
        if near:
            _, tuned = min(near, key=lambda pair: pair[0])
            try:
                answer = _build(cls, tuned.config)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}: the config {tuned.config} of {op} {name!r} does not fit it ({error}); tune it again"
                ) from None
            other = "".join(f", tuned at {f} {x}" for f, x in tuned.spec.items() if x != mine[f])
            source = f"{answer} ({'shipped' if path.parent == SHIPPED else 'own'} table{other})"
            break
    _USED[f"{op} {name} on {device}: {canonical(spec)}"] = source
    return answer


def used_configs() -> dict[str, str]:
    """What the lookups of this process answered: problem -> configuration, or ``heuristic``; for provenance."""
    return dict(_USED)


def fastest(op: str, spec: Any, device: str) -> tuple[str, ...]:
    """The implementations of `op`, fastest first, that were measured on the nearest problem; maybe none.

    The nearest problem has the same types, masks, options and head dimension, each of the spec's
    ``size_fields`` within a factor of 4, and the least sum of squared log ratios of sizes.  Counted is the
    time of forward and backward together.

    Raises:
        ValueError: a file that cannot be read; it is named.
    """
    mine = spec_fields(spec)
    for path in _files(device):
        near = [
            (distance, m)
            for m in _read(path).measurements
            if m.op == op
            and m.direction == "both"
            and (distance := _distance(mine, m.spec, spec.size_fields)) is not None
        ]
        if near:
            _, nearest = min(near, key=lambda pair: pair[0])
            ranked = sorted((m for _, m in near if m.spec == nearest.spec), key=lambda m: m.seconds)
            return tuple(dict.fromkeys(m.implementation for m in ranked))
    return ()


def save_config(
    op: str, name: str, spec: Any, device: str, timing: Timing, folder: Path | None = None
) -> Path:
    """Keep a configuration, in place of an earlier one for the same problem and versions.

    Args:
        op, name, spec, device: as for `config_for`.
        timing: from `trials.best`.
        folder: where; by default the user's, see the module.

    Returns:
        The file, which this process reads anew.

    Raises:
        ValueError: the timing has no seconds, or the file that is there cannot be read.
    """
    if timing.seconds is None:
        raise ValueError(f"{timing.config} did not run ({timing.reason}), so it is not kept")
    entry = {
        "op": op,
        "implementation": name,
        "spec": spec_fields(spec),
        "config": dataclasses.asdict(timing.config),
        "seconds": timing.seconds,
    }
    return _add(device, folder, "configs", [entry])


def save_measurements(measurements: Sequence[Measurement], device: str, folder: Path | None = None) -> Path:
    """Keep measurements, each in place of an earlier one of the same kind; otherwise as `save_config`."""
    entries = [dataclasses.asdict(m) | {"spec": dict(m.spec)} for m in measurements]
    return _add(device, folder, "measurements", entries)


def spec_fields(spec: Any) -> dict[str, Any]:
    """A spec as JSON has it: its fields by name, tuples as lists."""
    return json.loads(canonical(spec))


def canonical(spec: Any) -> str:
    """One text per problem: the spec's fields as JSON, in the order of their names."""
    return json.dumps(dataclasses.asdict(spec), sort_keys=True)


def file_for(device: str, folder: Path) -> Path:
    """Where a folder keeps what it knows of a device: ``NVIDIA H200`` -> ``nvidia-h200.json``."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def user_folder() -> Path:
    """``$JAXABLATE_TUNED``, or ``~/.cache/jaxablate/tuned``."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    return Path(chosen) if chosen else Path.home() / ".cache" / "jaxablate" / "tuned"


@dataclasses.dataclass(frozen=True)
class _Tuned:
    """A configuration as a file has it."""

    op: str
    implementation: str
    spec: Mapping[str, Any]
    config: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Table:
    """What a file says for the versions at hand."""

    configs: tuple[_Tuned, ...]
    measurements: tuple[Measurement, ...]


# Problem -> what a lookup answered, in the order of the first lookups.
_USED: dict[str, str] = {}


def _versions() -> dict[str, str]:
    return _installed(_COMPILERS)


def _installed(packages: Sequence[str]) -> dict[str, str]:
    """The versions of those packages that are there."""
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _versions_of(section: Section) -> dict[str, str]:
    return _versions() | (_installed(_LIBRARIES) if section == "measurements" else {})


def _files(device: str) -> tuple[Path, Path]:
    return file_for(device, user_folder()), file_for(device, SHIPPED)


@functools.cache
def _read(path: Path) -> _Table:
    document = _document(path)

    def entries(section: Section, cls: type[C]) -> tuple[C, ...]:
        names, versions = [field.name for field in dataclasses.fields(cls)], _versions_of(section)  # pyright: ignore[reportArgumentType]
        ours = (entry for entry in document[section] if entry["versions"] == versions)
        return tuple(cls(**{name: entry[name] for name in names}) for entry in ours)

    try:
        return _Table(entries("configs", _Tuned), entries("measurements", Measurement))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: an entry is incomplete ({type(error).__name__}: {error}); correct the file or remove it"
        ) from None


def _document(path: Path) -> dict[str, Any]:
    """The file's content; an absent file is an empty one, a broken one is an error."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        document = {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable table of tuned kernels ({error}); remove it") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path}: not a table of tuned kernels but a {type(document).__name__}; remove it")
    return {"configs": [], "measurements": []} | document


def _add(device: str, folder: Path | None, section: Section, entries: list[dict[str, Any]]) -> Path:
    path = file_for(device, user_folder() if folder is None else folder)
    document = _document(path)
    entries = [{**entry, "versions": _versions_of(section)} for entry in entries]
    by_identity = {_identity(entry): entry for entry in [*document[section], *entries]}
    document[section] = [by_identity[identity] for identity in sorted(by_identity)]
    _write(path, {"device": device, **document})
    _read.cache_clear()
    return path


def _identity(entry: Mapping[str, Any]) -> str:
    """All of an entry but what was found."""
    found = ("config", "seconds")
    return json.dumps({key: value for key, value in entry.items() if key not in found}, sort_keys=True)


def _write(path: Path, document: Mapping[str, Any]) -> None:
    """All or nothing: a reader sees the old file or the new one, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=path.name, suffix=".tmp", delete=False
    ) as file:
        try:
            json.dump(document, file, indent=1, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _build(cls: type[C], fields: Mapping[str, Any]) -> C:
    """A dataclass from JSON, with the dataclasses and tuples inside it."""
    hints = typing.get_type_hints(cls)

    def value(name: str, x: Any) -> Any:
        if isinstance(x, dict) and dataclasses.is_dataclass(hints.get(name)):
            return _build(hints[name], x)
        return tuple(x) if isinstance(x, list) else x

    return cls(**{name: value(name, x) for name, x in fields.items()})


def _distance(mine: Mapping[str, Any], measured: Mapping[str, Any], sizes: Sequence[str]) -> float | None:
    """How far a measured problem, which may differ in the fields `sizes`, is from this one; None if too far."""
    if mine.keys() != measured.keys():
        return None
    total = 0.0
    for name, x in mine.items():
        ratios = _log_ratios(x, measured[name])
        if (
            ratios is None
            or (ratios and name not in sizes)
            or any(abs(ratio) > math.log(NEAR) for ratio in ratios)
        ):
            return None
        total += sum(ratio**2 for ratio in ratios)
    return total


def _log_ratios(x: Any, y: Any) -> list[float] | None:
    """Log ratios of the sizes in a field; [] for equal words, None for what differs in kind.

    A size of 1 is a kind of its own: it is how a broadcast axis is written.
    """
    if type(x) is not type(y):
        return None
    if isinstance(x, list):
        each = [_log_ratios(a, b) for a, b in zip(x, y, strict=True)] if len(x) == len(y) else [None]
        return None if None in each else [ratio for ratios in each for ratio in ratios or []]
    if x == y:
        return []
    if type(x) is not int or min(x, y) <= 1:
        return None
    return [math.log(x / y)]
