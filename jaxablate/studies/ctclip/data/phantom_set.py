"""Phantoms as a prepared split (cached) and as files of the real format."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import nibabel as nib
import numpy as np

from jaxablate import cache
from jaxablate.studies.ctclip.data.findings import FINDINGS
from jaxablate.studies.ctclip.data.items import ArrayVolumes, Split
from jaxablate.studies.ctclip.data.phantoms import GENERATOR, Phantom, phantom
from jaxablate.studies.ctclip.data.preprocess import Chain

log = logging.getLogger(__name__)

_VOLUMES, _LABELS, _TEXTS = "volumes.npy", "labels.npy", "texts.json"


def phantom_split(seed: int, split: str, count: int, chain: Chain, cache_dir: Path) -> Split:
    """`count` prepared phantoms, generated once below `cache_dir` and memory-mapped.

    A cached set that is damaged is generated again.
    """
    key = cache.fingerprint(
        "phantoms", GENERATOR, seed, split, count, chain.volume, chain.spacing, chain.clip
    )
    folder = cache_dir / "phantoms" / key

    def build(scratch: Path) -> None:
        log.info("generating %d phantoms (%s) of %s voxels into %s", count, split, chain.volume, folder)
        _generate(scratch, seed, split, count, chain)

    digests = cache.built_folder(folder, build)
    texts = json.loads((folder / _TEXTS).read_text(encoding="utf-8"))
    return Split(
        volumes=ArrayVolumes(folder / _VOLUMES),
        names=tuple(texts["names"]),
        reports=tuple(texts["reports"]),
        labels=np.load(folder / _LABELS, allow_pickle=False),
        digest=cache.fingerprint(digests),
    )


def _generate(folder: Path, seed: int, split: str, count: int, chain: Chain) -> None:
    volumes = np.lib.format.open_memmap(
        folder / _VOLUMES, mode="w+", dtype=np.float16, shape=(count, *chain.volume)
    )
    labels, names, reports = np.zeros((count, len(FINDINGS)), np.float32), [], []
    for index in range(count):
        sample = phantom(seed, split, index, chain)
        volumes[index] = sample.prepared(chain)
        labels[index] = sample.labels
        names.append(sample.name)
        reports.append(sample.report)
    volumes.flush()
    np.save(folder / _LABELS, labels, allow_pickle=False)
    (folder / _TEXTS).write_text(json.dumps({"names": names, "reports": reports}), encoding="utf-8")


def write_nifti(folder: Path, seed: int, split: str, count: int, chain: Chain) -> list[Phantom]:
    """Write `count` phantoms as a split folder that `nifti.nifti_split` reads, and return them.

    Volumes go to `<folder>/<patient>/<VolumeName>` as int16 with no scaling in their headers; slope,
    intercept and spacing are in metadata.csv, beside reports.csv and labels.csv, as in CT-RATE.
    """
    samples = [phantom(seed, split, index, chain) for index in range(count)]
    for sample in samples:
        path = folder / sample.name.split("_a_")[0] / sample.name
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.Nifti1Image(sample.raw, np.diag([*sample.spacing, 1.0])).to_filename(path)
    _write_csv(
        folder / "metadata.csv",
        ("VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing"),
        [(s.name, s.slope, s.intercept, f"[{s.spacing[0]}, {s.spacing[1]}]", s.spacing[2]) for s in samples],
    )
    _write_csv(
        folder / "reports.csv",
        ("VolumeName", "Findings_EN", "Impressions_EN"),
        [(s.name, s.report, "Not given.") for s in samples],
    )
    _write_csv(
        folder / "labels.csv",
        ("VolumeName", *FINDINGS),
        [(s.name, *(int(label) for label in s.labels)) for s in samples],
    )
    return samples


def _write_csv(path: Path, header: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
