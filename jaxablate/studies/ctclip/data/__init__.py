"""The data of the CT-CLIP study: phantoms, NIfTI folders and tar shards behind one `open_dataset`.

Imports no jax, so that loader processes and login nodes start fast.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from jaxablate import cache
from jaxablate.errors import UserError, suggestion
from jaxablate.studies.ctclip.config import ClipData
from jaxablate.studies.ctclip.data import findings
from jaxablate.studies.ctclip.data.findings import FINDINGS, PromptStyle
from jaxablate.studies.ctclip.data.items import Items, Split, make_items
from jaxablate.studies.ctclip.data.nifti import nifti_split
from jaxablate.studies.ctclip.data.phantom_set import phantom_split
from jaxablate.studies.ctclip.data.preprocess import Chain
from jaxablate.studies.ctclip.data.shards import shard_split
from jaxablate.studies.ctclip.data.text import Tokenizer, build_words, open_wordpiece

__all__ = ["FINDINGS", "Dataset", "Items", "Tokenizer", "open_dataset"]


@dataclass(frozen=True)
class Dataset:
    """Both splits, ready to train on.

    `prompts` is int32 (2, 18, L): positive, then negative, in the order of `FINDINGS`. `fingerprint`
    is of the content as used (voxels, reports, labels, ids), not of paths or times.
    """

    train: Items
    val: Items
    prompts: npt.NDArray[np.int32]
    tokenizer: Tokenizer
    fingerprint: str


def open_dataset(
    config: ClipData, cache_dir: Path, *, prompt_style: str = "there_is", workers: int = 0
) -> Dataset:
    """Find, check and prepare everything `config` names; what it returns can be trained on.

    Prepared volumes stay below `cache_dir` and are used again. `workers` processes prepare NIfTI
    volumes (0: one a core); `prompt_style` is one of `findings.PROMPT_STYLES`. Raises UserError, one
    line, for any fault of config or data.
    """
    _check(config, prompt_style)
    cache_dir = Path(cache_dir).absolute()
    chain = Chain(config.volume, config.spacing, config.clip)
    train, val = (_open_split(config, name, chain, cache_dir, workers) for name in ("train", "val"))
    shared = sorted(set(train.names) & set(val.names))
    if shared:
        raise UserError(
            f"data.val={config.val}: '{shared[0]}' ({len(shared)} in all) is in "
            f"data.train={config.train} too; validation must not hold training samples, remove them from one"
        )
    tokenizer = _open_tokenizer(config, train)
    positive, negative = findings.prompts(cast(PromptStyle, prompt_style))
    prompts = tokenizer.encode([*positive, *negative])
    if len(np.unique(prompts, axis=0)) < len(prompts):
        raise UserError(
            f"data.text_length={config.text_length}: cuts prompts until two are equal; use a larger one"
        )
    text = {"train": tokenizer.encode(train.reports), "val": tokenizer.encode(val.reports)}
    folder = cache_dir / "text"
    return Dataset(
        train=make_items(train, text["train"], folder),
        val=make_items(val, text["val"], folder),
        prompts=prompts.reshape(2, len(FINDINGS), -1),
        tokenizer=tokenizer,
        fingerprint=cache.fingerprint(
            train.digest, val.digest, *(_crc(ids) for ids in (text["train"], text["val"], prompts))
        ),
    )


def _crc(ids: npt.NDArray[np.int32]) -> list[object]:
    return [zlib.crc32(ids.astype("<i4").tobytes()), *ids.shape]


def _open_split(config: ClipData, name: str, chain: Chain, cache_dir: Path, workers: int) -> Split:
    if config.source == "phantoms":
        count = config.phantoms_train if name == "train" else config.phantoms_val
        return phantom_split(config.phantoms_seed, name, count, chain, cache_dir)
    folder, field = (config.train, "data.train") if name == "train" else (config.val, "data.val")
    if config.source == "nifti":
        return nifti_split(folder, field, chain, cache_dir, workers)
    return shard_split(folder, field, chain)


def _open_tokenizer(config: ClipData, train: Split) -> Tokenizer:
    if config.tokenizer == "wordpiece":
        return open_wordpiece(config.vocab_file, config.vocab_size, config.text_length)
    styles = findings.PROMPT_STYLES
    every_prompt = [text for style in styles for side in findings.prompts(style) for text in side]
    return build_words(train.reports, every_prompt, config.vocab_size, config.text_length)


_CHOICES = {
    "source": ("phantoms", "nifti", "shards"),
    "clip": ("before_resampling", "faithful"),
    "tokenizer": ("words", "wordpiece"),
}


def _check(config: ClipData, prompt_style: str) -> None:
    """Raise UserError for a value no data could satisfy."""
    values = asdict(config)
    for field, choices in _CHOICES.items():
        if values[field] not in choices:
            raise UserError(
                f"data.{field}={values[field]}: unknown; {suggestion(str(values[field]), choices)}"
            )
    if prompt_style not in findings.PROMPT_STYLES:
        raise UserError(
            f"prompt style '{prompt_style}': unknown; {suggestion(prompt_style, findings.PROMPT_STYLES)}"
        )
    if len(config.volume) != 3 or min(config.volume) < 1:
        raise UserError(f"data.volume={config.volume}: must be three voxel counts (T, H, W) above 0")
    if len(config.spacing) != 3 or not all(0 < s < math.inf for s in config.spacing):
        raise UserError(f"data.spacing={config.spacing}: must be three lengths (z, x, y) in mm above 0")
    for field in ("text_length", "vocab_size"):
        if values[field] < 5:
            raise UserError(
                f"data.{field}={values[field]}: must be at least 5, to hold a word beside [CLS] and [SEP]"
            )
    if config.source == "phantoms":
        for field in ("phantoms_train", "phantoms_val"):
            if values[field] < 1:
                raise UserError(f"data.{field}={values[field]}: must be at least 1")
        if config.phantoms_seed < 0:
            raise UserError(f"data.phantoms_seed={config.phantoms_seed}: must be 0 or more")
        return
    for field in ("train", "val"):
        if not values[field]:
            raise UserError(
                f"data.{field} is empty: data.source={config.source} needs the folder of that split"
            )
