"""The Burgers benchmark: PyTorch competes with the same function, cohorts with as many steps of one."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxablate.bench.step_programs import made_up, make_program
from tests.benchmarks import burgers
from tests.benchmarks.against_torch import trained

TINY = (
    *("--scale=tiny", "--batch=3", "--rounds=3", "--seconds=1"),
    *("--config.data.cells=64", "--config.model.core.depth=1", "--config.model.loss.rollout=0.1"),
)
OPERATORS = ("16tokens_unet", "16tokens_pure", "16tokens_channel_sep")


@pytest.fixture(scope="module")
def torch_burgers() -> ModuleType:
    pytest.importorskip("torch").set_num_threads(1)  # others wait for cores, too
    return importlib.import_module("tests.benchmarks.torch_burgers")


@pytest.fixture(scope="module", params=OPERATORS)
def ours(torch_burgers: ModuleType, request: pytest.FixtureRequest) -> SimpleNamespace:
    """Loss and gradient norm of the compiled training step, at parameters of which each matters."""
    run = burgers.run_of(burgers.read(TINY), "float32", request.param)
    built, given = make_program(run, "operator"), burgers.made_up(run)
    state, draw = built.init(), np.random.default_rng(1)
    # At the start many are 0 or 1, the stem and norms, and attention is the same everywhere.
    moved = jax.tree.map(lambda x: 2 * x + 0.1 * draw.standard_normal(x.shape, np.float32), state.params)
    state = replace(state, params=jax.device_put(moved, built.state_sharding.params))
    params = jax.tree.map(lambda x: np.array(x[0]), state.params)
    n = np.int32(built.first + 1)
    _, found = built.compile_step()(state, built.member, built.put_batch(given), n)
    return SimpleNamespace(
        run=run,
        params=params,
        batch={key: values[0] for key, values in given.items()},
        parameters=trained(built),
        loss=float(found["train/loss"][0]),
        grad_norm=float(found["train/grad_norm"][0]),
    )


def theirs(
    torch_burgers: ModuleType, ours: SimpleNamespace, params: Any = None
) -> tuple[float, float, float]:
    """Loss and gradient norm of PyTorch's first step, and the loss of its second."""
    torch_step = importlib.import_module("tests.benchmarks.torch_step")
    model = torch_burgers.TorchBurgers(ours.run.model, ours.run.data.cells)
    assert torch_step.count(model) == ours.parameters
    model.take(ours.params if params is None else params)
    given = torch_burgers.batch_of(ours.batch, "cpu")
    step = torch_step.TorchStep(model, ours.run.optim, given, "float32", "eager")
    return float(step()), float(step.grad_norm), float(step())


def test_the_pytorch_operator_has_our_loss_and_gradient_and_learns(torch_burgers, ours) -> None:
    loss, grad_norm, second = theirs(torch_burgers, ours)
    assert loss == pytest.approx(ours.loss, rel=1e-4)
    assert grad_norm == pytest.approx(ours.grad_norm, rel=1e-4)
    assert second < loss


def no_norm_of_queries(torch_burgers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_burgers.nn.RMSNorm, "forward", lambda self, x: x * self.weight)


def no_spectrum(torch_burgers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_burgers, "amplitudes", lambda z: 0 * z)


