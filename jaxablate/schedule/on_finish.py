"""`--on-finish=CMD`: a program of the user's own, called once when all is over, such as to stop a rented machine.

Over is a success, a failure, bad input found on the way, and a stop by a person's signal: the machine costs money
after each of them. A job that goes back into the queue is not over. Whoever starts `jaxablate run` and puts it back
(`schedule.plan.packed`) therefore makes the call instead of it: see `Deferred`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxablate import disk
from jaxablate.errors import UserError

logger = logging.getLogger(__name__)

_FAILED = 70  # as the command line's own code for what is nobody's input
_LATER = (
    "JAXABLATE_FINISH_LATER"  # names the file in which the call is left to the process that started this one
)


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

    An exception in the block counts as code 2 if it is the user's input, 130 for Ctrl-C, else 70; SIGTERM and SIGHUP,
    where nothing in the block hears them, as 143 and 129. The call is left to the process that started this one if
    that has asked for it.
    """
    if later := os.environ.get(_LATER):
        disk.write_json(later, {"argv": list(argv), "study": os.path.abspath(study)})
        argv = ()
    finish = Finish()
    try:
        with _called_first(argv, study):
            yield finish
    except UserError:
        finish.exit_code = 2
        raise
    except KeyboardInterrupt:
        finish.exit_code = 130
        raise
    finally:
        call(argv, study, finish.exit_code)


@contextlib.contextmanager
def _called_first(argv: Sequence[str], study: str | os.PathLike[str]) -> Iterator[None]:
    """Calls the program where a signal would end this process at once, and then lets it.

    An exception instead would wait for what runs in threads, such as the estimates of a plan.
    """

    def stop(number: int, frame: object) -> None:
        del frame
        signal.signal(number, signal.SIG_DFL)
        call(argv, study, 128 + number)
        signal.raise_signal(number)

    ends = [s for s in (signal.SIGTERM, signal.SIGHUP) if argv and signal.getsignal(s) is signal.SIG_DFL]
    for number in ends:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ends:
            signal.signal(number, signal.SIG_DFL)


@dataclass(frozen=True)
class Deferred:
    """The call that a child leaves to this process, which knows better when all is over."""

    note: Path  # the child's word on what to call; none if it never came to start anything

    @property
    def environment(self) -> Mapping[str, str]:
        """Of the child."""
        return {**os.environ, _LATER: str(self.note)}

    def call(self, exit_code: int) -> None:
        """Calls what the child would have called."""
        if self.note.exists():
            told = disk.read_json(self.note)
            call(told["argv"], told["study"], exit_code)


@contextlib.contextmanager
def deferred() -> Iterator[Deferred]:
    """To start a child in whose stead this process makes the call."""
    with tempfile.TemporaryDirectory(prefix="jaxablate-") as folder:
        yield Deferred(Path(folder) / "finish.json")


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
