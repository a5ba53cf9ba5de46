"""How long a planned study takes against what its plan says, on this machine, which should be quiet.

    python tests/benchmarks/makespan.py [configs/ctclip.py:scale=tiny] [--arm=A --arm=B] [--gpus=2]

Plans with timed steps, runs by that plan in a work directory of its own, and compares from the start of the first
cohort to the end of the last. Prints one JSON object: both in seconds, of the study and of each cohort. The caches of
data, programs and estimates are of its own too, so that the probe is part of what is looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_STARTED = re.compile(r"started (\S+) \((\w+)\): seeds ([\d,]*\d)")
_ENDED = re.compile(r"ended   (\S+) \((\w+)\): seeds ([\d,]*\d)")


def call(verb: str, args: argparse.Namespace, workdir: Path, *options: str) -> list[str]:
    """The command line of a verb."""
    arms = [f"--arm={arm}" for arm in args.arm]
    common = [f"--workdir={workdir}", f"--gpus={args.gpus}", *arms, *options]
    return [sys.executable, "-m", "jaxablate.cli", verb, args.study, *common]


def follow(command: list[str]) -> dict[tuple[str, ...], tuple[float, float]]:
    """Runs a study; (arm, phase, seeds) -> seconds at which that cohort started and ended."""
    times: dict[tuple[str, ...], tuple[float, float]] = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            now = time.perf_counter()
            print(line, end="", file=sys.stderr)
            if found := _STARTED.match(line):
                times[found.groups()] = now, now
            elif found := _ENDED.match(line):
                times[found.groups()] = times[found.groups()][0], now
    if process.returncode:
        sys.exit(f"the run ended with code {process.returncode}")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", nargs="?", default="configs/ctclip.py:scale=tiny")
    parser.add_argument("--arm", action="append", default=[])
    parser.add_argument("--gpus", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ["JAXABLATE_CACHE"] = str(Path(name) / "cache")
        began = time.perf_counter()
        done = subprocess.run(
            call("plan", args, Path(name), "--probe", "--json"), check=True, stdout=subprocess.PIPE, text=True
        )
        planning, plan = time.perf_counter() - began, json.loads(done.stdout)
        times = follow(call("run", args, Path(name)))
    first, last = min(start for start, _ in times.values()), max(end for _, end in times.values())
    predicted, measured = 3600 * plan["makespan"], last - first
    cohorts = {}
    for element in plan["elements"]:
        key = (element["arm"], element["phase"], ",".join(map(str, sorted(element["seeds"]))))
        start, end = times.get(key, (0.0, 0.0))
        told = cohorts.setdefault("/".join(key), {"predicted_s": 0.0, "measured_s": round(end - start, 1)})
        told["predicted_s"] = round(told["predicted_s"] + 3600 * element["hours"], 1)
    result = {
        "study": args.study,
        "cores": os.cpu_count(),
        "places": args.gpus,
        "planning_s": round(planning, 1),
        "predicted_s": round(predicted, 1),
        "measured_s": round(measured, 1),
        "measured_over_predicted": round(measured / predicted, 3),
        "cohorts": cohorts,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
