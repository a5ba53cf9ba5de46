"""The cases of every operation as problems of one form: arrays, a function of them, and its useful work.

The cases themselves are those of `jaxablate_kernels/<op>/cases.py`, which the tests read too.
"""

from __future__ import annotations

import dataclasses
import importlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxablate.bench import work
from jaxablate_kernels import dispatch
from jaxablate_kernels.attention.spec import AttentionSpec
from jaxablate_kernels.cross_entropy.spec import CrossEntropySpec, Static

Group = Literal["paper", "library", "small"]
# The names of the tuples in a `cases.py`. All but the first two are for GPUs.
_GROUPS: dict[str, Group] = {
    "PAPER": "paper",
    "SMALL": "small",
    "LIBRARY": "library",
    "LARGE": "library",
    "LONG": "library",
}
Arrays = Mapping[str, Any]  # by argument; None for one that the case does not have
Call = Callable[..., Any]  # `Implementation.call`


@dataclass(frozen=True)
class Problem:
    """One case of an operation, at the size and type that are timed.

    Attributes:
      op, name: the operation and its case.
      group: `paper`: a shape of the studies; `library`: a large one, such as libraries are tuned for;
        `small`: an awkward one, for tests.
      shape: in a few words.
      dtype: of the main arguments.
      spec: the operation's own description, which `Implementation.supports` and the tuned tables go by.
      learned: the arguments with a gradient.
      fixed: those without.
      options: the arguments that are constants of the program.
      apply: (call, learned, fixed) -> results by name.
      oracle: (learned, fixed) -> results by name, in any precision and in little memory.
      passes: the useful work.
    """

    op: str
    name: str
    group: Group
    shape: str
    dtype: str
    spec: Any
    learned: Arrays
    fixed: Arrays
    options: Mapping[str, Any]
    apply: Callable[[Call, Arrays, Arrays], dict[str, Any]]
    oracle: Callable[[Arrays, Arrays], dict[str, Any]]
    passes: work.Passes

    def cotangents(self) -> dict[str, Any]:
        """Standard normal gradients of the results, the same each time."""
        rng = np.random.default_rng(zlib.crc32(f"{self.op} {self.name}".encode()))
        results = jax.eval_shape(self.oracle, self.learned, self.fixed)
        return {
            name: jnp.asarray(rng.standard_normal(result.shape, dtype=np.float32), result.dtype)
            for name, result in results.items()
        }


def cases(op: str) -> dict[str, tuple[Group, Any]]:
    """The cases of an operation by name, each with its group."""
    module = vars(importlib.import_module(f"jaxablate_kernels.{op}.cases"))
    return {case.name: (group, case) for name, group in _GROUPS.items() for case in module.get(name, ())}


def problem(op: str, group: Group, case: Any, *, batch: int = 1, dtype: str = "") -> Problem:
    """A case with its arrays.

    Args:
      op: the operation.
      group: the case's.
      case: from `cases`.
      batch: factor of the case's own batch, or of its rows.
      dtype: instead of the case's own; "" keeps that.
    """
    sizes = {
        "attention": lambda: {"batch": case.batch * batch},
        "norm": lambda: {"lead": (case.lead[0] * batch, *case.lead[1:])},
        "gated": lambda: {"lead": (case.lead[0] * batch, *case.lead[1:])},
        "cross_entropy": lambda: {"tokens": case.tokens * batch},
    }
    changes = {**(sizes[op]() if batch > 1 else {}), **({"dtype": dtype} if dtype else {})}
    case = dataclasses.replace(case, **changes)
    return _PROBLEMS[op](group, case)


# --------------------------------------------------------------------------------------------- attention


