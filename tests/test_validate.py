"""`validate`: what it lists is what training enforces, it lists all of it at once, and it writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxablate import cli, config
from jaxablate.claims import Claim
from jaxablate.errors import UserError
from jaxablate.runstore import RunDir, run_id
from jaxablate.validate import Validation, validate

TOY = "tests/configs/toy.py"
LM, CLIP = "configs/tinystories.py", "configs/ctclip.py"


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


def looked(tmp_path: Path, spec: str = TOY, *overrides: tuple[str, str], **options: str) -> Validation:
    """The validation of a config whose folders are below `tmp_path`."""
    folders = [("host.workdir", f"{tmp_path}/runs"), ("host.cache", f"{tmp_path}/cache")]
    return validate(spec, [*folders, *overrides], **options)  # type: ignore[arg-type]


def broken(found: Validation) -> list[str]:
    return [str(rule) for rule in found.broken]


def its_run(tmp_path: Path) -> RunDir:
    """The directory of the toy config's run, made."""
    run = config.load(TOY, [("host.workdir", f"{tmp_path}/runs")]).base
    name = run_id(run.seed, run.optim.learning_rate, run.fingerprint)
    where = RunDir(tmp_path / "runs" / run.study / run.arm / name)
    where.create({key: value for key, value in run.to_dict().items() if key != "host"})
    return where


# -------------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize("spec", [TOY, LM, CLIP])
def test_a_sound_config_is_valid_and_ready(spec: str, tmp_path: Path):
    found = looked(tmp_path, spec)
    lines = found.text().splitlines()
    assert found.exit_code == 0, found.text()
    assert lines[-1] == "valid and ready"
    assert lines[-2] == f"{len(found.rules)} of {len(found.rules)} rules hold"
    assert sum("✅" in line for line in lines) == len(found.rules) > 30
    assert "❌" not in found.text()
    assert list(tmp_path.iterdir()) == []


def test_all_that_is_broken_is_listed_at_once(tmp_path: Path):
    found = looked(
        tmp_path, TOY, ("optim.learning_rate", "-1"), ("optim.b1", "2"), ("training.steps", "0"),
        ("host.mesh.tensor", "-1"),
    )  # fmt: skip
    assert broken(found) == [
        "optim.learning_rate=-1.0: must be 0 or more",
        "optim.b1=2.0: must be in [0, 1)",
        "training.steps=0: must be 1 or more",
        "host.mesh.tensor=-1: must be 0 or more",
    ]
    text = found.text()
    assert text.splitlines()[-1] == "not valid: 4 ❌ above"
    assert "not looked at: the task's own rules" in text
    assert found.exit_code == 1


