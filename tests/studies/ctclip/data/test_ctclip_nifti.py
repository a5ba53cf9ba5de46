"""The NIfTI path gives what the phantoms are, and stops with one clear line at any fault."""

from __future__ import annotations

import csv
import gzip
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from jaxablate.errors import UserError
from jaxablate.studies.ctclip.data.findings import FINDINGS
from jaxablate.studies.ctclip.data.nifti import nifti_split
from jaxablate.studies.ctclip.data.phantom_set import phantom_split, write_nifti
from jaxablate.studies.ctclip.data.preprocess import Chain

CHAIN = Chain((6, 16, 16), (1.5, 0.75, 0.75))
SHARED = Path(__file__).resolve().parents[5] / "shared" / "data" / "nifti"
COUNT = 3


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nifti") / "val"
    write_nifti(folder, 5, "val", COUNT, CHAIN)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "val"))  # keeps modification times


def load(path: Path) -> Any:
    return nib.load(path)  # type: ignore[attr-defined]


def open_split(folder: Path, tmp_path: Path, chain: Chain = CHAIN, workers: int = 1):
    return nifti_split(str(folder), "data.val", chain, tmp_path / "cache", workers)


def stack(split) -> np.ndarray:
    return np.stack([split.volumes.read(i) for i in range(len(split.volumes))])


