"""How the norm kernels for GPUs cut their work: `Config`, a heuristic per device, what is worth timing."""

import dataclasses

from jaxablate_gpus import GPUS, find
from jaxablate_kernels.norm.spec import NormSpec

# One block holds a whole row.  Beyond the first width the sums over rows do not fit into registers beside
# it (XLA makes them then); beyond the second the row itself does not.
WIDEST_WITH_SUMS = 8192
WIDEST = {"rms": 16384, "layer": 8192}


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        rows, warps: of a program of the forward pass; powers of two.
        backward_rows, backward_warps: rows that a program of the backward pass takes at a time, and its warps.
        groups: at most so many programs in the backward pass.  Each takes an equal run of rows and adds up
            the gradients of scale and bias over it, so a gradient's sum has at most this many terms left.
        stages: 1, or 2 to load the next rows of the run while these are worked on.

    Raises:
        ValueError: a number out of its range.
    """

    rows: int
    warps: int
    backward_rows: int
    backward_warps: int
    groups: int
    stages: int

    def __post_init__(self):
        for name in ("rows", "warps", "backward_rows", "backward_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1, got {self.groups}")
        if self.stages not in (1, 2):
            raise ValueError(f"stages must be 1 or 2, got {self.stages}")


def heuristic(spec: NormSpec, device: str) -> Config:
    """The choice where nothing was measured.

    Forward, 16 elements of each array per thread, which in bfloat16 are two accesses of 16 bytes, and rows
    enough for four warps, less where there would not be two programs for every multiprocessor.  Backward
    the same rows with 8 elements per thread, and as many programs as run at a time with the registers that
    these kernels need.
    """
    known = find(device)
    # Of a device that is not in the table the least of them, which fits everywhere.
    cores = known.cores if known else min(gpu.cores for gpu in GPUS.values())
    width = block_width(spec.dim)
    rows = max(1, 2048 // width)
    while rows > 1 and -(-spec.rows // rows) < 2 * cores:
        rows //= 2
    warps, backward_warps = _warps(rows, width, 512), _warps(rows, width, 256)
    # 24 warps of 80 registers per thread fit; the widest rows need more, so there is one program of them.
    fit = 24 // backward_warps if rows * width <= 256 * backward_warps else 1
    # A program for fewer than four blocks of rows would write more than it saves, unless a core were idle.
    groups = min(cores * fit, max(cores, -(-spec.rows // (4 * rows))))
    return Config(rows, warps, rows, backward_warps, groups, stages=1)


def candidates(spec: NormSpec, device: str) -> tuple[Config, ...]:
    """What is worth timing; the heuristic's choice first."""
    first = heuristic(spec, device)
    width = block_width(spec.dim)
    configs = [first, dataclasses.replace(first, stages=2)]
    configs += [dataclasses.replace(first, groups=max(1, int(first.groups * by))) for by in (4 / 3, 1 / 2, 2)]
    for rows in (1, first.rows // 2, first.rows * 2):
        if rows >= 1 and rows * width <= 8192 and rows <= spec.rows:
            warps = _warps(rows, width, 512)
            configs.append(dataclasses.replace(first, rows=rows, warps=warps))
            configs.append(dataclasses.replace(first, backward_rows=rows, backward_warps=warps))
    if first.warps > 1:
        configs.append(
            dataclasses.replace(first, warps=first.warps // 2, backward_warps=first.backward_warps // 2)
        )
    return tuple(dict.fromkeys(configs))


def _warps(rows: int, width: int, elements: int) -> int:
    """Warps of so many elements each; 32 is the most there can be, 16 the most with 128 registers a thread."""
    return min(16 if width <= WIDEST_WITH_SUMS else 32, max(1, rows * width // elements))


def block_width(dim: int) -> int:
    """D rounded up to a power of two: the width of every block."""
    return 1 << (dim - 1).bit_length()
