"""RMSNorm and its gradients by Triton's interpreter: ``python triton_interpreter.py inputs.npz outputs.npz``.

A process of its own: Triton decides when it is imported whether it interprets, by TRITON_INTERPRET=1.
"""

import sys
from typing import Any

import numpy as np

from jaxablate_kernels.norm.triton_kernels import rms_backward, rms_forward


class Memory:
    """An array as the interpreter wants its arguments: with the address of its numbers."""

    dtype = "fp32"

    def __init__(self, array: Any = None):
        self.array = array

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def copy_(self, other):
        assert other.array is self.array  # what is written is written here

    def new_empty(self, size, device):
        return Memory()

    def set_(self, storage, *layout):
        self.array = storage.array

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides


def main(inputs: str, outputs: str) -> None:
    """Two rows at a time; backward twice in each program."""
    with np.load(inputs) as file:
        x, scale, dy, eps = (file[name] for name in ("x", "scale", "dy", "eps"))
    count, dim = x.shape
    blocks = -(-count // 2)
    programs = -(-blocks // 2)
    sizes = {"COUNT": count, "DIM": dim, "EPS": float(eps), "ROWS": 2, "WIDTH": 1 << (dim - 1).bit_length()}

    def launch(kernel: Any, grid: int, arrays: tuple[Any, ...], **more: int) -> None:
        kernel[(grid,)](*map(Memory, arrays), **sizes, **more)

    y, mean_square = np.full_like(x, np.nan), np.full(count, np.nan, np.float32)
    launch(rms_forward, blocks, (x, scale, y, mean_square))
    dx, dscale = np.full_like(x, np.nan), np.full((programs, dim), np.nan, np.float32)
    launch(rms_backward, programs, (x, mean_square, scale, dy, dx, dscale), STEPS=2)
    np.savez(outputs, y=y, dx=dx, dscale=dscale.sum(axis=0))


if __name__ == "__main__":
    main(*sys.argv[1:])
