"""PyTorch's `scaled_dot_product_attention` as a competitor from outside, where PyTorch is installed.

It sees the same arrays, through DLPack, and picks its own backend (FlashAttention, cuDNN, its own).
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
        ("qk_norm", spec.qk_norm is not None),
        ("rotary", spec.rotary is not None),
    ):
        if there:
            return f"{argument} is not None, supported is None"
    if spec.causal and (spec.q_len != spec.kv_len or spec.bias or spec.has_kv_mask):
        return "causal is True beside a mask, a bias or T != S, supported is a square alone"
    return None


def build(problem: Problem, gradients: Mapping[str, Any], direction: Direction) -> Program:
    """As `programs.build`. On a GPU its clock is that of CUDA events."""
    torch = _torch()

    learned = {name: _to_torch(x).requires_grad_() for name, x in problem.learned.items() if x is not None}
    mask = problem.fixed["kv_mask"]
    gradient = _heads_first(_to_torch(gradients["o"]))
    if mask is not None:
        mask = _to_torch(mask)[:, None, None, :]
        if "bias" in learned:
            mask = torch.where(mask, 0.0, -torch.inf).to(learned["bias"].dtype)

    def forward() -> Any:
        q, k, v = (_heads_first(learned[name]) for name in "qkv")
        terms = [x for x in (mask, learned.get("bias")) if x is not None]
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=sum(terms[1:], terms[0]) if terms else None, is_causal=problem.spec.causal,
            scale=problem.options["scale"], enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip

    def backward(o: Any) -> dict[str, Any]:
        found = torch.autograd.grad(o, [*learned.values()], gradient, retain_graph=True)
        return dict(zip(learned, found, strict=True))

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
        return named(found, {name: _to_jax(x) for name, x in gradients.items()})

    if not gradient.is_cuda:
        run()
        return Program(run, results, 0.0, Memory(None, "device"))
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    arguments = sum(x.nbytes for x in (*learned.values(), gradient))  # these are jax's
    return Program(
        run, results, 0.0, Memory(torch.cuda.max_memory_allocated() + arguments, "device"), cuda_events
    )


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
