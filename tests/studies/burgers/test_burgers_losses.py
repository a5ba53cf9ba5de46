"""The operator's loss: when its terms begin, how far they reach, and which of them train it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxablate import config
from jaxablate.config import import_task
from jaxablate.errors import UserError
from jaxablate.studies.burgers.task import BurgersTask, inverse_weight

SMALL = (
    ("data.cells", "16"), ("model.encoder.tokens", "4"), ("model.encoder.dim", "8"), ("model.core.hidden", "8"),
    ("model.core.depth", "1"), ("model.core.heads", "2"), ("model.decoder.hidden", "8"),
    ("model.decoder.heads", "2"), ("model.decoder.ffn", "8"), ("optim.warmup_steps", "1"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


def task(*changes: tuple[str, str]) -> BurgersTask:
    run = config.load("configs/burgers.py", [*SMALL, *changes]).base
    made = import_task(run.task)(run, "cpu")
    assert isinstance(made, BurgersTask)
    return made


def test_the_inverse_weight_waits_rises_and_is_cut() -> None:
    found = [float(inverse_weight(epoch, 0.5, 15, 0.05)) for epoch in (0, 15, 16, 17, 30, 99)]
    np.testing.assert_allclose(found, [0, 0, 0.0333333, 0.05, 0.05, 0.05], rtol=1e-5)
    assert float(inverse_weight(40, 0.01, 5, 0.05)) == pytest.approx(0.01)  # below the cut it is itself
    assert float(inverse_weight(0, 0.01, 0, 0.05)) == pytest.approx(0.01)  # no warm-up: at once


def terms_and_gradient(own: BurgersTask, steps: float) -> tuple[dict[str, Any], Any]:
    """The operator's stage at random variables that have seen `steps` updates."""
    inside = own.during(next(stage for stage in own.stages() if stage.name == "operator"))
    variables = dict(jax.jit(inside.init)(jax.random.key(0)))
    noise = iter(jax.random.split(jax.random.key(1), 1000))
    params = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(next(noise), x.shape), variables.pop("params")
    )
    if variables:
        variables = {"clock": {"steps": jnp.float32(steps)}}
    rng = np.random.default_rng(0)
    u = jnp.asarray(rng.normal(size=(3, *inside.example()["u"].shape)), jnp.float32)
    batch = {"u": u, "viscosity": jnp.full(3, 0.01), "dt": jnp.full(3, 0.1)}

    def loss(params: Any) -> tuple[jax.Array, Any]:
        features, _ = inside.encode(
            {"params": params, **variables}, batch, jax.random.split(jax.random.key(2), 3)
        )
        return inside.loss({"params": params, **variables}, features)

    (_, terms), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return dict(terms), gradient["operator"]


def apart(one: Any, other: Any) -> float:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(jnp.abs(a - b).max()) for a, b in pairs)


def test_the_inverse_term_trains_the_operator_after_its_warm_up_alone() -> None:
    without = terms_and_gradient(task(("model.loss.inverse", "0")), 0)
    own = task(("model.loss.inverse", "0.05"), ("model.loss.inverse_warmup", "10"))
    waiting, acting = terms_and_gradient(own, 10), terms_and_gradient(own, 20)
    assert "inverse" not in without[0]
    assert waiting[0]["inverse"] > 0  # it is shown all the time
    assert apart(without[1], waiting[1]) < 1e-6  # two programs, each with its own rounding
    assert apart(without[1], acting[1]) > 1e-4


def test_the_clock_goes_in_the_operators_stage() -> None:
    own = task(("model.loss.inverse", "0.05"))
    for stage in own.stages():
        after = own.during(stage).advance({"clock": {"steps": jnp.float32(3)}}, {})
        assert float(after["clock"]["steps"]) == (4 if stage.name == "operator" else 3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.loss.inverse_warmup": "600", "model.loss.inverse": "0.05"}, "never acts"),
        ({"model.loss.inverse_warmup": "599", "model.loss.inverse": "0.05"}, "never acts"),
        ({"model.loss.inverse_cap": "0", "model.loss.inverse": "0.05"}, "inverse_cap=0"),
        ({"model.loss.inverse_warmup": "5", "model.loss.inverse": "0"}, "the warm-up of model.loss.inverse=0"),
        (
            {
                "model.encoder.kind": "faithful_random", "model.autoencoder.steps": "0", "model.corrector.steps": "0",
                "model.distill.steps": "0", "model.loss.inverse": "0.05",
            },
            "no trained decoder",
        ),
    ],
)  # fmt: skip
def test_a_dead_inverse_weight_is_refused(changes: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        task(*changes.items(), ("training.steps", "600"))


@pytest.mark.parametrize("warmup", [0, 598])
def test_an_inverse_weight_that_acts_in_the_last_update_is_not_refused(warmup: int) -> None:
    """Of 600 updates the last one is made after 599, and only then is the weight of a warm-up of 598 above 0."""
    task(
        ("model.loss.inverse", "0.05"), ("model.loss.inverse_warmup", str(warmup)), ("training.steps", "600")
    )
    assert float(inverse_weight(599, 0.05, warmup, 0.05)) > 0
    assert float(inverse_weight(599, 0.05, 599, 0.05)) == 0
