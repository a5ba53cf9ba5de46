"""Names -> implementations, per operation.  A name runs or raises; nothing falls back.

Three kinds of name are accepted wherever an implementation is chosen:

* an *implementation* (``reference``, ``blockwise``) means exactly that code, on every platform;
* an *algorithm* (``flash``: online softmax, no T x S matrix) means the implementation which carries
  it on the platform at hand, by the table `_ALGORITHMS`.  A new kernel is one line there;
* ``auto`` means one implementation per problem and device: the fastest that was measured there on the
  nearest problem, see `tuning.fastest`, else the first of `_AUTO_ORDER` that takes it.  `resolve` says
  which; what was resolved then runs or raises like any other name.

Each implementation is a module with a constant ``IMPLEMENTATION``, imported on first use, so a
backend whose extras are not installed costs nothing until it is asked for.  Its kernel name is the
name of an inner function under ``jax.jit``: it shows in the jaxpr and in the lowered text of every
program that uses it, which is how `kernels_in` and the ablation linter know what really runs.  The
backward pass shows the same name or the name with ``_backward`` behind it.

Every implementation must be deterministic to the bit: the same program on the same inputs gives the
same bits each time, in value and gradient.  So: no atomics, no scatter-add, reductions in an order
fixed by the shapes and the configuration (see `tuning.used_configs`).  Frozen cohort members and resumed
runs are compared bit for bit.  Of the adapters to other libraries ``cudnn`` needs an XLA flag for that, and
``tokamax`` does not promise it; their modules say so.
"""

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from jaxablate_kernels import tuning
from jaxablate_kernels.devices import PLATFORM_ALIASES, target
from jaxablate_kernels.errors import KernelUnsupported, PackageMissing

AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class Implementation:
    """What an implementation's module offers.

    Attributes:
        op: the operation it implements.
        name: its name in the table.
        kernel_name: the name that shows in jaxpr and lowered text.
        supports: ``(spec, platform) -> None`` if it can run the problem, else the reason in one line,
            naming the argument and what is supported.  `spec` is the operation's own description of
            a problem (for attention `attention.spec.AttentionSpec`): shapes and types, no arrays.
        call: the operation itself; its arguments are the operation's, already validated.
        candidates: for an implementation with a frozen ``Config``: ``(spec, device) -> configs`` that are
            worth timing for a problem, the heuristic's own choice first; `call` then also takes ``config=``.
    """

    op: str
    name: str
    kernel_name: str
    supports: Callable[[Any, str], str | None]
    call: Callable[..., Any]
    candidates: Callable[[Any, str], tuple[Any, ...]] | None = None


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Which code a requested name stands for; printed at start and recorded with the run.

    Attributes:
        op: the operation.
        requested: the name in the config, an implementation or an algorithm.
        name: the implementation.
        kernel_name: what to look for in the program, see `kernels_in`.
    """

    op: str
    requested: str
    name: str
    kernel_name: str


# op -> implementation -> its module in the op's folder.  The first of an op is its reference, the oracle
# of the others.  The kernel name is `<op>_<implementation>`.
_IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "attention": {
        "reference": "reference",
        "blockwise": "blockwise",
        "pallas": "pallas_gpu",
        "cudnn": "cudnn",
        "tokamax": "tokamax",
    },
    "norm": {
        "reference": "reference",
        "recompute": "recompute",
        "pallas": "pallas_gpu",
        "triton": "triton",
        "tokamax": "tokamax",
    },
    "gated": {
        "reference": "reference",
        "recompute": "recompute",
        "pallas": "pallas_gpu",
    },
    "cross_entropy": {
        "reference": "reference",
        "chunked": "chunked",
    },
}

# op -> algorithm -> platform -> implementation.
_ALGORITHMS: dict[str, dict[str, dict[str, str]]] = {
    "attention": {
        "flash": {"cpu": "blockwise", "gpu": "pallas", "tpu": "blockwise"},
    },
    "norm": {
        "fused": {"cpu": "recompute", "gpu": "pallas", "tpu": "recompute"},
    },
    "gated": {
        "fused": {"cpu": "recompute", "gpu": "pallas", "tpu": "recompute"},
    },
}

# platform -> what `auto` tries where nothing was measured, among the implementations that the op has.
_AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("blockwise", "recompute", "chunked", "reference"),
    "gpu": ("pallas", "cudnn", "blockwise", "recompute", "chunked", "reference"),
    "tpu": ("blockwise", "recompute", "chunked", "reference"),
}

# Python package -> how pip calls it, of those that an implementation may need beyond jax.
_EXTRAS = {"tokamax": "tokamax", "jax_triton": "jax-triton"}

_BACKWARD = "_backward"


def operations() -> tuple[str, ...]:
    """The operations that have implementations."""
    return tuple(_IMPLEMENTATIONS)


def implementations(op: str) -> tuple[str, ...]:
    """The implementations of `op`, its reference first.

    Raises:
        ValueError: `op` is not an operation.
    """
    return tuple(_entries(op))


def algorithms(op: str) -> tuple[str, ...]:
    """The algorithm names of `op`, which stand for one implementation per platform.

    Raises:
        ValueError: `op` is not an operation.
    """
    _entries(op)
    return tuple(_ALGORITHMS.get(op, {}))


def resolve(
    op: str, name: str, platform: str, *, spec: Any | None = None, device: str | None = None
) -> Resolved:
    """Say which implementation of `op` the name stands for on a platform.

    Args:
        op: an operation, such as ``attention``.
        name: an implementation, which stands for itself, an algorithm, or ``auto``.
        platform: ``cpu``, ``gpu`` (or ``cuda``, ``rocm``) or ``tpu``; implementations do not depend on it.
        spec: the operation's description of the problem, see `Implementation.supports`; for ``auto``.
        device: the `jax.Device.device_kind` that the problem will run on; for ``auto``.

    Raises:
        ValueError: the operation, the name or the platform is unknown (the message gives the nearest
            valid names), or ``auto`` was asked without spec or device.
        KernelUnsupported: ``auto``, and nothing takes the problem.
    """
    entries, by_algorithm = _entries(op), _ALGORITHMS.get(op, {})
    if name in entries:
        chosen = name
    elif name in by_algorithm:
        chosen = _on_platform(by_algorithm[name], platform, f"platform for {op} {name!r}")
    elif name == AUTO:
        if spec is None or device is None:
            raise ValueError(
                f"{op} implementation 'auto' chooses per problem and cannot stand in a config that must name "
                f"its kernels; name one of {', '.join((*entries, *by_algorithm))} (or, in code, give spec= and device=)"
            )
        chosen = _auto(op, platform, spec, device)
    else:
        raise ValueError(_unknown(f"{op} implementation", name, (*entries, *by_algorithm, AUTO)))
    return Resolved(op, name, chosen, kernel_name(op, chosen))


def load(op: str, name: str) -> Implementation:
    """Import an implementation by its own name (not an algorithm's).

    Raises:
        ValueError: unknown operation or implementation.
        PackageMissing: its module needs a package that is not installed; the message says which.
    """
    entries = _entries(op)
    if name not in entries:
        raise ValueError(_unknown(f"{op} implementation", name, tuple(entries)))
    try:
        return importlib.import_module(f"jaxablate_kernels.{op}.{entries[name]}").IMPLEMENTATION
    except ModuleNotFoundError as error:
        package = _EXTRAS.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        raise PackageMissing(
            f"{op} implementation {name!r} needs a package that is not installed: pip install {package}",
            name=error.name,
        ) from error


def choose(op: str, name: str, spec: Any) -> Implementation:
    """`resolve` and `require` for `devices.target()`: what an operation's function does with its `impl`.

    Raises:
        ValueError, KernelUnsupported, PackageMissing: as those two.
    """
    platform, device = target()
    resolved = resolve(op, name, platform, spec=spec, device=device)
    return require(resolved, spec, platform)


def kernel_name(op: str, name: str) -> str:
    """The name by which an implementation shows in a program."""
    return f"{op}_{name}"


def require(resolved: Resolved, spec: Any, platform: str) -> Implementation:
    """Return the resolved implementation if it can run the problem.

    Args:
        resolved: from `resolve`.
        spec: the operation's description of the problem, see `Implementation.supports`.
        platform: where it will run.

    Raises:
        KernelUnsupported: it cannot; the message says why and which other implementation could.
    """
    platform = PLATFORM_ALIASES.get(platform, platform)
    implementation = load(resolved.op, resolved.name)
    reason = implementation.supports(spec, platform)
    if reason is None:
        return implementation
    raise KernelUnsupported(resolved.op, resolved.name, reason, takers(resolved.op, spec, platform))


def takers(op: str, spec: Any, platform: str) -> tuple[str, ...]:
    """The implementations of `op` that are installed and can run the problem, in the table's order."""
    platform = PLATFORM_ALIASES.get(platform, platform)
    return tuple(name for name in implementations(op) if _takes(op, name, spec, platform))


def kernel_names() -> frozenset[str]:
    """All names that `kernels_in` looks for: each kernel's, and the one of its backward pass."""
    forward = {kernel_name(op, name) for op, entries in _IMPLEMENTATIONS.items() for name in entries}
    return frozenset(forward | {name + _BACKWARD for name in forward})


def kernels_in(jaxpr: Any) -> set[str]:
    """The names of the kernels a program uses, however deep: under jit, scan, remat, vmap, shard_map, grad.

    Args:
        jaxpr: a jaxpr, closed or not, such as ``jax.make_jaxpr(step)(params, batch)``.

    Returns:
        The subset of `kernel_names()` that occurs.  An arm declares a kernel by
        `Resolved.kernel_name`; a gradient may add the same name with ``_backward``.
    """
    known = kernel_names()
    return {name for eqn in equations(jaxpr) if (name := _equation_name(eqn)) in known}


def equations(jaxpr: Any) -> Iterator[Any]:
    """Each equation of a jaxpr and of all jaxprs inside it, each jaxpr visited once.

    Jaxprs are recognised by having ``eqns``: what else they are (open, closed, or both, since jax
    0.12) has changed between versions.

    Raises:
        TypeError: the argument is not a jaxpr.
    """
    if not hasattr(jaxpr, "eqns"):
        raise TypeError(f"expected a jaxpr, as from jax.make_jaxpr(f)(...), got {type(jaxpr).__name__}")
    pending, seen = [jaxpr], set()
    while pending:
        current = pending.pop()
        # A function that is called twice is one jaxpr object at two places.  `pending` and the caller's
        # jaxpr keep them alive, so an id stays the id of one object.
        if id(current) in seen:
            continue
        seen.add(id(current))
        for eqn in current.eqns:
            yield eqn
            for parameter in eqn.params.values():
                pending.extend(_jaxprs(parameter))


def _jaxprs(parameter: Any) -> Iterator[Any]:
    if hasattr(parameter, "eqns"):
        yield parameter
    elif isinstance(parameter, tuple | list):  # the branches of a cond
        for item in parameter:
            yield from _jaxprs(item)
    elif isinstance(parameter, dict):
        for item in parameter.values():
            yield from _jaxprs(item)


def _equation_name(eqn: Any) -> str | None:
    name = eqn.params.get("name")
    return name if isinstance(name, str) else None


def _auto(op: str, platform: str, spec: Any, device: str) -> str:
    """The first that takes the problem, of those measured, fastest first, and then of the platform's order."""
    order = _on_platform(_AUTO_ORDER, platform, f"platform for {op} {AUTO!r}")
    names = (*tuning.fastest(op, spec, device), *order)
    platform = PLATFORM_ALIASES.get(platform, platform)
    for name in names:
        if name in _entries(op) and _takes(op, name, spec, platform):
            return name
    # The reference refuses least, so its reason is the one that no choice of a name gets round.
    reference = next(iter(_entries(op)))
    reason = (
        load(op, reference).supports(spec, platform) or f"{reference!r} is not in the order of {platform}"
    )
    raise KernelUnsupported(op, AUTO, reason, ())


def _on_platform(table: dict[str, Any], platform: str, what: str) -> Any:
    platform = PLATFORM_ALIASES.get(platform, platform)
    if platform not in table:
        raise ValueError(_unknown(what, platform, tuple(table)))
    return table[platform]


def _takes(op: str, name: str, spec: Any, platform: str) -> bool:
    try:
        return load(op, name).supports(spec, platform) is None
    except PackageMissing:
        return False


def _entries(op: str) -> dict[str, str]:
    if op not in _IMPLEMENTATIONS:
        raise ValueError(_unknown("operation", op, tuple(_IMPLEMENTATIONS)))
    return _IMPLEMENTATIONS[op]


def _unknown(what: str, name: str, valid: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, valid, n=2, cutoff=0.5)
    guess = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return f"unknown {what} {name!r}{guess} (valid: {', '.join(valid)})"
