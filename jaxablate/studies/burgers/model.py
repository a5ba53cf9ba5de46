"""The latent surrogate of the Burgers equation: encoder, decoder, operator, corrector.

Axes in comments and types: B samples, X cells of the grid, T tokens, D channels of a token, H of the operator.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxablate.nn.attention import Attention
from jaxablate.nn.block import Block
from jaxablate.nn.channel_attention import ChannelSeparatedAttention
from jaxablate.nn.drop_path import depth_rates
from jaxablate.nn.ffn import Ffn
from jaxablate.nn.linear import linear
from jaxablate.nn.norm import Norm
from jaxablate.nn.resample import halve, interpolate, pool
from jaxablate.studies.burgers.config import BurgersModel, CoreConfig, DecoderConfig, EncoderConfig

COORDINATE_FREQUENCIES = (1, 2)  # of the encoder
QUERY_FREQUENCIES = (1, 2, 4, 8)  # of the decoder
FFN_RATIO = {"pdet_stack": 4, "pdet_unet": 2}


def dense(features: int, inputs: int, name: str | None, dtype: Any) -> nn.DenseGeneral:
    """A linear layer with bias, uniform in 1/sqrt(inputs)."""
    return linear(features, ("embed", "mlp"), name=name, dtype=dtype, bias_fan_in=inputs)


def waves(places: np.ndarray, frequencies: tuple[int, ...]) -> np.ndarray:
    """Sines, then cosines, of 2 pi f x and 2 pi f y with y = 0: (places, 4 x frequencies)."""
    points = np.stack([places, np.zeros_like(places)], axis=1)
    angles = 2 * math.pi * points[:, :, None] * np.array(frequencies)
    angles = angles.reshape(len(places), -1)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class Encoder(nn.Module):
    """A field on the grid to tokens in a row."""

    config: EncoderConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, u: Float[Array, "B X"]) -> Float[Array, "B T D"]:
        config, (batch, cells) = self.config, u.shape
        if cells % config.tokens:
            raise ValueError(f"{cells} cells do not divide into {config.tokens} tokens")
        x = self._stem(u[..., None])
        coordinates = jnp.asarray(waves(np.linspace(0, 1, cells), COORDINATE_FREQUENCIES))
        if config.cells == "pooled":
            features = jnp.concatenate(
                [x, jnp.broadcast_to(coordinates[None], (batch, *coordinates.shape))], axis=-1
            )
            projected = dense(config.dim, features.shape[-1], "project", self.dtype)(features)
            return pool(projected, config.tokens).astype(jnp.float32)
        own = x.reshape(batch, config.tokens, -1)
        places = pool(coordinates[None], config.tokens)
        features = jnp.concatenate(
            [own, jnp.broadcast_to(places, (batch, config.tokens, places.shape[-1]))], axis=-1
        )
        # The bias starts as that of a single cell would, so that it is the same at every number of tokens.
        return dense(config.dim, 1 + places.shape[-1], "project", self.dtype)(features).astype(jnp.float32)

    def _stem(self, u: Float[Array, "B X 1"]) -> Float[Array, "B X 1"]:
        """u plus a small convolution of it, which starts at zero; the grid has one row, so a kernel's middle acts."""
        grid = u[:, None]  # B 1 X 1
        h = nn.Conv(self.config.stem, (3, 3), padding="SAME", name="stem_in", dtype=self.dtype)(grid)
        out = nn.Conv(1, (1, 1), kernel_init=nn.initializers.zeros, name="stem_out", dtype=self.dtype)
        return u + out(jax.nn.gelu(h, approximate=False))[:, 0].astype(u.dtype)


