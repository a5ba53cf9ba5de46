"""The gated product on a GPU: elementwise kernels, one pass forward and one backward (Pallas, for Triton).

Each program takes a tile of both halves, computes in float32 and writes its result once; the backward pass
writes both halves of the gradient into one array, which XLA otherwise may put together in a pass of its
own.  Kept from the forward pass is h alone.  Formulas as in `recompute`.

Bytes per row of a width W, with e the size of an element: 3 W e forward, 5 W e backward, both the ideal.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxablate_kernels import tuning
from jaxablate_kernels.devices import target
from jaxablate_kernels.dispatch import Implementation
from jaxablate_kernels.gated.spec import GatedSpec, Halves, Kind, Product, unsupported_dtype
from jaxablate_kernels.manual_axes import shaped

DTYPES = ("float32", "bfloat16", "float16")
_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        rows, width: sizes of a tile of either half, powers of two.
        warps: of a program, a power of two.

    Raises:
        ValueError: a size that is no power of two.
    """

    rows: int
    width: int
    warps: int

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")


def heuristic(spec: GatedSpec, device: str) -> Config:
    """The choice where nothing was measured: 8 elements of each half per thread, as 16-byte accesses in bfloat16.

    The tile is as wide as it can be with at most an eighth of its columns beyond the width: long rows of
    a tile are long runs of memory.
    """
    return candidates(spec, device)[0]


