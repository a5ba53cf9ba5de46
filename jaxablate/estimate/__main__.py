"""What one arm costs: `python -m jaxablate.estimate STUDY --arm=ARM [--target=h200] [--members=N] [--probe]`.

A plan asks one process about several, through standard input (`served`): what jax costs to start, and what arms
have in common when they are traced, is then paid once.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TextIO

from jaxablate.errors import UserError

if TYPE_CHECKING:
    from jaxablate.estimate.facts import Estimate

EPILOG = """--config.PATH=VALUE overrides a field of the study's base config.
Prints one JSON object; exit codes: 0 done, 1 internal error, 2 bad input"""
ENDED = 128 + signal.SIGTERM  # exit code of a process that was ended
GRACE_S = 5.0  # to leave no temporary files behind


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, prints the estimate; returns the exit code."""
    began = time.perf_counter()  # the imports below are what a run pays for too
    parser = argparse.ArgumentParser(
        "python -m jaxablate.estimate", description="What one arm of a study costs, before it is trained."
    )
    parser.epilog, parser.allow_abbrev = EPILOG, False
    add = parser.add_argument
    add("study", metavar="STUDY", help="study file and its argument, such as configs/ctclip.py:scale=tiny")
    add("--arm", default="", help="which arm")
    add("--target", default="here", help="the device: here, cpu, l4, a100, h100, h200, b200 (default: here)")
    add("--members", type=int, default=1, metavar="N", help="runs in the cohort (default 1)")
    add("--probe", action="store_true", help="time the training loop on this machine")
    add(
        "--beside",
        type=int,
        default=1,
        metavar="N",
        help="N such processes at a time, which share a CPU (default 1)",
    )
    add("--mfu", type=float, metavar="0.4", help="hours from this share of the target's peak FLOP/s")
    add("--served", action="store_true", help="answer standard input: a line of JSON [ARM, MEMBERS] for each")
    add("--parent", type=int, default=0, help=argparse.SUPPRESS)  # whose end is that of this process
    add("--busy", action="store_true", help=argparse.SUPPRESS)  # what a probe starts beside itself
    args, rest = parser.parse_known_args(argv)
    if bool(args.arm) == args.served:
        parser.error("--arm: not allowed with --served" if args.arm else "--arm: which arm?")
    if args.parent:
        _end_with(args.parent)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("jaxablate").setLevel(logging.INFO)
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, "")  # a study's own task lies beside it
    if args.target == "cpu" or (args.target != "here" and not args.probe):
        # A GPU to compile for need not be here, and is left to others if it is.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    given = sys.argv[1:] if argv is None else argv
    command = [arg for arg in given if arg not in ("--busy", "--served") and not arg.startswith("--parent=")]
    hours = "probed" if args.probe else "unknown" if args.mfu is None else "stated"
    try:
        from jaxablate.config import read_overrides
        from jaxablate.estimate import arm

        overrides = read_overrides(rest, [*parser._option_string_actions])
        options = arm.Options(args.arm, args.target, args.members, hours, args.mfu or 0.0, args.beside - 1)
        if args.busy:
            arm.busy(arm.cohort_of_arm(args.study, overrides, options), args.target)
            return 0
        if not args.served:
            found = arm.of_study(args.study, overrides, options, command, began)
            sys.stdout.write(f"{json.dumps(found.to_dict())}\n")
            return 0
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2

    def estimate(name: str, members: int) -> Estimate:
        asked = replace(options, arm=name, members=members)
        own = [*command, f"--arm={name}", f"--members={members}"]
        return arm.of_study(args.study, overrides, asked, own, began)

    if not args.probe:
        _only_compile()
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # whatever a study's file prints is no answer
        serve(estimate, sys.stdin, answers)
    return 0


def serve(estimate: Callable[[str, int], Estimate], questions: Iterable[str], answers: TextIO) -> None:
    """Answers each line `[ARM, MEMBERS]` by a line: the estimate, or `{"problem": …}` where there is none."""
    for line in questions:
        arm, members = json.loads(line)
        try:
            answer: dict[str, Any] = estimate(arm, members).to_dict()
        except UserError as error:
            answer = {"problem": str(error)}
        answers.write(f"{json.dumps(answer)}\n")
        answers.flush()


def _only_compile() -> None:
    """Settings for a process that runs no program: a third less time to trace and lower one.

    Nobody will read from which line an operation came. Tracing leaves much behind that lasts and little that
    is in cycles, for which Python by default looks through all of it again and again.
    """
    import jax

    jax.config.update("jax_traceback_in_locations_limit", 0)
    gc.freeze()
    gc.set_threshold(100_000)


def _end_with(parent: int) -> None:
    """Ends this process once `parent` has gone, or SIGTERM comes: in order, or at once if a compiler has it.

    By polling, as workers do: who is killed cannot pass a signal on. The copies of a probe end with their input.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_S)
        os._exit(ENDED)

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(ENDED))
    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
