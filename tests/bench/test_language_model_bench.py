"""The language-model benchmark: PyTorch competes with the same function, and what cannot run does not stop the rest."""

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

from jaxablate.trees import count
from tests.benchmarks import language_model
from tests.benchmarks.language_model_cases import batch, make_program, read, run_of

TINY = (
    *("--scale=tiny", "--batch=2", "--precision=float32", "--rounds=3", "--seconds=1"),
    *(
        "--config.data.context=16",
        "--config.data.tokens=0",
        "--config.data.vocab_size=257",
        "--config.model.layers=1",
    ),
)


@pytest.fixture(scope="module")
def torch_lm() -> ModuleType:
    pytest.importorskip("torch").set_num_threads(1)  # others wait for cores, too
    return importlib.import_module("tests.benchmarks.torch_lm")


@pytest.fixture(scope="module")
def torch_step(torch_lm: ModuleType) -> ModuleType:
    return importlib.import_module("tests.benchmarks.torch_step")


@pytest.fixture(scope="module")
def ours(torch_lm: ModuleType) -> SimpleNamespace:
    """Loss and gradient norm of the compiled training step, at parameters larger than those at the start."""
    run = run_of(read(TINY), "float32")
    built, given = make_program(run), batch(run)
    state = built.init()
    # At the start attention hardly sees what stands where.
    state = replace(state, params=jax.tree.map(lambda x: 3 * x, state.params))
    params = jax.tree.map(lambda x: np.array(x[0]), state.params)
    _, found = built.compile_step()(state, built.member, built.put_batch(given), np.int32(1))
    return SimpleNamespace(
        run=run,
        params=params,
        tokens=given["tokens"][0],
        parameters=count(built.abstract_member.params),
        loss=float(found["train/loss"][0]),
        grad_norm=float(found["train/grad_norm"][0]),
    )


def theirs(torch_lm: ModuleType, torch_step: ModuleType, ours: SimpleNamespace) -> tuple[float, float, float]:
    """Loss and gradient norm of PyTorch's first step, and the loss of its second."""
    data = ours.run.data
    model = torch_lm.TorchLm(ours.run.model, data.vocab_size, data.context)
    assert torch_step.count(model) == ours.parameters
    model.take(ours.params)
    given = torch_lm.batch_of(ours.tokens, "cpu")
    step = torch_step.TorchStep(model, ours.run.optim, given, "float32", "eager")
    return float(step()), float(step.grad_norm), float(step())


def test_the_pytorch_model_has_our_loss_and_gradient_and_learns(torch_lm, torch_step, ours) -> None:
    loss, grad_norm, second = theirs(torch_lm, torch_step, ours)
    assert loss == pytest.approx(ours.loss, rel=1e-4)
    assert grad_norm == pytest.approx(ours.grad_norm, rel=1e-4)
    assert second < loss - 1e-3


def halves_swapped(torch_lm: ModuleType, monkeypatch: pytest.MonkeyPatch, ours: SimpleNamespace) -> Any:
    kernel = ours.params["layers"]["layer_0"]["block"]["ffn"]["wi"]["kernel"]
    kernel[:] = kernel[:, ::-1].copy()


def other_pairs(torch_lm: ModuleType, monkeypatch: pytest.MonkeyPatch, ours: SimpleNamespace) -> None:
    def rotate(x: Any, cos: Any, sin: Any) -> Any:
        a, b = x.chunk(2, -1)
        cos, sin = cos[:, None], sin[:, None]
        return torch_lm.torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    monkeypatch.setattr(torch_lm, "rotate", rotate)


def sees_the_future(torch_lm: ModuleType, monkeypatch: pytest.MonkeyPatch, ours: SimpleNamespace) -> None:
    attention = torch_lm.functional.scaled_dot_product_attention
    blind = lambda *args, is_causal: attention(*args)
    monkeypatch.setattr(torch_lm.functional, "scaled_dot_product_attention", blind)


@pytest.mark.parametrize("fault", [halves_swapped, other_pairs, sees_the_future])
def test_another_function_is_noticed(torch_lm, torch_step, ours, monkeypatch, fault) -> None:
    """The negative control."""
    ours = SimpleNamespace(**{**vars(ours), "params": copy.deepcopy(ours.params)})
    fault(torch_lm, monkeypatch, ours)
    loss, grad_norm, _ = theirs(torch_lm, torch_step, ours)
    assert loss != pytest.approx(ours.loss, rel=1e-3)
    assert grad_norm != pytest.approx(ours.grad_norm, rel=1e-3)


def test_an_arm_that_is_not_the_baseline_is_refused(torch_lm, ours) -> None:
    with pytest.raises(ValueError, match="not that of ffn=silu"):
        torch_lm.TorchLm(replace(ours.run.model, ffn="silu"), 257, 16)


def test_what_cannot_run_here_is_a_row_with_the_reason_and_the_others_go_on(tmp_path, capsys) -> None:
    out = tmp_path / "new" / "found.json"
    asked = ["--arms=baseline", "--kernels=attention=cudnn", "--torch=eager", "--cohort=2"]
    assert language_model.main([*TINY, *asked, f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    rows = {row["name"]: row for row in found["cases"]}
    assert "platform is cpu, supported is gpu" in rows["baseline, attention=cudnn"]["problem"]
    assert rows["baseline, attention=cudnn"]["samples"] is None
    measured = {name for name, row in rows.items() if row["samples"]}
    ours = {"baseline", "cohort of 1, config", "cohort of 2, config"}
    assert measured - {"torch eager"} == ours
    assert measured >= ({"torch eager"} if importlib.util.find_spec("torch") else set())
    for name in measured:
        row = rows[name]
        taken = row["samples"]["seconds"]
        assert len(taken) == 3
        assert row["tokens_per_second"] == pytest.approx(row["members"] * 2 * 16 / np.median(taken))
        assert row["loss"] == pytest.approx(rows["baseline"]["loss"], rel=1e-4)
    assert rows["cohort of 2, config"]["flops"] == 2 * rows["baseline"]["flops"]
    assert found["provenance"]["packages"]["jax"] == jax.__version__
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--arms=silu", "did you mean 'silu_ffn'"),
        ("--kernels=attn=flash", "slots: attention"),
        ("--torch=compiled", "'compile'"),
        ("--cohort=1", "2 or more"),
        ("--rounds=0", "1 or more"),
        ("--cohorts=16", "--cohorts"),
    ],
)
def test_bad_input_is_one_line(flag: str, message: str, capsys) -> None:
    assert language_model.main([*TINY, flag]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1
