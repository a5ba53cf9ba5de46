"""CT-CLIP: the CTViT image encoder, a BERT-shaped text encoder, and their projections.

Axes in comments: B volumes, T H W the patch grid, C channels, L tokens.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxablate.nn.attention import Attention
from jaxablate.nn.block import Block, Remat, Stack
from jaxablate.nn.ffn import GATED, Ffn, gated_width
from jaxablate.nn.linear import linear, parameter
from jaxablate.nn.norm import Norm
from jaxablate.nn.position import OffsetBias, Peg, PositionEmbedding
from jaxablate.studies.ctclip.config import ClipModel, ImageConfig, TextConfig

COSINE_SCALE = 8.0  # of the logits of unit queries and keys
BERT_EPS = 1e-12
Sums = dict[str, Array]


def l2norm(x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """x / max(|x|, 1e-12) along the last axis, in float32."""
    y = x.astype(jnp.float32)
    return y * lax.rsqrt(jnp.maximum(jnp.sum(lax.square(y), axis=-1, keepdims=True), 1e-24))


def image_norm(config: ImageConfig, site: str):
    """Factory of the norm at `site`: patch_in, patch_out, attention, ffn or out.

    Of the baseline's LayerNorms those of attention and output have no bias. `faithful` keeps the
    RMSNorm switch to these two, as upstream does; the clean definition changes every norm.
    """
    inner = site in ("attention", "out")
    norm = functools.partial(Norm, impl=config.norm_impl)
    if config.attention.variant == "faithful_flash" and site == "attention":
        return functools.partial(norm, kind="layernorm", eps=1e-5)
    if config.norm == "layernorm" or (config.norm_scope == "faithful" and not inner):
        return functools.partial(norm, kind="layernorm_nobias" if inner else "layernorm", eps=1e-5)
    return functools.partial(norm, kind=config.norm, eps=1e-8, eps_at="outside")


class CtVitLayer(nn.Module):
    """Position by convolution over the grid, then a transformer block within frames or along time."""

    config: ImageConfig
    axis: str  # "space" or "time"
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T H W C"], logit_bias: Float[Array, "1 heads cells cells"] | None
    ) -> Float[Array, "B T H W C"]:
        config, attention = self.config, self.config.attention
        B, T, H, W, C = x.shape
        if config.peg != "none":
            peg = Peg(dtype=self.dtype, name="peg")
            if config.peg == "faithful" and self.axis == "time":
                # Upstream reads the (H, W, T) memory order of the temporal stack as if it were (T, H, W).
                memory = x.transpose(0, 2, 3, 1, 4)
                moved = peg(memory.reshape(B, T, H, W, C)).reshape(B, H, W, T, C)
                x = x + moved.transpose(0, 3, 1, 2, 4)
            else:
                x = x + peg(x)
        faithful = attention.variant == "faithful_flash"
        block = Block(
            attention=functools.partial(
                Attention,
                heads=attention.heads,
                head_dim=attention.head_dim,
                impl=attention.impl,
                qk_norm="none" if faithful else "l2",
                scale=0.0 if faithful else COSINE_SCALE,
                dtype=jnp.float16 if faithful else self.dtype,
            ),
            ffn=functools.partial(
                Ffn, kind=config.ffn, width=ffn_width(config), gate_impl=config.ffn_impl, dtype=self.dtype
            ),
            norm=image_norm(config, "attention"),
            ffn_norm=image_norm(config, "ffn"),
            kv_input="raw",
            name="block",
        )
        if self.axis == "space":
            return block(x.reshape(B * T, H * W, C), logit_bias=logit_bias).reshape(B, T, H, W, C)
        tokens = x.transpose(0, 2, 3, 1, 4).reshape(B * H * W, T, C)
        return block(tokens).reshape(B, H, W, T, C).transpose(0, 3, 1, 2, 4)


def ffn_width(config: ImageConfig) -> int:
    """Hidden width at which gated and ungated layers have the same matrices."""
    if config.ffn in GATED:
        return gated_width(config.dim, config.ffn_mult)
    return int(config.ffn_mult * config.dim)


class CosineCodebook(nn.Module):
    """Vector quantisation by the nearest code in angle, with a straight-through gradient.

    Codes are learned by an average over the assigned unit vectors (van den Oord et al. 2017, appendix;
    the cosine form of Yu et al. 2022). The module only gathers that average's sums, which add up over
    micro-batches and devices; `update` applies them once per step.
    """

    size: int
    chunk: int = 4096  # tokens of all examples compared with all codes at a time

    @nn.compact
    def __call__(self, x: Float[Array, "B *tokens dim"]) -> tuple[Float[Array, "B *tokens dim"], Sums]:
        dim = x.shape[-1]

        def init(key: jax.Array) -> Array:
            return l2norm(nn.initializers.he_uniform()(key, (self.size, dim), jnp.float32))

        codes = self.variable("codebook", "codes", lambda: init(self.make_rng("params"))).value
        unit_codes = l2norm(codes)
        # (B, N, dim), cut along N: examples stay whole, so that they stay on the devices they are on.
        batch, rows = x.shape[0], x[0].size // dim
        vectors = lax.stop_gradient(l2norm(x.reshape(batch, rows, dim)))
        chunk = min(max(self.chunk // batch, 1), rows)
        count = -(-rows // chunk)
        padded = jnp.pad(vectors, ((0, 0), (0, count * chunk - rows), (0, 0)))
        chunks = padded.reshape(batch, count, chunk, dim).swapaxes(0, 1)
        valid = (jnp.arange(count * chunk) < rows).reshape(count, 1, chunk, 1)

        def assign(sums: Sums, chunk_of: tuple[Array, Array]) -> tuple[Sums, Array]:
            vectors, is_token = chunk_of
            nearest = jnp.argmax(jnp.einsum("bnd,kd->bnk", vectors, unit_codes), axis=-1)
            # A matrix product and not a scatter: the same bits on every run, also on a GPU.
            onehot = jax.nn.one_hot(nearest, self.size, dtype=jnp.float32) * is_token
            total = sums["total"] + jnp.einsum("bnk,bnd->kd", onehot, vectors)
            return {"count": sums["count"] + onehot.sum((0, 1)), "total": total}, nearest

        zero = {"count": jnp.zeros(self.size), "total": jnp.zeros((self.size, dim))}
        sums, nearest = lax.scan(assign, zero, (chunks, valid))
        nearest = nearest.swapaxes(0, 1).reshape(batch, count * chunk)[:, :rows]
        quantised = unit_codes[nearest].reshape(x.shape)
        return x + lax.stop_gradient(quantised - x), sums

    @staticmethod
    def update(codes: Float[Array, "size dim"], sums: Sums, decay: float) -> Float[Array, "size dim"]:
        """Moves each used code towards the mean direction of its vectors; an unused one stays."""
        used = sums["count"] > 0
        mean = l2norm(sums["total"] / jnp.maximum(sums["count"], 1.0)[:, None])
        return decay * codes + (1 - decay) * jnp.where(used[:, None], mean, codes)


class ImageEncoder(nn.Module):
    """CTViT: patches -> spatial stack -> temporal stack -> codebook."""

    config: ImageConfig
    dtype: Any
    remat: Remat

    @nn.compact
    def __call__(
        self, volume: Float[Array, "B depth height width"]
    ) -> tuple[Float[Array, "B T H W C"], Sums]:
        config = self.config
        x = self._embed(volume)
        logit_bias = None
        if config.position_bias == "on" and config.attention.variant != "faithful_flash":
            logit_bias = OffsetBias(config.attention.heads, config.dim, name="position_bias")(*x.shape[2:4])
        for axis, depth in (("space", config.spatial_depth), ("time", config.temporal_depth)):
            layer = functools.partial(CtVitLayer, config=config, axis=axis, dtype=self.dtype)
            x = Stack(layer, depth, remat=self.remat, name=axis)(x, logit_bias if axis == "space" else None)
            x = image_norm(config, "out")(name=f"{axis}_norm")(x)
        if config.codebook == "none":
            return x, {}
        return CosineCodebook(config.codebook_size, name="codebook")(x)

    def _embed(self, volume: Array) -> Array:
        """Cuts patches, in the vector order (channel, time, height, width), and projects them."""
        config = self.config
        B, *voxels = volume.shape
        grid = [n // p for n, p in zip(voxels, config.patch, strict=True)]
        if any(n % p for n, p in zip(voxels, config.patch, strict=True)):
            raise ValueError(
                f"a volume of {tuple(voxels)} voxels does not divide into patches of {config.patch}"
            )
        (T, H, W), (t, h, w) = grid, config.patch
        patches = (
            volume.reshape(B, T, t, H, h, W, w).transpose(0, 1, 3, 5, 2, 4, 6).reshape(B, T, H, W, t * h * w)
        )
        x = image_norm(config, "patch_in")(name="patch_norm")(patches.astype(jnp.float32))
        size = math.prod(config.patch)
        x = linear(config.dim, ("embed", "mlp"), name="patch", dtype=self.dtype, bias_fan_in=size)(x)
        return image_norm(config, "patch_out")(name="patch_out_norm")(x.astype(jnp.float32))


class TextEncoder(nn.Module):
    """A post-norm transformer in BERT's shape (Devlin et al. 2019); gives the state of token 0."""

    config: TextConfig
    vocab_size: int
    max_length: int
    dtype: Any
    remat: Remat

    @nn.compact
    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B C"]:
        config = self.config
        mask: Bool[Array, "B L"] = tokens != 0
        norm = functools.partial(Norm, kind="layernorm", eps=BERT_EPS, impl=config.norm_impl)
        normal = nn.initializers.normal(0.02)
        init = nn.with_logical_partitioning(normal, ("vocab", "embed"))
        x = nn.Embed(self.vocab_size, config.dim, embedding_init=init, name="words")(tokens)
        x = x + parameter(self, "segment", normal, (None, "embed"), (2, config.dim))[None, :1]
        x = PositionEmbedding("learned", self.max_length, name="positions")(x)
        x = norm(name="embedding_norm")(x)
        layer = functools.partial(
            _TextLayer,
            attention=functools.partial(
                Attention,
                heads=config.heads,
                head_dim=config.dim // config.heads,
                impl=config.attention_impl,
                bias="all",
                dtype=self.dtype,
            ),
            ffn=functools.partial(Ffn, kind="gelu", width=config.ffn_dim, bias="all", dtype=self.dtype),
            norm=norm,
        )
        return Stack(layer, config.depth, remat=self.remat, name="layers")(x, mask)[:, 0]


