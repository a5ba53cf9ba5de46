"""What one arm costs: `python -m jaxablate.estimate STUDY --arm=ARM [--target=h200] [--members=N] [--probe]`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

from jaxablate.errors import UserError

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
    add("--arm", required=True, help="which arm")
    add("--target", default="here", help="the device: here, cpu, a100, h100, h200, b200 (default: here)")
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
    add("--parent", type=int, default=0, help=argparse.SUPPRESS)  # whose end is that of this process
    add("--busy", action="store_true", help=argparse.SUPPRESS)  # what a probe starts beside itself
    args, rest = parser.parse_known_args(argv)
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
    command = [arg for arg in given if arg != "--busy" and not arg.startswith("--parent=")]
    hours = "probed" if args.probe else "unknown" if args.mfu is None else "stated"
    try:
        from jaxablate.config import read_overrides
        from jaxablate.estimate import arm

        overrides = read_overrides(rest, [*parser._option_string_actions])
        options = arm.Options(args.arm, args.target, args.members, hours, args.mfu or 0.0, args.beside - 1)
        if args.busy:
            arm.busy(arm.cohort_of_arm(args.study, overrides, options), args.target)
            return 0
        found = arm.of_study(args.study, overrides, options, command, began)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{json.dumps(found.to_dict())}\n")
    return 0


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
