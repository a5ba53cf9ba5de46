"""Write prepared volumes as tar shards that `shards.shard_split` reads."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jaxablate.disk import write_bytes
from jaxablate.studies.ctclip.data.shards import MANIFEST


@dataclass(frozen=True)
class Sample:
    """One sample: `volume` (T, H, W) in thousands of HU, `labels` (18,). `key` has no dot and no slash."""

    key: str
    volume: npt.NDArray[np.float16]
    report: str
    labels: npt.NDArray[np.float32]


def write_shards(folder: Path, samples: Iterable[Sample], per_shard: int, labels: str = "labels") -> int:
    """Write shards of `per_shard` samples and the manifest; return the number of samples.

    `labels` is the suffix of the label member ("labels" or "cls"). Each shard appears whole or not at
    all; equal samples give equal bytes. Raises ValueError for a key with a dot or slash.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = 0
    held: list[Sample] = []
    for sample in samples:
        if not sample.key or set("./") & set(sample.key):
            raise ValueError(f"key '{sample.key}' must not be empty or hold a dot or a slash")
        held.append(sample)
        total += 1
        if len(held) == per_shard:
            _write_shard(folder / f"shard-{(total - 1) // per_shard:06d}.tar", held, labels)
            held = []
    if held:
        _write_shard(folder / f"shard-{(total - 1) // per_shard:06d}.tar", held, labels)
    write_bytes(folder / MANIFEST, json.dumps({"total_samples": total}).encode())
    return total


def _write_shard(path: Path, samples: list[Sample], labels: str) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with tarfile.open(scratch, "w") as tar:
            for sample in samples:
                stored = np.ascontiguousarray(sample.volume.transpose(1, 2, 0), dtype="<f2")
                meta = {"study_id": sample.key, "volume_shape": stored.shape, "volume_dtype": "float16"}
                for suffix, content in (
                    ("bin", stored.tobytes()),
                    ("json", json.dumps(meta).encode()),
                    ("txt", sample.report.encode()),
                    (labels, sample.labels.astype("<f4").tobytes()),
                ):
                    info = tarfile.TarInfo(
                        f"{sample.key}.{suffix}"
                    )  # its time is 0: bytes depend on content only
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
