"""The latent operators of the Burgers study in PyTorch, as one would write them there: what `burgers.py` competes with.

A frozen encoder, the operator as a stack or a U with standard or channel-separated attention, and the loss of its
training: error after a step, of the channels' spectrum, and after further steps. Modules have the names that they
have in Flax, but for queries, keys and values from one matrix where they have one input.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxablate.studies.burgers.config import BurgersModel, CoreConfig, EncoderConfig
from jaxablate.studies.burgers.model import COORDINATE_FREQUENCIES, FFN_RATIO, waves
from tests.benchmarks.torch_step import take, torch

nn, functional = torch.nn, torch.nn.functional

NORM_EPS = 1e-5  # of LayerNorm
QK_EPS = 1e-6  # of queries and keys
LAYERS = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Conv1d)


class Encoder(nn.Module):
    """(B, X) -> (B, T, D). The grid has one row, so of a kernel of 3 x 3 the middle row acts."""

    def __init__(self, config: EncoderConfig, cells: int):
        super().__init__()
        self.tokens, own = config.tokens, cells // config.tokens
        self.stem_in = nn.Conv1d(1, config.stem, 3, padding=1)
        self.stem_out = nn.Conv1d(config.stem, 1, 1)
        coordinates = waves(np.linspace(0, 1, cells), COORDINATE_FREQUENCIES)
        self.register_buffer("places", torch.tensor(coordinates.reshape(self.tokens, own, -1).mean(1)))
        self.project = nn.Linear(own + coordinates.shape[1], config.dim)

    def forward(self, u: Any) -> Any:
        x = u + self.stem_out(functional.gelu(self.stem_in(u[:, None])))[:, 0].float()
        places = self.places.expand(len(u), -1, -1)
        return self.project(torch.cat([x.unflatten(1, (self.tokens, -1)), places], -1)).float()


class Attention(nn.Module):
    """Over all channels, with RMSNorm of queries and keys."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_scale = nn.RMSNorm(dim // heads, eps=QK_EPS)
        self.k_scale = nn.RMSNorm(dim // heads, eps=QK_EPS)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Any) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            self.q_scale(q).type_as(v), self.k_scale(k).type_as(v), v
        )
        return self.out(mixed.transpose(1, 2).flatten(-2))


class ChannelSeparatedAttention(nn.Module):
    """Contiguous groups of channels as rows of the batch, all with the same matrices."""

    def __init__(self, group: int, heads: int):
        super().__init__()
        self.group, self.heads = group, heads
        self.q_norm, self.k_norm = nn.RMSNorm(group, eps=QK_EPS), nn.RMSNorm(group, eps=QK_EPS)
        self.q, self.k, self.v = (nn.Linear(group, group) for _ in range(3))
        self.out = nn.Linear(group, group)

    def forward(self, x: Any) -> Any:
        batch = len(x)
        rows = x.unflatten(-1, (-1, self.group)).transpose(1, 2).flatten(0, 1)
        parts = self.q(self.q_norm(rows)), self.k(self.k_norm(rows)), self.v(rows)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return self.out(mixed).unflatten(0, (batch, -1)).transpose(1, 2).flatten(-2)


