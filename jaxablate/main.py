"""Trains one arm: `python -m jaxablate.main --config=configs/flash_rms.py [--config.seeds=0,1,2 …]`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from jaxablate.errors import UserError

EPILOG = """--config.PATH=VALUE overrides one field of the config, as often as you like:
  python -m jaxablate.main --config=configs/flash_rms.py
  python -m jaxablate.main --config=configs/ctclip.py:arm=baseline,scale=tiny --config.seeds=0,1,2
  python -m jaxablate.main --config=configs/baseline.py --config.optim.learning_rate=3e-4 --print-config

exit codes: 0 done, 1 internal error, 2 bad config or usage, 75 stopped cleanly: run again to continue"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, trains, prints the summary; returns the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    description = "Train one arm of a study: all its seeds as one compiled program."
    parser = argparse.ArgumentParser(
        "python -m jaxablate.main", None, description, EPILOG, formatter_class=raw
    )
    parser.allow_abbrev = False
    parser.add_argument("--config", metavar="FILE.py[:ARG]", required=True, help="file, and its argument")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved config as JSON, and stop"
    )
    known, rest = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("jaxablate").setLevel(logging.INFO)
    try:
        from jaxablate import config  # here and below: --help waits for none of these

        cohort = config.load(known.config, config.read_overrides(rest))
        if known.print_config:
            print(config.to_json(cohort))
            return 0
        from jaxablate.analysis.text import describe
        from jaxablate.stopping import EXIT_AGAIN, Paused, Stopped
        from jaxablate.train import train

        try:
            print(describe(train(cohort), cohort.base.host.workdir))
        except Stopped as stopped:
            print(f"stopped: {stopped}; run the same command again to continue", file=sys.stderr)
            return EXIT_AGAIN
        except Paused as paused:
            print(f"paused: {paused}; without --config.host.until it goes on from there", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
