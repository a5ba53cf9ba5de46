"""What a stage trains, the order of the data, and an update that is split further: each does what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxablate import config, data, sharding
from jaxablate.config import import_task
from jaxablate.data import ArraySource, CohortBatches, batch_indices
from jaxablate.errors import UserError
from jaxablate.program import Program
from jaxablate.task import Stage
from jaxablate.trees import count
from tests.toy import ToyTask
from tests.toy_tasks import OwnRatesTask, cohort_with
from tests.toy_training import with_rates


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


def one_update(*trainable: str, **overrides: Any) -> tuple[dict[str, Any], dict[str, Any], Program]:
    """Flat states before and after the first update of the toy task, with a stage that trains the patterns."""
    pairs = {"host.mesh.member": "1", "host.mesh.data": "1", "optim.warmup_steps": "0"}
    pairs |= {key.replace("__", "."): str(value) for key, value in overrides.items()}
    cohort = config.load("tests/configs/toy.py", pairs.items())
    task, base = ToyTask(cohort.base, "cpu"), cohort.base
    stage = Stage("main", base.training.steps, base.optim, trainable or ("*",))
    here = Program(task, cohort, stage, sharding.make_mesh(base.host.mesh, 1, base.training.batch_size))
    state = here.init()
    before = {k: np.asarray(v) for k, v in here.take(state, 0).items()}
    batches = CohortBatches(task.open(Path()).train, [0], base.training.batch_size, base.training.steps)
    state, _ = here.compile_step()(state, here.member, here.put_batch(batches[0]), np.int32(1))
    return before, {k: np.asarray(v) for k, v in here.take(state, 0).items()}, here


def changed(before: dict[str, Any], after: dict[str, Any], prefix: str = "params/") -> set[str]:
    return {k for k in before if k.startswith(prefix) and not np.array_equal(before[k], after[k])}


def test_frozen_parameters_keep_every_bit_and_have_no_optimiser_state() -> None:
    before, after, here = one_update("out/*", optim__decay="all", optim__weight_decay=0.1)
    assert changed(before, after) == {"params/out/kernel", "params/out/bias"}
    moments = [k for k in before if k.startswith("opt_state") and k.endswith(("kernel", "bias"))]
    assert moments
    assert not [k for k in moments if "hidden" in k]
    assert count(here.abstract_member.params) == count(ToyTask.init(here.task, jax.random.key(0))["params"])


def test_without_patterns_everything_trains() -> None:
    before, after, _ = one_update()
    assert len(changed(before, after)) == 4


def test_a_frozen_gradient_does_not_count_in_the_norm_that_is_clipped() -> None:
    """What is trained moves as if the frozen part were not there: same direction, clipped by its own norm."""
    settings = {"optim__clip_norm": 1e-3, "optim__eps": 1.0, "optim__weight_decay": 0.0}
    before, some, _ = one_update("hidden/*", **settings)
    _, every, _ = one_update(**settings)
    name = "params/hidden/kernel"
    step = [np.linalg.norm(after[name] - before[name]) for after in (some, every)]
    assert step[0] > 2 * step[1]


def test_file_order_is_the_order_of_the_file_in_every_epoch() -> None:
    epoch = np.concatenate([batch_indices(3, step, 4, 8, "file") for step in (1, 2)])
    assert epoch.tolist() == list(range(8))
    assert batch_indices(3, 3, 4, 8, "file").tolist() == [0, 1, 2, 3]
    assert np.concatenate([batch_indices(3, step, 4, 8) for step in (1, 2)]).tolist() != list(range(8))


def test_random_draws_follow_seed_and_step_alone_and_cover_the_whole_range() -> None:
    first = batch_indices(3, 7, 4000, 10, "random")
    assert (first == batch_indices(3, 7, 4000, 10, "random")).all()
    assert (first != batch_indices(3, 8, 4000, 10, "random")).any()
    assert (first != batch_indices(4, 7, 4000, 10, "random")).any()
    counts = np.bincount(first, minlength=10)
    assert len(counts) == 10  # no example beyond the last
    assert counts.min() > 300  # of 400 each: with replacement, and none left out
    # Of more examples than a permutation could hold.
    assert batch_indices(0, 1, 4, 2**40, "random").max() > 2**32


def test_each_member_has_the_rates_that_its_own_config_gives_a_stage(tmp_path: Path) -> None:
    """As if it were trained by itself; also where its config, or the first member's, has a rate of 0."""
    alone = cohort_with(OwnRatesTask, tmp_path, optim__weight_decay=0.0, model__stages="two")
    for rates in ((0.0,), (0.01, 0.02), (0.0, 0.02)):
        cohort = with_rates(alone, *rates)
        task = OwnRatesTask(cohort.base, "cpu")
        mesh = sharding.make_mesh(cohort.base.host.mesh, len(rates), 8)
        first, second = (Program(task, cohort, stage, mesh) for stage in task.stages())
        assert first.member.learning_rate.tolist() == [0.125] * len(rates)
        assert first.member.weight_decay.tolist() == [0.25] * len(rates)
        assert second.member.learning_rate.tolist() == pytest.approx(rates)
        assert not second.member.weight_decay.any()


def test_burgers_without_decay_in_the_operator_has_that_of_its_other_stages() -> None:
    cohort = config.load("configs/burgers.py", [("optim.weight_decay", "0.0")])
    task = import_task(cohort.base.task)(cohort.base, "cpu")
    mesh, (stage, operator, *_) = sharding.make_mesh(config.MeshConfig(1, 1, 1, 1), 1, 8), task.stages()
    own = Program(task, cohort, stage, mesh).member.weight_decay.tolist()
    assert own == pytest.approx([cohort.base.model.autoencoder.weight_decay]) and own[0] > 0
    assert Program(task, cohort, operator, mesh).member.weight_decay.tolist() == [0.0]


def test_a_split_update_is_the_update_of_the_whole_batch() -> None:
    _, whole, _ = one_update()
    _, split, here = one_update(host__split=4)
    assert here.cohort.base.accumulation == 4
    for name in (k for k in whole if k.startswith("params/")):
        np.testing.assert_allclose(split[name], whole[name], rtol=1e-6, atol=1e-7)


def test_a_split_is_no_part_of_a_run_s_identity_and_must_divide_the_batch() -> None:
    plain = config.load("tests/configs/toy.py").base
    assert config.load("tests/configs/toy.py", [("host.split", "2")]).base.fingerprint == plain.fingerprint
    other = config.load("tests/configs/toy.py", [("training.accumulation", "2")]).base
    assert other.fingerprint != plain.fingerprint
    with pytest.raises(UserError, match=r"host\.split=3: must be such that 3 micro-batches"):
        config.load("tests/configs/toy.py", [("host.split", "3")])


def test_arrays_in_memory_are_a_source() -> None:
    def source(value: float) -> ArraySource:
        held_out = {"x": np.arange(5.0), "y": np.full(5, value)}
        return ArraySource({"x": np.arange(9.0), "y": np.zeros(9)}, held_out, 2, lambda o: {"n": len(o["e"])})

    here = source(1.0)
    assert [len(batch["x"]) for batch in here.evaluation] == [2, 2, 1]
    assert here.score([{"e": batch["x"]} for batch in here.evaluation]) == {"n": 5}
    assert here.train[3]["x"] == 3.0
    assert here.fingerprint == source(1.0).fingerprint
    assert here.fingerprint != source(2.0).fingerprint
    assert data.CohortBatches(here.train, [0], 3, 2)[0]["x"].shape == (1, 3)
