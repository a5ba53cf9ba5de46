"""Whether `jaxablate bench step` finds a difference where there is none, on this machine as busy as it is.

    python tests/benchmarks/step_null.py [--study=configs/ctclip.py] [--repeats=10] [--rounds=40]

Each repeat is a process of its own that measures the baseline and the baseline again, compiled twice and timed
in turns. The interval of their ratio must hold 1 in about 95 % of the repeats, however busy the machine is.
From the same samples come two intervals that must do worse where there is a drift: of two programs one after
another (the first half of the one's rounds, the second half of the other's), and of single rounds without blocks.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy import stats

REPO = Path(__file__).resolve().parents[2]


def measure(study: str, rounds: int, out: Path, cache: Path) -> tuple[dict, list[float], list[float]]:
    """One repeat: the ratio with its interval, and the samples of both copies in milliseconds."""
    command = [sys.executable, "-m", "jaxablate.cli", "bench", "step", study, "--arm=baseline", "--json"]
    env = {
        **os.environ,
        "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'kernels'}",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),  # compiled once; every copy is loaded from it by itself
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    child = subprocess.run(
        [*command, f"--rounds={rounds}", f"--out={out}"],
        cwd=REPO,
        env=env,
        stdout=subprocess.PIPE,
        check=True,
    )
    found = json.loads(child.stdout)
    (first,), (again,) = found["arms"][0]["timings"], found["control"]["timings"]
    return again["ratio"], first["samples_ms"], again["samples_ms"]


def holds_one(logs: np.ndarray) -> bool:
    """Whether a t interval of these log ratios holds zero."""
    return bool(stats.ttest_1samp(logs, 0).pvalue > 0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", default="configs/ctclip.py")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    repeats, after_another, single = [], [], []
    with tempfile.TemporaryDirectory() as name:
        for number in range(args.repeats):
            load = os.getloadavg()[0]
            ratio, first, again = measure(args.study, args.rounds, Path(name) / "out", Path(name) / "cache")
            a, b = np.log(again), np.log(first)
            half = len(a) // 2
            after_another.append(bool(stats.ttest_ind(a[half:], b[:half], equal_var=False).pvalue > 0.05))
            single.append(holds_one(a - b))
            repeats.append(
                {
                    "ratio": round(ratio["value"], 4),
                    "low": round(ratio["low"], 4),
                    "high": round(ratio["high"], 4),
                    "holds": ratio["low"] <= 1 <= ratio["high"],
                    "median_ms": round(float(np.median(first)), 2),
                    "slowest_over_fastest": round(float(max(first) / min(first)), 2),
                    "load": [round(load, 1), round(os.getloadavg()[0], 1)],
                }
            )
            print(f"{number + 1} of {args.repeats}: {repeats[-1]}", file=sys.stderr)
    result = {
        "study": args.study,
        "rounds": args.rounds,
        "cores": os.cpu_count(),
        "repeats": repeats,
        "held": f"{sum(r['holds'] for r in repeats)} of {len(repeats)}",
        "held_single_rounds": f"{sum(single)} of {len(single)}",
        "held_one_after_another": f"{sum(after_another)} of {len(after_another)}",
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