class Ffn(nn.Module):
    """dim -> width -> dim."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.wi, self.wo = nn.Linear(dim, width), nn.Linear(width, dim)

    def forward(self, x: Any) -> Any:
        return self.wo(functional.gelu(self.wi(x)))


class Block(nn.Module):
    """Pre-norm; the stream stays float32."""

    def __init__(self, config: CoreConfig):
        super().__init__()
        dim = config.hidden
        self.attention_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        if config.attention == "standard":
            self.attention = Attention(dim, config.heads)
        else:
            self.attention = ChannelSeparatedAttention(config.group, config.heads)
        self.ffn_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.ffn = Ffn(dim, FFN_RATIO[config.kind] * dim)

    def forward(self, x: Any) -> Any:
        x = x + self.attention(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))


class Core(nn.Module):
    """A stack of blocks at one length."""

    def __init__(self, config: CoreConfig, dim: int):
        super().__init__()
        if dim != config.hidden:
            self.into, self.out = nn.Linear(dim, config.hidden), nn.Linear(config.hidden, dim)
        self.same = dim == config.hidden
        self.norm = nn.LayerNorm(config.hidden, eps=NORM_EPS)
        self.make(config)

    def make(self, config: CoreConfig) -> None:
        """The modules between."""
        self.names = [f"layer_{i}" for i in range(config.depth)]
        for name in self.names:
            self.add_module(name, Block(config))

    def forward(self, z: Any) -> Any:
        x = self.norm(self.move(z if self.same else self.into(z).float()))
        return x if self.same else self.out(x).float()

    def move(self, x: Any) -> Any:
        """What is between."""
        return self.run(self.names, x)

    def run(self, names: Sequence[str], x: Any) -> Any:
        """Blocks one after another."""
        for name in names:
            x = getattr(self, name)(x)
        return x


class UNet(Core):
    """Blocks at several lengths, each half of the one above."""

    def make(self, config: CoreConfig) -> None:
        *levels, bottom = config.depths
        self.bottom = [f"bottom_{j}" for j in range(bottom)]
        self.down, self.up = (
            [[f"{way}_{i}_{j}" for j in range(depth)] for i, depth in enumerate(levels)]
            for way in ("down", "up")
        )
        for name in itertools.chain(self.bottom, *self.down, *self.up):
            self.add_module(name, Block(config))
        for i in range(len(levels)):
            self.add_module(f"down_{i}", nn.Linear(config.hidden, config.hidden))
            self.add_module(f"skip_{i}", nn.Linear(config.hidden, config.hidden))

    def move(self, x: Any) -> Any:
        skips = []
        for i, names in enumerate(self.down):
            x = self.run(names, x)
            skips.append(x)
            x = getattr(self, f"down_{i}")(halve(x)).float()
        x = self.run(self.bottom, x)
        for i, names in reversed(list(enumerate(self.up))):
            skip = getattr(self, f"skip_{i}")(skips[i]).float()
            x = self.run(names, longer(x, skip.shape[1]) + skip)
        return x


def halve(x: Any) -> Any:
    """Means of neighbouring tokens of (B, T, C); an odd last one is its own pair."""
    if x.shape[1] % 2:
        x = torch.cat([x, x[:, -1:]], 1)
    return x.unflatten(1, (-1, 2)).mean(2)


def longer(x: Any, length: int) -> Any:
    """Linear interpolation along the tokens of (B, T, C)."""
    return functional.interpolate(x.mT, size=length, mode="linear", align_corners=False).mT


class Operator(nn.Module):
    """A step in time of (B, T, D)."""

    def __init__(self, config: BurgersModel):
        super().__init__()
        dim = config.encoder.dim
        self.with_viscosity = config.conditioned_on == "dt_and_viscosity"
        self.time_in = nn.Linear(2 if self.with_viscosity else 1, dim)
        self.time_out, self.time_shift = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.core = (Core if config.core.kind == "pdet_stack" else UNet)(config.core, dim)
        self.residual_norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, z: Any, dt: Any, viscosity: Any) -> Any:
        known = [dt, viscosity.log10()] if self.with_viscosity else [dt]
        c = self.time_out(functional.silu(self.time_in(torch.stack(known, -1))))
        shift = self.time_shift(c).float()[:, None]
        return z + self.residual_norm(self.core(z + shift))


class TorchBurgers(nn.Module):
    """A frozen encoder and an operator; its call gives the loss.

    Raises:
      ValueError: a config whose function it has not.
    """

    def __init__(self, config: BurgersModel, cells: int):
        super().__init__()
        core, encoder, loss = config.core, config.encoder, config.loss
        if core.drop_path or loss.inverse or encoder.cells != "patch" or core.qk_norm != "rms":
            raise ValueError(
                "the PyTorch model has patches, RMSNorm of queries and keys, no drop path and no inverse loss"
            )
        self.spectral, self.rollout, self.steps = loss.spectral, loss.rollout, loss.rollout_steps
        self.encoder = Encoder(encoder, cells).requires_grad_(False)
        self.operator = Operator(config)

    def forward(self, u: Any, dt: Any, viscosity: Any) -> Any:
        """u (B, frames, X), dt and viscosity (B,) -> the mean loss."""
        frames = [0, 1, self.steps] if self.rollout else [0, 1]
        with torch.no_grad():
            z, *targets = self.encoder(u[:, frames].flatten(0, 1)).unflatten(0, (-1, len(frames))).unbind(1)
        z = self.operator(z, dt, viscosity)
        loss = functional.mse_loss(z, targets[0])
        if self.spectral:
            loss = loss + self.spectral * functional.mse_loss(amplitudes(z), amplitudes(targets[0]))
        if self.rollout:
            for _ in range(1, self.steps):
                z = self.operator(z, dt, viscosity)
            loss = loss + self.rollout * functional.mse_loss(z, targets[1])
        return loss

    def take(self, params: Mapping[str, Any]) -> None:
        """Sets all parameters to those of a `Surrogate` of the same shape; Flax has inputs first, PyTorch outputs."""
        found: dict[str, np.ndarray] = {}
        for name, module in self.named_modules():
            if isinstance(module, LAYERS):
                *above, last = name.split(".")
                tree = functools.reduce(lambda tree, key: tree[key], above, params)
                parts = [tree[part] for part in (last if last == "qkv" else [last])]
                for key, values in zip(("weight", "bias"), _arrays(module, parts), strict=False):
                    found[f"{name}.{key}"] = np.concatenate(values)
        take(self, found)


def amplitudes(z: Any) -> Any:
    """Of the Fourier transform along the channels."""
    return torch.fft.rfft(z, dim=-1).abs()


def _arrays(module: Any, parts: Sequence[Any]) -> list[list[np.ndarray]]:
    """Weights of a layer, then its biases if it has any, as PyTorch has them, from the parts that it is made of."""
    if isinstance(module, nn.RMSNorm):
        return [[np.asarray(part["scale"] if isinstance(part, Mapping) else part) for part in parts]]
    biases = [np.reshape(part["bias"], -1) for part in parts]
    if isinstance(module, nn.LayerNorm):
        return [[np.asarray(part["scale"]) for part in parts], biases]
    kernels = [np.asarray(part["kernel"]) for part in parts]
    if isinstance(module, nn.Conv1d):
        return [[kernel[len(kernel) // 2].transpose(2, 1, 0) for kernel in kernels], biases]
    # Heads are axes of their own in Flax, of the outputs or of the inputs.
    return [[kernel.reshape(module.in_features, -1).T for kernel in kernels], biases]


def batch_of(batch: Mapping[str, np.ndarray], device: Any) -> tuple[Any, ...]:
    """The arguments of the model from one member's batch."""
    return tuple(torch.tensor(batch[key], device=device) for key in ("u", "dt", "viscosity"))
