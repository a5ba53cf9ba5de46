"""How fast trajectories of the Burgers equation are generated.

    python -m tests.benchmarks.burgers_data                                        # 96 at 128 cells: any machine
    python -m tests.benchmarks.burgers_data --trajectories=10000 --cells=1024 --at-once=2500      # wants a GPU
    python -m tests.benchmarks.burgers_data … --out=FOLDER         # written as benchmark files too, and timed

For each viscosity prints one JSON object: the seconds to compile, those to generate (to the host's memory, the
initial states too), the bytes made, and the largest drift of a trajectory's mean. On a busy machine look at
`processor_seconds`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxablate.studies.burgers.data import generator, write_pdebench


def blocks(args: argparse.Namespace, viscosity: float) -> Iterator[np.ndarray]:
    """All trajectories, at most `at_once` together and equally many each time but the last."""
    for start in range(0, args.trajectories, args.at_once):
        numbers = range(start, min(start + args.at_once, args.trajectories))
        yield generator.generate(
            numbers, viscosity=viscosity, cells=args.cells, frames=args.frames, interval=args.interval, seed=args.seed
        )  # fmt: skip


def compile_seconds(args: argparse.Namespace) -> float:
    """How long the two programs take to compile, for a full block."""
    rows = min(args.at_once, args.trajectories)
    key, numbers = jax.random.key(0, impl="threefry2x32"), jnp.zeros(rows, jnp.uint32)
    x, u = jnp.zeros(args.cells), jnp.zeros((rows, args.cells))
    began = time.perf_counter()
    generator.initial_states.lower(key, numbers, x).compile()
    generator.evolve.lower(u, jnp.ones(rows), jnp.float32(1), frames=args.frames).compile()
    return time.perf_counter() - began


def drift(tensor: np.ndarray) -> float:
    """The largest change of a trajectory's mean, (n, T, X)."""
    means = tensor.mean(axis=2, dtype=np.float64)
    return float(np.abs(means - means[:, :1]).max())


def measure(args: argparse.Namespace, viscosity: float) -> dict[str, object]:
    """Of one viscosity; the first block is made once before, so that nothing is left to compile."""
    next(blocks(args, viscosity))
    load, made, worst, seconds, used = os.getloadavg()[0], 0, 0.0, 0.0, 0.0
    source = blocks(args, viscosity)
    while True:
        began, worked = time.perf_counter(), time.process_time()
        block = next(source, None)
        seconds, used = seconds + time.perf_counter() - began, used + time.process_time() - worked
        if block is None:
            break
        made, worst = made + block.nbytes, max(worst, drift(block))
    result: dict[str, object] = {
        "viscosity": viscosity,
        "trajectories": args.trajectories,
        "cells": args.cells,
        "frames": args.frames + 1,
        "bytes": made,
        "seconds": seconds,
        "processor_seconds": used,
        "drift_of_the_mean": worst,
        "load_before": load,
    }
    if args.out:
        path = Path(args.out) / f"1D_Burgers_Sols_Nu{viscosity!r}.hdf5"
        began = time.perf_counter()
        write_pdebench(
            path,
            blocks(args, viscosity),
            shape=(args.trajectories, args.frames + 1, args.cells),
            x=generator.centres(args.cells),
            t=args.interval * np.arange(args.frames + 2),
            viscosity=viscosity,
        )
        result |= {"seconds_with_writing": time.perf_counter() - began, "file_bytes": path.stat().st_size}
    return result


def main() -> None:
    """Parses the command line, prints a header and a line for each viscosity."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trajectories", type=int, default=96)
    parser.add_argument("--cells", type=int, default=128)
    parser.add_argument("--frames", type=int, default=200, help="after the initial one")
    parser.add_argument("--interval", type=float, default=0.01)
    parser.add_argument("--viscosities", type=float, nargs="+", default=[0.001, 0.1])
    parser.add_argument("--at-once", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=2025)
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    device = jax.devices()[0]
    header = {"device": device.device_kind, "jax": jax.__version__, "cores": os.cpu_count()}
    print(json.dumps({**header, "compile_seconds": compile_seconds(args)}))
    for viscosity in args.viscosities:
        print(json.dumps(measure(args, viscosity)), flush=True)


if __name__ == "__main__":
    main()
