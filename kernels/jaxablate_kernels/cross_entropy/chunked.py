"""Linear cross-entropy that never holds the logits, in plain XLA, on any platform.

The vocabulary is visited in chunks of `block_v` words, and for each the tokens in blocks of `block_n`;
alive are block_n * block_v logits.

Forward: an online log-sum-exp (Milakov & Gimelshein 2018, arXiv:1805.02867).  Per token the maximum m of the
logits so far, the sum of exp(logit - m), and the target's logit once its chunk has come by.

Backward: kept are the arguments and lse.  A chunk's logits are computed again, and with the cotangents
g of nll and h of z, per token n and word v,

    dlogits = (g + 2 z_loss lse h) exp(logits - lse) - g [v is n's target],
    dlogits *= 1 - (logits / softcap)^2   with a cap,
    dx += dlogits w^T,   dw = x^T dlogits,   dbias = sum over n of dlogits.

The vocabulary is the outer loop, so that dw and dbias of a chunk are finished, in float32, before they are
rounded and put in their place; what grows with the vocabulary is then w and dw themselves and nothing else.
(XLA on a CPU computes bfloat16 in float32 and widens a bfloat16 w as a whole; not so a float32 w.)
Everything is summed in an order that shapes and configuration fix.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxablate_kernels import tuning
from jaxablate_kernels.cross_entropy.spec import (
    Bias,
    CrossEntropySpec,
    Features,
    PerToken,
    Static,
    Targets,
    TokenLosses,
    Weights,
    is_target,
    logits_of,
    losses_of,
    sound,
    supports_by_xla,
)
from jaxablate_kernels.devices import target
from jaxablate_kernels.dispatch import Implementation
from jaxablate_kernels.dtypes import accurate_dtype
from jaxablate_kernels.manual_axes import match_varying


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut; block_n * block_v logits are alive at a time, in float32.

    Attributes:
        block_n: at most so many tokens at a time; they are cut evenly.
        block_v: so many words at a time; the last chunk holds what is left.

    Raises:
        ValueError: a block smaller than 1.
    """

    block_n: int
    block_v: int

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def heuristic(spec: CrossEntropySpec, device: str) -> Config:
    """A choice from the shape alone: logits that stay in the last cache between the passes over them."""
    return candidates(spec, device)[0]


def candidates(spec: CrossEntropySpec, device: str) -> tuple[Config, ...]:
    """What is worth timing; the heuristic's choice first."""
    del spec  # a block larger than the problem is cut down to it
    if device == "cpu":
        return tuple(Config(n, v) for n in (1024, 512, 256) for v in (1024, 2048, 512))
    return tuple(Config(n, v) for n in (2048, 1024, 4096) for v in (2048, 1024, 4096))


def linear_cross_entropy(
    x: Features,
    w: Weights,
    targets: Targets,
    *,
    bias: Bias | None,
    static: Static,
    config: Config | None = None,
) -> TokenLosses:
    """The losses without the logits; arguments and result as in `jaxablate_kernels.cross_entropy`."""
    if config is None:
        options = {"ignore_index": static.ignore_index, "z_loss": static.z_loss, "softcap": static.softcap}
        spec, device = CrossEntropySpec.of(x, w, targets, bias=bias, **options), target()[1]
        config = tuning.config_for("cross_entropy", "chunked", spec, device, Config)
        config = config or heuristic(spec, device)
    x, w, targets, bias = match_varying(x, w, targets, bias)
    return _linear_cross_entropy(x, w, targets, bias, static, config)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _linear_cross_entropy(x, w, targets, bias, static: Static, config: Config):
    return cross_entropy_chunked(x, w, targets, bias, static, config)[0]


def _forward(x, w, targets, bias, static: Static, config: Config):
    losses, lse = cross_entropy_chunked(x, w, targets, bias, static, config)
    return losses, (x, w, targets, bias, lse)


