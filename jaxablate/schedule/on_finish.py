"""`--on-finish=CMD`: a program of the user's own, called once when all is over, such as to stop a rented machine."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxablate.errors import UserError

logger = logging.getLogger(__name__)

_FAILED = 70  # as the command line's own code for what is nobody's input


@dataclass
class Finish:
    """Collects what the program is told."""

    exit_code: int = _FAILED


def parse(text: str) -> tuple[str, ...]:
    """The program and its arguments, split as a shell would; no shell sees them. Empty for no text.

    Raises:
      UserError: the text cannot be split, or there is no such program.
    """
    if not text:
        return ()
    try:
        argv = tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(f"--on-finish={text}: {error}; quote it as for a shell") from None
    program = argv[0] if argv else ""
    if not program or shutil.which(program) is None:
        raise UserError(f"--on-finish={text}: no program '{program}'; give one that is on PATH, or its path")
    return argv


@contextlib.contextmanager
def calling(argv: Sequence[str], study: str | os.PathLike[str]) -> Iterator[Finish]:
    """Calls the program at the end of the block, however that ends; set `exit_code` before.

    An exception in the block counts as code 2 if it is the user's input, 130 for Ctrl-C, else 70.
    """
    finish = Finish()
    try:
        yield finish
    except UserError:
        finish.exit_code = 2
        raise
    except KeyboardInterrupt:
        finish.exit_code = 130
        raise
    finally:
        call(argv, study, finish.exit_code)


def call(argv: Sequence[str], study: str | os.PathLike[str], exit_code: int) -> None:
    """Calls the program with JAXABLATE_STUDY_DIR and JAXABLATE_EXIT_CODE. What goes wrong is a warning."""
    if not argv:
        return
    about = {"JAXABLATE_STUDY_DIR": os.path.abspath(study), "JAXABLATE_EXIT_CODE": str(exit_code)}
    logger.info("on-finish: %s", shlex.join(argv))
    try:
        done = subprocess.run(argv, env={**os.environ, **about}, stdin=subprocess.DEVNULL, check=False)
    except OSError as error:
        logger.warning("on-finish: %s cannot be called: %s", argv[0], error.strerror)
        return
    if done.returncode:
        logger.warning("on-finish: %s ended with code %d", argv[0], done.returncode)
