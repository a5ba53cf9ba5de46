"""RMSNorm in Triton's own language; `triton` calls it.  Needs the triton package, no GPU to compile.

The plan is that of `pallas_gpu`: a row within a block, sums over a run of rows in registers.  Triton reads
the source of these functions, so nothing may wrap them: tests, which check annotations, are told not to.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def rms_forward(
    x,
    scale,
    y,
    mean_square,
    COUNT: tl.constexpr,
    DIM: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """y (COUNT, DIM) and the mean square (COUNT,) of each row; a program has ROWS rows.

    WIDTH is DIM rounded up to a power of two.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < COUNT)[:, None] & (column < DIM)[None, :]
    # A row's first element may be more than 2^31 elements away.
    at = row.to(tl.int64)[:, None] * DIM + column[None, :]

    block = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    square = tl.sum(block * block, axis=1) / DIM
    weight = tl.load(scale + column, mask=column < DIM, other=0.0).to(tl.float32)
    normed = block * tl.rsqrt(square + EPS)[:, None] * weight[None, :]
    tl.store(y + at, normed.to(y.dtype.element_ty), mask=inside)
    tl.store(mean_square + row, square, mask=row < COUNT)


@triton.jit
@no_type_check
def rms_backward(
    x,
    mean_square,
    scale,
    dy,
    dx,
    dscale,
    COUNT: tl.constexpr,
    DIM: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):
    """dx (COUNT, DIM), and each program's sum dscale (programs, DIM) over its STEPS blocks of ROWS rows."""
    program = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    weight = tl.load(scale + column, mask=column < DIM, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for step in range(STEPS):
        row = (program * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < COUNT)[:, None] & (column < DIM)[None, :]
        at = row.to(tl.int64)[:, None] * DIM + column[None, :]

        block = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        square = tl.load(mean_square + row, mask=row < COUNT, other=1.0)
        inverse = tl.rsqrt(square + EPS)[:, None]
        normed = block * inverse
        g = gradient * weight
        along = tl.sum(g * normed, axis=1) / DIM
        tl.store(dx + at, ((g - normed * along[:, None]) * inverse).to(dx.dtype.element_ty), mask=inside)
        sums += gradient * normed
    tl.store(dscale + program * DIM + column, tl.sum(sums, axis=0), mask=column < DIM)
