"""Whether a result is right: the reference in higher precision, on the same device, in the same process."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxablate.bench.kernel_results import Error
from jaxablate.bench.problems import Problem
from jaxablate.bench.work import MATMULS

# What the difference may be, as a share of the oracle's root mean square. Rounding costs about 0.003 in
# bfloat16, 0.0005 in float16 and 4e-7 in float32; a wrong mask, scale or gate costs tenths. On a GPU jax
# multiplies float32 matrices in TF32 (10 bits, as float16) unless told otherwise; what has no matrix
# products has no such excuse.
LIMITS = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}
TF32_LIMIT = 2e-3
ROW = 8.0  # a single row's share, beside that of all: a row that is wrong is off by about 1
# A result whose terms cancel cannot be had to a share of itself. An entry may be off by this much whatever
# it is: float32 sums of terms of size 1, as the cases have them, are no better.
ABSOLUTE = 1e-6
# Also in such a result the reference, in the case's own type, errs too, and others may err a few times as
# much, up to a point: beyond `MOST` nothing is right. The reference itself is the oracle's code; a compiler
# can get it wrong, but not by a little.
OF_REFERENCE = 4.0
MOST = 0.05
REFERENCE_LIMIT = 0.1


def expected(problem: Problem, gradients: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Results and gradients of a problem, computed in float64 for float32 cases and in float32 for halves.

    Args:
      problem: with its arrays.
      gradients: of the results, by name.

    Returns:
      By the names that `named` gives them.
    """
    wide = jnp.float64 if problem.dtype == "float32" else jnp.float32

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(wide) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    @jax.jit
    def run(learned: Any, fixed: Any, gradients: Any) -> dict[str, jax.Array]:
        results, vjp = jax.vjp(lambda learned: problem.oracle(learned, fixed), widen(learned))
        cotangents = {name: g.astype(results[name].dtype) for name, g in gradients.items()}
        return named(results, vjp(cotangents)[0])

    with _float64(wide), jax.default_matmul_precision("highest"):
        return run(problem.learned, problem.fixed, gradients)


def named(results: Mapping[str, Any], gradients: Mapping[str, Any]) -> dict[str, jax.Array]:
    """`o`, `d q`, `d qk_norm.q_scale`: results and gradients by name."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(gradients))
    found = {f"d {jax.tree_util.keystr(path, simple=True, separator='.')}": leaf for path, leaf in leaves}
    return {**results, **found}


def errors(
    actual: Mapping[str, jax.Array],
    right: Mapping[str, jax.Array],
    *,
    op: str,
    dtype: str,
    platform: str,
    reference: Mapping[str, Error] | None,
) -> dict[str, Error]:
    """The error of each result, with what it may be.

    Args:
      actual: from the program to be judged.
      right: from `expected`; may have more than `actual`.
      op: the operation.
      dtype: of the case.
      platform: where `actual` was computed.
      reference: the errors of the reference implementation, empty if unknown; None for the reference itself.
    """
    rounded = dtype == "float32" and platform != "cpu" and op in MATMULS
    limit = TF32_LIMIT if rounded else LIMITS[dtype]
    found = {}
    for name, result in actual.items():
        with _float64(right[name].dtype):
            overall, worst_row = (float(x) for x in _distance(result, right[name], ABSOLUTE / limit))
        if reference is None:
            may_be = REFERENCE_LIMIT
        elif name in reference:
            own = reference[name]
            may_be = max(limit, min(MOST, OF_REFERENCE * max(own.overall, own.worst_row / ROW)))
        else:
            may_be = limit
        found[name] = Error(overall, worst_row, may_be)
    return found


def complaint(errors: Mapping[str, Error]) -> str | None:
    """In one line what is wrong; None if all is right. NaN is wrong."""
    wrong = [
        f"{name} is off by {error.overall:.2g} (may be {error.limit:.2g}), its worst row by {error.worst_row:.2g}"
        for name, error in errors.items()
        if not (error.overall <= error.limit and error.worst_row <= ROW * error.limit)
    ]
    return "; ".join(wrong) or None


@jax.jit
def _distance(actual: jax.Array, right: jax.Array, least: float) -> tuple[jax.Array, jax.Array]:
    """`Error.overall` and `Error.worst_row`, with entries of the oracle taken for at least `least`."""
    rows = right.reshape(-1, right.shape[-1] if right.ndim > 1 else 1)  # of a vector each entry is one
    apart = jnp.linalg.norm(actual.astype(right.dtype).reshape(rows.shape) - rows, axis=1)
    sizes = jnp.linalg.norm(rows, axis=1)
    typical = jnp.maximum(jnp.sqrt(jnp.mean(sizes**2)), least * rows.shape[1] ** 0.5)
    return jnp.sqrt(jnp.mean(apart**2)) / typical, jnp.max(apart / jnp.maximum(sizes, typical))


def _float64(dtype: Any) -> contextlib.AbstractContextManager[Any]:
    return jax.enable_x64(True) if dtype == jnp.float64 else contextlib.nullcontext()
