"""Tokens as training windows and fixed evaluation batches, with the scores of what is predicted for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxablate.data import Batch
from jaxablate.studies.tinystories import metrics
from jaxablate.text.tokenizer import Vocabulary

EVALUATION_KEY = (
    6  # of the draw of the evaluation windows; apart from every training seed's [seed, step >= 1]
)


@dataclass(frozen=True)
class Windows:
    """All windows of `context` + 1 tokens of a file of ids; item s is {"tokens": ids[s : s + context + 1]}.

    A file's place and layout are all that is kept, so that it pickles to a few words: each process maps
    the file itself. Made by `of`.
    """

    path: Path
    dtype: str
    offset: int  # bytes before the first id
    tokens: int
    context: int

    @classmethod
    def of(cls, ids: np.memmap, context: int) -> Windows:
        """The windows of a mapped file (tokens,)."""
        return cls(Path(str(ids.filename)), ids.dtype.str, ids.offset, len(ids), context)

    @cached_property
    def ids(self) -> npt.NDArray[np.integer]:
        """(tokens,), mapped read-only."""
        return np.memmap(self.path, self.dtype, "r", self.offset, (self.tokens,))

    def __len__(self) -> int:
        return self.tokens - self.context

    def __getitem__(self, index: int, /) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return {"tokens": self.ids[index : index + self.context + 1].astype(np.int32)}

    def __reduce__(self) -> tuple[type[Windows], tuple[Any, ...]]:
        return Windows, astuple(self)


@dataclass(frozen=True)
class Corpus:
    """The opened data of a language model (a `task.Source`).

    Attributes:
      train: the training windows.
      val: the validation windows, of which an evaluation sees a fixed few.
      counts: how often each id is in the training tokens, (vocab_size,).
      kinds: of every validation token of generated stories, uint8 of `metrics.KINDS`; else None.
      vocabulary: between ids and text; None for tokens that came without a tokenizer.
      fingerprint: of all tokens, in whatever file they are.
      eval_batches, eval_batch_size: of an evaluation.
    """

    train: Windows
    val: Windows
    counts: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.uint8] | None
    vocabulary: Vocabulary | None
    fingerprint: str
    eval_batches: int
    eval_batch_size: int

    @property
    def description(self) -> str:
        """How much there is, in a few words."""
        return (
            f"{self.train.tokens:,} training tokens, {self.val.tokens:,} of validation, "
            f"{np.count_nonzero(self.counts):,} of {len(self.counts):,} ids in use"
        )

    @cached_property
    def evaluation(self) -> list[Batch]:
        """`tokens` (B, context + 1) int32 and, of stories, the `kinds` (B, context) uint8 of the targets.

        The windows start at uniform draws which depend on the validation tokens' number alone, so they are
        the same for every arm, member and evaluation.
        """
        rng = np.random.Generator(np.random.Philox(key=[EVALUATION_KEY, 0]))
        starts = rng.integers(len(self.val), size=(self.eval_batches, self.eval_batch_size, 1))
        places = starts + np.arange(self.val.context + 1)
        tokens = self.val.ids[places].astype(np.int32)
        if self.kinds is None:
            return [{"tokens": batch} for batch in tokens]
        kinds = self.kinds[places[..., 1:]]
        return [{"tokens": batch, "kinds": kind} for batch, kind in zip(tokens, kinds, strict=True)]

    def score(self, outputs: Sequence[Any]) -> dict[str, float]:
        """Metrics of one member from its {"nll": (B, context)} per evaluation batch.

        `unigram_loss`, a constant of the data, is what knowing the frequency of each id and nothing else
        gives on the same windows; a loss means something where it is below.
        """
        nll = [np.asarray(output["nll"]) for output in outputs]
        loss = metrics.mean_loss(nll)
        scores = {
            "loss": loss,
            "perplexity": metrics.perplexity(loss),
            "unigram_loss": metrics.mean_loss(self._unigram),
        }
        if self.kinds is not None:
            scores |= metrics.loss_by_kind(nll, [batch["kinds"] for batch in self.evaluation])
        return scores

    def trivial(self, outputs: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
        """All ids alike, and each as frequent as in training."""
        uniform = [np.full(nll.shape, math.log(len(self.counts))) for nll in self._unigram]
        del outputs
        return {
            "uniform": [{"nll": nll} for nll in uniform],
            "unigram": [{"nll": nll} for nll in self._unigram],
        }

    @cached_property
    def _unigram(self) -> list[npt.NDArray[np.float64]]:
        of_id = metrics.unigram_nll(self.counts)
        return [of_id[batch["tokens"][:, 1:]] for batch in self.evaluation]
