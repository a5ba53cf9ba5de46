"""Four stages, each from a sound checkpoint of the one before: a kill costs nothing, damage is noticed."""

from __future__ import annotations

import os
import shutil
import signal
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from jaxablate import config, disk
from jaxablate.checkpoint import Checkpoints
from tests.faults.harness import Child, Nursery, begun, differences, environment, runs

EACH = 6  # updates of every stage
AUTOENCODER, OPERATOR, CORRECTOR, DISTILL = ENDS = tuple(EACH * n for n in (1, 2, 3, 4))
DEATHS = ("in 5", "after 6", "in 11", "after 12", "in 17", "after 18", "in 23")
# As small as it can be with noise in it: drop path in the operator, random times in the corrector.
SMALLEST = {
    "data.cells": 16, "data.trajectories": 4, "data.held_out": 2, "data.frames": 40, "data.rollout": 1,
    "data.eval_windows": 4, "model.encoder.tokens": 4, "model.encoder.dim": 4, "model.core.hidden": 8,
    "model.core.heads": 2, "model.core.drop_path": 0.5, "model.decoder.hidden": 8, "model.decoder.heads": 2,
    "model.decoder.ffn": 8, "model.conditioning.candidates": 2, "training.batch_size": 4,
    "training.eval_batch_size": 4, "training.eval_every": EACH, "training.steps": EACH, "optim.warmup_steps": 1,
    "model.autoencoder.steps": EACH, "model.corrector.steps": EACH, "model.distill.steps": EACH,
    "host.checkpoint_every": 2, "host.log_every": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


@dataclass(frozen=True)
class Lab:
    """Real processes, which share the generated data."""

    nursery: Nursery

    def start(self, death: str, workdir: Path, **overrides: object) -> Child:
        """A process that trains the reference arm below `workdir` until its death."""
        workdir.mkdir(parents=True, exist_ok=True)
        fields = SMALLEST | {key.replace("__", "."): value for key, value in overrides.items()}
        argv = [f"--config.{name}={value}" for name, value in (fields | {"host.workdir": workdir}).items()]
        command = [death, "--config=configs/burgers.py", *argv]
        return self.nursery.start("tests.studies.burgers.mortal", command, workdir / "output.txt")

    def dead(self, death: str, workdir: Path, **overrides: object) -> Path:
        """The workdir of a process that has died."""
        child = self.start(death, workdir, **overrides)
        assert child.wait() == -signal.SIGKILL, child.words()[-3000:]
        return workdir

    def finished(self, workdir: Path) -> Path:
        """Trained to the end, from whatever is there."""
        child = self.start("never", workdir)
        assert child.wait() == 0, child.words()[-3000:]
        return workdir


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A nursery that keeps compiled programs where all tests do: its children die after they have compiled."""
    env = environment(tmp_path_factory.mktemp("cache"))
    env |= {name: value for name, value in os.environ.items() if name.startswith(("JAX_COMP", "JAX_PERS"))}
    with Nursery(env) as nursery:
        yield Lab(nursery)


@pytest.fixture(scope="module")
def whole(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without any disturbance."""
    return lab.finished(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def killed(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run after each of its deaths, one after the other, and at its `end`."""
    here, kept = tmp_path_factory.mktemp("killed"), {}
    for death in DEATHS:
        lab.dead(death, here / "run")
        kept[death] = Path(shutil.copytree(here / "run", here / death))
    return kept | {"end": lab.finished(here / "run")}


def checkpoints(workdir: Path) -> Path:
    (run,) = runs(workdir)
    return run.checkpoints


def of_the_operator(checkpoints: Path) -> Path:
    """The largest file of the last checkpoint of the operator's stage."""
    files = [path for path in (checkpoints / f"{OPERATOR:09d}").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


# ------------------------------------------------------------------------------------------- four stages


@pytest.mark.slow
def test_four_stages_leave_the_encoder_frozen_and_say_what_each_part_gives(whole: Path) -> None:
    (run,) = runs(whole)
    summary = disk.read_json(run.summary)
    assert summary["steps"] == DISTILL
    for name in ("operator", "corrected", "conditioned", "reconstruction", "persistence"):
        assert summary["statistics"][f"val_nrmse_{name}"]["final"] > 0
    rows = disk.read_jsonl(run.metrics)[0]
    floor = {
        row["step"]: row["val/nrmse_reconstruction"] for row in rows if "val/nrmse_reconstruction" in row
    }
    assert floor[0] != floor[AUTOENCODER]  # it is trained
    assert floor[OPERATOR] == floor[CORRECTOR] == floor[DISTILL]  # and then stays as it is
    plain = {row["step"]: row["val/nrmse_operator"] for row in rows if "val/nrmse_operator" in row}
    assert plain[CORRECTOR] == plain[DISTILL]
    with np.load(run.predictions) as kept:
        assert kept["truth"].shape == kept["prediction"].shape
    base = config.load("configs/burgers.py").base
    stages = config.import_task(base.task)(base, "cpu").stages()
    assert [stage.name for stage in stages] == ["autoencoder", "operator", "corrector", "distill"]
    assert not any(stage.trains("encoder/project/kernel") for stage in stages[1:])
    assert [stage.trains("operator/time_in/kernel") for stage in stages] == [False, True, False, False]


# ---------------------------------------------------------------------------------------- kill -9


@pytest.mark.slow
def test_killed_in_each_stage_and_between_each_two_it_ends_as_if_nothing_had_happened(
    whole: Path, killed: dict[str, Path]
) -> None:
    assert differences(whole, killed["end"]) == []
    kept = [np.load(runs(workdir)[0].predictions) for workdir in (whole, killed["end"])]
    assert kept[0].files == kept[1].files != []
    assert all(np.array_equal(kept[0][name], kept[1][name]) for name in kept[0].files)
    # Each attempt went on from its own stage, or from the very end of the one before.
    steps = [row["step"] for row in begun(runs(killed["end"])[0])]
    assert [steps[i] for i in (0, 2, 4, 6)] == [0, AUTOENCODER, OPERATOR, CORRECTOR]
    assert all(end - EACH < step < end for step, end in zip(steps[1::2], ENDS, strict=True))


@pytest.mark.slow
def test_the_comparison_sees_a_stage_that_starts_from_something_else(
    lab: Lab, killed: dict[str, Path], whole: Path, tmp_path: Path
) -> None:
    """The operator as it was two updates earlier, with a manifest that claims it to be the last one."""
    here = Path(shutil.copytree(killed["after 12"], tmp_path / "run"))
    last, earlier = (checkpoints(here) / f"{step:09d}" for step in (OPERATOR, OPERATOR - 2))
    shutil.rmtree(last)
    shutil.copytree(earlier, last)
    forged = disk.read_json(earlier.with_name(f"{earlier.name}.json")) | {"step": OPERATOR}
    del forged["crc32"]
    forged["crc32"] = zlib.crc32(disk.encode_row(forged))
    disk.write_json(last.with_name(f"{last.name}.json"), forged)
    lab.finished(here)
    assert begun(runs(here)[0])[-1]["step"] == OPERATOR
    assert any("params_digest differs" in said for said in differences(whole, here))


# ------------------------------------------------------------------------- the stage before


@pytest.mark.slow
def test_a_damaged_predecessor_is_put_aside_and_its_stage_ends_anew(
    lab: Lab, killed: dict[str, Path], whole: Path, tmp_path: Path
) -> None:
    here = Path(shutil.copytree(killed["after 12"], tmp_path / "run"))
    file = of_the_operator(checkpoints(here))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    lab.finished(here)
    assert differences(whole, here) == []
    again = begun(runs(here)[0])[-1]
    assert again["step"] == OPERATOR - 2
    assert "has other bytes than were written" in " ".join(again["notes"])


@pytest.mark.slow
def test_what_another_run_learned_is_refused_in_one_line(
    lab: Lab, killed: dict[str, Path], tmp_path: Path
) -> None:
    """Checkpoints that are sound and of equal shapes, and yet those of another seed."""
    here = lab.dead("in 1", tmp_path / "run", seeds=1)
    shutil.copytree(checkpoints(killed["after 12"]), checkpoints(here), dirs_exist_ok=True)
    child = lab.start("never", here, seeds=1)
    assert child.wait() == 2
    said = [line for line in child.words().splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "is a checkpoint of run" in said[0]
    assert f"{OPERATOR:09d}" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("lost", "is missing"),
        ("without_manifest", "has no manifest"),
        ("exchanged", "has other bytes than were written"),
        ("of_another_stage", "it is the checkpoint of step 6"),
    ],
)
def test_no_stage_starts_from_an_unsound_predecessor(
    killed: dict[str, Path], tmp_path: Path, harm: str, says: str
) -> None:
    here = Path(shutil.copytree(checkpoints(killed["after 12"]), tmp_path / "checkpoints"))
    whole, earlier = here / f"{OPERATOR:09d}", here / f"{AUTOENCODER:09d}"
    sound = Checkpoints(here, "", 3).sound_regular_steps()
    assert sound[-1] == OPERATOR  # before it is harmed
    if not earlier.exists():  # removed meanwhile, as old ones are
        shutil.copytree(checkpoints(killed["after 6"]), here, dirs_exist_ok=True)
    if harm == "lost":
        of_the_operator(here).unlink()
    elif harm == "without_manifest":
        whole.with_name(f"{whole.name}.json").unlink()
    else:
        shutil.rmtree(whole)
        shutil.copytree(earlier, whole)
        if harm == "of_another_stage":
            shutil.copy(earlier.with_name(f"{earlier.name}.json"), whole.with_name(f"{whole.name}.json"))
    found = Checkpoints(here, "", 3)
    assert max(found.sound_regular_steps()) == sound[-2]
    assert says in " ".join(found.notes)
