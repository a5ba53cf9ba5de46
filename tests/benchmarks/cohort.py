"""Four members in one cohort against four runs one after another, on this machine.

    python tests/benchmarks/cohort.py [--config=configs/flash_rms.py] [--members=4] [--repeats=3]

Each run is a whole process, from the command to its summary, in a work directory of its own; the compilation
cache is warm for both. Prints one JSON object with all times and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(config: str, seeds: str, workdir: Path, cache: Path) -> tuple[float, list[dict]]:
    """Wall seconds of one process, and its runs' summaries."""
    args = [f"--config={config}", f"--config.seeds={seeds}", f"--config.host.workdir={workdir}"]
    command = [sys.executable, "-m", "jaxablate.main", *args, f"--config.host.cache={cache}"]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    return seconds, [json.loads(p.read_text()) for p in sorted(workdir.glob("*/*/*/summary.json"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/flash_rms.py")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    seeds = [str(seed) for seed in range(args.members)]
    together, apart, train_together, train_apart = [], [], [], []
    with tempfile.TemporaryDirectory() as name:
        root, cache = Path(name), Path(name) / "cache"
        run(args.config, ",".join(seeds), root / "warm-together", cache)
        run(args.config, seeds[0], root / "warm-apart", cache)
        for repeat in range(args.repeats):
            seconds, found = run(args.config, ",".join(seeds), root / f"together-{repeat}", cache)
            together.append(seconds)
            train_together.append(found[0]["perf"]["step_ms"])
            singles = [run(args.config, s, root / f"apart-{repeat}-{s}", cache) for s in seeds]
            apart.append(sum(seconds for seconds, _ in singles))
            train_apart.append(sum(found[0]["perf"]["step_ms"] for _, found in singles))
    result = {
        "config": args.config,
        "members": args.members,
        "seconds_together": together,
        "seconds_one_after_another": apart,
        "ratio": statistics.median(apart) / statistics.median(together),
        "step_ms_together": train_together,
        "step_ms_one_after_another": train_apart,
        "step_ratio": statistics.median(train_apart) / statistics.median(train_together),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