def _backward(static: Static, config: Config, residuals, cotangent: TokenLosses):
    dx, dw, dbias = cross_entropy_chunked_backward(*residuals, cotangent, static, config)
    return dx, dw, None, dbias


_linear_cross_entropy.defvjp(_forward, _backward)


# The names of the next two functions are the kernel names: jit puts them in jaxpr and lowered text.
@functools.partial(jax.jit, static_argnames=("static", "config"))
def cross_entropy_chunked(
    x: Features, w: Weights, targets: Targets, bias: Bias | None, static: Static, config: Config
) -> tuple[TokenLosses, PerToken]:
    """The losses, and the log-sum-exp (N,) of each token's logits."""
    accurate = accurate_dtype(x.dtype)
    blocks = _split(x, config), _split(targets, config)
    _, *state = match_varying(
        x,
        jnp.full(blocks[1].shape, jnp.finfo(accurate).min, accurate),  # finite: no -inf - (-inf)
        jnp.zeros(blocks[1].shape, accurate),
        jnp.zeros(blocks[1].shape, accurate),
    )

    def fold(state, chunk: _Chunk):
        """Add a chunk to m, the sum and the target's logit, each (blocks, n)."""

        def one_block(_, block):
            x, targets, m_before, total, picked = block
            logits = logits_of(x, chunk.w, chunk.bias, static.softcap)
            m = jnp.maximum(m_before, jnp.max(logits, axis=1))
            total = total * jnp.exp(m_before - m) + jnp.sum(jnp.exp(logits - m[:, None]), axis=1)
            here = is_target(targets, chunk.start, chunk.width)
            picked = picked + jnp.sum(logits, axis=1, where=here)
            return None, (m, total, picked)

        return list(jax.lax.scan(one_block, None, (*blocks, *state))[1])

    m, total, picked = _over_chunks(fold, state, w, bias, config)
    lse, picked = _join(m + jnp.log(total), x.shape[0]), _join(picked, x.shape[0])
    return losses_of(lse, picked, targets, w.shape[1], static), lse


@functools.partial(jax.jit, static_argnames=("static", "config"))
def cross_entropy_chunked_backward(
    x: Features,
    w: Weights,
    targets: Targets,
    bias: Bias | None,
    lse: PerToken,
    cotangent: TokenLosses,
    static: Static,
    config: Config,
) -> tuple[Features, Weights, Bias | None]:
    """The gradients of x, w and, if there is one, bias, given the forward's lse and the losses' cotangents."""
    accurate, ignored = accurate_dtype(x.dtype), targets == static.ignore_index
    of_target = cotangent.nll * sound(targets, w.shape[1], static, accurate)
    of_lse = of_target + 2 * static.z_loss * lse * cotangent.z
    factors = [jnp.where(ignored, jnp.zeros_like(lse), factor) for factor in (of_target, of_lse)]
    # Tokens of padding have factor 0, as those that are ignored, and a probability of 0, lest 0 * inf.
    blocks = _split(x, config), _split(targets, config), _split(lse, config, jnp.inf)
    blocks = (*blocks, *(_split(factor, config) for factor in factors))
    _, *state = match_varying(
        x,
        jnp.zeros(blocks[0].shape, accurate),
        jnp.zeros(w.shape, w.dtype),
        None if bias is None else jnp.zeros(bias.shape, bias.dtype),
    )

    def add(state, chunk: _Chunk):
        """Add a chunk's share to dx (blocks, n, D), and put its own dw and dbias in their place."""
        dx, dw, dbias = state

        def one_block(sums, block):
            x, targets, lse, of_target, of_lse, dx = block
            logits = logits_of(x, chunk.w, chunk.bias, static.softcap)
            dlogits = of_lse[:, None] * jnp.exp(logits - lse[:, None])
            here = is_target(targets, chunk.start, chunk.width)
            dlogits = dlogits - jnp.where(here, of_target[:, None], jnp.zeros_like(dlogits))
            if static.softcap is not None:
                dlogits = dlogits * (1 - jax.lax.square(logits / static.softcap))
            rounded = dlogits.astype(x.dtype)
            dx = dx + _matmul(rounded, chunk.w.astype(x.dtype), contract=(1, 1))
            own_dw, own_dbias = sums
            own_dw = own_dw + _matmul(x, rounded, contract=(0, 0))
            if own_dbias is not None:
                own_dbias = own_dbias + jnp.sum(dlogits, axis=0)
            return (own_dw, own_dbias), dx

        _, own_dw, own_dbias = match_varying(
            x,
            jnp.zeros(chunk.w.shape, accurate),
            None if bias is None else jnp.zeros(chunk.width, accurate),
        )
        (own_dw, own_dbias), dx = jax.lax.scan(one_block, (own_dw, own_dbias), (*blocks, dx))
        dw = jax.lax.dynamic_update_slice_in_dim(dw, own_dw.astype(dw.dtype), chunk.start, axis=1)
        if own_dbias is not None:
            own_dbias = own_dbias.astype(dbias.dtype)
            dbias = jax.lax.dynamic_update_slice_in_dim(dbias, own_dbias, chunk.start, axis=0)
        return [dx, dw, dbias]

    dx, dw, dbias = _over_chunks(add, state, w, bias, config)
    return _join(dx, x.shape[0]).astype(x.dtype), dw, dbias


