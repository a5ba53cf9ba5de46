"""Leases: what tells a claim of another machine that works from one whose holder is gone.

A holder touches its claims every BEAT_S seconds; one that nobody has touched for LEASE_S has expired. All times
are those that the file system gives to files, so that the clocks of two machines need not agree.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, Protocol

from jaxablate.stopping import EXIT_TAKEN

LEASE_S = 60.0
BEAT_S = 5.0


class Lease(Protocol):
    """What the heart keeps alive."""

    def renew(self) -> bool:
        """Touches the claim; False if it is this process's no more. OSError: it cannot be told just now."""
        ...


class Heart:
    """Renews all leases of this process, from one daemon thread, as long as there are any.

    A process that was stopped (SIGSTOP, a suspended container) for longer than its lease may find the claim in
    other hands when it goes on: it is then ended at once, from whichever of its threads finds out.
    """

    def __init__(self) -> None:
        self._leases: dict[Lease, str] = {}
        self._guard = threading.RLock()
        self._changed = threading.Condition(self._guard)
        self._thread: threading.Thread | None = None

    def keep(self, lease: Lease, what: str) -> None:
        """Renews `lease` from now on; `what` is its name in messages."""
        with self._guard:
            self._leases[lease] = what
            if self._thread is None:
                self._thread = threading.Thread(target=self._beat, name="leases", daemon=True)
                self._thread.start()

    @contextlib.contextmanager
    def without(self, lease: Lease) -> Iterator[None]:
        """Renews `lease` no more, and none meanwhile, so that to give it back is not mistaken for a loss."""
        with self._guard:
            self._leases.pop(lease, None)
            yield
            self._changed.notify()

    def _beat(self) -> None:
        with self._guard:
            while not self._changed.wait_for(lambda: not self._leases, BEAT_S):
                for lease, what in list(self._leases.items()):
                    with contextlib.suppress(OSError):  # the next beat may get through; the fence asks anyway
                        if not lease.renew():
                            end(what)
            self._thread = None


def end(what: str) -> NoReturn:
    """Ends this process without another word to any file: `what` belongs to somebody else.

    No exception, since on its way it would pass code that tidies up, and so writes.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"left alone: {what} was claimed by another process; this one ends\n".encode())
    os._exit(EXIT_TAKEN)


def age(claim: int, clock: Path) -> float:
    """Seconds since the file behind the descriptor `claim` was touched, by the file system's own clock.

    Args:
      clock: a file on the same file system, which is touched to learn what time it is there.
    """
    os.utime(clock)
    return clock.stat().st_mtime - os.fstat(claim).st_mtime


heart = Heart()


def _forget() -> None:
    """In a forked child, which has neither the thread nor the claims."""
    global heart
    heart = Heart()


os.register_at_fork(after_in_child=_forget)
