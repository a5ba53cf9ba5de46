"""The time that `jaxablate status` takes for a study of many runs, as a whole process.

    python -m tests.benchmarks.status [--runs=10000] [--repeats=5]

Freezes a study of 100 arms and gives each run a directory with the files that training leaves: three in four
are done, the others running, failed (with a log), or not begun. Prints one JSON object with all times.
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

from jaxablate import disk
from jaxablate.config import new_config, resolve
from jaxablate.manifest import Manifest
from jaxablate.study import Factor, Response, Study, product
from tests.toy import ToyData, ToyModel

ARMS = 100


def build(workdir: Path, runs: int) -> Manifest:
    """The study, its run directories in plain writes: fsync for each would take minutes."""
    base = new_config(study="many", task="tests.toy:ToyTask", model=ToyModel(), data=ToyData())
    base.scale, base.host.workdir = "tiny", str(workdir)
    levels = {"w0": {}} | {f"w{i}": {"model.width": 8 + i} for i in range(1, ARMS)}
    width = Factor("width", "model", levels)
    study = Study(
        name="many",
        factors=(width,),
        arms=product(width),
        seeds=tuple(range(runs // ARMS)),
        responses=(Response("val/loss", "min"),),
        base=base,
    )
    manifest = Manifest.freeze(
        study, {arm.name: resolve(study.config(arm.name)).runs[0] for arm in study.arms}
    )
    for run in manifest.runs:
        _fill(manifest, run.index)
    return manifest


def _fill(manifest: Manifest, index: int) -> None:
    run = manifest.runs[index]
    state = ("done", "done", "done", ("running", "oom", "pending")[index // 4 % 3])[index % 4]
    if state == "pending":
        return
    where = manifest.run_dir(run)
    where.path.mkdir(parents=True)
    begun = {"attempt": 1, "state": "running", "time": "2026-01-01T00:00:00.000+00:00", "host": "n1", "pid": 7,
             "step": 0, "commit": "0" * 40, "notes": [], "members": 4}  # fmt: skip
    rows = [begun]
    if state != "running":
        rows.append(
            begun | {"state": state, "time": "2026-01-01T01:00:00.000+00:00", "reason": "", "step": 40}
        )
    if state == "oom":
        rows[-1] |= {"reason": "RESOURCE_EXHAUSTED: out of memory", "log": f"{run.arm}/{run.id}/log.txt"}
        (where.path / "log.txt").write_text("step 1\n" * 1000)
    where.attempts.write_bytes(b"".join(map(disk.encode_row, rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        manifest = build(Path(name), args.runs)
        command = [sys.executable, "-m", "jaxablate.cli", "status", str(manifest.path)]
        seconds = []
        for _ in range(args.repeats):
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - began)
    result = {
        "runs": len(manifest.runs),
        "seconds": seconds,
        "median": statistics.median(seconds),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
