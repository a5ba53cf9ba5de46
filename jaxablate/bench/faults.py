"""What an error of XLA, PyTorch or a kernel's compiler means."""

from __future__ import annotations


def out_of_memory(error: Exception) -> bool:
    """Whether something needs more memory than the device has.

    A kernel that wants more of a multiprocessor's own memory than there is has the same status in XLA, but
    is a fault of the kernel: a smaller batch would not help.
    """
    text = str(error)
    return ("RESOURCE_EXHAUSTED" in text or "CUDA out of memory" in text) and "hared memory" not in text
