"""What srun says of the tasks of a step, among what they say themselves."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable

_OF_SLURM = re.compile(r"(srun|slurmstepd\S*): ")
_TASK = re.compile(r"srun: error: .*\btasks? [\d,-]+: (.+)")
_EXITED = re.compile(r"Exited with exit code (\d+)")
_SIGNALS = {signal.strsignal(number) or "": number for number in signal.Signals}


def is_of_slurm(line: str) -> bool:
    """Whether a line of the output is not of the program that ran."""
    return _OF_SLURM.match(line) is not None


def code_of(lines: Iterable[str], srun: int) -> int:
    """The exit code of the task that ended the step, as of `Popen.returncode`: -N for signal N.

    With --kill-on-bad-exit the first task that fails takes the others along, and srun's own code is the highest
    of all: that of the victims, 143, hides the 2 of the culprit. srun names them in the order in which they ended.

    Args:
      lines: the output of the step.
      srun: its exit code.
    """
    for line in lines:
        if (found := _TASK.match(line)) is None:
            continue
        if exited := _EXITED.match(found[1]):
            return int(exited[1])
        number = _SIGNALS.get(found[1].partition(" (")[0])  # such as "Aborted (core dumped)"
        if number is not None:
            return -number
    return 128 - srun if srun > 128 else srun
