"""PyTorch's `scaled_dot_product_attention` as a competitor from outside, where PyTorch is installed.

It sees the same arrays, through DLPack, and picks its own backend (FlashAttention, cuDNN, its own). It knows
neither QK-norm nor rotary positions nor a bias of another type than q: these are PyTorch's own operations
before it, and are timed with it. Its calls come from Python, one by one, so that at small shapes launches are
part of its time, which the programs of jax repeat their work to be free of.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxablate.bench.oracle import named
from jaxablate.bench.problems import Problem
from jaxablate.bench.programs import Program
from jaxablate.bench.timing import Memory
from jaxablate.bench.work import Direction

NAME = "torch_sdpa"


def unsupported(problem: Problem) -> str | None:
    """Why it cannot run an attention problem, in one line; None if it can."""
    if importlib.util.find_spec("torch") is None:
        return "No module named 'torch'"
    spec = problem.spec
    for argument, there in (
        ("segment_ids", spec.segments),
        ("softcap", spec.softcap),
    ):
        if there:
            return f"{argument} is not None, supported is None"
    if spec.causal and (spec.q_len != spec.kv_len or spec.bias or spec.has_kv_mask):
        return "causal is True beside a mask, a bias or T != S, supported is a square alone"
    return None


def build(problem: Problem, gradients: Mapping[str, Any], direction: Direction) -> Program:
    """As `programs.build`. On a GPU its clock is that of CUDA events."""
    torch = _torch()

    learned = jax.tree.map(lambda x: _to_torch(x).requires_grad_(), dict(problem.learned))
    leaves, tree = jax.tree.flatten(learned)
    bias, rotary = learned["bias"], jax.tree.map(_to_torch, problem.fixed["rotary"])
    mask = problem.fixed["kv_mask"]
    gradient = _heads_first(_to_torch(gradients["o"]))
    if mask is not None:
        mask = _to_torch(mask)[:, None, None, :]
        if bias is not None:
            mask = torch.where(mask, 0.0, -torch.inf).to(learned["q"].dtype)

    def forward() -> Any:
        q, k = _prepare(learned["q"], learned["k"], learned["qk_norm"], rotary)
        q, k, v = (_heads_first(x) for x in (q, k, learned["v"]))
        terms = [x for x in (mask, None if bias is None else bias.to(q.dtype)) if x is not None]
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=sum(terms[1:], terms[0]) if terms else None, is_causal=problem.spec.causal,
            scale=problem.options["scale"], enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip

    def backward(o: Any) -> dict[str, Any]:
        return tree.unflatten(torch.autograd.grad(o, leaves, gradient, retain_graph=True))

    def both() -> tuple[Any, dict[str, Any]]:
        o = forward()
        return o, backward(o)

    graph = forward() if direction == "backward" else None
    runs: dict[Direction, Callable[[], tuple[Any, dict[str, Any]]]] = {
        "forward": lambda: (forward().detach(), {}),
        "backward": lambda: (None, backward(graph)),
        "both": both,
    }
    run = runs[direction]

    def results() -> dict[str, jax.Array]:
        o, gradients = run()
        found = {} if o is None else {"o": _to_jax(o.transpose(1, 2))}
        return named(found, jax.tree.map(_to_jax, gradients))

    if not gradient.is_cuda:
        run()
        return Program(run, results, 0.0, Memory(None, "device"))
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    arguments = sum(x.nbytes for x in (*leaves, gradient))  # these are jax's
    return Program(
        run, results, 0.0, Memory(torch.cuda.max_memory_allocated() + arguments, "device"), cuda_events
    )


def _prepare(q: Any, k: Any, qk_norm: Any, rotary: Any) -> tuple[Any, Any]:
    """Queries and keys (B, L, H, D) before their product: `jaxablate_kernels.attention.prologue` in PyTorch."""
    if qk_norm is not None:
        q = _normalize(q, qk_norm.q_scale, qk_norm.kind, qk_norm.eps)
        k = _normalize(k, qk_norm.k_scale, qk_norm.kind, qk_norm.eps)
    if rotary is not None:
        q, k = _rotate(q, rotary.q, rotary.pairing), _rotate(k, rotary.k, rotary.pairing)
    return q, k


def _normalize(x: Any, scale: Any, kind: str, eps: float) -> Any:
    y = x.float()
    squares = y.square()
    if kind == "l2":
        inverse = squares.sum(-1, keepdim=True).clamp(min=eps**2).rsqrt()
    else:
        inverse = (squares.mean(-1, keepdim=True) + eps).rsqrt()
    return (y * inverse * scale).to(x.dtype)


def _rotate(x: Any, tables: tuple[Any, Any], pairing: str) -> Any:
    """Pairs of features, turned by tables (L, D/2) or (B, L, D/2)."""
    torch = _torch()

    cos, sin = (table[..., None, :] for table in tables)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1) if pairing == "adjacent" else x.float().chunk(2, -1)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1 if pairing == "adjacent" else -2)
    return turned.flatten(-2).to(x.dtype)


def cuda_events(call: Callable[[], Any], inner: int) -> float:
    """Seconds of `inner` calls between two events on PyTorch's stream."""
    torch = _torch()

    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(inner):
        call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1000


def _torch() -> Any:
    """PyTorch, imported when it is needed: it is no dependency."""
    return importlib.import_module("torch")


def _heads_first(x: Any) -> Any:
    """(B, T, H, D) -> (B, H, T, D), a view."""
    return x.transpose(1, 2)


def _to_torch(x: jax.Array) -> Any:
    torch = _torch()

    return torch.from_dlpack(jax.block_until_ready(x)).detach()


def _to_jax(x: Any) -> jax.Array:
    torch = _torch()

    if x.is_cuda:
        torch.cuda.synchronize()
    return jnp.from_dlpack(x.detach().contiguous())
