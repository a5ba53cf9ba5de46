"""An attention that shares nothing with the kernels: numpy, float64, one head at a time; and how to compare.

The gradients come from the softmax's Jacobian, dS = P * (dP - sum(P * dP)), with the sum over P and dP
themselves, not the rowsum(do * o) that the blockwise backward uses.  Rotary positions are products of complex
numbers, and so are their gradients, with the conjugate.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxablate.xla import quick
from jaxablate_kernels import attention
from jaxablate_kernels.attention.cases import Case, Inputs
from jaxablate_kernels.dispatch import takers

NAMES = ("o", "dq", "dk", "dv", "dbias", "dq_scale", "dk_scale")


@dataclasses.dataclass(frozen=True)
class Results:
    """The output of an attention and its gradients; None without bias or QK-norm."""

    o: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dbias: np.ndarray | None = None
    dq_scale: np.ndarray | None = None
    dk_scale: np.ndarray | None = None

    def items(self):
        """Pairs of name and array, of those that are there."""
        return [(name, x) for name in NAMES if (x := getattr(self, name)) is not None]


def on_cpu(case: Case) -> tuple[str, ...]:
    """The implementations that take the case on a CPU, the reference first."""
    return takers("attention", case.spec, "cpu")


def run(case: Case, impl, inputs: Inputs | None = None, fast_compile: bool = True) -> Results:
    """Value and all gradients under one jit.

    Args:
        case: what to compute.
        impl: an implementation's name, or a function with the signature of `attention` less `impl`.
        inputs: other than the case's own.
        fast_compile: False to compile as users do.
    """
    x = case.inputs() if inputs is None else inputs

    def call(q, k, v, bias, qk_norm):
        arguments = {**case.keywords(x), "bias": bias, "qk_norm": qk_norm}
        if callable(impl):
            return impl(q, k, v, **arguments)
        return attention(q, k, v, impl=impl, **arguments)

    def value_and_gradients(do, *differentiated):
        o, pullback = jax.vjp(call, *differentiated)
        return o, *pullback(do)

    arguments = (x.do, x.q, x.k, x.v, x.bias, x.qk_norm)
    lowered = jax.jit(value_and_gradients).lower(*arguments)
    options = quick() if fast_compile else {}
    *arrays, dnorm = lowered.compile(options)(*arguments)
    scales = () if dnorm is None else (dnorm.q_scale, dnorm.k_scale)
    return Results(*(None if array is None else np.asarray(array) for array in (*arrays, *scales)))


def oracle(case: Case, inputs: Inputs | None = None) -> Results:
    """The same in float64."""
    x = case.inputs() if inputs is None else inputs
    v, do = (np.asarray(a, np.float64) for a in (x.v, x.do))
    q, q_pullback = prepared(x, "q")
    k, k_pullback = prepared(x, "k")
    full = (case.batch, case.heads, case.q_len, case.kv_len)
    bias = np.zeros((1, 1, 1, 1)) if x.bias is None else np.asarray(x.bias, np.float64)
    bias_full = np.broadcast_to(bias, full)
    allowed = allowed_keys(case, x)

    o, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    ds_full = np.zeros(full)
    group = case.heads // case.kv_heads
    for b in range(case.batch):
        for h in range(case.heads):
            keys, values = k[b, :, h // group], v[b, :, h // group]
            scores, slope = capped(case.scale * (q[b, :, h] @ keys.T), case.softcap)
            logits = scores + bias_full[b, h]
            weights = np.where(allowed[b], np.exp(logits - logits.max(axis=1, keepdims=True)), 0.0)
            total = weights.sum(axis=1, keepdims=True)
            p = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
            dp = do[b, :, h] @ values.T
            ds = p * (dp - (p * dp).sum(axis=1, keepdims=True))
            o[b, :, h] = p @ values
            dq[b, :, h] = case.scale * (ds * slope) @ keys
            dk[b, :, h // group] += case.scale * (ds * slope).T @ q[b, :, h]
            dv[b, :, h // group] += p.T @ do[b, :, h]
            ds_full[b, h] = ds
    shared = tuple(axis for axis in range(4) if bias.shape[axis] == 1)
    dbias = None if x.bias is None else ds_full.sum(axis=shared, keepdims=True)
    (dq, dq_scale), (dk, dk_scale) = q_pullback(dq), k_pullback(dk)
    return Results(o, dq, dk, dv, dbias, dq_scale, dk_scale)


def capped(products: np.ndarray, softcap: float | None) -> tuple[np.ndarray, np.ndarray]:
    """The logits before bias and masks, and their derivative by the products."""
    if softcap is None:
        return products, np.ones_like(products)
    return softcap * np.tanh(products / softcap), np.cosh(products / softcap) ** -2.0


def prepared(x: Inputs, name: str) -> tuple[np.ndarray, Callable[[np.ndarray], tuple[np.ndarray, Any]]]:
    """Queries (name ``q``) or keys (``k``) after QK-norm and rotary positions, and how gradients go back.

    The pullback returns the gradient of the array and, if there is a QK-norm, of its scale.
    """
    y = np.asarray(getattr(x, name), np.float64)
    turn = turning(x, name)
    if x.qk_norm is None:
        return turn(y, +1), lambda dy: (turn(dy, -1), None)

    scale = np.asarray(getattr(x.qk_norm, f"{name}_scale"), np.float64)
    eps = x.qk_norm.eps
    if x.qk_norm.kind == "l2":
        length = np.maximum(np.linalg.norm(y, axis=-1, keepdims=True), eps)
        share = np.sum
    else:
        length = np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + eps)
        share = np.mean
    normal = y / length

    def pullback(dy):
        dnormal = turn(dy, -1)
        dscale = np.sum(dnormal * normal, axis=(0, 1, 2))
        dnormal = dnormal * scale
        return (dnormal - normal * share(normal * dnormal, axis=-1, keepdims=True)) / length, dscale

    return turn(normal * scale, +1), pullback


def turning(x: Inputs, name: str) -> Callable[[np.ndarray, int], np.ndarray]:
    """A function of (y, +1 or -1) that turns pairs of features forwards or backwards."""
    if x.rotary is None:
        return lambda y, sign: y
    cos, sin = (np.asarray(table, np.float64) for table in getattr(x.rotary, name))
    angle = cos + 1j * sin
    angle = angle[:, :, None, :] if angle.ndim == 3 else angle[None, :, None, :]
    half = angle.shape[-1]
    first = np.arange(0, 2 * half, 2) if x.rotary.pairing == "adjacent" else np.arange(half)
    second = first + (1 if x.rotary.pairing == "adjacent" else half)

    def turn(y, sign):
        z = (y[..., first] + 1j * y[..., second]) * (angle if sign > 0 else angle.conj())
        turned = np.empty_like(y)
        turned[..., first], turned[..., second] = z.real, z.imag
        return turned

    return turn


def allowed_keys(case: Case, x: Inputs) -> np.ndarray:
    """bool (B, T, S): which key each query may see, by the words of the specification."""
    allowed = np.ones((case.batch, case.q_len, case.kv_len), bool)
    if x.kv_mask is not None:
        allowed &= np.asarray(x.kv_mask)[:, None, :]
    if x.segment_ids is not None:
        allowed &= np.asarray(x.segment_ids.q)[:, :, None] == np.asarray(x.segment_ids.kv)[:, None, :]
    if case.causal:
        # Bottom right: the last query sees the last key.
        allowed &= np.tri(case.q_len, case.kv_len, k=case.kv_len - case.q_len, dtype=bool)
    return allowed


def differences(actual: Results, expected: Results, tolerance: float = 1e-5) -> dict[str, float]:
    """Where two results differ by more than the tolerance: name -> error in units of the tolerance.

    The tolerance is a share of the largest expected entry, at least of 1, the size of the inputs: a
    rounding error comes with the size of the terms, not with that of their sum (the gradient of a bias
    that all keys share is exactly zero, and its terms are not).  It also grows with the root of the
    number of terms beyond 1000 in the longest sum.
    """
    found = {}
    for (name, a), (_, e) in zip(actual.items(), expected.items(), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape, (name, a.shape, e.shape)
        terms = longest_sum(name, expected)
        limit = tolerance * max(1.0, np.abs(e).max()) * max(1.0, terms / 1000) ** 0.5
        error = np.abs(a - e).max()
        if not error <= limit:  # a NaN is a difference
            found[name] = float(error / limit)
    return found


def longest_sum(name: str, r: Results) -> int:
    """The number of terms in the longest sum on the way to a result."""
    batch, q_len, heads, _ = r.o.shape
    kv_len = r.dk.shape[1]
    added = {"dbias": batch * heads * q_len * kv_len, "dq_scale": r.dq.size, "dk_scale": r.dk.size}
    return max(q_len, kv_len, added.get(name, 0) // getattr(r, name).size)


def rms_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference, in float64."""
    return float(np.sqrt(np.mean((np.asarray(actual, np.float64) - expected) ** 2)))


def cast(inputs: Inputs, dtype) -> Inputs:
    """The inputs in another floating type; masks, ids and rotary tables stay."""
    names = ("q", "k", "v", "do", "bias", "qk_norm")
    changed = {name: jax.tree.map(lambda x: x.astype(dtype), getattr(inputs, name)) for name in names}
    return dataclasses.replace(inputs, **changed)
