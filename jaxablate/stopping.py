"""Stopping at a step boundary when a signal asks for it."""

from __future__ import annotations

import signal
from types import FrameType

EXIT_AGAIN = 75  # stopped cleanly, run me again (EX_TEMPFAIL)
EXIT_TAKEN = 76  # another process works on these runs; nothing was done
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class Stopped(Exception):
    """The cohort stopped at a step boundary and can be resumed."""


class StopRequest:
    """Listens for the signals while it is entered. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __enter__(self) -> StopRequest:
        self._before = {s: signal.signal(s, self._on_signal) for s in SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self.signal:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
