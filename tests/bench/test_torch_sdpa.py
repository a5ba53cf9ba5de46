"""PyTorch as a competitor computes the same problem as the kernels; where it is not installed, nothing is tested."""

from __future__ import annotations

import dataclasses

import pytest

from jaxablate.bench import oracle, problems, torch_sdpa
from jaxablate.bench.problems import Problem

pytest.importorskip("torch")


def made(name: str, **changes) -> Problem:
    group, case = problems.cases("attention")[name]
    return problems.problem("attention", group, dataclasses.replace(case, **changes))


def complaint(p: Problem, direction="both") -> str | None:
    right = oracle.expected(p, p.cotangents())
    actual = torch_sdpa.build(p, p.cotangents(), direction).results()
    of = {"op": "attention", "dtype": p.dtype, "platform": "cpu", "reference": {}}
    assert direction == "forward" or set(actual) >= {f"d {name}" for name in "qkv"}
    return oracle.complaint(oracle.errors(actual, right, **of))


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("name", ["ctclip_temporal", "rotary_adjacent"])
def test_qk_norm_and_rotary_are_done_before_it(name, direction):
    assert complaint(made(name), direction) is None


@pytest.mark.parametrize(
    "p",
    [
        made("rms_queries", causal=False),
        made("rotary_halves", causal=False),
        made("length_100", causal=False, dtype="bfloat16", bias_dtype="float32"),
        made("bias_per_key", kv_mask="lengths"),
    ],
    ids=lambda p: p.name,
)
def test_other_kinds_and_a_float32_bias_too(p):
    assert complaint(p) is None


def test_the_other_pairing_is_noticed(monkeypatch):
    """The negative control."""
    turn = torch_sdpa._rotate
    monkeypatch.setattr(torch_sdpa, "_rotate", lambda x, tables, pairing: turn(x, tables, "halves"))
    assert "o is off by" in (complaint(made("rotary_adjacent"), "forward") or "")
    assert complaint(made("rotary_halves", causal=False), "forward") is None


def test_all_studies_problems_are_taken_but_those_with_a_mask_beside_causal():
    for name, (group, _) in problems.cases("attention").items():
        if group == "paper":
            assert torch_sdpa.unsupported(made(name)) is None, name
    assert "causal is True beside" in (torch_sdpa.unsupported(made("length_100")) or "")
