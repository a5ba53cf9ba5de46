"""How the attention kernels for GPUs cut their work, and which cut suits which problem on which device."""

import dataclasses
from typing import Literal

from jaxablate_gpus import is_hopper_or_later
from jaxablate_kernels.attention.spec import AttentionSpec

# Triton multiplies matrices of at least 16 x 16.
SMALLEST = 16

# What a program of the short path may go through while others idle, and how many of them fill a device.
_FEW_QUERIES = 1024
_PROGRAMS = 128

Path = Literal["short", "streaming"]
Prologue = Literal["inside", "outside"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles, warps and pipeline stages of the forward and of the backward pass.

    Attributes:
        path: ``short`` holds all keys of a sequence on chip, ``streaming`` goes through them in blocks.
        block_q: queries in a tile of the forward pass.
        block_k: keys in a tile of the forward pass; short: all, the number is not used.
        num_warps, num_stages: of the forward pass.
        block_q_backward: queries in a tile of the backward pass; streaming: of its dK and dV kernel, which
            holds `block_k_backward` keys and goes through the queries.  The dQ kernel has it the other way
            round: it holds `block_k_backward` queries and goes through `block_q_backward` keys at a time.
        block_k_backward: see there; short: not used.
        num_warps_backward, num_stages_backward: of the backward pass.
        heads: short: key/value heads that a program computes one after the other; a divisor of K.
        prologue: where QK-norm and rotary positions are applied: ``inside`` the kernels, which only the short
            path can, or ``outside`` by XLA, before them.

    Raises:
        ValueError: a block that is no power of two from 16 on, warps that are no power of two up to 16, or
            stages or heads below 1.
    """

    path: Path
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    block_q_backward: int
    block_k_backward: int
    num_warps_backward: int
    num_stages_backward: int
    heads: int = 1
    prologue: Prologue = "outside"

    def __post_init__(self):
        if self.path not in ("short", "streaming"):
            raise ValueError(f"path must be 'short' or 'streaming', got {self.path!r}")
        if self.prologue not in ("inside", "outside"):
            raise ValueError(f"prologue must be 'inside' or 'outside', got {self.prologue!r}")
        if self.path == "streaming" and (self.prologue, self.heads) != ("outside", 1):
            raise ValueError("the streaming path has its prologue outside and one head per program")
        for name in ("block_q", "block_k", "block_q_backward", "block_k_backward"):
            size = getattr(self, name)
            if size < SMALLEST or size & (size - 1):
                raise ValueError(f"{name} must be a power of two from {SMALLEST} on, got {size}")
        for name in ("num_warps", "num_warps_backward"):
            if getattr(self, name) not in (1, 2, 4, 8, 16):
                raise ValueError(f"{name} must be 1, 2, 4, 8 or 16, got {getattr(self, name)}")
        for name in ("num_stages", "num_stages_backward", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def block_of(length: int) -> int:
    """The smallest tile that holds so many rows."""
    return max(SMALLEST, 1 << (length - 1).bit_length())


def head_width(head_dim: int) -> int:
    """W, the head dimension padded for the matrix unit."""
    return block_of(head_dim)


def path_reason(config: Config, spec: AttentionSpec) -> str | None:
    """Why a config cannot compute a problem, in one line; None if it can."""
    if config.path == "short" and spec.kv_heads % config.heads:
        return f"config.heads is {config.heads}, which does not divide the {spec.kv_heads} key/value heads"
    return None


def heuristic(spec: AttentionSpec, device: str) -> Config:
    """The config for a problem that nobody has timed; on any device."""
    return _short(spec, device) if _fits_short(spec, device) else _streaming(spec, device)


def candidates(spec: AttentionSpec, device: str) -> tuple[Config, ...]:
    """What is worth timing; the heuristic's choice first."""
    configs = [heuristic(spec, device)]
    if _fits_short(spec, device):
        short = _short(spec, device)
        configs += [
            *_varied(short, "block_q", "num_warps"),
            *_varied(short, "block_q_backward", "num_warps_backward"),
            *(
                dataclasses.replace(short, heads=heads)
                for heads in (1, 2, 4, 8)
                if spec.kv_heads % heads == 0
            ),
        ]
    streaming = _streaming(spec, device)
    configs += [
        streaming,
        *_varied(streaming, "block_q", "num_warps"),
        *_varied(streaming, "block_k", "num_warps"),
        *_varied(streaming, "block_q_backward", "num_warps_backward"),
        *_varied(streaming, "block_k_backward", "num_warps_backward"),
        dataclasses.replace(streaming, num_stages=2, num_stages_backward=1),
        dataclasses.replace(streaming, num_stages=3, num_stages_backward=3),
    ]
    return tuple(dict.fromkeys(configs))


def _varied(config: Config, block: str, warps: str) -> list[Config]:
    """Half and double the block, with as many warps, and in proportion; half and double the warps."""
    made = []
    for by_block, by_warps in ((0.5, 1.0), (0.5, 0.5), (2.0, 1.0), (2.0, 2.0), (1.0, 0.5), (1.0, 2.0)):
        size, count = int(getattr(config, block) * by_block), int(getattr(config, warps) * by_warps)
        if SMALLEST <= size <= 128 and 1 <= count <= 8:
            made.append(dataclasses.replace(config, **{block: size, warps: count}))
    return made


def _fits_short(spec: AttentionSpec, device: str) -> bool:
    """Whether keys, values and the sums of their gradients fit into the registers of eight warps.

    A row of logits lies in one warp, since a product follows that contracts over it: 16 rows of 256 are half of
    the warp's registers, and a tile of bias beside them the other half.

    And whether the backward pass, a program for each batch row and key/value head, has enough of those to fill
    a device, or few queries for each to go through.
    """
    limit = 16 if _roomy(device) else 4 if _crowded(spec) else 8
    fits = block_of(spec.kv_len) <= (128 if _crowded(spec) else 256) and _held(spec) <= limit
    busy = spec.q_len <= _FEW_QUERIES or spec.batch * spec.kv_heads >= _PROGRAMS
    return fits and busy


def _held(spec: AttentionSpec) -> int:
    """What a program of the short path holds throughout, in units of 1024 numbers of two bytes, at least 1."""
    return max(1, block_of(spec.kv_len) * head_width(spec.head_dim) * _bytes(spec) // 2048)


def _crowded(spec: AttentionSpec) -> bool:
    """Whether tiles of other things stand beside the tile of logits."""
    return spec.bias is not None or spec.softcap or spec.segments


def _roomy(device: str) -> bool:
    """Whether matrices are multiplied out of shared memory; before Hopper they go through the registers."""
    return is_hopper_or_later(device)


def _bytes(spec: AttentionSpec) -> int:
    return 4 if spec.dtype == "float32" else 2


def _short(spec: AttentionSpec, device: str) -> Config:
    """Warps and tiles with which nothing spilled when compiled for A100, H100 and B200."""
    keys, queries, width = block_of(spec.kv_len), block_of(spec.q_len), head_width(spec.head_dim)
    prologue: Prologue = "outside"
    load = _held(spec)
    if _crowded(spec):
        load *= 2
    elif spec.rotary is not None:  # tables, and a product with the permutation
        if load <= (8 if _roomy(device) else 2) and width <= 64:
            prologue, load = "inside", 4 * load
    elif spec.qk_norm is not None and load <= 4:
        prologue, load = "inside", 2 * load
    block_q = min(queries, 64)
    most = max(1, keys * width // 256)
    return Config(
        path="short",
        block_q=block_q,
        block_k=SMALLEST,
        num_warps=min(most, max(_warps(load, (2, 4, 8)), _warps(keys * block_q, (2048, 4096, 8192)))),
        num_stages=1,
        block_q_backward=min(
            queries, 32 if load < (4 if _crowded(spec) else 8 if _roomy(device) else 9) else 16
        ),
        block_k_backward=SMALLEST,
        num_warps_backward=min(most, _warps(load, (1, 2, 4))),
        num_stages_backward=1,
        heads=_several(spec) if keys * queries <= 1024 else 1,
        prologue=prologue,
    )


def _warps(load: int, most: tuple[int, int, int]) -> int:
    """1, 2, 4 or 8 warps, for a load of at most the first, the second, the third number, or more."""
    return next((1 << i for i, limit in enumerate(most) if load <= limit), 8)


def _several(spec: AttentionSpec) -> int:
    """Heads for one program where a head alone is too little work for it: up to 8."""
    return max(n for n in (1, 2, 4, 8) if spec.kv_heads % n == 0)


def _streaming(spec: AttentionSpec, device: str) -> Config:
    """Tiles measured for kernels of this kind on an H100; smaller, or for more warps, where something spilled."""
    features = head_width(spec.head_dim)
    width = features * _bytes(spec) // 2
    crowded, exact, roomy = _crowded(spec), spec.dtype == "float32", _roomy(device)
    if width <= 32:
        return Config("streaming", 64, 32 if crowded else 64, 4, 3, 32, 64, 8 if crowded else 2, 2)
    block_q = 64 if crowded or spec.has_kv_mask else 128
    if width <= 64:
        step = 32 if exact and (crowded or not roomy) else 64
        return Config("streaming", block_q, 64, 4, 3, step, 64, 8 if crowded and exact else 4, 2)
    if width <= 128:
        step = 16 if crowded and exact else 32
        held = 32 if crowded and not roomy else 64
        warps = 8 if crowded or spec.head_dim < features else 4
        return Config("streaming", block_q, 64, 8, 2, step, held, warps, 2)
    step = 16 if crowded or (exact and not roomy) else 32
    held = 16 if exact else 32
    if width <= 256 and roomy:
        return Config("streaming", 64, 32, 8, 2, step, held, 4 if exact else 8, 1)
    if width <= 256:
        return Config("streaming", 32, 16, 4, 2, step, held, 8, 1)
    return Config("streaming", 16, 16, 4, 1, 16, 16, 8, 1)
