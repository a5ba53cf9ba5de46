"""Drawn scenes with their questions, written once below the cache as files like any other's."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from jaxablate import cache
from jaxablate.disk import read_jsonl
from jaxablate.studies.vqa.data import scenes
from jaxablate.studies.vqa.data.jsonl import write_questions
from jaxablate.studies.vqa.data.prompts import Wording
from jaxablate.studies.vqa.data.stages import SEQUENCES, Split, StageRule, first_sequences

log = logging.getLogger(__name__)

FORMAT = 1  # of the files, part of the cache key
CAPTIONS = "captions.jsonl"


class Caption(NamedTuple):
    """A text that goes with a picture."""

    image_filename: str
    text: str


def written(
    folder: Path, *, scenes_each: int, sequences: int, seed: int, wording: Wording, stage_rule: StageRule
) -> Path:
    """The folder with train.jsonl, validation.jsonl, test.jsonl, CAPTIONS of the training scenes, and all pictures.

    Args:
      folder: below it the set gets a folder of its own, which is used again.
      scenes_each: scenes of a sequence.
    """
    key = cache.fingerprint(
        "vqa scenes", FORMAT, scenes.GENERATOR, scenes_each, sequences, seed, wording, stage_rule
    )
    chosen = first_sequences(sequences)

    def build(scratch: Path) -> None:
        log.info("drawing %d scenes into %s", sequences * scenes_each, folder / key)
        for split, members in chosen.items():
            made = [scenes.scene(seed, number, frame) for number in members for frame in range(scenes_each)]
            asked = [q for scene in made for q in scenes.questions(scene, wording=wording, rule=stage_rule)]
            write_questions(scratch / f"{split}.jsonl", asked)
            for scene in made:
                _save(scenes.draw(scene), scratch / f"{scene.image_id}.png")
            if split == "train":
                _write_captions(scratch / CAPTIONS, made)

    cache.built_folder(folder / key, build)
    return folder / key


def counts(scenes_each: int, sequences: int) -> dict[Split, tuple[int, int, int]]:
    """Questions of each stage in each split of a set, from arithmetic alone."""
    chosen = first_sequences(sequences)
    return {split: scenes.counts(scenes_each, chosen[split]) for split in SEQUENCES}


def read_captions(folder: Path) -> tuple[Caption, ...]:
    """Those of a folder that `written` made."""
    rows, _ = read_jsonl(folder / CAPTIONS)
    return tuple(Caption(row["image_filename"], row["text"]) for row in rows)


def _write_captions(path: Path, made: list[scenes.Scene]) -> None:
    lines = [
        json.dumps(Caption(f"{scene.image_id}.png", text)._asdict())
        for scene in made
        for text in scenes.captions(scene)
    ]
    path.write_text("\n".join(lines) + "\n")


def _save(pixels: np.ndarray, path: Path) -> None:
    Image.fromarray(pixels).save(path, "PNG")
