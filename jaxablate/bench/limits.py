"""What this machine can do at best, measured beside the kernels: the two roofs of a roofline, and a call's cost.

A data sheet's figures are never reached, and differ from those of a machine that is shared or throttled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxablate.bench.timing import Samples, time_interleaved

ROUNDS = 15
# Beyond an H200's cache of 60 MB. On a CPU fresh arrays beyond 32 MB measure how fast the system hands out
# pages, and those below come from the heap.
COPY_BYTES = {"gpu": 2**30, "cpu": 2**24}
MATRIX = {"gpu": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Limits:
    """The best rates that plain programs reach on this device.

    Attributes:
      copy: bytes per second of a copy of a large array, read and written bytes both counted.
      matmul: FLOP/s of a large product of square matrices, by the type of their entries. float32 is
        multiplied as jax does it by default: on a GPU in TF32.
      call: seconds of a call of a program that does next to nothing: what is near it says nothing of a kernel.
      samples: of which the rates are the fastest; a call's cost is the median.
    """

    copy: float
    matmul: Mapping[str, float]
    call: float
    samples: Mapping[str, Samples]

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return {
            "copy_bytes_per_second": self.copy,
            "matmul_flops_per_second": dict(self.matmul),
            "call_seconds": self.call,
            "samples": {
                name: {"seconds": list(s.seconds), "inner": s.inner} for name, s in self.samples.items()
            },
        }


def measure(dtypes: Iterable[str], platform: str, *, rounds: int = ROUNDS) -> Limits:
    """Measure the limits of the default device.

    Args:
      dtypes: the types of entries whose matrix products are wanted.
      platform: `cpu` or `gpu` (any other is treated as a GPU): how large the arrays are.
      rounds: samples of each.
    """
    size = MATRIX.get(platform, MATRIX["gpu"])
    copied = COPY_BYTES.get(platform, COPY_BYTES["gpu"])
    rng = np.random.default_rng(0)  # products of zeros are faster: they take less power
    x = jnp.asarray(rng.standard_normal(copied // 4, dtype=np.float32))
    # Twice, since a library's copy and a compiled loop may differ: the faster is the limit.
    copies = _timed(
        {
            "copy": _program(jnp.copy, x),
            "scale": _program(lambda x: x * 1.5, x),
            "call": _program(lambda x: x + 1, x[:8]),
        },
        rounds,
    )
    del x
    products = {}
    for dtype in dict.fromkeys(dtypes):
        a, b = (jnp.asarray(rng.standard_normal((size, size), dtype=np.float32), dtype) for _ in range(2))
        products |= _timed({dtype: _program(jnp.matmul, a, b)}, rounds)
    return Limits(
        copy=2 * copied / min(*copies["copy"].seconds, *copies["scale"].seconds),
        matmul={dtype: 2 * size**3 / min(samples.seconds) for dtype, samples in products.items()},
        call=copies["call"].median,
        samples=copies | {f"matmul {dtype}": samples for dtype, samples in products.items()},
    )


def _timed(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Samples]:
    return time_interleaved(calls, rounds=rounds, budget=10.0)


def _program(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    compiled = jax.jit(function).lower(*args).compile()
    return lambda: compiled(*args)
