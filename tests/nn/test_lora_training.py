"""A stage that trains adapters alone, beside a kernel in storage: nothing of the base moves or costs state."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxablate import config, sharding
from jaxablate.data import Batch, CohortBatches
from jaxablate.nn.lora import Lora
from jaxablate.nn.projections import Quantization, projections
from jaxablate.program import Program
from jaxablate.task import Stage, Variables
from tests.toy import ToyTask

ADAPTERS = Lora(("hidden", "out"), rank=2, dropout=0.25)
NF4 = Quantization("nf4", ("hidden",))


class AdaptedTask(ToyTask):
    """The toy network with adapters; the kernel of its hidden layer is stored."""

    def init(self, rng: jax.Array) -> Variables:
        with projections(adapters=ADAPTERS, base=NF4):
            return super().init(rng)

    def encode(self, variables: Variables, batch: Batch, rngs: jax.Array) -> tuple[Any, Any]:
        with projections(adapters=ADAPTERS, base=NF4, keys=rngs):
            predicted: Any = self.net.apply(variables, batch["x"], rngs, rngs={"dropout": jax.random.key(0)})
        return {"error": predicted - batch["y"], "predicted": predicted}, {"x": batch["x"].sum(0)}

    def advance(self, collections: Variables, sums: Any) -> Variables:
        return {**collections, **super().advance(collections, sums)}


State = Mapping[str, np.ndarray]


@functools.cache
def two_updates(accumulation: int) -> tuple[State, State]:
    """The member's state before and after them, flat."""
    pairs = {"host.mesh.member": "1", "host.mesh.data": "1", "optim.warmup_steps": "0"}
    pairs |= {"training.accumulation": str(accumulation)}
    cohort = config.load("tests/configs/toy.py", pairs.items())
    task, base = AdaptedTask(cohort.base, "cpu"), cohort.base
    stage = Stage("main", base.training.steps, base.optim, ("*/lora_*",))
    here = Program(task, cohort, stage, sharding.make_mesh(base.host.mesh, 1, base.training.batch_size))
    state = here.init()
    before = {k: np.asarray(v) for k, v in here.take(state, 0).items()}
    batches = CohortBatches(task.open(Path()).train, [0], base.training.batch_size, base.training.steps)
    step = here.compile_step()
    for i in range(2):  # at the first B is zero, so A has no gradient
        state, _ = step(state, here.member, here.put_batch(batches[i]), np.int32(i + 1))
    return before, {k: np.asarray(v) for k, v in here.take(state, 0).items()}


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


pytestmark = pytest.mark.standard_dtypes


@pytest.mark.parametrize("accumulation", [1, 4])
def test_only_adapters_move_and_the_base_keeps_every_bit(accumulation: int) -> None:
    before, after = two_updates(accumulation)
    changed = {
        k
        for k in before
        if k.startswith(("params/", "collections/quantized/"))
        if (before[k] != after[k]).any()
    }
    assert changed == {f"params/{m}/lora_{f}/kernel" for m in ("hidden", "out") for f in "ab"}
    assert "collections/quantized/hidden/kernel/codes" in before
    assert "params/hidden/kernel" not in before


def test_only_adapters_have_optimiser_state() -> None:
    before, _ = two_updates(1)
    moments = [k for k in before if k.startswith("opt_state") and before[k].ndim]
    assert moments
    assert all("/lora_" in k for k in moments)
    assert sum(before[k].size for k in moments) == 2 * 2 * (4 + 8 + 8 + 1)


def test_accumulation_gives_the_same_update() -> None:
    """Dropout included, whose keys are the examples'."""
    whole, parts = (two_updates(n)[1] for n in (1, 4))
    for name in (k for k in whole if "/lora_" in k and k.startswith("params")):
        np.testing.assert_allclose(parts[name], whole[name], atol=1e-6)
