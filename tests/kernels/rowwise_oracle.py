"""Norms and gated products that share nothing with the kernels: numpy, float64, every intermediate by name.

Gradients follow the chain rule one operation at a time, back from the result; no formula is simplified.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from scipy import special

from jaxablate.xla import quick
from jaxablate_kernels import dispatch
from jaxablate_kernels.gated import cases as gated_cases
from jaxablate_kernels.gated import pallas_gpu as gated_pallas
from jaxablate_kernels.norm import cases as norm_cases
from jaxablate_kernels.norm import pallas_gpu as norm_pallas

# What runs on a CPU: implementation -> the module's own function.
NORMS: dict[str, Callable[..., Any]] = {
    "reference": dispatch.load("norm", "reference").call,
    "recompute": dispatch.load("norm", "recompute").call,
    "pallas": functools.partial(norm_pallas.norm, interpret=True),
}
GATES: dict[str, Callable[..., Any]] = {
    "reference": dispatch.load("gated", "reference").call,
    "recompute": dispatch.load("gated", "recompute").call,
    "pallas": functools.partial(gated_pallas.gated, interpret=True),
}

Results = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Expected:
    """What is right.

    Attributes:
        values: name -> array.
        sizes: name -> size of the terms that the largest entry is a sum of: rounding errors come with
            these, not with what is left of them.
    """

    values: Results
    sizes: dict[str, float]


def run_norm(
    case: norm_cases.Case, norm: Callable[..., Any], inputs: norm_cases.Inputs | None = None
) -> Results:
    """y, total and all gradients under one jit, of those that there are."""
    i = case.inputs() if inputs is None else inputs

    def call(x, residual, scale, bias):
        return norm(x, residual, scale, bias, kind=case.kind, eps=case.eps, eps_at=case.eps_at)

    def everything(i: dict[str, Any]):
        (y, total), pullback = jax.vjp(call, i["x"], i["residual"], i["scale"], i["bias"])
        dx, dresidual, dscale, dbias = pullback((i["dy"], i["dtotal"]))
        results = {"y": y, "total": total, "dx": dx, "dresidual": dresidual}
        return results | {"dscale": dscale, "dbias": dbias}

    arrays = {field.name: getattr(i, field.name) for field in dataclasses.fields(i)}
    return _compiled(everything, arrays)


def run_gated(case: gated_cases.Case, gated: Callable[..., Any]) -> Results:
    """The product and h's gradient under one jit."""

    def everything(i: dict[str, Any]):
        y, pullback = jax.vjp(functools.partial(gated, kind=case.kind), i["h"])
        return {"y": y, "dh": pullback(i["dy"])[0]}

    i = case.inputs()
    return _compiled(everything, {"h": i.h, "dy": i.dy})


def _compiled(f: Callable[..., Any], arrays: dict[str, Any]) -> Results:
    results = jax.jit(f).lower(arrays).compile(quick())(arrays)
    return {name: np.asarray(value) for name, value in results.items() if value is not None}


def norm_oracle(case: norm_cases.Case) -> Expected:
    """y, total and the gradients."""
    i = case.inputs()
    x, scale, dy = (np.asarray(a, np.float64) for a in (i.x, i.scale, i.dy))
    total = x
    if i.residual is not None:
        total = (x + np.asarray(i.residual, np.float64)).astype(i.x.dtype).astype(np.float64)

    mean = total.mean(axis=-1, keepdims=True) if case.kind == "layer" else 0.0
    centred = total - mean
    square = (centred**2).mean(axis=-1, keepdims=True)
    if case.eps_at == "inside":
        inverse = (square + case.eps) ** -0.5
        dinverse_dsquare = -0.5 * (square + case.eps) ** -1.5
    else:
        root = np.sqrt(np.maximum(square, 1e-30))
        inverse = 1 / (root + case.eps)
        dinverse_dsquare = np.where(square > 1e-30, -1 / (root + case.eps) ** 2 / (2 * root), 0.0)
    normed = centred * inverse
    y = normed * scale
    if i.bias is not None:
        y = y + np.asarray(i.bias, np.float64)

    dnormed = dy * scale
    dinverse = (dnormed * centred).sum(axis=-1, keepdims=True)
    dsquare = dinverse * dinverse_dsquare
    dcentred = dnormed * inverse + dsquare * 2 * centred / case.dim
    dtotal = dcentred - dcentred.mean(axis=-1, keepdims=True) if case.kind == "layer" else dcentred
    terms = np.abs(dnormed * inverse).max()
    values, sizes = {"y": y}, {"y": np.abs(y).max()}
    if i.dtotal is not None:
        dtotal = dtotal + np.asarray(i.dtotal, np.float64)
        terms = terms + np.abs(np.asarray(i.dtotal, np.float64)).max()
        values["total"], sizes["total"] = total, np.abs(total).max()
        values["dresidual"], sizes["dresidual"] = dtotal, terms
    values["dx"], sizes["dx"] = dtotal, terms

    weights = {"dscale": dy * normed} | ({} if i.bias is None else {"dbias": dy})
    for name, shares in weights.items():
        shares = shares.reshape(-1, case.dim)
        values[name], sizes[name] = shares.sum(axis=0), np.sqrt((shares**2).sum(axis=0)).max()
    return Expected(values, {name: float(size) for name, size in sizes.items()})


def gated_oracle(case: gated_cases.Case) -> Expected:
    """The product and h's gradient."""
    i = case.inputs()
    h, dy = np.asarray(i.h, np.float64), np.asarray(i.dy, np.float64)
    first, second = h[..., 0, :], h[..., 1, :]
    if case.kind == "geglu":
        activation = second * special.ndtr(second)
        slope = special.ndtr(second) + second * np.exp(-(second**2) / 2) / np.sqrt(2 * np.pi)
        y, dh = first * activation, np.stack([dy * activation, dy * first * slope], axis=-2)
    else:
        gate = special.expit(first)
        activation, slope = first * gate, gate + first * gate * special.expit(-first)
        y, dh = activation * second, np.stack([dy * second * slope, dy * activation], axis=-2)
    return Expected({"y": y, "dh": dh}, {"y": float(np.abs(y).max()), "dh": float(np.abs(dh).max())})


def differences(actual: Results, expected: Expected, tolerance: float = 1e-5) -> dict[str, float]:
    """Where a result is off by more than the tolerance, as a share of its size: name -> error in tolerances.

    What is missing or too much differs by infinity, and so does a NaN.
    """
    found = dict.fromkeys(actual.keys() ^ expected.values.keys(), float("inf"))
    for name in actual.keys() & expected.values.keys():
        a, e = np.asarray(actual[name], np.float64), expected.values[name]
        assert a.shape == e.shape, (name, a.shape, e.shape)
        error, limit = np.abs(a - e).max(), tolerance * expected.sizes[name]
        if not error <= limit:
            found[name] = float(error / limit) if error == error and limit > 0 else float("inf")
    return found


def worse_than(
    actual: Results, reference: Results, expected: Expected, factor: float = 1.5
) -> dict[str, float]:
    """Where the root mean square error is more than `factor` times the reference's: name -> ratio.

    For results of low precision, where it is the rounding that counts.
    """

    def rms_error(results: Results, name: str) -> float:
        return float(np.sqrt(np.mean((np.asarray(results[name], np.float64) - expected.values[name]) ** 2)))

    low = [name for name, value in reference.items() if value.dtype.itemsize < 4]
    ratios = {name: rms_error(actual, name) / max(rms_error(reference, name), 1e-30) for name in low}
    return {name: ratio for name, ratio in ratios.items() if not ratio <= factor}