def _attention(group: Group, case: Any) -> Problem:
    inputs = case.inputs()
    arguments = {"q": inputs.q, "k": inputs.k, "v": inputs.v, **case.keywords(inputs)}
    learned = {name: arguments[name] for name in ("q", "k", "v", "bias", "qk_norm")}
    fixed = {name: arguments[name] for name in ("kv_mask", "segment_ids", "rotary")}
    options = {name: arguments[name] for name in ("causal", "scale", "softcap")}

    def apply(call: Call, learned: Arrays, fixed: Arrays) -> dict[str, Any]:
        q, k, v = (learned[name] for name in "qkv")
        return {"o": call(q, k, v, bias=learned["bias"], qk_norm=learned["qk_norm"], **fixed, **options)}

    return Problem(
        op="attention",
        name=case.name,
        group=group,
        shape=_attention_shape(case),
        dtype=case.dtype,
        spec=AttentionSpec.of(**arguments),
        learned=learned,
        fixed=fixed,
        options=options,
        apply=apply,
        oracle=lambda learned, fixed: _attention_oracle(learned, fixed, options),
        passes=work.attention(
            inputs.q,
            inputs.k,
            causal=case.causal,
            learned=jax.tree.leaves((inputs.bias, inputs.qk_norm)),
            fixed=jax.tree.leaves(fixed),
        ),
    )


def _attention_shape(case: Any) -> str:
    heads = f"{case.heads}" if case.heads == case.kv_heads else f"{case.heads}/{case.kv_heads}"
    length = f"{case.q_len}" if case.q_len == case.kv_len else f"{case.q_len}→{case.kv_len}"
    marks = {
        "causal": case.causal,
        "mask": case.kv_mask != "none",
        "segments": case.segments != "none",
        "bias": case.bias is not None,
        "QK-norm": case.qk_norm is not None,
        "rotary": case.rotary is not None,
        "softcap": case.softcap is not None,
    }
    return " ".join(
        [f"{case.batch}×{length}×{heads}×{case.head_dim}", *(m for m, there in marks.items() if there)]
    )


