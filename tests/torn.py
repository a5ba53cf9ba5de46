"""The toy task on data that only one of several processes cannot read."""

from __future__ import annotations

from pathlib import Path

import jax

from jaxablate.data import Batch
from jaxablate.errors import UserError
from tests.toy import ToyItems, ToySource, ToyTask


class TornItems(ToyItems):
    def __getitem__(self, index: int, /) -> Batch:
        if jax.process_index() == 1:
            raise ValueError("the scan of process 1 is torn")
        return super().__getitem__(index)


class TornSource(ToySource):
    @property
    def train(self) -> ToyItems:
        return TornItems(self.data.count, 0)


class TornTask(ToyTask):
    def open(self, cache: Path) -> ToySource:
        return TornSource(self.config.data, 8)


class UnreadableTask(ToyTask):
    def open(self, cache: Path) -> ToySource:
        if jax.process_index() == 1:
            raise UserError("toy.csv: is not on this machine")
        return super().open(cache)
