"""Real volumes: a folder of NIfTI files with reports.csv, labels.csv and metadata.csv.

labels.csv says which volumes the split has; each of them needs its file, its report and, if there is a
metadata.csv, its row there. Everything is read, checked and prepared before training starts.

Scaling is applied once. With metadata.csv, the integers as stored in the file get the slope and the
intercept of the table, whatever the header says, because CT-RATE's files carry raw values. Without
it, the header's own scaling and voxel sizes are used, and a log line says so.
"""

from __future__ import annotations

import gzip
import logging
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from jaxablate import cache
from jaxablate.disk import write_bytes
from jaxablate.errors import UserError, suggestion
from jaxablate.studies.ctclip.data import tables
from jaxablate.studies.ctclip.data.findings import FINDINGS
from jaxablate.studies.ctclip.data.items import FileVolumes, Split
from jaxablate.studies.ctclip.data.pool import run_jobs
from jaxablate.studies.ctclip.data.preprocess import Chain, Spacing, preprocess
from jaxablate.studies.ctclip.data.tables import Table
from jaxablate.studies.ctclip.data.text import clean_report

log = logging.getLogger(__name__)

CHAIN_VERSION = 1  # part of the cache key: raise it when `preprocess` gives other numbers
_UNREADABLE = (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError)
_EDGE = 4096  # bytes at each end of a file that go into its key; a .gz ends with a checksum of its content


@dataclass(frozen=True)
class Job:
    """One volume to prepare. `slope` is NaN where the header's own scaling applies."""

    path: Path
    slope: float
    intercept: float
    spacing: Spacing
    chain: Chain
    target: Path

    @property
    def record(self) -> Path:
        """Written after the volume: "crc32 bytes" of the prepared file."""
        return self.target.with_suffix(".crc")


