"""The TinyStories baseline in PyTorch, as one would write it there to be fast: what `language_model.py` competes with.

Pre-norm RMSNorm, SwiGLU, rotary positions in adjacent pairs, `scaled_dot_product_attention`, an untied head, no
biases. Queries, keys and values are one matrix, and so are the two halves of the feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxablate.studies.tinystories.config import LmModel
from jaxablate.studies.tinystories.model import NORM_EPS, ffn_width
from tests.benchmarks.torch_step import take, torch

functional = torch.nn.functional

# Fields of the config that change the function; this is the one that they have by default.
FUNCTION = ("norm", "placement", "final_norm", "position", "qk_norm", "ffn")


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
        take(self, found)


def batch_of(tokens: np.ndarray, device: Any) -> tuple[Any, Any]:
    """(B, T + 1) -> what goes in and what comes next, (B, T) each."""
    rows = torch.tensor(np.asarray(tokens, np.int64), device=device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _differs(config: LmModel, name: str) -> bool:
    return getattr(config, name) != getattr(LmModel(), name)