class _TextLayer(nn.Module):
    """A post-norm block that takes the mask as a positional argument, as `Stack` hands it on."""

    attention: Any
    ffn: Any
    norm: Any

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        return Block(self.attention, self.ffn, self.norm, placement="post", name="block")(x, mask=mask)


class CtClip(nn.Module):
    """Both encoders and their projections to unit vectors of one latent space."""

    config: ClipModel
    vocab_size: int
    text_length: int
    dtype: Any = jnp.float32
    remat: Remat = "none"

    def setup(self) -> None:
        config, dtype = self.config, self.dtype
        self.image = ImageEncoder(config.image, dtype, self.remat)
        self.text = TextEncoder(config.text, self.vocab_size, self.text_length, dtype, self.remat)
        self.image_projection = linear(config.latent, ("embed", "mlp"), name=None, dtype=dtype)
        self.text_projection = linear(config.latent, ("embed", "mlp"), name=None, dtype=dtype)
        start, bias = (1.0, 0.0) if config.loss == "softmax" else (math.log(10.0), -10.0)
        constant = nn.initializers.constant
        self.log_temperature = parameter(self, "log_temperature", constant(start), (), ())
        if config.loss == "siglip":
            self.logit_bias = parameter(self, "logit_bias", constant(bias), (), ())

    def encode_image(
        self, volume: Float[Array, "B depth height width"]
    ) -> tuple[Float[Array, "B latent"], Sums]:
        x, sums = self.image(volume)
        pooled = x.mean(axis=1).reshape(x.shape[0], -1)  # mean over time, then the frame in one vector
        return l2norm(self.image_projection(pooled)), sums

    def encode_text(self, tokens: Int[Array, "B L"]) -> Float[Array, "B latent"]:
        return l2norm(self.text_projection(self.text(tokens)))

    def __call__(
        self, volume: Float[Array, "B depth height width"], tokens: Int[Array, "B L"]
    ) -> tuple[Float[Array, "B latent"], Float[Array, "B latent"], Sums]:
        image, sums = self.encode_image(volume)
        return image, self.encode_text(tokens), sums


def softmax_loss(
    image: Float[Array, "B latent"], text: Float[Array, "B latent"], log_temperature: Float[Array, ""]
) -> Float[Array, ""]:
    """Symmetric InfoNCE (Radford et al. 2021): mean of row and column cross-entropy of exp(theta) * T I^T."""
    logits = jnp.exp(log_temperature) * (text @ image.T)
    matched = jnp.diagonal(logits)
    rows = jax.nn.logsumexp(logits, axis=1) - matched
    columns = jax.nn.logsumexp(logits, axis=0) - matched
    return (rows.mean() + columns.mean()) / 2


def siglip_loss(
    image: Float[Array, "B latent"],
    text: Float[Array, "B latent"],
    log_temperature: Float[Array, ""],
    bias: Float[Array, ""],
) -> Float[Array, ""]:
    """Pairwise sigmoid loss (Zhai et al. 2023), summed over all pairs and divided by the batch."""
    logits = jnp.exp(log_temperature) * (text @ image.T) + bias
    sign = 2 * jnp.eye(logits.shape[0], dtype=logits.dtype) - 1
    return -jnp.sum(jax.nn.log_sigmoid(sign * logits)) / logits.shape[0]
