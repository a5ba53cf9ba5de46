"""Row 7: a full disk, a broken one, one that may only be read. Old steps stay, the message is one line, and
once there is room the same command goes on.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxablate.checkpoint import Checkpoints
from tests.faults.harness import (
    TOY,
    Child,
    Counts,
    Failing,
    Nursery,
    common_step,
    differences,
    finish,
    interrupted,
    runs,
    snapshot,
)

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def small_disk(where: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes at `where`; of memory, so it needs the right to mount."""
    where.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "none", where)
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


def may_mount(scratch: Path) -> bool:
    """Whether this process may make a file system."""
    try:
        with small_disk(scratch / "probe", 1 << 16):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextlib.contextmanager
def read_only(where: Path) -> Iterator[None]:
    """A directory that cannot be written, not even by root if there is the right to mount."""
    if os.geteuid():
        mode = where.stat().st_mode
        where.chmod(0o500)
        try:
            yield
        finally:
            where.chmod(mode)
        return
    _mount("--bind", where, where)
    try:
        _mount("-o", "remount,bind,ro", where)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)


def sound(workdir: Path) -> bool:
    """Whether every checkpoint that counts holds what was written."""
    stores = [Checkpoints(run.checkpoints, "", 3) for run in runs(workdir)]
    return not any(store.verify(step) for store in stores for step in store.steps())


def judged(counts: Counts, child: Child, workdir: Path, before: int, what: object) -> None:
    """What must hold of a process that met a broken disk."""
    counts.faults += 1
    code, said = child.wait(), child.words()
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    # Where native code of a library prints a traceback of its own there is nothing to be done about it.
    ours = re.search(r'File ".*jaxablate/', said)
    counts.expect("one line and exit 2", code == 2 and len(lines) == 1 and not ours, (what, said[-3000:]))
    counts.expect("old steps intact", sound(workdir) and common_step(workdir) >= before, what)


def full(nursery: Nursery, killed: Path, whole: Path, scratch: Path, times: int, seed: int) -> Counts:
    """Leaves a toy that goes on a random part of the room that it needs, then all of it."""
    rng, counts = random.Random(seed), Counts(7, "disk full", "full disks")
    size, need = 1 << 24, 1 << 17
    with small_disk(scratch / "disk", size) as disk:
        numbers = itertools.count()
        while counts.faults < times:
            number = next(numbers)
            ballast, output = disk / "ballast", scratch / f"{number}.txt"
            workdir = Path(shutil.copytree(killed, disk / str(number)))
            before, room = common_step(workdir), rng.randrange(need)
            ballast.write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - room))
            child = nursery.start(TOY.entry, TOY.argv(workdir), output)
            if child.wait():
                judged(counts, child, workdir, before, f"{room} bytes")
            else:  # it was enough
                need = room
            ballast.unlink()
            _goes_on(counts, nursery, whole, workdir)
    return counts


def small_files(nursery: Nursery, killed: Path, whole: Path, scratch: Path, sizes: list[int]) -> Counts:
    """Allows no file to be larger than so many bytes; a disk that is full for one file and not for another."""
    counts = Counts(7, "a file that may not grow", "limits")
    for size in sizes:
        workdir, output = Path(shutil.copytree(killed, scratch / str(size))), scratch / f"{size}.txt"
        before = common_step(workdir)
        child = nursery.start(TOY.entry, TOY.argv(workdir), output, file_size=size)
        child.wait()
        judged(counts, child, workdir, before, f"{size} bytes")
        _goes_on(counts, nursery, whole, workdir)
    return counts


def broken(nursery: Nursery, killed: Path, whole: Path, scratch: Path, times: int, seed: int) -> Counts:
    """From a random call on, a function of the operating system fails with EIO, under a run that goes on."""
    rng, counts = random.Random(seed), Counts(7, "I/O error", "broken calls")
    for number in range(times):
        workdir = Path(shutil.copytree(killed, scratch / str(number)))
        before = common_step(workdir)
        failing = Failing(rng.choice(("fsync", "write", "replace")), rng.randrange(12), errno.EIO)
        output = scratch / f"{number}.txt"
        child = nursery.start(TOY.entry, TOY.argv(workdir), output, failing=failing)
        child.wait()
        judged(counts, child, workdir, before, failing)
        _goes_on(counts, nursery, whole, workdir)
    return counts


def only_to_be_read(nursery: Nursery, killed: Path, whole: Path, scratch: Path) -> Counts:
    """Makes the directory of a run read-only, or a new run's workdir, and then writable again."""
    counts = Counts(7, "read-only directory", "read-only directories")
    new = scratch / "new"
    new.mkdir(parents=True)
    for workdir in (Path(shutil.copytree(killed, scratch / "old")), new):
        before, files = common_step(workdir), snapshot(workdir)
        output = scratch / f"{workdir.name}.txt"
        with read_only(workdir):
            child = nursery.start(TOY.entry, TOY.argv(workdir), output)
            child.wait()
        judged(counts, child, workdir, before, workdir)
        counts.expect("nothing written", snapshot(workdir) == files, workdir)
        _goes_on(counts, nursery, whole, workdir)
    return counts


def _goes_on(counts: Counts, nursery: Nursery, whole: Path, workdir: Path) -> None:
    finish(nursery, TOY, workdir)
    wrong = differences(whole, workdir)
    counts.expect("ended as if undisturbed", not wrong, wrong)
    shutil.rmtree(workdir)


@pytest.fixture(scope="module")
def killed(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy that was killed; to be copied."""
    return interrupted(nursery, tmp_path_factory.mktemp("disks") / "killed")


def test_a_full_disk_costs_no_step(nursery: Nursery, killed: Path, whole: Path, tmp_path: Path) -> None:
    if not may_mount(tmp_path):
        pytest.skip("no right to mount a small file system here")
    full(nursery, killed, whole, tmp_path, 1, seed=0).check()


def test_a_disk_that_fails_or_is_read_only_costs_no_step(
    nursery: Nursery, killed: Path, whole: Path, tmp_path: Path
) -> None:
    broken(nursery, killed, whole, tmp_path / "broken", 1, seed=0).check()
    if os.geteuid() or may_mount(tmp_path):
        only_to_be_read(nursery, killed, whole, tmp_path / "closed").check()