def edit(path: Path, row: int, column: str, value: str) -> None:
    """Set one cell; row 1 is the header's successor, as index of data rows from 0."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    rows[row + 1][rows[0].index(column)] = value
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def drop_row(path: Path, row: int) -> None:
    lines = path.read_text().splitlines()
    del lines[row + 1]
    path.write_text("\n".join(lines) + "\n")


def volume(folder: Path, number: int = 1) -> Path:
    return next(folder.rglob(f"val_{number}_a_1.nii.gz"))


def test_written_phantoms_come_back_the_same(folder, tmp_path):
    split = open_split(folder, tmp_path)
    phantoms = phantom_split(5, "val", COUNT, CHAIN, tmp_path)
    assert split.names == phantoms.names
    assert split.reports == phantoms.reports
    np.testing.assert_array_equal(split.labels, phantoms.labels)
    np.testing.assert_array_equal(stack(split), stack(phantoms))
    assert stack(split).dtype == np.float16


def test_faithful_clipping_is_another_data_set(folder, tmp_path):
    faithful = Chain(CHAIN.volume, CHAIN.spacing, "faithful")
    first, second = open_split(folder, tmp_path), open_split(folder, tmp_path, faithful)
    assert first.volumes != second.volumes


def test_names_of_ct_rate_are_found(folder, tmp_path):
    plain = open_split(folder, tmp_path)
    for name in ("metadata", "reports"):
        (folder / f"{name}.csv").rename(folder / f"validation_{name}.csv")
    (folder / "labels.csv").rename(folder / "valid_predicted_labels.csv")
    assert open_split(folder, tmp_path).digest == plain.digest


def test_slope_is_applied_once_whatever_the_header_says(folder, tmp_path, caplog):
    plain = stack(open_split(folder, tmp_path))
    path = volume(folder)
    image = load(path)
    raw = np.asarray(image.dataobj.get_unscaled())
    scaled = nib.Nifti1Image(raw, image.affine)
    scaled.header.set_slope_inter(2.0, -7.0)
    scaled.to_filename(path)
    # nibabel stores (data - inter) / slope; put the very integers of before behind the new header
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[352:] = raw.tobytes(order="F")
    path.write_bytes(gzip.compress(bytes(content)))
    assert load(path).dataobj.slope == 2.0
    with caplog.at_level(logging.WARNING):
        again = stack(open_split(folder, tmp_path))
    np.testing.assert_array_equal(again, plain)
    assert "header scaling (2.0, -7.0) is ignored" in caplog.text
    (folder / "metadata.csv").unlink()
    assert (stack(open_split(folder, tmp_path))[0] != plain[0]).any()  # now the header counts


def test_without_metadata_the_header_counts_and_the_log_says_so(folder, tmp_path, caplog):
    expected = stack(open_split(folder, tmp_path))
    (folder / "metadata.csv").unlink()
    for path in folder.rglob("*.nii.gz"):
        image = load(path)
        raw = np.asarray(image.dataobj.get_unscaled())
        header = nib.Nifti1Image(raw.astype(np.float32) - 1024.0, image.affine)
        header.to_filename(path)
    with caplog.at_level(logging.WARNING):
        split = open_split(folder, tmp_path)
    np.testing.assert_array_equal(stack(split), expected)
    assert caplog.text.count("has no metadata.csv; using the scaling and voxel sizes") == 1


def test_prepared_volumes_are_used_again_until_the_file_or_the_chain_changes(folder, tmp_path):
    first = open_split(folder, tmp_path)
    cache = tmp_path / "cache" / "nifti"
    stamps = {p.name: p.stat().st_mtime_ns for p in cache.iterdir()}
    moved = folder.rename(tmp_path / "moved")
    again = open_split(moved, tmp_path)
    assert again.digest == first.digest
    assert {p.name: p.stat().st_mtime_ns for p in cache.iterdir()} == stamps
    os.utime(volume(moved), ns=(1, 1))
    touched = open_split(moved, tmp_path)
    assert touched.digest == first.digest  # same content, prepared once more
    assert len(list(cache.iterdir())) == len(stamps) + 2
    other = open_split(moved, tmp_path, Chain((6, 16, 12), CHAIN.spacing))
    assert other.digest != first.digest


def test_a_cached_volume_cut_short_is_made_again(folder, tmp_path):
    expected = stack(open_split(folder, tmp_path))
    target = next((tmp_path / "cache" / "nifti").glob("*.npy"))
    target.write_bytes(target.read_bytes()[:-10])
    np.testing.assert_array_equal(stack(open_split(folder, tmp_path)), expected)


def test_a_process_pool_gives_the_same(tmp_path):
    folder = tmp_path / "val"
    write_nifti(folder, 5, "val", 8, CHAIN)
    alone = open_split(folder, tmp_path / "a", workers=1)
    pooled = open_split(folder, tmp_path / "b", workers=2)
    assert alone.digest == pooled.digest
    np.testing.assert_array_equal(stack(alone), stack(pooled))


def corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def save(path: Path, array: np.ndarray) -> None:
    nib.Nifti1Image(array, np.eye(4)).to_filename(path)


def with_nan(path: Path) -> None:
    array = np.zeros((8, 8, 8), np.float32)
    array[1, 2, 3] = np.nan
    save(path, array)


def in_microns(folder: Path) -> None:
    (folder / "metadata.csv").unlink()
    image = nib.Nifti1Image(np.zeros((8, 8, 8), np.int16), np.eye(4))
    image.header.set_xyzt_units("micron")
    image.to_filename(volume(folder))


def duplicate(folder: Path) -> None:
    (folder / "copy").mkdir()
    shutil.copy(volume(folder), folder / "copy")


def double_table(folder: Path) -> None:
    (folder / "labels.csv").rename(folder / "a_labels.csv")
    shutil.copy(folder / "a_labels.csv", folder / "b_labels.csv")


def rename_column(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new, 1))


def repeat_row(path: Path) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[1]]) + "\n")


FAULTS = {
    "corrupt": (
        lambda f: corrupt(volume(f)),
        r"val_1_a_1\.nii\.gz: cannot be read as NIfTI .* corrupt or trunc",
    ),
    "checksum": (
        lambda f: volume(f).write_bytes(
            volume(f).read_bytes()[:-8] + b"\0\0\0\0" + volume(f).read_bytes()[-4:]
        ),
        r"val_1_a_1\.nii\.gz: cannot be read as NIfTI \(CRC check failed",
    ),
    "truncated": (
        lambda f: volume(f).write_bytes(volume(f).read_bytes()[:-200]),
        r"val_1_a_1\.nii\.gz: cannot be read as NIfTI .* fetch it again",
    ),
    "empty file": (lambda f: volume(f).write_bytes(b""), r"val_1_a_1\.nii\.gz: cannot be read as NIfTI"),
    "not nifti": (lambda f: volume(f).write_bytes(gzip.compress(b"x" * 999)), r"cannot be read as NIfTI"),
    "four-dimensional": (
        lambda f: save(volume(f), np.zeros((4, 4, 4, 2), np.int16)),
        r"val_1_a_1\.nii\.gz: shape \(4, 4, 4, 2\) is not that of a 3-D volume",
    ),
    "two-dimensional": (lambda f: save(volume(f), np.zeros((4, 4), np.int16)), r"shape \(4, 4\) is not"),
    "complex": (lambda f: save(volume(f), np.zeros((4, 4, 4), np.complex64)), r"voxel type complex64 is not"),
    "nan": (lambda f: with_nan(volume(f)), r"val_1_a_1\.nii\.gz: voxel \(1, 2, 3\) is nan"),
    "missing volume": (
        lambda f: volume(f).unlink(),
        r"labels\.csv row 2 column VolumeName: volume 'val_1_a_1\.nii\.gz' is not below",
    ),
    "no volumes": (lambda f: [p.unlink() for p in f.rglob("*.nii.gz")], r"holds no \.nii or \.nii\.gz file"),
    "same name twice": (duplicate, r"val_1_a_1\.nii\.gz: the same VolumeName as"),
    "no label row": (
        lambda f: drop_row(f / "labels.csv", 1),
        r"val_2_a_1\.nii\.gz: has no row in .*labels\.csv; add its labels",
    ),
    "no report row": (
        lambda f: drop_row(f / "reports.csv", 1),
        r"val_2_a_1\.nii\.gz: has no report: no row .* in .*reports\.csv",
    ),
    "no metadata row": (lambda f: drop_row(f / "metadata.csv", 2), r"val_3_a_1\.nii\.gz: has no metadata"),
    "no reports": (lambda f: (f / "reports.csv").unlink(), r"has no reports\.csv"),
    "no labels": (lambda f: (f / "labels.csv").unlink(), r"has no labels\.csv"),
    "two label tables": (double_table, r"2 files match \*labels\*\.csv \(a_labels\.csv, b_labels\.csv\)"),
    "repeated row": (
        lambda f: repeat_row(f / "labels.csv"),
        r"labels\.csv row 5 column VolumeName: 'val_1_a_1\.nii\.gz' is in row 2 too",
    ),
    "nameless row": (
        lambda f: edit(f / "labels.csv", 0, "VolumeName", " "),
        r"row 2 column VolumeName: is empty",
    ),
    "label 2": (
        lambda f: edit(f / "labels.csv", 1, "Lung nodule", "2"),
        r"labels\.csv row 3 column Lung nodule: label '2' is neither 0 nor 1",
    ),
    "label empty": (
        lambda f: edit(f / "labels.csv", 0, "Emphysema", ""),
        r"labels\.csv row 2 column Emphysema: label '' is neither 0 nor 1",
    ),
    "label column": (
        lambda f: rename_column(f / "labels.csv", "Hiatal hernia", "Hiatal hernea"),
        r"labels\.csv: has no column 'Hiatal hernia'; did you mean 'Hiatal hernea'\?",
    ),
    "report column": (
        lambda f: rename_column(f / "reports.csv", "Findings_EN", "Findings"),
        r"reports\.csv: has no column 'Findings_EN'; did you mean 'Findings'\?",
    ),
    "spacing": (
        lambda f: edit(f / "metadata.csv", 2, "XYSpacing", "0.75"),
        r"metadata\.csv row 4 column XYSpacing: '0\.75' is not two lengths in mm; write it like \[0\.75",
    ),
    "negative spacing": (
        lambda f: edit(f / "metadata.csv", 0, "XYSpacing", "[-1, 1]"),
        r"row 2 column XYSpacing: '\[-1, 1\]'",
    ),
    "spacing words": (lambda f: edit(f / "metadata.csv", 0, "XYSpacing", "[a, b]"), r"XYSpacing: '\[a, b\]'"),
    "z spacing": (
        lambda f: edit(f / "metadata.csv", 0, "ZSpacing", "0"),
        r"row 2 column ZSpacing: 0 is not a",
    ),
    "z spacing text": (
        lambda f: edit(f / "metadata.csv", 0, "ZSpacing", "nan"),
        r"ZSpacing: 'nan' is no finite",
    ),
    "slope": (
        lambda f: edit(f / "metadata.csv", 0, "RescaleSlope", ""),
        r"RescaleSlope: '' is no finite number",
    ),
    "slope 0": (
        lambda f: edit(f / "metadata.csv", 0, "RescaleSlope", "0"),
        r"RescaleSlope: is 0, which erases",
    ),
    "too thin": (
        lambda f: edit(f / "metadata.csv", 0, "ZSpacing", "0.001"),
        r"val_1_a_1\.nii\.gz: .* resample to \(0, .*; correct its spacing",
    ),
    "ragged row": (
        lambda f: (f / "labels.csv").write_text((f / "labels.csv").read_text() + "only_a_name\n"),
        r"labels\.csv row 5: has not the 19 cells of the header",
    ),
    "empty table": (
        lambda f: (f / "labels.csv").write_text(""),
        r"labels\.csv: has no column 'VolumeName'; the file",
    ),
    "only a header": (
        lambda f: (f / "reports.csv").write_text("VolumeName,Findings_EN\n"),
        r"reports\.csv: has no row",
    ),
    "latin-1": (
        lambda f: (f / "reports.csv").write_bytes(b"VolumeName,\xe9\n"),
        r"reports\.csv: is no CSV in UTF-8",
    ),
    "microns": (in_microns, r"val_1_a_1\.nii\.gz: header gives voxel sizes in micron, not mm"),
    "no folder": (lambda f: shutil.rmtree(f), r"data\.val=.*: no such folder"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_line_that_names_the_place(folder, tmp_path, fault):
    spoil, message = FAULTS[fault]
    open_split(folder, tmp_path)  # the sound folder opens, so the fault alone is to blame
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_split(folder, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_fault_in_a_worker_process_is_the_same_error(tmp_path):
    folder = tmp_path / "val"
    write_nifti(folder, 5, "val", 8, CHAIN)
    with_nan(volume(folder, 6))
    with pytest.raises(UserError, match=r"val_6_a_1\.nii\.gz: voxel \(1, 2, 3\) is nan"):
        open_split(folder, tmp_path, workers=2)


def real_split(folder: Path, name: str) -> Path:
    folder.mkdir()
    shutil.copy(SHARED / name, folder / name)
    (folder / "reports.csv").write_text(f"VolumeName,Findings_EN\n{name},Not given.\n")
    header = ",".join(FINDINGS)
    (folder / "labels.csv").write_text(f"VolumeName,{header}\n{name}{',0' * 18}\n")
    return folder


needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no sample volumes in {SHARED}")


@needs_shared
@pytest.mark.parametrize("name, zxy", [("anatomical.nii", (33, 88, 109)), ("standard.nii.gz", (9, 5, 20))])
def test_real_files_are_read_with_their_headers(tmp_path, name, zxy):
    folder = real_split(tmp_path / "real", name)
    split = open_split(folder, tmp_path, Chain(zxy, (1.5, 0.75, 0.75)))
    assert split.reports == ("",)
    image = stack(split)[0].astype(np.float32)
    assert image.shape == zxy
    raw = np.asarray(load(SHARED / name).dataobj, np.float32).clip(-1000, 1000)
    assert abs(image.mean() * 1000 - raw.mean()) < 0.05 * raw.std()


@needs_shared
@pytest.mark.parametrize("name", ["example4d.nii.gz", "functional.nii"])
def test_real_four_dimensional_files_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="is not that of a 3-D volume"):
        open_split(real_split(tmp_path / "real", name), tmp_path)
