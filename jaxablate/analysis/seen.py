"""A run as its directory shows it from outside: the last row of its history, and whether its process lives.

10,000 of them in a fraction of a second: of attempts.jsonl only the end is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxablate import disk
from jaxablate.claims import claim_alive, claim_holder
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.runstore import STATES, State
from jaxablate.study import Run

# What is counted: the states as recorded, and four that only a look from outside can tell.
#   paused      recorded as preempted, at the end of the stage that was asked for; the next one is another job's
#   gone        recorded as running, and the process that holds the claim is dead or has let its lease expire
#   unlisted    a confirmatory run that is listed once the arm's learning rate is tuned
#   unreadable  the history is damaged; a note says how
Count = State | Literal["paused", "gone", "unlisted", "unreadable"]

END_OF_FILE = 8192  # bytes; a row of attempts.jsonl is a few hundred
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True)
class Seen:
    """A run with what its directory says last."""

    run: Run
    state: Count
    last: Mapping[str, Any]  # the last row; empty if it never began

    @property
    def attempts(self) -> int:
        """How often it was begun."""
        return self.last.get("attempt", 0)


def look(manifest: Manifest, run: Run, notes: list[str]) -> Seen:
    """How a run stands; what is wrong with its files is added to `notes`."""
    row = _end_of(f"{manifest.path}/{run.arm}/{run.id}/attempts.jsonl")
    if row is None:  # long, torn or damaged: the run store knows what to make of it
        try:
            row = next(reversed(manifest.run_dir(run).history()), {})
        except UserError as error:
            notes.append(str(error))
            return Seen(run, "unreadable", {})
    if not row:
        return Seen(run, "pending", row)
    if row["state"] == "running":
        claim = manifest.run_dir(run).claim
        gone = claim_alive(claim) is None and claim_holder(claim) is not None
        return Seen(run, "gone" if gone else "running", row)
    return Seen(run, "paused" if row.get("paused") else row["state"], row)


def printable(text: object) -> str:
    """Without colours and control characters, which a log or a reason may hold."""
    return _CONTROL.sub("", str(text))


def _end_of(path: str) -> dict[str, Any] | None:
    """The last row of an attempts.jsonl; empty without a file; None if it takes more than a look at its end."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return {}
    except OSError:
        return None
    try:
        size = os.fstat(fd).st_size
        data = os.pread(fd, END_OF_FILE, max(size - END_OF_FILE, 0))
    finally:
        os.close(fd)
    start = data.rfind(b"\n", 0, -1) + 1
    if not data.endswith(b"\n") or (start == 0 and size > len(data)):
        return None
    row = disk.parse_row(data[start:])
    sound = row is not None and row.get("state") in STATES and type(row.get("attempt")) is int
    return row if sound else None
