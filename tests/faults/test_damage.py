"""Row 6: whatever happens to a file of a checkpoint is noticed, said, and the last good step is used."""

from __future__ import annotations

import logging
import random
import re
import shutil
from pathlib import Path

import pytest

from jaxablate.checkpoint import Checkpoints
from tests.faults.harness import (
    TOY,
    Counts,
    Nursery,
    begun,
    common_step,
    differences,
    interrupted,
    runs,
    start,
)

KINDS = ("flip", "truncate", "delete")


def files(checkpoints: Path, step: int) -> list[Path]:
    """The files of one checkpoint, with its manifest, relative to the directory."""
    inside = (p for p in (checkpoints / f"{step:09d}").rglob("*") if p.is_file())
    return [p.relative_to(checkpoints) for p in sorted([*inside, checkpoints / f"{step:09d}.json"])]


def harm(path: Path, kind: str, rng: random.Random) -> None:
    """Flips a bit of a file, cuts it off somewhere, or deletes it; an empty one can only go."""
    content = bytearray(path.read_bytes())
    if kind == "delete" or not content:
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)


def every_file(workdir: Path, scratch: Path, rounds: int, seed: int) -> Counts:
    """Harms each file of the newest checkpoint of a real run, one at a time, in each way; flips `rounds` times."""
    rng, counts = random.Random(seed), Counts(6, "damage to any file of a checkpoint", "damages")
    source = runs(workdir)[0].checkpoints
    kept = Checkpoints(shutil.copytree(source, scratch / "sound"), "", 3)
    *_, last_good, newest = kept.sound_regular_steps()
    said = _Heard()
    log = logging.getLogger("jaxablate.checkpoint")
    log.addHandler(said)
    log.propagate = False  # hundreds of lines
    for kind in KINDS:
        for name in files(kept.directory, newest) * (rounds if kind == "flip" else 1):
            where = scratch / "harmed"
            harm(Path(shutil.copytree(kept.directory, where)) / name, kind, rng)
            found = Checkpoints(where, "", 3)
            said.text = ""
            good = found.sound_regular_steps()
            counts.faults += 1
            counts.expect("found", newest not in good, (kind, name))
            counts.expect("last good step used", good[-1:] == [last_good], (kind, name, good))
            notes = " ".join(found.notes)
            counts.expect("said in log and notes", _about(newest, notes) and notes in said.text, (kind, name))
            shutil.rmtree(where)
    log.removeHandler(said)
    log.propagate = True
    return counts


def _about(step: int, text: str) -> bool:
    return re.search(rf"checkpoint (of step )?0*{step}\b", text) is not None


class _Heard(logging.Handler):
    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage()


def to_the_end(
    nursery: Nursery, source: Path, whole: Path, scratch: Path, kinds: list[str], seed: int
) -> Counts:
    """Harms a random file of the newest checkpoint of a member that was killed, and lets the run go on."""
    rng, counts = random.Random(seed), Counts(6, "a harmed checkpoint, then the run goes on", "resumes")
    for number, kind in enumerate(kinds):
        workdir = Path(shutil.copytree(source, scratch / str(number)))
        newest, run = common_step(workdir), rng.choice(runs(workdir))
        name = rng.choice(files(run.checkpoints, newest))
        harm(run.checkpoints / name, kind, rng)
        child = start(nursery, TOY, workdir)
        counts.faults += 1
        counts.expect("finished", child.wait() == 0, child.words()[-2000:])
        last = begun(run)[-1]
        counts.expect("went on from the step before", last["step"] == newest - 2, (name, kind, last))
        counts.expect("said in the log", _about(newest, child.words()), (name, kind))
        counts.expect("said in the attempt", _about(newest, " ".join(last["notes"])), (name, kind, last))
        wrong = differences(whole, workdir)
        counts.expect("ended as if undisturbed", not wrong, wrong)
    return counts


@pytest.mark.slow
def test_damage_to_any_file_is_found_and_the_run_goes_on(
    nursery: Nursery, whole: Path, tmp_path: Path
) -> None:
    source = interrupted(nursery, tmp_path / "killed")
    assert every_file(source, tmp_path, rounds=3, seed=0).check().faults > 40
    to_the_end(nursery, source, whole, tmp_path / "on", ["flip"], seed=0).check()
