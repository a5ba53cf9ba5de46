"""The ten runs of an arm as one cohort beside the same one at a time, and an arm whose features are there already.

    python -m tests.benchmarks.lora_space_runs                                  # stats_all_layers, 1k, ten runs
    python -m tests.benchmarks.lora_space_runs --arm=spectral_visual_only --scale=tiny --runs=3

Each way of training is a process, or as many as there are runs, with an empty folder for its compiled programs; the
features are made before, and all use them. A line of JSON each:

* `features`: how long an arm's data takes to open when nothing is there, and when its features are: a second call in
  the same process, and one in a new process.
* `commands`: `python -m jaxablate.main` for each seed, one after another, as a user would; each starts Python, and
  finds what the ones before it have compiled.
* `one process`: the runs one at a time in a process that has started, from the first batch on; compiled once.
* `cohort`: `python -m jaxablate.main` once for all seeds, and likewise without start-up.
* `again`: the same command when all runs are done.

Seconds are on the clock; `processor_seconds` are those of the processes, which a busy machine distorts less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SPEC = "configs/lora_space.py"

# Trains each cohort that it is given, and prints the seconds of each: those of `train` alone, on opened features.
IN_PROCESS = """
import json, sys, time
from jaxablate import config
from jaxablate.train import train
spec, *cohorts = json.loads(sys.argv[1])
for pairs in cohorts:
    own = config.load(spec, pairs)
    clock, processor = time.perf_counter(), time.process_time()
    train(own)
    print("SECONDS", json.dumps([time.perf_counter() - clock, time.process_time() - processor]), flush=True)
"""

OPEN = """
import json, sys, time
from pathlib import Path
from jaxablate import config
from jaxablate.studies.lora_space.task import LoraSpaceTask
base = config.load(*json.loads(sys.argv[1])).base
for _ in range(2):
    began = time.perf_counter()
    cached = LoraSpaceTask(base, "cpu").open(Path(base.host.cache)).cached
    print("SECONDS", json.dumps([time.perf_counter() - began, cached]), flush=True)
"""


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What it returns, with its seconds and those of the processors, its processes' among them."""
    clock, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    found = work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return found, {"seconds": time.perf_counter() - clock, "processor_seconds": processor}


def python(*args: str) -> list[Any]:
    """Runs Python on the CPU; what it printed behind SECONDS."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *args], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{args[0]} {args[1][:60]}: {done.stderr[-2000:]}")
    return [
        json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("SECONDS")
    ]


def told(what: str, **figures: Any) -> None:
    """A line of the result."""
    print(json.dumps({"what": what, **figures}), flush=True)


class Bench:
    """One arm at one scale, below a folder of its own."""

    def __init__(self, arm: str, scale: str, seeds: Sequence[int], folder: Path):
        self.spec, self.seeds, self.folder = f"{SPEC}:{arm},scale={scale}", seeds, folder

    def pairs(self, name: str, seeds: Sequence[int]) -> list[tuple[str, str]]:
        """What a run of this way of training changes in the config: where it lies, and its compiled programs."""
        cache = self.folder / name / "cache"
        if not cache.exists():
            cache.mkdir(parents=True)
            if name != "features":
                (cache / "lora_space").symlink_to(self.folder / "features" / "cache" / "lora_space")
        return [
            ("seeds", ",".join(map(str, seeds))),
            ("host.workdir", str(self.folder / name / "runs")),
            ("host.cache", str(cache)),
            ("host.mesh.member", "1"),
            ("host.mesh.data", "1"),
        ]

    def command(self, name: str, seeds: Sequence[int]) -> None:
        """`python -m jaxablate.main` as a user types it."""
        options = [f"--config.{key}={value}" for key, value in self.pairs(name, seeds)]
        python("-m", "jaxablate.main", f"--config={self.spec}", *options)

    def in_process(self, name: str, cohorts: Sequence[Sequence[int]]) -> dict[str, float]:
        """Seconds of training each cohort in one process that has started; the first of them compiles."""
        given = [self.spec, *[self.pairs(name, seeds) for seeds in cohorts]]
        each = python("-c", IN_PROCESS, json.dumps(given))
        return {"seconds": sum(one[0] for one in each), "processor_seconds": sum(one[1] for one in each)}

    def features(self) -> dict[str, float]:
        """Seconds to open the data with nothing there, a second time, and in another process."""
        given = json.dumps([self.spec, self.pairs("features", self.seeds[:1])])
        (first, _), (second, cached) = python("-c", OPEN, given)
        (later, _), _ = python("-c", OPEN, given)
        assert cached, "features are kept"
        return {"first": first, "second": second, "in_a_new_process": later}


def main() -> None:
    """Parses the command line and prints a header and a line for each way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arm", default="stats_all_layers")
    parser.add_argument("--scale", default="1k")
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    seeds = range(42, 42 + args.runs)
    told("header", **vars(args), cores=len(os.sched_getaffinity(0)), load_before=os.getloadavg()[0])
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.arm, args.scale, seeds, Path(folder))
        told("features", **bench.features())
        commands = timed(lambda: [bench.command("commands", [seed]) for seed in seeds])[1]
        told("commands", **commands)
        alone = bench.in_process("one process", [[seed] for seed in seeds])
        told("one process", **alone)
        cohort = timed(lambda: bench.command("cohort", seeds))[1]
        started = bench.in_process("cohort in process", [seeds])
        told("cohort", **cohort, without_start_up=started)
        told("again", **timed(lambda: bench.command("cohort", seeds))[1])
        told(
            "ratios",
            commands_to_cohort=commands["seconds"] / cohort["seconds"],
            without_start_up=alone["seconds"] / started["seconds"],
            of_the_processor=commands["processor_seconds"] / cohort["processor_seconds"],
        )


if __name__ == "__main__":
    main()