class _Chunk(NamedTuple):
    """Some words of the vocabulary."""

    start: Any  # the first; an int or a traced int32
    w: jax.Array  # (D, width)
    bias: jax.Array | None  # (width,)

    @property
    def width(self) -> int:
        return self.w.shape[1]


def _over_chunks(body, state, w, bias, config: Config):
    """``state = body(state, chunk)`` for the chunks of the vocabulary in turn, the last maybe shorter.

    The chunks are sliced inside the loop: cut beforehand, they would be a copy of w.  (Under vmap a slice
    is a gather with one index, which XLA turns into a slice again.)
    """
    vocab = w.shape[1]
    width = min(config.block_v, vocab)

    def chunk(start, width) -> _Chunk:
        own_bias = None if bias is None else jax.lax.dynamic_slice_in_dim(bias, start, width, axis=0)
        return _Chunk(start, jax.lax.dynamic_slice_in_dim(w, start, width, axis=1), own_bias)

    whole, rest = divmod(vocab, width)
    if whole > 1:
        state = jax.lax.fori_loop(0, whole, lambda i, state: body(state, chunk(i * width, width)), state)
    else:
        state = body(state, _Chunk(0, w[:, :width], None if bias is None else bias[:width]))
    if rest:
        start = whole * width
        state = body(state, _Chunk(start, w[:, start:], None if bias is None else bias[start:]))
    return state


def _split(a, config: Config, fill: float = 0):
    """(N, ...) -> (blocks, n, ...) with n <= block_n, cut evenly, the last block filled up."""
    blocks = -(-a.shape[0] // config.block_n)
    n = -(-a.shape[0] // blocks)
    padding = blocks * n - a.shape[0]
    if padding:
        a = jnp.pad(a, [(0, padding), *[(0, 0)] * (a.ndim - 1)], constant_values=fill)
    return a.reshape(blocks, n, *a.shape[1:])


def _join(blocks, tokens: int):
    """(blocks, n, ...) -> (N, ...), without the padding."""
    return blocks.reshape(-1, *blocks.shape[2:])[:tokens]


def _matmul(left, right, *, contract: tuple[int, int]):
    """Product over one axis of each, summed in at least float32, whatever the operands are."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=accurate_dtype(left.dtype))


IMPLEMENTATION = Implementation(
    op="cross_entropy",
    name="chunked",
    kernel_name="cross_entropy_chunked",
    supports=supports_by_xla,
    call=linear_cross_entropy,
    candidates=candidates,
)
