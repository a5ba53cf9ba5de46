"""Predicted against measured memory of training steps on a CPU, each arm in a process of its own.

    python tests/benchmarks/memory.py configs/ctclip.py:scale=tiny --config.training.batch_size=256

Predicted is what `jaxablate.estimate` says of the step. Measured is how far the high-water mark of the resident set
(VmHWM, reset through /proc/self/clear_refs) lies above what is resident without the state, after a first step
and with the allocator's free memory given back to the system. Linux with glibc alone.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STEPS = 4


def measured(spec: str, arm: str, overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Predicted and measured bytes of an arm's first stage, in this process."""
    import jax
    import numpy as np

    from jaxablate.bench.step_programs import made_up
    from jaxablate.estimate import memory, places
    from jaxablate.estimate.arm import Options, cohort_of_arm

    cohort = cohort_of_arm(spec, overrides, Options(arm, "cpu"))
    place = places.present("cpu")
    program = memory.programs(cohort, place)[0]
    predicted = memory.measure([program], place).programs[f"step of {program.stage.name}"]
    step, batch = program.compile_step(), made_up(program.task)

    def train(state: Any, steps: int) -> Any:
        for n in range(1, steps + 1):
            state, metrics = step(state, program.member, program.put_batch(batch), np.int32(n))
            jax.block_until_ready(metrics)
        return state

    state = train(program.init(), 1)  # which brings in code and threads, once for a process
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is what is resident now
    before = _status("VmRSS") - sum(x.nbytes for x in jax.tree.leaves(state))
    train(state, STEPS)
    grown = _status("VmHWM") - before
    return {"arm": arm, "predicted": predicted, "measured": grown, "ratio": predicted / grown}


def in_child(spec: str, arm: str, overrides: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
    """The same in a fresh process, of this environment."""
    command = [sys.executable, __file__, spec, f"--only={arm}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(env))
    return json.loads(done.stdout.splitlines()[-1])


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    (kilobytes,) = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def main() -> None:
    """Prints a line for each arm."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("spec", metavar="STUDY")
    parser.add_argument("--arms", default="", metavar="A,B", help="default: all of the study's")
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    from jaxablate import config, study

    if args.only:
        print(json.dumps(measured(args.spec, args.only, config.read_overrides(rest))))
        return
    arms = args.arms.split(",") if args.arms else [arm.name for arm in study.load(args.spec).arms]
    for arm in arms:
        found = in_child(args.spec, arm, rest, {**os.environ, "JAX_PLATFORMS": "cpu"})
        print(
            f"{arm:16} predicted {found['predicted'] / 1e6:8.1f} MB, measured {found['measured'] / 1e6:8.1f} MB: "
            f"ratio {found['ratio']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
