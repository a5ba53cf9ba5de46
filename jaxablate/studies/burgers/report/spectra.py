"""Energy of fields over wave numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def energy(u: ArrayLike) -> NDArray[np.floating[Any]]:
    """Energy at each wave number 0 … n // 2 of fields (…, n): |rfft(u)_k|^2 / n^2, twice where -k is another.

    By Parseval's theorem its sum is the mean of u^2.
    """
    field = np.asarray(u, np.float64)
    cells = field.shape[-1]
    found = np.abs(np.fft.rfft(field)) ** 2 / cells**2
    found[..., 1 : (cells + 1) // 2] *= 2
    return found
