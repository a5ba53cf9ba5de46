"""Features of LoRA adapters: ours against the document's algorithm, on the same weights, in one run, without caches.

    python -m tests.benchmarks.lora_space                                  # 1,000 adapters, ten representations
    python -m tests.benchmarks.lora_space --adapters=200 --representations spectral frequency
    python -m tests.benchmarks.lora_space --engine=numpy --rank=4

The document's algorithm, in an implementation of our own, takes one tensor of one adapter at a time and decomposes
each in full; in PyTorch where that is installed, else in numpy. Prints one JSON object a representation: seconds on the
clock and of the processor, `compile_seconds` of our first call beyond a later one, and how far the two are apart. The
last line is of all together: `one_by_one` adds up our times of the representations, `together` is one call for all,
which computes what they share once. On a busy machine look at `processor_seconds`.

`--original=N` gives the document's algorithm the first N adapters alone; its seconds are then per adapter times
`--adapters`, and `original_measured` says so.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxablate.studies.lora_space.config import LoraSpaceData
from jaxablate.studies.lora_space.data.names import Shape
from jaxablate.studies.lora_space.data.synthetic import Synthetic
from jaxablate.studies.lora_space.features import features

EPS = 1e-8
TEN = (
    "simple_stats", "rank_based", "stats", "spectral", "matrix_norms", "distribution", "frequency",
    "info_theoretic", "ensemble", "flat_vec",
)  # fmt: skip
ENSEMBLE = ("spectral", "matrix_norms", "distribution", "frequency", "info_theoretic")
RANK_QUANTILES = [0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99]
DISTRIBUTION_QUANTILES = [0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95]


class InNumpy:
    """The document's features of one tensor (a, b), float32."""

    @staticmethod
    def tensor(a: np.ndarray) -> Any:
        return a

    @staticmethod
    def simple_stats(a: np.ndarray) -> list[Any]:
        return [np.linalg.norm(a), a.mean(), a.std(ddof=1), a.max(), a.min()]

    @staticmethod
    def rank_based(a: np.ndarray) -> list[Any]:
        q = np.quantile(a, RANK_QUANTILES)
        return [q, q[5] - q[3], q[8] - q[0]]

    @staticmethod
    def stats(a: np.ndarray) -> list[Any]:
        flat = a.ravel()
        mean, std = flat.mean(), flat.std(ddof=1)
        z = (flat - mean) / (std + EPS)
        median = np.partition(flat, (flat.size - 1) // 2)[(flat.size - 1) // 2]
        return [mean, std, median, flat.min(), flat.max(), (z**3).mean(), (z**4).mean()]

    @staticmethod
    def spectral(a: np.ndarray) -> list[Any]:
        s = np.linalg.svd(a, full_matrices=False)[1]
        top = np.zeros(10, a.dtype)
        top[: min(10, len(s))] = s[:10]
        p = top / (top.sum() + EPS)
        gaps = (top[:-1] - top[1:]) / (top[:-1] + EPS)
        return [top, p, gaps, -(p * np.log(p + EPS)).sum(), top[0] / (top[9] + EPS), top.sum()]

    @staticmethod
    def matrix_norms(a: np.ndarray) -> list[Any]:
        frobenius, nuclear, spectral = (np.linalg.norm(a, kind) for kind in ("fro", "nuc", 2))
        sums = [np.linalg.norm(a, 1), np.linalg.norm(a, np.inf)]
        return [
            frobenius,
            nuclear,
            spectral,
            *sums,
            nuclear / (frobenius + EPS),
            spectral / (frobenius + EPS),
        ]

    @staticmethod
    def distribution(a: np.ndarray) -> list[Any]:
        flat = a.ravel()
        q = np.quantile(flat, DISTRIBUTION_QUANTILES)
        mean, std = flat.mean(), flat.std(ddof=1)
        z = (flat - mean) / (std + EPS)
        distance = np.abs(flat - mean).mean()
        return [q, q[4] - q[2], distance, std / (abs(mean) + EPS), (z**3).mean(), (z**4).mean()]

    @staticmethod
    def frequency(a: np.ndarray) -> list[Any]:
        size = np.abs(np.fft.fft2(a)).ravel()
        top = np.sort(np.partition(size, -10)[-10:])[::-1]
        return [top, size.mean(), size.std(), size.max(), (top**2).sum() / ((size**2).sum() + EPS)]

    @staticmethod
    def info_theoretic(a: np.ndarray) -> list[Any]:
        counts = np.histogram(a, 50)[0]
        h = counts / (counts.sum() + EPS)
        entropy = -(h * np.log(h + EPS)).sum()
        return [entropy, entropy / math.log(50)]

    @staticmethod
    def flat_vec(a: np.ndarray) -> list[Any]:
        return [a.ravel()]

    @staticmethod
    def row(pieces: list[Any]) -> np.ndarray:
        """The features of an adapter from numbers and vectors."""
        return np.hstack(pieces)


def _torch() -> Any:
    return importlib.import_module("torch")  # no dependency, so type checkers need not find it


class InTorch(InNumpy):
    """The same in PyTorch."""

    @staticmethod
    def tensor(a: np.ndarray) -> Any:
        torch = _torch()
        return torch.from_numpy(a)

    @staticmethod
    def simple_stats(a: Any) -> list[Any]:
        return [a.norm(), a.mean(), a.std(), a.max(), a.min()]

    @staticmethod
    def rank_based(a: Any) -> list[Any]:
        q = a.flatten().quantile(a.new_tensor(RANK_QUANTILES))
        return [q, q[5] - q[3], q[8] - q[0]]

    @staticmethod
    def stats(a: Any) -> list[Any]:
        mean, std = a.mean(), a.std()
        z = (a - mean) / (std + EPS)
        return [mean, std, a.median(), a.min(), a.max(), (z**3).mean(), (z**4).mean()]

    @staticmethod
    def spectral(a: Any) -> list[Any]:
        torch = _torch()
        s = torch.linalg.svd(a, full_matrices=False)[1]
        top = a.new_zeros(10)
        top[: min(10, len(s))] = s[:10]
        p = top / (top.sum() + EPS)
        gaps = (top[:-1] - top[1:]) / (top[:-1] + EPS)
        return [top, p, gaps, -(p * (p + EPS).log()).sum(), top[0] / (top[9] + EPS), top.sum()]

    @staticmethod
    def matrix_norms(a: Any) -> list[Any]:
        torch = _torch()
        frobenius, nuclear, spectral = (torch.linalg.matrix_norm(a, kind) for kind in ("fro", "nuc", 2))
        sums = [torch.linalg.matrix_norm(a, 1), torch.linalg.matrix_norm(a, math.inf)]
        return [
            frobenius,
            nuclear,
            spectral,
            *sums,
            nuclear / (frobenius + EPS),
            spectral / (frobenius + EPS),
        ]

    @staticmethod
    def distribution(a: Any) -> list[Any]:
        q = a.flatten().quantile(a.new_tensor(DISTRIBUTION_QUANTILES))
        mean, std = a.mean(), a.std()
        z = (a - mean) / (std + EPS)
        distance = (a - mean).abs().mean()
        return [q, q[4] - q[2], distance, std / (mean.abs() + EPS), (z**3).mean(), (z**4).mean()]

    @staticmethod
    def frequency(a: Any) -> list[Any]:
        torch = _torch()
        size = torch.fft.fft2(a).abs().flatten()
        top = size.topk(10).values
        share = (top**2).sum() / ((size**2).sum() + EPS)
        return [top, size.mean(), size.std(unbiased=False), size.max(), share]

    @staticmethod
    def info_theoretic(a: Any) -> list[Any]:
        counts = a.flatten().histc(50)
        h = counts / (counts.sum() + EPS)
        entropy = -(h * (h + EPS).log()).sum()
        return [entropy, entropy / math.log(50)]

    @staticmethod
    def flat_vec(a: Any) -> list[Any]:
        return [a.flatten()]

    @staticmethod
    def row(pieces: list[Any]) -> np.ndarray:
        torch = _torch()
        return torch.hstack([torch.atleast_1d(piece) for piece in pieces]).numpy()


def original(
    engine: type[InNumpy], weights: Mapping[str, np.ndarray], representation: str, count: int
) -> np.ndarray:
    """The document's algorithm: adapter by adapter, tensor by tensor. (count, dim)"""
    parts = ENSEMBLE if representation == "ensemble" else (representation,)
    functions = [getattr(engine, part) for part in parts]
    rows = []
    for number in range(count):
        pieces: list[Any] = []
        for name in sorted(weights):
            a = engine.tensor(weights[name][number])
            for function in functions:
                pieces += function(a)
        rows.append(engine.row(pieces))
    return np.stack(rows)


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """(result, seconds on the clock, seconds of the processor)."""
    clock, processor = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - clock, time.process_time() - processor


def ours(
    weights: Mapping[str, np.ndarray], representations: Sequence[str], workers: int
) -> tuple[Any, dict[str, float]]:
    """A first call, which compiles, and a second."""

    def work() -> dict[str, np.ndarray]:
        return features(weights, representations, variant="original", workers=workers)

    _, first, first_processor = timed(work)
    found, seconds, processor = timed(work)
    return found, {
        "seconds": seconds,
        "processor_seconds": processor,
        "compile_seconds": max(0.0, first - seconds),
        "compile_processor_seconds": max(0.0, first_processor - processor),
    }


def furthest(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference as a share of the size of the column's values, or of 1e-4 (of a vector's spectrum the
    entropy is about 1e-8, of which theirs has no digit in single precision)."""
    size = np.abs(theirs).max(axis=0) + 1e-4
    return float((np.abs(ours[: len(theirs)] - theirs) / size).max())


def ratios(mine: Mapping[str, float], seconds: float, processor: float) -> dict[str, float]:
    """How many times faster ours is: on the clock, of the processor, and on the clock with our compilation."""
    return {
        "times_faster": seconds / mine["seconds"],
        "times_less_processor": processor / mine["processor_seconds"],
        "times_faster_with_compiling": seconds / (mine["seconds"] + mine["compile_seconds"]),
    }


def main() -> None:
    """Parses the command line, prints a header and a line for each representation, and one of all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument(
        "--original", type=int, default=0, help="adapters of the document's algorithm; 0: all"
    )
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--architecture", choices=("sd15", "tiny"), default="sd15")
    parser.add_argument("--representations", nargs="+", choices=TEN, default=list(TEN))
    parser.add_argument("--engine", choices=("numpy", "torch"), default="")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    there = importlib.util.find_spec("torch") is not None
    engine = args.engine or ("torch" if there else "numpy")
    algorithm: type[InNumpy] = InTorch if engine == "torch" else InNumpy
    data = LoraSpaceData(samples=args.adapters, rank=args.rank, architecture=args.architecture)
    adapters = Synthetic.of(data)
    shapes: Mapping[str, Shape] = adapters.shapes
    weights, generating, _ = timed(lambda: adapters.read(0, args.adapters, sorted(shapes), args.workers))
    count = min(args.original or args.adapters, args.adapters)
    header = {
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "original": engine, "cores": os.cpu_count(),
        "workers": args.workers, "adapters": args.adapters, "original_measured": count, "rank": args.rank,
        "tensors": len(shapes), "generating_seconds": generating, "load_before": os.getloadavg()[0],
    }  # fmt: skip
    print(json.dumps(header), flush=True)
    for one in args.representations:  # whatever either loads at its first call
        original(algorithm, weights, one, 1)

    all_seconds = all_processor = 0.0
    added = dict.fromkeys(
        ("seconds", "processor_seconds", "compile_seconds", "compile_processor_seconds"), 0.0
    )
    for one in args.representations:
        found, mine = ours(weights, [one], args.workers)
        theirs, seconds, processor = timed(lambda one=one: original(algorithm, weights, one, count))
        seconds, processor = seconds * args.adapters / count, processor * args.adapters / count
        all_seconds, all_processor = all_seconds + seconds, all_processor + processor
        for name in added:
            added[name] += mine[name]
        line = {
            "representation": one,
            "dim": found[one].shape[1],
            "original_seconds": seconds,
            "original_processor_seconds": processor,
            **mine,
            **ratios(mine, seconds, processor),
            "furthest_apart": furthest(found[one], theirs),
        }
        print(json.dumps(line), flush=True)
        del found, theirs
    shared = ours(weights, args.representations, args.workers)[1]
    summary = {
        "representation": "all",
        "original_seconds": all_seconds,
        "original_processor_seconds": all_processor,
        "one_by_one": {**added, **ratios(added, all_seconds, all_processor)},
        "together": {**shared, **ratios(shared, all_seconds, all_processor)},
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
