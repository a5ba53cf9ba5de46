"""Rows 11 and 12: a run goes on on another number of devices, and not at all under another config or program."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxablate import config, sharding
from jaxablate.checkpoint import Checkpoints
from jaxablate.disk import read_jsonl
from jaxablate.errors import UserError
from jaxablate.program import Program
from tests.faults.harness import (
    TOY,
    Counts,
    Nursery,
    begun,
    committed,
    common_step,
    interrupted,
    runs,
    snapshot,
    start,
)
from tests.toy import ToyTask

pytestmark = pytest.mark.slow
TOLERANCE = 1e-4  # relative, of the losses: what the mesh declares (tests/test_sharding.py)
DEVICES = "--xla_force_host_platform_device_count"


# ------------------------------------------------------------------------------- row 11: other devices


def move(nursery: Nursery, killed: Path, whole: Path, scratch: Path, devices: list[int]) -> Counts:
    """Lets a run that was killed go on to its end on other numbers of devices."""
    counts = Counts(11, "resume on another number of devices", "resumes")
    for number in devices:
        workdir = Path(shutil.copytree(killed, scratch / str(number)))
        step = common_step(workdir)
        flags = {"XLA_FLAGS": f"{DEVICES}={number}", "NPROC": "32"}
        child = start(nursery, TOY, workdir, env=flags)
        counts.faults += 1
        counts.expect("finished", child.wait() == 0, child.words()[-2000:])
        counts.expect("went on", all(begun(run)[-1]["step"] == step for run in runs(workdir)), workdir)
        used = child.words().rpartition(" steps, ")[2].splitlines()[0]
        counts.expect("on those devices", ("x" in used or "member" in used) == (number > 1), used)
        for one, other in zip(runs(whole), runs(workdir), strict=True):
            a, b = (
                {r["step"]: r for r in read_jsonl(run.metrics)[0] if "train/loss" in r}
                for run in (one, other)
            )
            counts.expect("rows before it bit-equal", all(a[s] == b[s] for s in a if s <= step), workdir)
            near = [np.isclose(a[s]["train/loss"], b[s]["train/loss"], rtol=TOLERANCE) for s in a]
            counts.expect(
                f"losses after it within {TOLERANCE:g}", all(near) and a.keys() == b.keys(), workdir
            )
    return counts


def restore_everywhere(killed: Path) -> Counts:
    """Restores every checkpoint of a run on meshes of one to eight devices: each bit is where it was."""
    counts = Counts(11, "restore on another mesh", "restores")
    cohort = config.load("tests/configs/toy.py", [(k, str(v)) for k, v in TOY.fields.items()])
    task = ToyTask(cohort.base, "cpu")
    meshes = [(1, 1), (2, 1), (1, 2), (1, 4), (1, 8), (2, 2), (2, 4)]
    for member, data in meshes:
        mesh = sharding.make_mesh(config.MeshConfig(member, data), 2, 8, jax.devices()[: member * data])
        program = Program(task, cohort, task.stages()[0], mesh)
        target = program.abstract_checkpoint()
        for step in set.intersection(*(committed(run) for run in runs(killed))):
            stores = [_store(run.checkpoints) for run in runs(killed)]
            state = program.stack([store.restore(step, target) for store in stores])
            counts.faults += 1
            for m, store in enumerate(stores):
                plain = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in target.items()}
                saved = jax.device_get(store.restore(step, plain))
                now = jax.device_get(program.take(state, m))
                same = [np.array_equal(saved[k], now[k]) and saved[k].dtype == now[k].dtype for k in saved]
                counts.expect(
                    "state bit-equal", all(same) and saved.keys() == now.keys(), (member, data, step)
                )
    return counts


def _store(directory: Path) -> Checkpoints:
    manifest = json.loads(next(directory.glob("*.json")).read_bytes())
    return Checkpoints(directory, manifest["identity"], 3)


@pytest.mark.alone
def test_a_run_goes_on_on_another_number_of_devices(nursery: Nursery, whole: Path, tmp_path: Path) -> None:
    killed = interrupted(nursery, tmp_path / "killed", rows=20)
    restore_everywhere(killed).check()
    move(nursery, killed, whole, tmp_path, [8]).check()


# -------------------------------------------------------------------- row 12: another config or program


def leaves(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The leaves of nested dicts with their paths."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from leaves(value, (*path, key))
    else:
        yield path, values


def other(value: Any) -> Any:
    """Another value than `value`, of its type where that has others."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return f"{value}x" if isinstance(value, str) else [*(value or []), 1]


def edit(nursery: Nursery, killed: Path, scratch: Path, fields: int, seed: int) -> Counts:
    """Edits fields of the config that a run was begun with, one at a time, and asks for it to go on."""
    rng, counts = random.Random(seed), Counts(12, "edited config under a run", "edited fields")
    workdir = Path(shutil.copytree(killed, scratch / "edited"))
    path = runs(workdir)[0].config
    frozen = json.loads(path.read_bytes())
    every = list(leaves(frozen))
    for keys, value in rng.sample(every, min(fields, len(every))):
        edited = json.loads(json.dumps(frozen))
        section = edited
        for key in keys[:-1]:
            section = section[key]
        section[keys[-1]] = other(value)
        path.write_text(json.dumps(edited))
        before = snapshot(workdir)
        child = nursery.start(TOY.entry, TOY.argv(workdir), scratch / "output")
        code, line = child.wait(), child.words().strip().splitlines()[-1]
        counts.faults += 1
        shown = f"{'.'.join(keys)}: {json.dumps(other(value))} -> {json.dumps(value)}"
        counts.expect("refused in one line", code == 2 and line.startswith("error: "), child.words()[-2000:])
        counts.expect("with the difference", shown in line or len(shown) > 100, (shown, line))
        counts.expect("nothing touched", snapshot(workdir) == before, keys)
    return counts


def retype(killed: Path) -> Counts:
    """Asks for the arrays of a checkpoint in another dtype or shape, one at a time."""
    counts = Counts(12, "other dtype or shape under a checkpoint", "arrays")
    cohort = config.load("tests/configs/toy.py", [(k, str(v)) for k, v in TOY.fields.items()])
    task = ToyTask(cohort.base, "cpu")
    mesh = sharding.make_mesh(config.MeshConfig(1, 1), 2, 8, jax.devices()[:1])
    target = Program(task, cohort, task.stages()[0], mesh).abstract_checkpoint()
    store, step = _store(runs(killed)[0].checkpoints), common_step(killed)
    store.restore(step, target)  # the control: as it is, it is taken
    for name, x in target.items():
        narrow = jnp.bfloat16 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int8
        for shape, dtype in ((x.shape, narrow), ((*x.shape, 1), x.dtype)):
            counts.faults += 1
            words = f"saved {x.dtype}{list(x.shape)}, now {jnp.dtype(dtype)}{list(shape)}"
            try:
                store.restore(step, {**target, name: jax.ShapeDtypeStruct(shape, dtype)})
            except UserError as error:
                counts.expect(
                    "refused with the difference", name in str(error) and words in str(error), error
                )
            else:
                counts.expect("refused with the difference", False, (name, words))
    return counts


def test_another_config_or_dtype_under_a_run_is_refused(nursery: Nursery, tmp_path: Path) -> None:
    """Another program under a checkpoint: tests/test_resume.py; under a frozen study: tests/test_worker.py."""
    killed = interrupted(nursery, tmp_path / "killed", rows=20)
    edit(nursery, killed, tmp_path, 6, seed=0).check()
    retype(killed).check()
