"""What one arm costs: `python -m jaxablate.estimate STUDY --arm=ARM [--target=h200] [--members=N] [--probe]`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence

from jaxablate.errors import UserError

EPILOG = """--config.PATH=VALUE overrides a field of the study's base config.
Prints one JSON object; exit codes: 0 done, 1 internal error, 2 bad input"""


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
        help="with --probe: N such processes at a time (default 1)",
    )
    add("--mfu", type=float, metavar="0.4", help="hours from this share of the target's peak FLOP/s")
    add("--busy", action="store_true", help=argparse.SUPPRESS)  # what a probe starts beside itself
    args, rest = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("jaxablate").setLevel(logging.INFO)
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, "")  # a study's own task lies beside it
    if args.target == "cpu" or (args.target != "here" and not args.probe):
        # A GPU to compile for need not be here, and is left to others if it is.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    command = [arg for arg in (sys.argv[1:] if argv is None else argv) if arg != "--busy"]
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


if __name__ == "__main__":
    sys.exit(main())
