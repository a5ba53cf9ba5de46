"""The TinyStories baseline in PyTorch, as one would write it there to be fast: what `language_model.py` competes with.

Pre-norm RMSNorm, SwiGLU, rotary positions in adjacent pairs, `scaled_dot_product_attention`, an untied head, no
biases; AdamW, fused on a GPU, after clipping by the global norm. Queries, keys and values are one matrix, and so
are the two halves of the feed-forward layer. Parameters are float32; in bfloat16 the model runs under autocast.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from jaxablate.config import OptimConfig
from jaxablate.studies.tinystories.config import LmModel
from jaxablate.studies.tinystories.model import NORM_EPS, ffn_width

torch: Any = importlib.import_module("torch")  # no dependency, so type checkers need not find it
functional = torch.nn.functional

Precision = Literal["float32", "bfloat16"]
# Names of `--torch` -> arguments of `torch.compile`; None: not compiled.
MODES: Mapping[str, Mapping[str, Any] | None] = {
    "eager": None,
    "compile": {},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "max-autotune": {"mode": "max-autotune"},
}
# Fields of the config that change the function; this is the one that they have by default.
FUNCTION = ("norm", "placement", "final_norm", "position", "qk_norm", "ffn")
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


def linear(inputs: int, outputs: int) -> Any:
    """A matrix without a bias."""
    return torch.nn.Linear(inputs, outputs, bias=False)


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    """Turns the adjacent pairs of x (B, T, H, D) by tables (T, D/2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


class Layer(torch.nn.Module):
    """A pre-norm block."""

    def __init__(self, dim: int, heads: int, width: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = torch.nn.RMSNorm(dim, eps=NORM_EPS)
        self.qkv = linear(dim, 3 * dim)
        self.out = linear(dim, dim)
        self.ffn_norm = torch.nn.RMSNorm(dim, eps=NORM_EPS)
        self.wi = linear(dim, 2 * width)
        self.wo = linear(width, dim)

    def forward(self, x: Any, cos: Any, sin: Any) -> Any:
        """(B, T, C) -> (B, T, C)."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        gate, up = self.wi(self.ffn_norm(x)).chunk(2, -1)
        return x + self.wo(functional.silu(gate) * up)


class TorchLm(torch.nn.Module):
    """The model; its call gives the mean loss of the targets.

    Raises:
      ValueError: a config that is not the baseline's function.
    """

    def __init__(self, config: LmModel, vocab: int, context: int):
        super().__init__()
        if other := [f"{name}={getattr(config, name)}" for name in FUNCTION if _differs(config, name)]:
            raise ValueError(f"the PyTorch model is the baseline's, not that of {', '.join(other)}")
        self.embedding = torch.nn.Embedding(vocab, config.dim)
        self.layers = torch.nn.ModuleList(
            Layer(config.dim, config.heads, ffn_width(config)) for _ in range(config.layers)
        )
        self.final_norm = torch.nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.head = linear(config.dim, vocab)
        head_dim = config.dim // config.heads
        frequencies = 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.arange(context)[:, None] * frequencies
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Any, targets: Any) -> Any:
        """tokens, targets (B, T) -> the mean cross-entropy in nats."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = self.head(self.final_norm(x))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def count(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())

    def take(self, params: Mapping[str, Any]) -> None:
        """Sets all parameters to those of a `DecoderLm` of the same shape; Flax has inputs first, PyTorch outputs."""
        found: dict[str, np.ndarray] = {
            "embedding.weight": params["embedding"]["embedding"],
            "final_norm.weight": params["final_norm"]["scale"],
            "head.weight": np.asarray(params["head"]["kernel"]).T,
        }
        for number, layer in enumerate(self.layers):
            block = params["layers"][f"layer_{number}"]["block"]
            attention, ffn = block["attention"], block["ffn"]
            dim = layer.out.weight.shape[0]
            qkv = [np.asarray(attention[name]["kernel"]).reshape(dim, -1).T for name in "qkv"]
            found |= {
                f"layers.{number}.attention_norm.weight": block["attention_norm"]["scale"],
                f"layers.{number}.qkv.weight": np.concatenate(qkv),
                f"layers.{number}.out.weight": np.asarray(attention["out"]["kernel"]).reshape(-1, dim).T,
                f"layers.{number}.ffn_norm.weight": block["ffn_norm"]["scale"],
                f"layers.{number}.wi.weight": np.asarray(ffn["wi"]["kernel"]).reshape(dim, -1).T,
                f"layers.{number}.wo.weight": np.asarray(ffn["wo"]["kernel"]).T,
            }
        own = dict(self.named_parameters())
        if own.keys() != found.keys():
            raise ValueError(f"parameters differ: {sorted(own.keys() ^ found.keys())}")
        with torch.no_grad():
            for name, value in found.items():
                own[name].copy_(torch.tensor(np.asarray(value)))  # raises where shapes differ


class TorchStep:
    """A training step on one batch, over and over, and how it is timed.

    Args:
      model: on the device.
      tokens: (B, T + 1).
      mode: a key of `MODES`.
    """

    def __init__(
        self, model: TorchLm, optim: OptimConfig, tokens: np.ndarray, precision: Precision, mode: str
    ):
        self._device = model.head.weight.device
        self._parameters = list(model.parameters())
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=optim.learning_rate,
            betas=(optim.b1, optim.b2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=self._device.type == "cuda",
        )
        self._mode, self._clip_norm = mode, optim.clip_norm
        self._autocast = precision == "bfloat16"
        arguments = MODES[mode]
        self._loss = model if arguments is None else torch.compile(model, fullgraph=True, **arguments)
        rows = torch.tensor(np.asarray(tokens, np.int64), device=self._device)
        self._batch = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        self.grad_norm: Any = None  # of the last step, before clipping

    def __call__(self) -> Any:
        """One update; the loss before it."""
        if self._mode in CUDA_GRAPHS:  # what the last step gave is no longer needed
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            loss = self._loss(*self._batch)
        loss.backward()
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def clock(self, call: Callable[[], Any], inner: int) -> float:
        """Seconds of `inner` calls, until the device has done them: as `bench.timing.wall_clock` does for jax."""
        began = time.perf_counter()
        for _ in range(inner):
            call()
        self._wait()
        return time.perf_counter() - began

    def peak_bytes(self) -> int | None:
        """The most that the allocator of a GPU gave out during one more step; other models' memory is not in it."""
        if self._device.type != "cuda":
            return None
        self._wait()
        mine = sum(x.nbytes for x in self._held())
        others = torch.cuda.memory_allocated() - mine
        torch.cuda.reset_peak_memory_stats()
        self()
        self._wait()
        return torch.cuda.max_memory_allocated() - others

    def _held(self) -> Iterator[Any]:
        """What lies on the device between steps."""
        yield from (*self._parameters, *self._batch)
        for state in self._optimizer.state.values():
            yield from (x for x in state.values() if torch.is_tensor(x) and x.device == self._device)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def device(backend: str) -> Any:
    """PyTorch's device for a backend of jax, `cpu` or `gpu`; float32 is multiplied there as jax does it.

    jax's default on a GPU is TF32, on a CPU float32.

    Raises:
      RuntimeError: PyTorch cannot use it.
    """
    if backend == "gpu" and not torch.cuda.is_available():
        raise RuntimeError("this PyTorch sees no GPU")
    torch.set_float32_matmul_precision("high" if backend == "gpu" else "highest")
    return torch.device("cuda" if backend == "gpu" else backend)


def _differs(config: LmModel, name: str) -> bool:
    return getattr(config, name) != getattr(LmModel(), name)
