"""`jaxablate.main` for a process that ends by its own kill -9, so that it falls exactly where a test wants it.

in N       when update N is computed and logged, before it is evaluated or saved
after N    when the checkpoint of update N, the last one of a stage, is complete, and the next stage is about to
           take its first step
never      not at all
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any

from jaxablate.main import main as train_one_arm
from jaxablate.train import Loop


def main(argv: Sequence[str]) -> int:
    """Trains what `argv[1:]` says, and dies as `argv[0]` says."""
    when, _, step = argv[0].partition(" ")
    if when == "in":
        _die_in(int(step))
    elif when == "after":
        _die_after(int(step))
    return train_one_arm(argv[1:])


def _die_in(step: int) -> None:
    log = Loop._log

    def dying(self: Loop, n: int, *args: Any) -> None:
        log(self, n, *args)
        if n >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    Loop._log = dying


def _die_after(step: int) -> None:
    train_stage = Loop._train_stage

    def dying(self: Loop, current: Any, *args: Any) -> Any:
        if current.first == self.step == step:
            for store in self.stores:
                store.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return train_stage(self, current, *args)

    Loop._train_stage = dying
