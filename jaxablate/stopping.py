"""Stopping at a step boundary, when a signal asks for it or the stage that was asked for is done."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Self

EXIT_DISK = 74  # the disk is full, broken or read-only (EX_IOERR)
EXIT_AGAIN = 75  # stopped cleanly, run me again (EX_TEMPFAIL)
EXIT_TAKEN = 76  # another process works on these runs; nothing was done, or nothing more
EXIT_PAUSED = 77  # the stage that was asked for is done; there are more
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class Stopped(Exception):
    """The cohort stopped at a step boundary and can be resumed."""


class Paused(Exception):
    """The cohort is at the end of the stage it was asked to train to; `stage` is its name."""

    def __init__(self, stage: str, reason: str):
        super().__init__(reason)
        self.stage = stage


class StopRequest:
    """Listens for the signals while it is entered. A second SIGINT interrupts at once."""

    signals: tuple[signal.Signals, ...] = SIGNALS

    def __init__(self) -> None:
        self.signal = ""

    def due(self) -> str:
        """The name of the signal that asks to stop now; empty if none does. Asked once after every step."""
        return self.signal

    def __enter__(self) -> Self:
        self._before = {s: signal.signal(s, self._on_signal) for s in self.signals}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self.signal:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
