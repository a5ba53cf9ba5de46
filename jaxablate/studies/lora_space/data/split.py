"""Which adapters are for training, for validation and for the test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from jaxablate.studies.lora_space.config import split_sizes

Ints = npt.NDArray[np.int64]
FEW = 10  # so many adapters and fewer are not split


@dataclass(frozen=True)
class Split:
    """Rows of the adapters in each part, in the order in which the split drew them."""

    train: Ints
    validation: Ints
    test: Ints

    @property
    def parts(self) -> tuple[Ints, Ints, Ints]:
        """In the order of their codes in evaluation batches: 0 train, 1 validation, 2 test."""
        return self.train, self.validation, self.test


def split(labels: npt.NDArray[np.integer], how: Literal["unstratified", "stratified"], seed: int) -> Split:
    """Cuts N adapters into parts of `split_sizes(N)`; all three are the whole if there are ten or fewer.

    `unstratified` is the document's, which is that of scikit-learn's train_test_split applied twice with the same
    seed. `stratified` draws an order in which every category is spread evenly and cuts that, so that each part
    has of each category its share to within one adapter at each cut.
    """
    count = len(labels)
    if count <= FEW:
        everything = np.arange(count)
        return Split(everything, everything, everything)
    training, validation, test = split_sizes(count)
    if how == "unstratified":
        order = np.random.default_rng(seed).permutation(count)
        held_out = order[: count - training]
        inner = np.random.default_rng(seed).permutation(len(held_out))
        return Split(order[count - training :], held_out[inner[test:]], held_out[inner[:test]])
    order = _spread(labels, seed)
    return Split(order[test + validation :], order[test : test + validation], order[:test])


def _spread(labels: npt.NDArray[np.integer], seed: int) -> Ints:
    """All rows, drawn so that any stretch of them has of each category about its share."""
    order = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        own = order[labels[order] == label]
        place[own] = (np.arange(len(own)) + 0.5) / len(own)
    return order[np.argsort(place[order], kind="stable")]


def remarks(labels: npt.NDArray[np.integer], parts: Split, categories: Sequence[str]) -> Iterator[str]:
    """Why results on these parts are no measurement, or of which category they are none; one sentence each."""
    if len(labels) <= FEW:
        yield (
            f"{len(labels)} adapters: training, validation and test are all of them; not a measurement, give "
            f"{FEW + 1} or more"
        )
        return
    seen = set(labels[parts.train])
    for name, rows in (("validation", parts.validation), ("test", parts.test)):
        unseen = sorted(set(labels[rows]) - seen)
        for label in unseen:
            yield (
                f"category '{categories[label]}' is in the {name} part and not in training: not a measurement of it; "
                f"give more adapters, or data.split=stratified"
            )
