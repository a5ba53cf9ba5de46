"""Trains one arm: `python -m jaxablate.main --config=configs/flash_rms.py [--config.seeds=0,1,2 …]`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from jaxablate.errors import UserError, suggestion

EPILOG = """examples:
  python -m jaxablate.main --config=configs/flash_rms.py
  python -m jaxablate.main --config=configs/ctclip.py:arm=baseline,scale=tiny --config.seeds=0,1,2
  python -m jaxablate.main --config=configs/baseline.py --config.optim.learning_rate=3e-4

exit codes: 0 done, 1 internal error, 2 bad config or usage, 75 stopped cleanly: run again to continue"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, trains, prints the summary; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxablate.main",
        description="Train one arm of a study: all its seeds as one compiled program.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE.py[:ARG]", required=True, help="config file, and what its get_config takes"
    )
    parser.add_argument(
        "--config.PATH", metavar="VALUE", help="override one field of the config", dest="_shown_in_help"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved config as JSON, and stop"
    )
    known, rest = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("jaxablate").setLevel(logging.INFO)
    try:
        overrides = read_overrides(rest)
        from jaxablate import config  # here and below: --help must not wait for these

        cohort = config.load(known.config, overrides)
        if known.print_config:
            print(config.to_json(cohort))
            return 0
        from jaxablate.stopping import EXIT_AGAIN, Stopped
        from jaxablate.train import train

        try:
            summaries = train(cohort)
        except Stopped as stopped:
            print(f"stopped: {stopped}; run the same command again to continue", file=sys.stderr)
            return EXIT_AGAIN
        from jaxablate.analysis.text import describe

        print(describe(summaries, cohort.base.host.workdir))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def read_overrides(args: Sequence[str]) -> list[tuple[str, str]]:
    """`--config.a.b=v` (or `--config.a.b v`) -> ("a.b", "v"); anything else is a UserError."""
    overrides, waiting = [], list(args)
    while waiting:
        flag, equals, value = waiting.pop(0).partition("=")
        if not flag.startswith("--config."):
            raise UserError(
                f"{flag}: unknown argument; {suggestion(flag, ['--config', '--config.PATH=VALUE', '--print-config'])}"
            )
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                raise UserError(f"{flag}: needs a value; write {flag}=VALUE")
            value = waiting.pop(0)
        overrides.append((flag.removeprefix("--config."), value))
    return overrides


if __name__ == "__main__":
    sys.exit(main())
