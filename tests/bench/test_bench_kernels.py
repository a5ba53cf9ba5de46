"""`bench kernels`: what is wrong is never timed, what is timed is accounted for, and files say where it was."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxablate.bench import problems, work
from jaxablate.bench.kernel_tuning import tune
from jaxablate.bench.kernels import Options, available, bench_kernels, bench_problem, slug
from jaxablate.bench.kernels_report import ON_A_CPU, Outcome
from jaxablate.bench.limits import Limits
from jaxablate.bench.problems import Problem, problem
from jaxablate.bench.timing import Samples
from jaxablate.errors import UserError
from jaxablate_kernels import Implementation, dispatch, tuning
from jaxablate_kernels.gated.spec import GatedSpec

OPS = ("attention", "norm", "gated", "cross_entropy")
LIMITS = Limits(copy=1e10, matmul={"float32": 1e11}, call=0.0, samples={"copy": Samples((1.0,), 1)})


def small(op: str, name: str, **changes) -> Problem:
    group, case = problems.cases(op)[name]
    return problem(op, group, dataclasses.replace(case, **changes))


# -------------------------------------------------------------------------------------- useful work


def matmul_flops(function, *args) -> int:
    """FLOPs of all matrix products in a program: two for each multiplication."""
    total = 0
    for eqn in dispatch.equations(jax.make_jaxpr(function)(*args)):
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            terms = np.prod([eqn.invars[0].aval.shape[axis] for axis in contracted])
            total += 2 * int(terms * np.prod(eqn.outvars[0].aval.shape))
    return total


def programs(p: Problem):
    """The forward pass of the reference, and forward and backward, as functions of what has a gradient."""
    reference = dispatch.load(p.op, "reference").call

    def forward(learned):
        return p.apply(reference, learned, p.fixed)

    def both(learned):
        results, vjp = jax.vjp(forward, learned)
        return results, vjp(results)

    return forward, both


def test_flops_of_attention_are_those_of_its_products():
    p = small("attention", "grouped", causal=False, q_len=40, kv_len=56, bias=None)
    forward, both = programs(p)
    assert p.passes.forward.flops == matmul_flops(forward, p.learned)
    # The reference keeps the probabilities: four products backward. Useful are five: the logits again.
    product = p.passes.forward.flops / 2
    assert p.passes.backward.flops == matmul_flops(both, p.learned) - p.passes.forward.flops + product


@pytest.mark.parametrize(("q_len", "kv_len"), [(64, 64), (40, 100), (100, 40)])
def test_a_causal_mask_takes_off_what_lies_above_the_diagonal(q_len, kv_len):
    q = jax.ShapeDtypeStruct((1, q_len, 1, 16), "float32")
    k = jax.ShapeDtypeStruct((1, kv_len, 1, 16), "float32")
    seen = np.tri(q_len, kv_len, kv_len - q_len).sum()  # the last query sees the last key
    diagonal = min(q_len, kv_len)
    counted = work.attention(q, k, causal=True).forward.flops / (4 * 16)
    assert counted == seen - diagonal / 2  # an area: half of each pair on the diagonal
    if q_len == kv_len:
        assert work.attention(q, k, causal=False).forward.flops / (4 * 16) == 2 * counted


def test_flops_of_cross_entropy_are_those_of_its_products():
    p = small("cross_entropy", "uneven")
    forward, both = programs(p)
    assert p.passes.forward.flops == matmul_flops(forward, p.learned)
    assert p.passes.of("both").flops == matmul_flops(both, p.learned)


@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("attention", "segments_random"),
        ("attention", "rms_queries"),
        ("norm", "width_5120"),
        ("norm", "width_513"),
        ("gated", "width_129"),
        ("cross_entropy", "everything"),
    ],
)
def test_bytes_are_those_of_arguments_results_and_gradients(op, case):
    p = small(op, case)
    forward, _ = programs(p)
    results = jax.tree.leaves(jax.eval_shape(forward, p.learned))
    moved = sum(x.nbytes for x in jax.tree.leaves((p.learned, p.fixed)))
    moved += sum(x.size * x.dtype.itemsize for x in results)
    assert p.passes.forward.bytes == moved
    gradients = sum(x.nbytes for x in jax.tree.leaves(p.learned))
    # Of the sum with a residual the backward pass needs one array, not its two terms.
    saved = p.fixed["residual"].nbytes if p.fixed.get("residual") is not None else 0
    assert p.passes.backward.bytes == moved + gradients - saved


def test_the_oracle_of_attention_is_the_reference_head_by_head():
    p = small("attention", "all_other_kinds")
    reference = dispatch.load("attention", "reference").call
    whole = p.apply(reference, p.learned, p.fixed)["o"]
    assert jnp.allclose(p.oracle(p.learned, p.fixed)["o"], whole, atol=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_every_operation_has_cases_of_the_studies_that_scale(op):
    names = [name for name, (group, _) in problems.cases(op).items() if group == "paper"]
    assert names
    group, case = problems.cases(op)[names[-1]]
    once, thrice = (problem(op, group, case, batch=n, dtype="bfloat16") for n in (1, 3))
    assert thrice.dtype == "bfloat16"
    assert thrice.passes.forward.flops == 3 * once.passes.forward.flops


# ------------------------------------------------------------------------- what is wrong is not timed


def swish(h):
    return jax.nn.silu(h[..., 0, :]) * h[..., 1, :]


def implementation(name: str, call, **more) -> Implementation:
    return Implementation("gated", name, f"gated_{name}", lambda spec, platform: None, call, **more)


def bench(calls, directions=("forward", "both"), **options):
    p = small("gated", "width_100")
    found = {
        name: call if isinstance(call, str) else implementation(name, call) for name, call in calls.items()
    }
    result = bench_problem(p, found, directions, seconds=0.02, rounds=3, **options)
    return result, {entry.name: entry for entry in result.entries}


def reference(h, *, kind):
    return swish(h)


def swapped(h, *, kind):
    return swish(h[..., ::-1, :])


def one_bad_row(h, *, kind):
    return swish(h).at[1, 2].multiply(-1.0)


def not_finite(h, *, kind):
    return swish(h).at[0, 0, 0].set(jnp.nan)


@jax.custom_vjp
def _wrong_gradient(h):
    return swish(h)


_wrong_gradient.defvjp(lambda h: (swish(h), h), lambda h, dy: (jax.vjp(swish, h)[1](dy)[0] * 1.05,))


def wrong_gradient(h, *, kind):
    return _wrong_gradient(h)


def test_a_wrong_kernel_is_reported_and_not_timed():
    wrong = {f.__name__: f for f in (swapped, one_bad_row, not_finite, wrong_gradient)}
    result, entries = bench({"reference": reference, **wrong, "also_right": reference})
    for name in ("reference", "also_right"):
        assert entries[name].status == "timed"
        assert set(entries[name].timed) == {"forward", "both"}
    for name in wrong:
        assert entries[name].status == "wrong", name
        assert not entries[name].timed, name
        assert name not in result.seconds("forward")
    assert "d h is off by 0.05" in entries["wrong_gradient"].reason
    values = entries["wrong_gradient"].errors["y"]
    assert values.overall <= values.limit  # only its gradient is wrong
    outcome = Outcome(facts(), LIMITS, (result,), Path("kernels.json"))
    assert outcome.exit_code == 3
    assert [row["implementation"] for row in result.rows(LIMITS) if row["direction"] == "both"] == [
        "reference",
        "also_right",
    ]


def test_a_gradient_that_cancels_is_judged_by_what_rounding_allows():
    p = small("norm", "one_feature")  # of size 1e-6, made of terms of size 1
    entries = bench_problem(p, available("norm", ("recompute",)), ("both",), seconds=0.02, rounds=3).entries
    assert [(entry.name, entry.status) for entry in entries] == [
        ("reference", "timed"),
        ("recompute", "timed"),
    ]


def exploding(h, *, kind):
    raise NotImplementedError("rows of 100 are not done yet")


def exhausting(h, *, kind):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68 GB")


def greedy(h, *, kind):
    raise jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 524288"
    )


def test_what_cannot_run_is_listed_with_its_reason_and_the_others_are_timed():
    calls = {"reference": reference, "exploding": exploding, "exhausting": exhausting, "greedy": greedy}
    result, entries = bench({**calls, "absent": "No module named 'absent'"}, ("forward",))
    assert entries["reference"].status == "timed"
    assert entries["exploding"].status == "failed"
    assert "NotImplementedError: rows of 100 are not done yet" in entries["exploding"].reason
    assert entries["exhausting"].status == "out of memory"
    assert entries["greedy"].status == "failed"  # a kernel asks for more than a multiprocessor has
    assert (entries["absent"].status, entries["absent"].reason) == ("unsupported", "No module named 'absent'")
    outcome = Outcome(facts(), LIMITS, (result,), Path("kernels.json"))
    assert outcome.exit_code == 1
    for text in (outcome.markdown(), outcome.text()):
        assert "gated exploding (width_100): failed: forward: NotImplementedError" in text


def facts():
    return {
        "platform": "cpu",
        "packages": {"jax": "1", "jaxlib": "1"},
        "python": "3",
        "driver": None,
        "git": {"commit": None, "dirty": None},
        "date": "today",
        "devices": {"platform": "cpu", "kind": "cpu", "count": 1},
        "host": {"processor": "abacus", "cores": 1},
    }


def test_speedups_and_the_share_of_the_limit():
    result, _ = bench({"reference": reference, "other": reference}, ("forward",))
    seconds = {"reference": 4.0, "other": 1.0}
    entries = tuple(
        dataclasses.replace(
            e,
            timed={
                "forward": dataclasses.replace(e.timed["forward"], samples=Samples((seconds[e.name],), 1))
            },
        )
        for e in result.entries
    )
    result = dataclasses.replace(
        result, entries=entries, passes=work.Passes(work.Work(2e10, 5e9), work.Work(0, 0))
    )
    assert result.speedup("other", "forward") == (4.0, 4.0)
    assert result.speedup("reference", "forward") == (1.0, 0.25)
    by_name = {row["implementation"]: row for row in result.rows(LIMITS)}
    # The bytes need 0.5 s at 1e10 a second, the FLOPs 0.2 s at 1e11: the longer is the limit.
    assert by_name["other"]["fraction_of_limit"] == 0.5
    assert by_name["reference"]["fraction_of_limit"] == 0.125
    assert by_name["other"]["flops_per_second"] == 2e10


# ------------------------------------------------------------------------------------ configurations


@dataclasses.dataclass(frozen=True)
class Config:
    repeats: int


def repeating(h, *, kind, config):
    body = lambda _, x: jnp.sin(x)
    delay = jax.lax.fori_loop(0, config.repeats, body, jnp.ones((64, 64)))
    return swish(h) + 0 * delay[0, 0]


def test_a_tuned_configuration_is_kept_and_used(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("JAXABLATE_TUNED", str(tmp_path))
    slow_first = lambda spec, device: (Config(3000), Config(1))
    loop = implementation("recompute", repeating, candidates=slow_first)
    found = {"reference": implementation("reference", reference), "recompute": loop}
    p = small("gated", "width_100")
    before = {e.name: e for e in bench_problem(p, found, ("forward",), seconds=0.02, rounds=3).entries}
    assert (before["recompute"].config, before["recompute"].config_from) == ({"repeats": 3000}, "heuristic")
    assert before["reference"].config is None
    with caplog.at_level(logging.INFO):
        monkeypatch.setattr("jaxablate.bench.kernels.available", lambda op, names: found)
        monkeypatch.setattr("jaxablate.bench.limits.measure", lambda dtypes, platform: LIMITS)
        outcome = bench_kernels(
            Options(("gated",), ("width_100",), seconds=0.02, tune="yes", out=tmp_path / "k.json")
        )
    assert "recompute: 2 of 2 configurations ran" in caplog.text
    (tuned,) = (e for e in outcome.results[0].entries if e.name == "recompute")
    assert (tuned.config, tuned.config_from) == ({"repeats": 1}, "tuned")
    after = {e.name: e for e in bench_problem(p, found, ("forward",), seconds=0.02, rounds=3).entries}
    assert (after["recompute"].config, after["recompute"].config_from) == ({"repeats": 1}, "tuned")
    assert tuning.fastest("gated", p.spec, jax.devices()[0].device_kind)[0] in found


def never(h, *, kind, config):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68 GB")


def test_what_cannot_be_tuned_is_said_and_the_next_case_is_measured(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("JAXABLATE_TUNED", str(tmp_path))
    hopeless = implementation("recompute", never, candidates=lambda *_: (Config(1), Config(2)))
    found = {"reference": implementation("reference", reference), "recompute": hopeless}
    monkeypatch.setattr("jaxablate.bench.kernels.available", lambda op, names: found)
    monkeypatch.setattr("jaxablate.bench.limits.measure", lambda dtypes, platform: LIMITS)
    cases, out = ("width_100", "one_row"), tmp_path / "k.json"
    outcome = bench_kernels(Options(("gated",), cases, seconds=0.02, tune="yes", out=out))
    assert [[e.status for e in r.entries] for r in outcome.results] == [["timed", "out of memory"]] * 2
    assert re.search(r"recompute: Config\(repeats=2\): .*RESOURCE_EXHAUSTED", caplog.text)
    assert "none of 2 configurations ran; not tuned" in caplog.text


def test_an_implementation_without_candidates_is_not_tuned():
    p = small("gated", "one_row")
    assert isinstance(p.spec, GatedSpec)
    assert tune(p, {"reference": implementation("reference", reference), "absent": "no"}) == {}


# ------------------------------------------------------------------------------------- the whole verb


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> Outcome:
    where = tmp_path_factory.mktemp("bench") / "deep" / "kernels.json"
    options = Options(
        ops=("attention", "gated"),
        cases=("length_7", "one_u*"),
        impls=("blockwise", "pallas"),
        directions=("forward", "both"),
        seconds=0.1,
        out=where,
        commit="abc1234",
    )
    return bench_kernels(options)


def test_json_holds_what_was_measured_and_where(outcome):
    data = json.loads(outcome.path.read_text())
    assert data == outcome.to_dict()
    assert set(data) == {"format", "note", "facts", "limits", "cases", "summary"}
    assert data["note"] == ON_A_CPU
    for key in ("devices", "packages", "python", "git", "date", "driver", "platform", "xla_flags", "options"):
        assert key in data["facts"], key
    assert data["facts"]["git"] == {"commit": "abc1234", "dirty": None}
    assert data["facts"]["packages"]["jaxlib"]
    assert data["limits"]["copy_bytes_per_second"] > 0
    assert data["limits"]["matmul_flops_per_second"]["float32"] > 0
    assert [(case["op"], case["case"]) for case in data["cases"]] == [
        ("attention", "length_7"),
        ("gated", "one_unit"),
    ]
    by_name = {found["name"]: found for found in data["cases"][0]["implementations"]}
    assert set(by_name) == {"reference", "blockwise", "pallas"}
    assert by_name["pallas"]["status"] == "unsupported"
    assert "platform is cpu" in by_name["pallas"]["reason"]
    assert by_name["blockwise"]["status"] == "timed"
    assert set(by_name["blockwise"]["errors"]) == {"o", "d q", "d k", "d v", "d bias"}
    assert all(0 < e["overall"] <= e["limit"] for e in by_name["blockwise"]["errors"].values())
    timings = {timing["direction"]: timing for timing in by_name["blockwise"]["timings"]}
    assert set(timings) == {"forward", "both"}
    for timing in timings.values():
        assert len(timing["samples_seconds"]) >= 3
        assert timing["median_seconds"] == pytest.approx(np.median(timing["samples_seconds"]))
        assert timing["peak_bytes"] > 0 and timing["peak_bytes_from"] == "program"
        assert timing["compile_seconds"] > 0
        assert timing["speedup_over_reference"] > 0


def test_text_says_first_that_it_was_a_cpu_and_accounts_for_every_implementation(outcome):
    lines = outcome.text().splitlines()
    assert lines[0] == ON_A_CPU
    assert "commit abc1234" in lines[1] and "limits measured here: copy" in lines[2]
    assert "attention length_7   2×7×2×16 bias, float32" in lines
    assert len([line for line in lines if line.split()[:2] == ["blockwise", "forward"]]) == 1
    assert any(line.strip().startswith("attention pallas (length_7): unsupported: ") for line in lines)
    assert outcome.exit_code == 0  # what is not for this platform is no failure


def test_table_and_figure_lie_beside_the_json(outcome):
    table, figure = (outcome.path.with_suffix(end) for end in (".md", ".png"))
    text = table.read_text()
    assert ON_A_CPU in text
    rows = [line for line in text.splitlines() if line.startswith("| length_7")]
    assert len(rows) == 4
    assert len({row.count("|") for row in rows}) == 1
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert len(list(outcome.path.parent.iterdir())) == 3  # no temporary file


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(ops=("atention",)), "--ops=atention: .* did you mean 'attention'"),
        (Options(cases=("ctclip_spatail",)), "--cases=ctclip_spatail: .* did you mean 'ctclip_spatial"),
        (Options(ops=("gated",), cases=("bert_base",)), "no case of gated has that name"),
        (Options(impls=("blockwize",)), "--impls=blockwize: .* did you mean 'blockwise'"),
        (Options(directions=("backwards",)), "--directions=backwards: .* did you mean 'backward'"),
        (Options(dtype="float8"), "--dtype=float8: .* did you mean 'float"),
        (Options(batch=-1), "--batch=-1: must be 1 or more"),
        (Options(seconds=0.0), "--seconds=0: must be more than 0"),
        (Options(out=Path("kernels.md")), "--out=kernels.md: must end in .json"),
    ],
)
def test_bad_options_are_named_before_anything_is_measured(options, message, monkeypatch):
    monkeypatch.setattr("jaxablate.bench.limits.measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(UserError, match=message) as caught:
        bench_kernels(options)
    assert "\n" not in str(caught.value)


def test_without_patterns_a_cpu_runs_the_studies_shapes():
    from jaxablate.bench import kernels

    chosen = kernels._chosen(Options())
    assert {group for _, group, _ in chosen} == {"paper"}
    assert {op for op, _, _ in chosen} == set(OPS)


def test_the_reference_is_always_among_the_implementations():
    assert list(available("attention", ("blockwise",))) == ["reference", "blockwise"]


def test_file_names_are_made_of_the_device():
    device = type("Device", (), {"device_kind": "NVIDIA H200"})
    assert slug(device) == "nvidia-h200"