def test_the_command_gives_the_list_as_json_and_its_exit_code(capsys, tmp_path: Path):
    where = [f"--config.host.workdir={tmp_path}/runs", f"--config.host.cache={tmp_path}/cache"]
    assert cli.main(["validate", TOY, *where, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["valid"]
    assert data["broken"] == 0 < data["rules"] == len(data["list"])
    assert cli.main(["validate", TOY, *where, "--config.seeds=-1", "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert [rule["rule"] for rule in data["list"] if not rule["holds"]] == ["seeds"]
    assert not data["valid"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["configs/tinystorie.py"], "no such file; did you mean 'configs/tinystories.py'"),
        ([TOY, "--config.optim.lerning_rate=1"], "did you mean 'optim.learning_rate'"),
        ([TOY, "--statc"], "did you mean '--static'"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(argv: list[str], words: str, capsys):
    assert cli.main(["validate", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert words in err


# ------------------------------------------------------------------------- one home for every rule

MISTAKES = [
    (LM, "model.heads", "7"),
    (LM, "model.layers", "0"),
    (LM, "data.context", "1"),
    (LM, "training.steps", "3"),
    (LM, "model.dim", "8"),
    (CLIP, "data.volume", "(13, 48, 48)"),
    (CLIP, "model.text.heads", "5"),
    (CLIP, "model.image.attention.heads", "0"),
    (CLIP, "model.text.weights", "bert.safetensors"),
]


@pytest.mark.parametrize(("spec", "path", "value"), MISTAKES, ids=[m[1] for m in MISTAKES])
def test_training_refuses_what_the_list_calls_broken(spec: str, path: str, value: str, tmp_path: Path):
    found = looked(tmp_path, spec, (path, value), look="static")
    first = next(rule for rule in found.broken if rule.kind == "static")
    run = config.load(spec, [(path, value)]).base
    with pytest.raises(UserError) as refused:
        config.import_task(run.task)(run, "cpu")
    assert str(refused.value) == f"config.{first}"


def test_training_takes_what_the_list_calls_valid(tmp_path: Path):
    for spec in (LM, CLIP):
        assert not looked(tmp_path, spec, look="static").broken
        run = config.load(spec).base
        config.import_task(run.task)(run, "cpu")


def test_a_wrong_word_is_a_broken_rule(tmp_path: Path):
    (said,) = broken(looked(tmp_path, LM, ("model.norm", "batchnorm"), look="static"))
    assert said == "model.norm='batchnorm': did you mean 'layernorm'?"


def test_a_cadence_beyond_the_budget_is_broken(tmp_path: Path):
    assert broken(looked(tmp_path, TOY, ("training.eval_every", "41"))) == [
        "training.eval_every=41: must be within the 40 steps of the run"
    ]
    assert not looked(tmp_path, TOY, ("training.eval_every", "40")).broken


# ------------------------------------------------------------------------------------ this machine


def test_static_leaves_the_machine_out(tmp_path: Path):
    (tmp_path / "file").write_text("")
    wrong = (("host.workdir", f"{tmp_path}/file"), ("host.workers", "100000"))
    assert [rule.name for rule in looked(tmp_path, TOY, *wrong).broken] == ["host.workdir", "host.workers"]
    static = looked(tmp_path, TOY, *wrong, look="static")
    assert static.exit_code == 0
    assert {rule.kind for rule in static.rules} == {"static"}
    assert static.text().splitlines()[-1] == "valid; not asked: this machine"


def test_data_that_is_not_there_is_named(tmp_path: Path):
    text = tmp_path / "text.txt"
    given = (("data.source", "text"), ("data.train", str(text)))
    assert broken(looked(tmp_path, LM, *given)) == [
        f"data.train={str(text)!r}: no such file or folder: {text}; mend the path"
    ]
    text.write_text("once")
    assert not looked(tmp_path, LM, *given).broken


def test_a_kernel_that_is_none_is_named(tmp_path: Path):
    found = looked(tmp_path, LM, ("model.attention_impl", "flsh"))
    assert [rule.name for rule in found.broken] == ["model.attention_impl='flsh'"]
    assert "flash" in broken(found)[0]
    assert found.unseen == ("cadences",)
    flash = next(
        r for r in looked(tmp_path, LM, ("model.attention_impl", "flash")).rules if r.value == "flash"
    )
    assert (flash.name, flash.detail) == ("model.attention_impl", "is blockwise on cpu")


def test_the_machine_is_looked_at_whatever_the_task_says(tmp_path: Path):
    found = looked(tmp_path, LM, ("model.heads", "7"), ("host.workers", "100000"))
    assert [rule.name for rule in found.broken] == ["model.heads", "host.workers"]
    assert found.unseen == ("cadences and kernels",)


def test_a_mesh_that_does_not_fit_is_named(tmp_path: Path):
    (said,) = broken(looked(tmp_path, TOY, ("host.mesh.tensor", "4096")))
    assert "needs 4096 devices" in said


def test_a_run_says_where_it_is(tmp_path: Path):
    where = its_run(tmp_path)
    number = where.begin_attempt()
    assert "running; starts anew" in looked(tmp_path).text()
    with Claim(where.claim):
        (said,) = broken(looked(tmp_path))
        assert "works on it; wait for it or stop it" in said
    where.end_attempt(number, "preempted", "a signal")
    assert not looked(tmp_path).broken
    where.checkpoints.mkdir()
    (where.checkpoints / "000000010.json").write_text("{")
    (said,) = broken(looked(tmp_path))
    assert "preempted; starts anew; that of step 10 is damaged (its manifest is damaged)" in said


def test_a_finished_run_is_said_and_a_torn_one_is_broken(tmp_path: Path):
    where = its_run(tmp_path)
    where.summary.write_text("{}")
    where.end_attempt(where.begin_attempt(), "done", "")
    assert "done; nothing is left to train" in looked(tmp_path).text()
    where.summary.write_text("{")
    (said,) = broken(looked(tmp_path))
    assert "summary.json: not valid JSON" in said