def candidates(spec: GatedSpec, device: str) -> tuple[Config, ...]:
    """What is worth timing; the heuristic's choice first."""
    del device  # a tile fits everywhere, and there are more of them than any device runs at a time
    widths = [w for w in (1024, 512, 256, 128, 64) if pl.cdiv(spec.width, w) * w <= spec.width * 9 / 8]
    width = widths[0] if widths else min(64, pl.next_power_of_2(spec.width))
    tiles = [(width, 1024, 4), (width, 2048, 4), (width, 1024, 2), (width, 2048, 8)]
    tiles += [(other, 1024, 4) for other in widths[1:2]]
    most = pl.next_power_of_2(spec.rows)
    configs = (Config(min(most, max(1, size // w)), w, warps) for w, size, warps in tiles)
    return tuple(dict.fromkeys(configs))


class _Static(NamedTuple):
    """What is fixed when the program is compiled."""

    kind: Kind
    config: Config
    interpret: bool


def gated(h: Halves, *, kind: Kind, config: Config | None = None, interpret: bool = False) -> Product:
    """As `jaxablate_kernels.gated`, which checks the arguments.

    Args:
        h, kind: as there.
        config: by default the tuned one, or else the heuristic's.
        interpret: run the kernels as JAX operations, on any platform; for tests.
    """
    if config is None:
        spec, (_, device) = GatedSpec.of(h, kind=kind), target()
        config = tuning.config_for("gated", "pallas", spec, device, Config) or heuristic(spec, device)
    return _gated(h, _Static(kind, config, interpret))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gated(h, static: _Static):
    return gated_pallas(h, static)


def _gated_fwd(h, static: _Static):
    return gated_pallas(h, static), h


def _gated_bwd(static: _Static, h, dy):
    return (gated_pallas_backward(h, dy, static),)


_gated.defvjp(_gated_fwd, _gated_bwd)


# The names of the next two functions are the kernel names: jit puts them in jaxpr and lowered text.
@functools.partial(jax.jit, static_argnames=("static",))
def gated_pallas(h: Halves, static: _Static) -> Product:
    """The product, in h's type."""
    y = _launch("gated_pallas", _forward_kernel, (h,), 1, static)
    return y.reshape(*h.shape[:-2], h.shape[-1])


@functools.partial(jax.jit, static_argnames=("static",))
def gated_pallas_backward(h: Halves, dy: Product, static: _Static) -> Halves:
    """The gradient of h."""
    return _launch("gated_pallas_backward", _backward_kernel, (h, dy[..., None, :]), 2, static).reshape(
        h.shape
    )


def _launch(name: str, kernel: Any, arrays: tuple[jax.Array, ...], halves: int, static: _Static) -> jax.Array:
    """Run a kernel over tiles of arrays (..., 1 or 2, W) for a result (N, halves, W)."""
    config, like = static.config, arrays[0]
    rows, width = math.prod(like.shape[:-2]), like.shape[-1]
    arrays = tuple(x.reshape(rows, -1, width) for x in arrays)

    def tiles(halves: int) -> pl.BlockSpec:
        return pl.BlockSpec((config.rows, halves, config.width), lambda i, j: (i, 0, j))

    return pl.pallas_call(
        functools.partial(kernel, kind=static.kind, sizes=(rows, width)),
        name=name,
        grid=(pl.cdiv(rows, config.rows), pl.cdiv(width, config.width)),
        in_specs=[tiles(x.shape[1]) for x in arrays],
        out_specs=tiles(halves),
        out_shape=shaped((rows, halves, width), like.dtype, like),
        compiler_params=plgpu.CompilerParams(num_warps=config.warps, num_stages=1),
        interpret=static.interpret,
    )(*arrays)


def _forward_kernel(h_ref, y_ref, *, kind: Kind, sizes: tuple[int, int]):
    inside = _inside(h_ref, sizes)
    first, second = _load(h_ref, 0, inside), _load(h_ref, 1, inside)
    y = first * second * (_normal(second)[0] if kind == "geglu" else _logistic(first))
    _store(y_ref, 0, inside, y)


def _backward_kernel(h_ref, dy_ref, dh_ref, *, kind: Kind, sizes: tuple[int, int]):
    inside = _inside(h_ref, sizes)
    first, second = _load(h_ref, 0, inside), _load(h_ref, 1, inside)
    dy = _load(dy_ref, 0, inside)
    if kind == "geglu":
        below, density = _normal(second)
        dfirst, dsecond = second * below, first * (below + second * density)
    else:
        gate = _logistic(first)
        dfirst, dsecond = second * gate * (1.0 + first * (1.0 - gate)), first * gate
    _store(dh_ref, 0, inside, dy * dfirst)
    _store(dh_ref, 1, inside, dy * dsecond)


def _inside(ref: Any, sizes: tuple[int, int]) -> jax.Array | None:
    """Which entries of a half (rows, 1, width) of this program's tile exist; None if all of every tile do."""
    rows, _, width = ref.shape
    exists = None
    for grid_axis, axis, block, size in ((0, 0, rows, sizes[0]), (1, 2, width, sizes[1])):
        if size % block:
            index = pl.program_id(grid_axis) * block + lax.broadcasted_iota(jnp.int32, (rows, 1, width), axis)
            exists = index < size if exists is None else exists & (index < size)
    return exists


def _load(ref: Any, half: int, inside: jax.Array | None) -> jax.Array:
    """One half of a tile, (rows, 1, width), in float32; zeros outside of the array."""
    view = ref.at[:, pl.ds(half, 1), :]
    tile = plgpu.load(view) if inside is None else plgpu.load(view, mask=inside, other=0.0)
    return tile.astype(jnp.float32)


def _store(ref: Any, half: int, inside: jax.Array | None, tile: jax.Array) -> None:
    plgpu.store(ref.at[:, pl.ds(half, 1), :], tile.astype(ref.dtype), mask=inside)


def _logistic(x: jax.Array) -> jax.Array:
    """1 / (1 + exp(-x)); exp2 is one instruction."""
    return 1.0 / (1.0 + jnp.exp2(x * -_LOG2E))


def _normal(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The normal distribution up to x and its density at x.

    Pallas cannot lower erf for Triton.  This is Abramowitz & Stegun 26.2.17, whose absolute error is below
    7.5e-8, and in float32 arithmetic below 3e-7; the exponential in it is the one that the density needs.
    """
    density = jnp.exp2(x * x * (-0.5 * _LOG2E)) * (1 / math.sqrt(2 * math.pi))
    t = 1.0 / (1.0 + 0.2316419 * jnp.abs(x))
    series = jnp.full_like(t, 1.330274429)
    for coefficient in (-1.821255978, 1.781477937, -0.356563782, 0.319381530):
        series = series * t + coefficient
    beyond = density * series * t  # the distribution beyond |x|
    return jnp.where(x < 0, beyond, 1.0 - beyond), density


def supports(spec: GatedSpec, platform: str) -> str | None:
    """`Implementation.supports`: GPUs; any shape."""
    if platform != "gpu":
        return f"platform is {platform}, supported is gpu"
    return unsupported_dtype(spec, DTYPES)


IMPLEMENTATION = Implementation(
    op="gated",
    name="pallas",
    kernel_name="gated_pallas",
    supports=supports,
    call=gated,
    candidates=candidates,
)
