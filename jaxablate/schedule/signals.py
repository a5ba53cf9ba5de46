"""The signals that stop a launcher."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal


class Signals:
    """Notes the signals that stop a launcher while it is entered. What was ignored before (nohup) stays so.

    The second one means "at once" where a person sends it; a batch system sends several and means the same.
    """

    def __init__(self, keep: Literal["all", "first"] = "all") -> None:
        self.received: list[str] = []
        self.keep = keep

    def __enter__(self) -> Signals:
        # The last two are what a batch system is asked to send before it ends a job.
        wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
        heard = [s for s in wanted if signal.getsignal(s) is not signal.SIG_IGN]
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {
            s: signal.signal(s, self._note) for s in heard
        }
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.keep == "all" or not self.received:
            self.received.append(signal.Signals(number).name)