class Decoder(nn.Module):
    """Tokens to the field: each cell asks them by cross-attention with the Fourier features of its place."""

    config: DecoderConfig
    cells: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "B T D"]) -> Float[Array, "B X"]:
        config = self.config
        places = waves(np.linspace(0, 1, self.cells), QUERY_FREQUENCIES)
        x = dense(config.hidden, places.shape[1], "query", self.dtype)(jnp.asarray(places))
        x = jnp.broadcast_to(x[None], (z.shape[0], *x.shape)).astype(jnp.float32)
        # A token tells each of its own cells apart, which features as slow as the queries' cannot; norms would
        # lose the field's size, so what is linear goes around them.
        own = dense(self.cells // z.shape[1] * config.hidden, z.shape[-1], "own", self.dtype)(z)
        x = x + own.reshape(x.shape).astype(x.dtype)
        around = dense(self.cells // z.shape[1], z.shape[-1], "around", self.dtype)(z).reshape(z.shape[0], -1)
        for i in range(config.layers):
            asked = Attention(
                config.heads, config.hidden // config.heads, "reference", bias="all", dtype=self.dtype,
                name=f"attention_{i}",
            )(x, z)  # fmt: skip
            x = Norm("layernorm", name=f"attention_norm_{i}")(x + asked.astype(x.dtype))
            told = Ffn("gelu", config.ffn, bias="all", dtype=self.dtype, name=f"ffn_{i}")(x)
            x = Norm("layernorm", name=f"ffn_norm_{i}")(x + told.astype(x.dtype))
        field = dense(1, config.hidden, "field", self.dtype)(x)[..., 0]
        return (field + around).astype(jnp.float32)


class Core(nn.Module):
    """The transformer that moves the tokens: a stack at one length, or a U over several."""

    config: CoreConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "B T D"], keys: Array | None) -> Float[Array, "B T D"]:
        config, dim = self.config, z.shape[-1]
        x = z
        if dim != config.hidden:
            x = dense(config.hidden, dim, "into", self.dtype)(z).astype(jnp.float32)
        x = self._stack(x, keys) if config.kind == "pdet_stack" else self._unet(x, keys)
        x = self._norm(name="norm")(x)
        if dim == config.hidden:
            return x
        return dense(dim, config.hidden, "out", self.dtype)(x).astype(jnp.float32)

    def _stack(self, x: Array, keys: Array | None) -> Array:
        for i, rate in enumerate(depth_rates(self.config.drop_path, self.config.depth)):
            x = self._layer(f"layer_{i}", rate)(x, keys=keys)
        return x

    def _unet(self, x: Array, keys: Array | None) -> Array:
        *levels, bottom = self.config.depths
        hidden, skips = self.config.hidden, []
        for i, depth in enumerate(levels):
            for j in range(depth):
                x = self._layer(f"down_{i}_{j}", 0.0)(x, keys=keys)
            skips.append(x)
            x = dense(hidden, hidden, f"down_{i}", self.dtype)(halve(x)).astype(jnp.float32)
        for j in range(bottom):
            x = self._layer(f"bottom_{j}", 0.0)(x, keys=keys)
        for i, depth in reversed(list(enumerate(levels))):
            skip = dense(hidden, hidden, f"skip_{i}", self.dtype)(skips[i]).astype(jnp.float32)
            x = interpolate(x, skips[i].shape[1]) + skip
            for j in range(depth):
                x = self._layer(f"up_{i}_{j}", 0.0)(x, keys=keys)
        return x

    @property
    def _norm(self) -> Any:
        return functools.partial(Norm, kind="layernorm", impl=self.config.norm_impl)

    def _layer(self, name: str, rate: float) -> Block:
        config = self.config
        if config.attention == "channel_separated":
            attention = functools.partial(
                ChannelSeparatedAttention, config.heads, config.group, config.attention_impl, dtype=self.dtype
            )
        else:
            attention = functools.partial(
                Attention,
                config.heads,
                config.hidden // config.heads,
                config.attention_impl,
                qk_norm=config.qk_norm,
                bias="all",
                dtype=self.dtype,
            )
        width = FFN_RATIO[config.kind] * config.hidden
        ffn = functools.partial(Ffn, "gelu", width, bias="all", dtype=self.dtype)
        return Block(attention, ffn, self._norm, drop_path=rate, name=name)


class Operator(nn.Module):
    """One step in time: z' = z + LN(core(z + W c)), c from the step's length and, if given, the viscosity."""

    config: BurgersModel
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "B T D"],
        dt: Float[Array, " B"],
        viscosity: Float[Array, " B"],
        keys: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """`keys` are those of the samples' noise; None in evaluation."""
        dim = z.shape[-1]
        known = [dt] if self.config.conditioned_on == "dt" else [dt, jnp.log10(viscosity)]
        c = dense(dim, len(known), "time_in", jnp.float32)(jnp.stack(known, axis=-1))
        c = dense(dim, dim, "time_out", jnp.float32)(jax.nn.silu(c))
        shift = dense(dim, dim, "time_shift", jnp.float32)(c)[:, None]
        moved = Core(self.config.core, self.dtype, name="core")(z + shift, keys)
        gain = nn.initializers.ones if self.config.residual_gain == "one" else nn.initializers.zeros
        return z + nn.LayerNorm(epsilon=1e-5, scale_init=gain, name="residual_norm")(moved)


class Corrector(nn.Module):
    """What is still missing of a step, token by token, as seen at diffusion time tau."""

    hidden: int
    start: Literal["one", "zero"] = "one"  # zero: it adds nothing at first
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "B T D"], tau: Float[Array, " B"]) -> Float[Array, "B T D"]:
        dim = z.shape[-1]
        when = jnp.broadcast_to(tau[:, None, None], (*z.shape[:2], 1))
        h = dense(self.hidden, dim + 1, "into", self.dtype)(jnp.concatenate([z, when], axis=-1))
        h = dense(self.hidden, self.hidden, "hidden", self.dtype)(jax.nn.silu(h))
        if self.start == "one":
            return dense(dim, self.hidden, "out", self.dtype)(jax.nn.silu(h)).astype(jnp.float32)
        out = nn.Dense(dim, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="out")
        return out(jax.nn.silu(h)).astype(jnp.float32)


class Surrogate(nn.Module):
    """All parts under one roof, each by its own method."""

    config: BurgersModel
    cells: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        config, dtype = self.config, self.dtype
        self.encoder = Encoder(config.encoder, dtype)
        self.decoder = Decoder(config.decoder, self.cells, dtype)
        self.operator = Operator(config, dtype)
        self.corrector = Corrector(config.core.hidden, config.residual_gain, dtype)

    def encode(self, u: Float[Array, "B X"]) -> Float[Array, "B T D"]:
        return self.encoder(u)

    def decode(self, z: Float[Array, "B T D"]) -> Float[Array, "B X"]:
        return self.decoder(z)

    def step(self, z: Array, dt: Array, viscosity: Array, keys: Array | None = None) -> Array:
        return self.operator(z, dt, viscosity, keys)

    def correct(self, z: Array, tau: Array) -> Array:
        return self.corrector(z, tau)

    def __call__(self, u: Float[Array, "B X"], dt: Array, viscosity: Array) -> tuple[Array, ...]:
        """Everything once, so that `init` makes every parameter."""
        z = self.encode(u)
        return self.decode(z), self.step(z, dt, viscosity), self.correct(z, dt)
