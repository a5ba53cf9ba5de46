"""Names -> implementations, per operation.  A name runs or raises; nothing falls back.

Two kinds of name are accepted wherever an implementation is chosen:

* an *implementation* (``reference``, ``blockwise``) means exactly that code, on every platform;
* an *algorithm* (``flash``: online softmax, no T x S matrix) means the implementation which carries
  it on the platform at hand, by the table `_ALGORITHMS`.  A new kernel is one line there.

Each implementation is a module with a constant ``IMPLEMENTATION``, imported on first use, so a
backend whose extras are not installed costs nothing until it is asked for.  Its kernel name is the
name of an inner function under ``jax.jit``: it shows in the jaxpr and in the lowered text of every
program that uses it, which is how `kernels_in` and the ablation linter know what really runs.  The
backward pass shows the same name or the name with ``_backward`` behind it.

Every implementation must be deterministic to the bit: the same program on the same inputs gives the
same bits each time, in value and gradient.  So: no atomics, no scatter-add, reductions in an order
fixed by the shapes.  Frozen cohort members and resumed runs are compared bit for bit.
"""

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from jaxablate_kernels.errors import KernelUnsupported


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
    """

    op: str
    name: str
    kernel_name: str
    supports: Callable[[Any, str], str | None]
    call: Callable[..., Any]


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


@dataclasses.dataclass(frozen=True)
class _Entry:
    module: str
    kernel_name: str


# op -> implementation -> where it lives.  The first of an op is its reference, the oracle of the others.
_IMPLEMENTATIONS: dict[str, dict[str, _Entry]] = {
    "attention": {
        "reference": _Entry("jaxablate_kernels.attention.reference", "attention_reference"),
        "blockwise": _Entry("jaxablate_kernels.attention.blockwise", "attention_blockwise"),
    },
}

# op -> algorithm -> platform -> implementation.
_ALGORITHMS: dict[str, dict[str, dict[str, str]]] = {
    "attention": {
        "flash": {"cpu": "blockwise", "gpu": "blockwise", "tpu": "blockwise"},
    },
}

# The names JAX uses for the same thing in other places (`lowering_platforms`, `Device.platform`).
_PLATFORM_ALIASES = {"cuda": "gpu", "rocm": "gpu"}

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


def resolve(op: str, name: str, platform: str) -> Resolved:
    """Say which implementation of `op` the name stands for on a platform.

    Args:
        op: an operation, such as ``attention``.
        name: an implementation, which stands for itself, or an algorithm.
        platform: ``cpu``, ``gpu`` (or ``cuda``, ``rocm``) or ``tpu``; only algorithms depend on it.

    Raises:
        ValueError: the operation or the name is unknown, or no implementation carries the algorithm on
            this platform.  The message gives the nearest valid names.
    """
    entries = _entries(op)
    if name in entries:
        return Resolved(op, name, name, entries[name].kernel_name)
    by_platform = _ALGORITHMS.get(op, {}).get(name)
    if by_platform is None:
        raise ValueError(_unknown(f"{op} implementation", name, (*entries, *_ALGORITHMS.get(op, {}))))
    platform = _PLATFORM_ALIASES.get(platform, platform)
    if platform not in by_platform:
        raise ValueError(_unknown(f"platform for {op} {name!r}", platform, tuple(by_platform)))
    chosen = by_platform[platform]
    return Resolved(op, name, chosen, entries[chosen].kernel_name)


def load(op: str, name: str) -> Implementation:
    """Import an implementation by its own name (not an algorithm's).

    Raises:
        ValueError: unknown operation or implementation.
        ImportError: its module needs a package that is not installed.
    """
    entries = _entries(op)
    if name not in entries:
        raise ValueError(_unknown(f"{op} implementation", name, tuple(entries)))
    return importlib.import_module(entries[name].module).IMPLEMENTATION


def require(resolved: Resolved, spec: Any, platform: str) -> Implementation:
    """Return the resolved implementation if it can run the problem.

    Args:
        resolved: from `resolve`.
        spec: the operation's description of the problem, see `Implementation.supports`.
        platform: where it will run.

    Raises:
        KernelUnsupported: it cannot; the message says why and which other implementation could.
    """
    platform = _PLATFORM_ALIASES.get(platform, platform)
    implementation = load(resolved.op, resolved.name)
    reason = implementation.supports(spec, platform)
    if reason is None:
        return implementation
    others = (name for name in implementations(resolved.op) if name != resolved.name)
    takers = tuple(name for name in others if _takes(resolved.op, name, spec, platform))
    raise KernelUnsupported(resolved.op, resolved.name, reason, takers)


def kernel_names() -> frozenset[str]:
    """All names that `kernels_in` looks for: each kernel's, and the one of its backward pass."""
    forward = {entry.kernel_name for entries in _IMPLEMENTATIONS.values() for entry in entries.values()}
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


def _takes(op: str, name: str, spec: Any, platform: str) -> bool:
    try:
        return load(op, name).supports(spec, platform) is None
    except ImportError:  # its extra is not installed: no advice to give here
        return False


def _entries(op: str) -> dict[str, _Entry]:
    if op not in _IMPLEMENTATIONS:
        raise ValueError(_unknown("operation", op, tuple(_IMPLEMENTATIONS)))
    return _IMPLEMENTATIONS[op]


def _unknown(what: str, name: str, valid: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, valid, n=2, cutoff=0.5)
    guess = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return f"unknown {what} {name!r}{guess} (valid: {', '.join(valid)})"
