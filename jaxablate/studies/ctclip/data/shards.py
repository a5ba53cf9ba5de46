"""Volumes that are already prepared, in tar shards.

A folder of `shard-NNNNNN.tar` and `manifest.json` {"total_samples": n}. Each key has four members:
`.bin` float16 (H, W, T), `.json` {"study_id", "volume_shape", "volume_dtype"}, `.txt` the report, and
`.labels` (or `.cls`) float32[18], little-endian. Members are found once, when the folder is opened;
after that a volume is one seek and one read.
"""

from __future__ import annotations

import json
import math
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jaxablate import cache
from jaxablate.errors import UserError
from jaxablate.studies.ctclip.data.findings import FINDINGS
from jaxablate.studies.ctclip.data.items import Split
from jaxablate.studies.ctclip.data.preprocess import Chain
from jaxablate.studies.ctclip.data.text import clean_report

MANIFEST = "manifest.json"
_LABEL_BYTES = 4 * len(FINDINGS)
_LABEL_SUFFIXES = ("labels", "cls")
_EDGE = 4096  # bytes at each end of a .bin that go into the split's digest: all would be a full read


@dataclass(frozen=True)
class Member:
    """Where one file's bytes lie in a shard."""

    offset: int
    size: int


@dataclass(frozen=True)
class ShardVolumes:
    """Random access to the `.bin` members; `places` is (shard, byte offset, key) a volume."""

    places: tuple[tuple[Path, int, str], ...]
    volume: tuple[int, int, int]  # (T, H, W)

    def __len__(self) -> int:
        return len(self.places)

    def read(self, index: int) -> npt.NDArray[np.float16]:
        """(T, H, W). Raises UserError if the shard changed since it was opened or a voxel is not finite."""
        shard, offset, key = self.places[index]
        stored = (*self.volume[1:], self.volume[0])
        try:
            flat = np.fromfile(shard, "<f2", count=math.prod(stored), offset=offset)
        except OSError as error:
            raise UserError(f"{shard} key {key}: cannot be read ({error}); put the shard back") from error
        if flat.size != math.prod(stored):
            raise UserError(f"{shard} key {key}: .bin ends early; fetch the shard again")
        if not np.isfinite(flat).all():
            raise UserError(f"{shard} key {key}: .bin holds a voxel that is not finite; make the shard again")
        return flat.reshape(stored).transpose(2, 0, 1)


def shard_split(folder: str, field: str, chain: Chain) -> Split:
    """The split in `folder`, in the order of shards and of keys in them.

    `field` ("data.train") is named in messages. Raises UserError, naming shard and key, for a truncated
    tar, a member missing, of the wrong size or twice there, labels that are not 18 of 0 and 1, a shape
    other than data.volume, or a count other than the manifest's.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{field}={folder}: no such folder; give the folder of the shards")
    shards = sorted(root.glob("shard-*.tar"))
    if not shards:
        raise UserError(f"{root}: holds no shard-NNNNNN.tar; give the folder of the shards")
    total = _read_manifest(root / MANIFEST)
    places: list[tuple[Path, int, str]] = []
    owner: dict[str, Path] = {}
    reports, labels, marks = [], [], []
    for shard in shards:
        samples = _scan(shard)
        with shard.open("rb") as file:
            for key, members in samples.items():
                where = f"{shard} key {key}"
                if key in owner:
                    raise UserError(f"{where}: is in {owner[key].name} too; delete one")
                owner[key] = shard

                def content(member: Member, file=file) -> bytes:
                    file.seek(member.offset)
                    return file.read(member.size)

                binary = _need(members, ("bin",), where)
                _check_volume(content(_need(members, ("json",), where)), binary, chain, where)
                reports.append(_decode_report(content(_need(members, ("txt",), where)), where))
                labels.append(_decode_labels(content(_need(members, _LABEL_SUFFIXES, where)), where))
                places.append((shard, binary.offset, key))
                head = content(Member(binary.offset, min(_EDGE, binary.size)))
                tail_start = max(binary.size - _EDGE, 0)
                tail = content(Member(binary.offset + tail_start, binary.size - tail_start))
                marks.append(zlib.crc32(tail, zlib.crc32(head)))
    if len(places) != total:
        raise UserError(
            f"{root / MANIFEST}: total_samples={total}, but the {len(shards)} shards hold {len(places)}; "
            f"fetch the missing shards or correct it"
        )
    values = np.stack(labels)
    names = tuple(key for _, _, key in places)
    return Split(
        volumes=ShardVolumes(tuple(places), chain.volume),
        names=names,
        reports=tuple(reports),
        labels=values,
        digest=cache.fingerprint(names, reports, values.tolist(), marks, chain.volume),
    )


def _read_manifest(path: Path) -> int:
    try:
        total = json.loads(path.read_text(encoding="utf-8"))["total_samples"]
    except FileNotFoundError:
        raise UserError(f'{path}: no such file; write {{"total_samples": n}} into it') from None
    except (ValueError, KeyError, TypeError):
        total = None
    if not isinstance(total, int) or total < 1:
        raise UserError(
            f'{path}: has no whole number total_samples above 0; write {{"total_samples": n}} into it'
        )
    return total


def _scan(shard: Path) -> dict[str, dict[str, Member]]:
    """{key: {suffix: place}} from the tar headers alone."""
    samples: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                if not info.isfile():
                    continue
                key, _, suffix = info.name.rpartition("/")[2].partition(".")
                members = samples.setdefault(key, {})
                if suffix in members:
                    raise UserError(f"{shard} key {key}: has .{suffix} twice; delete one")
                members[suffix] = Member(info.offset_data, info.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{shard}: is no whole tar file ({error}); fetch it again") from error
    return samples


def _need(members: dict[str, Member], suffixes: tuple[str, ...], where: str) -> Member:
    for suffix in suffixes:
        if suffix in members:
            return members[suffix]
    raise UserError(f"{where}: has no .{' nor .'.join(suffixes)}; make the shard again")


def _check_volume(meta: bytes, binary: Member, chain: Chain, where: str) -> None:
    try:
        fields = json.loads(meta)
        shape, dtype = tuple(fields["volume_shape"]), fields["volume_dtype"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{where}: .json lacks volume_shape or volume_dtype ({error}); make the shard again"
        ) from error
    want = (*chain.volume[1:], chain.volume[0])
    if shape != want:
        raise UserError(f"{where}: volume_shape {shape} is not (H, W, T) {want} of data.volume; change one")
    if dtype != "float16":
        raise UserError(f"{where}: volume_dtype '{dtype}' is not float16; make the shard again")
    if binary.size != 2 * math.prod(want):
        raise UserError(
            f"{where}: .bin has {binary.size} bytes, not {2 * math.prod(want)}; make the shard again"
        )


def _decode_report(content: bytes, where: str) -> str:
    try:
        return clean_report(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: .txt is not UTF-8 ({error}); make the shard again") from error


def _decode_labels(content: bytes, where: str) -> npt.NDArray[np.float32]:
    if len(content) != _LABEL_BYTES:
        raise UserError(
            f"{where}: labels have {len(content)} bytes, not {_LABEL_BYTES} (18 float32); make it again"
        )
    values = np.frombuffer(content, "<f4").astype(np.float32)
    for value in values:
        if value not in (0.0, 1.0):
            raise UserError(f"{where}: label {value:g} is neither 0 nor 1; correct it")
    return values