def nifti_split(folder: str, field: str, chain: Chain, cache_dir: Path, workers: int) -> Split:
    """The split in `folder`, every volume prepared (cached below `cache_dir`, float16 .npy).

    `field` ("data.train") is named in messages. Raises UserError for every fault of the input.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{field}={folder}: no such folder; give the folder of the split")
    paths = _find_volumes(root)
    labels = tables.read_table(tables.need_table(root, "labels"), FINDINGS)
    reports = tables.read_table(tables.need_table(root, "reports"), (tables.REPORT,))
    metadata_path = tables.find_table(root, "metadata")
    metadata = tables.read_table(metadata_path, tables.METADATA) if metadata_path else None
    names = _match(root, paths, labels, reports, metadata)
    values = np.stack([tables.parse_labels(labels[name]) for name in names])
    texts = tuple(clean_report(reports[name].cells[tables.REPORT]) for name in names)
    if metadata is None:
        log.warning("%s: has no metadata.csv; using the scaling and voxel sizes of the NIfTI headers", root)
    jobs = [_plan(paths[name], metadata, name, chain, cache_dir / "nifti") for name in names]
    checksums = run_jobs(prepare, jobs, workers, f"preparing {root}")
    return Split(
        volumes=FileVolumes(cache_dir / "nifti", tuple(job.target.name for job in jobs)),
        names=names,
        reports=texts,
        labels=values,
        digest=cache.fingerprint(names, texts, values.tolist(), checksums),
    )


def _find_volumes(root: Path) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for path in sorted(p for p in root.rglob("*.nii*") if p.name.endswith((".nii", ".nii.gz"))):
        if path.name in paths:
            raise UserError(f"{path}: the same VolumeName as {paths[path.name]}; rename or delete one")
        paths[path.name] = path
    if not paths:
        raise UserError(f"{root}: holds no .nii or .nii.gz file; give the folder of the split")
    return paths


def _match(
    root: Path, paths: dict[str, Path], labels: Table, reports: Table, metadata: Table | None
) -> tuple[str, ...]:
    """The names of the split, sorted. Raises UserError unless files, labels, reports and metadata agree."""
    for name, row in labels.items():
        if name not in paths:
            raise UserError(
                f"{row.where(tables.KEY)}: volume '{name}' is not below {root}; "
                f"add the file or delete the row ({suggestion(name, _sample(paths))})"
            )
    labels_path = next(iter(labels.values())).path
    for name, path in paths.items():
        if name not in labels:
            raise UserError(f"{path}: has no row in {labels_path}; add its labels or move the file away")
    for table, what in ((reports, "report"), (metadata, "metadata")):
        if table is None:
            continue
        table_path = next(iter(table.values())).path
        for name in paths:
            if name not in table:
                raise UserError(f"{paths[name]}: has no {what}: no row '{name}' in {table_path}; add it")
    return tuple(sorted(paths))


def _sample(paths: dict[str, Path]) -> list[str]:
    """Few enough names for a hint."""
    return sorted(paths)[:5]


def _plan(path: Path, metadata: Table | None, name: str, chain: Chain, folder: Path) -> Job:
    """Check the header and decide scaling, spacing and cache key of one volume."""
    try:
        image = _load(path)
        shape, dtype = tuple(image.shape), image.header.get_data_dtype()
        zooms, units = image.header.get_zooms(), image.header.get_xyzt_units()[0]
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    if len(shape) != 3 or min(shape) < 1:
        raise UserError(f"{path}: shape {shape} is not that of a 3-D volume; split or remove it")
    if dtype.kind not in "iuf":
        raise UserError(f"{path}: voxel type {dtype} is not a real number; convert it to int16")
    if metadata is not None:
        slope, intercept = tables.parse_scaling(metadata[name])
        spacing = tables.parse_spacing(metadata[name])
    else:
        slope, intercept, spacing = math.nan, math.nan, _header_spacing(path, zooms, units)
    stat = path.stat()
    key = cache.fingerprint(
        "nifti", CHAIN_VERSION, name, stat.st_size, stat.st_mtime_ns, _edges(path, stat.st_size),
        repr(slope), repr(intercept), spacing, chain.volume, chain.spacing, chain.clip,
    )  # fmt: skip
    return Job(path, slope, intercept, spacing, chain, folder / f"{key}.npy")


def _load(path: Path) -> Any:
    return nib.load(path)  # type: ignore[attr-defined]


def _unreadable(path: Path, error: BaseException) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(
        f"{path}: cannot be read as NIfTI ({reason}); it is corrupt or truncated, fetch it again"
    )


def _header_spacing(path: Path, zooms: tuple[np.floating[Any], ...], units: str) -> Spacing:
    if units not in ("mm", "unknown"):
        raise UserError(
            f"{path}: header gives voxel sizes in {units}, not mm; convert it or add a metadata.csv"
        )
    # The header stores float32; its shortest decimal is what was meant (0.7, not 0.699999988).
    x, y, z = (float(str(np.float32(zoom))) for zoom in zooms)
    if not all(0 < size < math.inf for size in (x, y, z)):
        raise UserError(f"{path}: header gives voxel sizes {(x, y, z)} mm; correct it or add a metadata.csv")
    return x, y, z


def _edges(path: Path, size: int) -> int:
    with path.open("rb") as file:
        head = file.read(_EDGE)
        file.seek(max(size - _EDGE, 0))
        return zlib.crc32(file.read(_EDGE), zlib.crc32(head))


def prepare(job: Job) -> str:
    """Make sure the prepared volume is in the cache; return the checksum of its bytes.

    A cached file of the wrong size is made again. Raises UserError if the voxels cannot be read, are
    not finite, or resample to nothing.
    """
    try:
        checksum, size = job.record.read_text().split()
        if job.target.stat().st_size == int(size):
            return checksum
    except (OSError, ValueError):
        pass  # not there yet, or half there
    raw, slope, intercept = _read_voxels(job)
    try:
        volume = preprocess(raw, slope, intercept, job.spacing, job.chain)
    except ValueError as error:
        raise UserError(f"{job.path}: {error}; correct its spacing") from error
    content = cache.npy_bytes(volume)
    checksum = f"{zlib.crc32(content):08x}"
    job.target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(job.target, content)
    write_bytes(job.record, f"{checksum} {len(content)}".encode())
    return checksum


def _read_voxels(job: Job) -> tuple[npt.NDArray[np.generic], float, float]:
    """(raw (x, y, z), slope, intercept); raw is what the file stores, before any scaling."""
    try:
        image = _load(job.path)
        if job.path.name.endswith(".gz"):
            # nibabel stops at the last voxel and never reaches gzip's checksum; reading to the end does.
            with gzip.open(job.path) as file:
                image = type(image).from_bytes(file.read())
        proxy = image.dataobj
        header_scaling = (float(proxy.slope), float(proxy.inter))
        raw = np.asarray(proxy.get_unscaled())
    except _UNREADABLE as error:
        raise _unreadable(job.path, error) from error
    if raw.dtype.kind == "f" and not np.isfinite(raw).all():
        bad = tuple(int(i) for i in np.argwhere(~np.isfinite(raw))[0])
        raise UserError(f"{job.path}: voxel {bad} is {raw[bad]}; repair or remove the volume")
    if math.isnan(job.slope):
        return raw, *header_scaling
    if header_scaling != (1.0, 0.0):
        log.warning("%s: header scaling %s is ignored; metadata.csv gives %s", job.path, header_scaling,
                    (job.slope, job.intercept))  # fmt: skip
    return raw, job.slope, job.intercept
