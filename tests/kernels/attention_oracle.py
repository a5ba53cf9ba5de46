"""An attention that shares nothing with the kernels: numpy, float64, one head at a time; and how to compare.

The gradients come from the softmax's Jacobian, dS = P * (dP - sum(P * dP)), with the sum over P and dP
themselves, not the rowsum(do * o) that the blockwise backward uses.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxablate_kernels import attention
from jaxablate_kernels.attention.cases import Case, Inputs

# For programs that run once: the same operations, compiled in half the time.
FAST_COMPILE: Any = {"xla_backend_optimization_level": 0}

NAMES = ("o", "dq", "dk", "dv", "dbias")


@dataclasses.dataclass(frozen=True)
class Results:
    """The output of an attention and its gradients; dbias is None without bias."""

    o: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dbias: np.ndarray | None

    def items(self):
        """Pairs of name and array, of those that are there."""
        return [(name, x) for name in NAMES if (x := getattr(self, name)) is not None]


def run(case: Case, impl, inputs: Inputs | None = None, fast_compile: bool = True) -> Results:
    """Value and all gradients under one jit.

    Args:
        case: what to compute.
        impl: an implementation's name, or a function with the signature of `attention` less `impl`.
        inputs: other than the case's own.
        fast_compile: see FAST_COMPILE; False to compile as users do.
    """
    x = case.inputs() if inputs is None else inputs

    def call(q, k, v, bias):
        arguments = {"causal": case.causal, "kv_mask": x.kv_mask, "bias": bias, "scale": case.scale}
        if callable(impl):
            return impl(q, k, v, **arguments)
        return attention(q, k, v, impl=impl, **arguments)

    def value_and_gradients(q, k, v, bias, do):
        o, pullback = jax.vjp(call, q, k, v, bias)
        return o, *pullback(do)

    arguments = (x.q, x.k, x.v, x.bias, x.do)
    lowered = jax.jit(value_and_gradients).lower(*arguments)
    options = FAST_COMPILE if fast_compile else {}
    o, dq, dk, dv, dbias = lowered.compile(options)(*arguments)
    return Results(*map(np.asarray, (o, dq, dk, dv)), dbias=None if dbias is None else np.asarray(dbias))


def oracle(case: Case, inputs: Inputs | None = None) -> Results:
    """The same in float64."""
    x = case.inputs() if inputs is None else inputs
    q, k, v, do = (np.asarray(a, np.float64) for a in (x.q, x.k, x.v, x.do))
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
            logits = case.scale * (q[b, :, h] @ keys.T) + bias_full[b, h]
            weights = np.where(allowed[b], np.exp(logits - logits.max(axis=1, keepdims=True)), 0.0)
            total = weights.sum(axis=1, keepdims=True)
            p = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
            dp = do[b, :, h] @ values.T
            ds = p * (dp - (p * dp).sum(axis=1, keepdims=True))
            o[b, :, h] = p @ values
            dq[b, :, h] = case.scale * ds @ keys
            dk[b, :, h // group] += case.scale * ds.T @ q[b, :, h]
            dv[b, :, h // group] += p.T @ do[b, :, h]
            ds_full[b, h] = ds
    shared = tuple(axis for axis in range(4) if bias.shape[axis] == 1)
    dbias = None if x.bias is None else ds_full.sum(axis=shared, keepdims=True)
    return Results(o, dq, dk, dv, dbias)


def allowed_keys(case: Case, x: Inputs) -> np.ndarray:
    """bool (B, T, S): which key each query may see, by the words of the specification."""
    allowed = np.ones((case.batch, case.q_len, case.kv_len), bool)
    if x.kv_mask is not None:
        allowed &= np.asarray(x.kv_mask)[:, None, :]
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
    terms = max(expected.o.shape[1], expected.dk.shape[1])
    if expected.dbias is not None:
        full = expected.o.shape[0] * expected.o.shape[2] * expected.o.shape[1] * expected.dk.shape[1]
        terms = max(terms, full // expected.dbias.size)
    for (name, a), (_, e) in zip(actual.items(), expected.items(), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape, (name, a.shape, e.shape)
        limit = tolerance * max(1.0, np.abs(e).max()) * max(1.0, terms / 1000) ** 0.5
        error = np.abs(a - e).max()
        if not error <= limit:  # a NaN is a difference
            found[name] = float(error / limit)
    return found


def rms_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference, in float64."""
    return float(np.sqrt(np.mean((np.asarray(actual, np.float64) - expected) ** 2)))


def cast(inputs: Inputs, dtype) -> Inputs:
    """The inputs in another floating type; the mask stays."""

    def one(x) -> Any:
        return x if x is None or x.dtype == jnp.bool_ else x.astype(dtype)

    return Inputs(**{f.name: one(getattr(inputs, f.name)) for f in dataclasses.fields(inputs)})