def _attention_oracle(learned: Arrays, fixed: Arrays, options: Mapping[str, Any]) -> dict[str, Any]:
    """The reference, one sequence and one key/value head at a time: the memory of one T x S matrix.

    The reference on all at once holds several float32 arrays of (B, H, T, S), more than a GPU has at the
    lengths where other implementations are of interest.
    """
    reference = dispatch.load("attention", "reference").call
    q, k, v, bias = (learned[name] for name in ("q", "k", "v", "bias"))
    batch, q_len, heads, dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads

    def by_head(x: jax.Array, per_head: int) -> jax.Array:
        """(B, L, K * per_head, D) -> (B K, 1, L, per_head, D)."""
        split = x.reshape(batch, x.shape[1], kv_heads, per_head, dim)
        return split.transpose(0, 2, 1, 3, 4).reshape(batch * kv_heads, 1, x.shape[1], per_head, dim)

    def by_row(x: jax.Array) -> jax.Array:
        """(B, ...) -> (B K, 1, ...)."""
        return jnp.repeat(x, kv_heads, axis=0)[:, None]

    rotary = fixed["rotary"]
    batched_tables = rotary is not None and rotary.q[0].ndim == 3
    each: dict[str, Any] = {
        "q": by_head(q, group),
        "k": by_head(k, 1),
        "v": by_head(v, 1),
        "kv_mask": jax.tree.map(by_row, fixed["kv_mask"]),
        "segment_ids": jax.tree.map(by_row, fixed["segment_ids"]),
    }
    if bias is not None:
        b, h, t, s = bias.shape
        split = bias.reshape(b, kv_heads if h > 1 else 1, h // kv_heads if h > 1 else 1, t, s)
        whole = jnp.broadcast_to(split, (batch, kv_heads, *split.shape[2:]))
        each["bias"] = whole.reshape(batch * kv_heads, 1, *split.shape[2:])
    if batched_tables:
        each["rotary"] = jax.tree.map(by_row, rotary)
    shared = {} if batched_tables else {"rotary": rotary}

    @jax.checkpoint
    def one(arguments: dict[str, Any]) -> jax.Array:
        return reference(**arguments, **shared, qk_norm=learned["qk_norm"], **options)

    o = jax.lax.map(one, each).reshape(batch, kv_heads, q_len, group, dim)
    return {"o": o.transpose(0, 2, 1, 3, 4).reshape(q.shape)}


# ------------------------------------------------------------------------------------- norms and gates


def _norm(group: Group, case: Any) -> Problem:
    inputs = case.inputs()
    options = {"kind": case.kind, "eps": case.eps, "eps_at": case.eps_at}

    def apply(call: Call, learned: Arrays, fixed: Arrays) -> dict[str, Any]:
        y, total = call(learned["x"], fixed["residual"], learned["scale"], learned["bias"], **options)
        return {"y": y} if total is None else {"y": y, "total": total}

    adds = "add " if inputs.residual is not None else ""
    return Problem(
        op="norm",
        name=case.name,
        group=group,
        shape=f"{_rows(case.lead)}×{case.dim} {adds}{case.kind}{' bias' if inputs.bias is not None else ''}",
        dtype=case.dtype,
        spec=case.spec,
        learned={"x": inputs.x, "scale": inputs.scale, "bias": inputs.bias},
        # Its gradient is x's, one array in a training step; as a result of its own it would be a copy.
        fixed={"residual": inputs.residual},
        options=options,
        apply=apply,
        oracle=_by_reference("norm", apply),
        passes=work.norm(
            inputs.x,
            jax.tree.leaves((inputs.scale, inputs.bias)),
            kind=case.kind,
            residual="none" if inputs.residual is None else "added",
        ),
    )


def _gated(group: Group, case: Any) -> Problem:
    h = case.inputs().h

    def apply(call: Call, learned: Arrays, fixed: Arrays) -> dict[str, Any]:
        return {"y": call(learned["h"], kind=case.kind)}

    return Problem(
        op="gated",
        name=case.name,
        group=group,
        shape=f"{_rows(case.lead)}×2×{case.width} {case.kind}",
        dtype=case.dtype,
        spec=case.spec,
        learned={"h": h},
        fixed={},
        options={"kind": case.kind},
        apply=apply,
        oracle=_by_reference("gated", apply),
        passes=work.gated(h),
    )


def _rows(lead: tuple[int, ...]) -> str:
    return "×".join(map(str, lead)) or "1"


# ----------------------------------------------------------------------------------------- cross entropy


def _cross_entropy(group: Group, case: Any) -> Problem:
    inputs = case.inputs()
    options = {"ignore_index": case.ignore_index, "z_loss": case.z_loss, "softcap": case.softcap}
    spec = CrossEntropySpec.of(inputs.x, inputs.w, inputs.targets, bias=inputs.bias, **options)
    static = Static(**options)

    def apply(call: Call, learned: Arrays, fixed: Arrays) -> dict[str, Any]:
        losses = call(learned["x"], learned["w"], fixed["targets"], bias=learned["bias"], static=static)
        return losses._asdict()

    return Problem(
        op="cross_entropy",
        name=case.name,
        group=group,
        shape=f"{case.tokens}×{case.dim}×{case.vocab}{' bias' if inputs.bias is not None else ''}",
        dtype=case.dtype,
        spec=spec,
        learned={"x": inputs.x, "w": inputs.w, "bias": inputs.bias},
        fixed={"targets": inputs.targets},
        options=options,
        apply=apply,
        oracle=_by_reference("cross_entropy", apply),
        passes=work.cross_entropy(inputs.x, inputs.w, inputs.targets, inputs.bias),
    )


def _by_reference(op: str, apply: Callable[[Call, Arrays, Arrays], dict[str, Any]]) -> Callable[..., Any]:
    reference = dispatch.load(op, "reference").call
    return lambda learned, fixed: apply(reference, learned, fixed)


_PROBLEMS: dict[str, Callable[[Group, Any], Problem]] = {
    "attention": _attention,
    "norm": _norm,
    "gated": _gated,
    "cross_entropy": _cross_entropy,
}
