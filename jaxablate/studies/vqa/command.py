"""What the study's own commands, `export` and `evaluate`, have in common: usage, and one line for what is wrong."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable

from jaxablate.errors import UserError


def parser(name: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """An empty parser of `python -m jaxablate.studies.vqa.<name>`."""
    return argparse.ArgumentParser(
        f"python -m jaxablate.studies.vqa.{name}",
        description=description,
        epilog=f"{epilog}exit codes: 0 done, 1 internal error, 2 bad input",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def carried_out(command: Callable[[], str]) -> int:
    """Runs a command and prints what it returns, or what was wrong with its input; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("jaxablate").setLevel(logging.INFO)
    try:
        sys.stdout.write(f"{command()}\n")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0
