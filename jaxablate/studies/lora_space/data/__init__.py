"""The data of the LoRA weight-space study: made-up adapters or three layouts of files behind one `open_adapters`.

Imports no jax, so that reader processes and login nodes start fast.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from jaxablate import cache
from jaxablate.rules import Rule, at_least, enforce
from jaxablate.studies.lora_space.config import LoraSpaceData
from jaxablate.studies.lora_space.data import columnar, folder, names, preprocessed, synthetic
from jaxablate.studies.lora_space.data.reader import Described, Reader
from jaxablate.studies.lora_space.data.source import Adapters
from jaxablate.studies.lora_space.data.split import remarks, split

__all__ = [
    "Adapters",
    "Described",
    "Reader",
    "dataset_name",
    "describe",
    "open_adapters",
    "open_reader",
    "rules",
]

log = logging.getLogger(__name__)

_GENERATED = ("classes", "rank", "architecture", "seed")
_CUT = ("split", "split_seed")


def rules(data: LoraSpaceData) -> Iterator[Rule]:
    """What must hold before anything is read or generated: nothing is set that nothing reads, and sizes can be."""
    generated = data.source == "synthetic"
    needed = (
        "must be empty: nothing is read" if generated else f"data.source={data.source} needs a path; give it"
    )
    yield Rule("data.path", data.path, generated == (not data.path), needed)
    unread = {"synthetic": (), "preprocessed": (*_GENERATED, *_CUT)}.get(data.source, _GENERATED)
    for name in (*_GENERATED, *_CUT):
        value, default = getattr(data, name), getattr(LoraSpaceData, name)
        detail = f"is not read by data.source={data.source}; leave it at {default!r}"
        yield Rule(f"data.{name}", value, name not in unread or value == default, detail)
    yield at_least(2, "data.samples", data.samples)
    most = len(synthetic.CATEGORIES)
    yield Rule("data.classes", data.classes, 2 <= data.classes <= most, f"must be from 2 to {most}")
    yield at_least(1, "data.rank", data.rank)
    share = data.sample_layers
    yield Rule("data.sample_layers", share, 0 < share <= 1, "must be more than 0 and at most 1")
    for name in ("seed", "sample_seed", "split_seed"):
        yield at_least(0, f"data.{name}", getattr(data, name))


def describe(data: LoraSpaceData) -> Described:
    """The chosen tensors' shapes and the categories, from listings, headers and labels; nothing if they are generated.

    Raises:
      UserError: one line, for a fault of config or data that shows there.
    """
    enforce(rules(data))
    path = Path(data.path)
    if data.source == "synthetic":
        shapes, categories = (
            names.unet_shapes(data.architecture, data.rank),
            synthetic.CATEGORIES[: data.classes],
        )
    else:
        layout = {"folder": folder, "columnar": columnar, "preprocessed": preprocessed}[data.source]
        shapes, categories = layout.describe(path)
    where = dataset_name(data)
    among = names.selected(shapes, replace(data, tensors="all_layers"), where)
    return Described(names.selected(shapes, data, where), among, categories)


def dataset_name(data: LoraSpaceData) -> str:
    """What the data is called: the last part of its path, such as `1k`."""
    return Path(data.path).stem if data.path else "synthetic"


def open_reader(data: LoraSpaceData, cache_dir: Path, workers: int) -> Reader:
    """The adapters of a config, listed and not read. Raises UserError as `describe` does."""
    path, kept = Path(data.path).absolute(), Path(cache_dir).absolute() / "lora_space" / "digests"
    match data.source:
        case "synthetic":
            return synthetic.Synthetic.of(data)
        case "folder":
            return folder.Folder.of(path, kept, workers)
        case "columnar":
            return columnar.Columnar.of(path, kept)
        case "preprocessed":
            return preprocessed.Preprocessed.of(path, kept)


def open_adapters(
    data: LoraSpaceData, cache_dir: Path, *, eval_batch_size: int, workers: int = 0
) -> Adapters:
    """Find, check and describe all adapters that `data` names; what it returns can be trained on.

    Args:
      cache_dir: below it stay features, and digests of files, and are used again.
      workers: threads that read and compute; 0: one for each core.

    Raises:
      UserError: one line, for any fault of config or data.
    """
    from jaxablate.studies.lora_space.features import store  # jax: reader processes do without

    workers = workers or len(os.sched_getaffinity(0))
    described = describe(data)
    reader = open_reader(data, cache_dir, workers)
    wanted = store.Wanted(
        reader.digest(), described.tensors, described.among, data.representation, data.spectral_variant,
        store.legacy_key(dataset_name(data), data.representation, data.tensors, described.tensors),
    )  # fmt: skip
    place = Path(cache_dir).absolute() / "lora_space"
    features, cached = store.stored(wanted, reader, place / "features", workers)
    labels = reader.labels
    parts = reader.parts or split(labels, data.split, data.split_seed)
    scale, near_constant = store.scaled(features, wanted.key, parts.train, data.normalise, place / "columns")
    found = Adapters(
        features=features,
        scale=scale,
        labels=labels,
        parts=parts,
        categories=described.categories,
        fingerprint=cache.fingerprint(
            wanted.key, scale.parent.name, reader.categories, [rows.tolist() for rows in parts.parts]
        ),
        eval_batch_size=eval_batch_size,
        dim=wanted.dim,
        near_constant=near_constant,
        remarks=tuple(remarks(labels, parts, described.categories)),
        cached=cached,
        workers=workers,
    )
    made = "found" if cached else f"made by {workers} threads"
    log.info("%s; %s in %s (%s)", found.description, made, features.parent, wanted.legacy_key)
    for remark in found.remarks:
        log.warning("%s", remark)
    return found