def one_step_less(torch_burgers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(
        self: Any, u: Any, dt: Any, viscosity: Any, forward: Any = torch_burgers.TorchBurgers.forward
    ) -> Any:
        self.steps = 1
        return forward(self, u, dt, viscosity)

    monkeypatch.setattr(torch_burgers.TorchBurgers, "forward", once)


@pytest.mark.parametrize("fault", [no_norm_of_queries, no_spectrum, one_step_less])
def test_another_function_is_noticed(torch_burgers, ours, monkeypatch, fault) -> None:
    """The negative control."""
    fault(torch_burgers, monkeypatch)
    loss, _, _ = theirs(torch_burgers, ours)
    assert loss != pytest.approx(ours.loss, rel=5e-4)


@pytest.mark.parametrize(
    "part", [("encoder", "stem_out"), ("operator", "time_shift"), ("operator", "residual_norm")]
)
def test_every_part_of_the_parameters_matters(torch_burgers, ours, part) -> None:
    params = copy.deepcopy(ours.params)
    tree = params
    for name in part:
        tree = tree[name]
    for array in tree.values():
        array *= 3
    loss, _, _ = theirs(torch_burgers, ours, params)
    assert loss != pytest.approx(ours.loss, rel=1e-3)


def test_a_config_whose_function_it_has_not_is_refused(torch_burgers) -> None:
    run = burgers.run_of(burgers.read(TINY), "float32", OPERATORS[0])
    with pytest.raises(ValueError, match="no drop path"):
        torch_burgers.TorchBurgers(replace(run.model, core=replace(run.model.core, drop_path=0.1)), 64)


def test_cohorts_and_what_cannot_run_here_are_rows_of_one_file(tmp_path, capsys) -> None:
    if importlib.util.find_spec("torch"):
        importlib.import_module("torch").set_num_threads(1)
    out = tmp_path / "new" / "found.json"
    asked = ["--operators=16tokens_channel_sep", "--attention=config,cudnn", "--cohorts=1,2", "--torch=eager"]
    assert burgers.main([*TINY, *asked, f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    rows = {row["name"]: row for row in found["cases"]}
    name = "16tokens_channel_sep"
    assert "supported is gpu" in rows[f"{name}, attention=cudnn"]["problem"]
    one, two, torch = (rows[f"{name}{case}"] for case in ("", ", cohort of 2", ", torch eager"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert (one["examples"], two["examples"], two["flops"]) == (3, 6, 2 * one["flops"])
    for row in (one, two):
        median = np.median(row["samples"]["seconds"])
        assert row["steps_per_second"] == pytest.approx(row["members"] / median)
        assert row["examples_per_second"] == pytest.approx(3 * row["members"] / median)
    pairs = 2 * np.array(one["samples"]["seconds"]) / two["samples"]["seconds"]
    assert min(pairs) <= two["cohort_speedup"]["value"] <= max(pairs) and one["cohort_speedup"] is None
    if importlib.util.find_spec("torch"):
        assert torch["loss"] == pytest.approx(one["loss"], rel=1e-4)
        pairs = 2 * np.array(torch["samples"]["seconds"]) / two["samples"]["seconds"]
        assert min(pairs) <= two["speedup"]["value"] <= max(pairs)
    else:
        assert "torch" in torch["problem"] and two["speedup"] is None
    assert found["stage"] == "operator" and found["provenance"]["packages"]["jax"] == jax.__version__
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)


def test_the_first_loss_depends_on_the_operator() -> None:
    """Else it would say nothing that it is the same."""
    run = burgers.run_of(burgers.read(TINY), "float32", OPERATORS[1])
    assert run.model.residual_gain == "one" and run.model.core.drop_path == 0
    faithful = burgers.read(["--scale=paper"])
    assert faithful.operators == (
        "128tokens_unet", "256tokens_unet", "128tokens_pure", "256tokens_pure", "128tokens_channel_sep",
    )  # fmt: skip
    core = burgers.run_of(faithful, "float32", "256tokens_pure").model.core
    assert (core.hidden, core.heads, core.depth) == (384, 6, 8)


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--operators=16tokens_unett", "did you mean '16tokens_unet'"),
        ("--torch=compiled", "'compile'"),
        ("--cohorts=1,none", "--cohorts=none"),
        ("--cohorts=0", "--cohorts=0"),
        ("--batch=0", "--batch=0: must be 1 or more"),
        ("--rounds=0", "1 or more"),
        ("--cohort=4", "--cohort"),
        ("--attention=flsh", "did you mean 'flash'"),
        ("--scale=papr", "did you mean 'paper'"),
    ],
)
def test_bad_input_is_one_line(flag: str, message: str, capsys) -> None:
    assert burgers.main([*TINY, flag]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1


def test_a_made_up_batch_has_a_loss() -> None:
    """`bench step --synthetic`: a viscosity that is not positive has no logarithm, and would time NaN."""
    built = make_program(burgers.run_of(burgers.read(TINY), "float32", OPERATORS[1]), "operator")
    built.rows, batch, state = 3, made_up(built.task), built.init()
    forward = jax.jit(built.forward)

    def loss(batch: Any) -> float:
        return float(forward(state, built.member, built.put_micro(batch), built.base)[0])

    assert np.isfinite(loss(batch))
    assert np.isnan(loss({**batch, "viscosity": -batch["viscosity"]}))
