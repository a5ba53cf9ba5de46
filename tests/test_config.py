"""The border: arms resolve to what they declare, identity is what is computed, and mistakes are one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from jaxablate import config
from jaxablate.errors import UserError
from jaxablate.main import main
from tests.goldens.update import HERE as GOLDENS
from tests.goldens.update import goldens

ARMS = {
    "baseline": {},
    "flash_only": {"model.image.attention.impl": "flash"},
    "rms_only": {"model.image.norm": "rmsnorm"},
    "swiglu_only": {"model.image.ffn": "swiglu"},
    "flash_rms": {"model.image.attention.impl": "flash", "model.image.norm": "rmsnorm"},
    "flash_swiglu": {"model.image.attention.impl": "flash", "model.image.ffn": "swiglu"},
    "rms_swiglu": {"model.image.norm": "rmsnorm", "model.image.ffn": "swiglu"},
    "optimized_full": {
        "model.image.attention.impl": "flash",
        "model.image.norm": "rmsnorm",
        "model.image.ffn": "swiglu",
    },
}
TOY = "tests/configs/toy.py"


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


@pytest.mark.parametrize(("spec", "golden"), list(goldens()), ids=lambda x: Path(x).name)
def test_resolved_config_equals_its_golden(spec: str, golden: Path) -> None:
    assert config.load(spec).base.to_dict() == json.loads(golden.read_text())


def test_every_golden_is_of_an_arm() -> None:
    assert {path for _, path in goldens()} == set(GOLDENS.glob("*/*/*.json"))


@pytest.mark.parametrize("arm", ARMS)
def test_arm_differs_from_baseline_only_in_what_it_declares(arm: str) -> None:
    base = config.load("configs/ctclip.py:baseline").base
    changed = config.diff(base, config.load(f"configs/ctclip.py:{arm}").base)
    changed.pop("arm", None)
    assert {path: new for path, (_, new) in changed.items()} == ARMS[arm]


@pytest.mark.parametrize("arm", ARMS)
def test_named_file_is_the_arm_of_the_study(arm: str) -> None:
    for scale in ("tiny", "paper"):
        named = config.load(f"configs/{arm}.py:scale={scale}")
        assert named == config.load(f"configs/ctclip.py:arm={arm},scale={scale}")
    assert config.load(f"configs/{arm}.py") == config.load(f"configs/{arm}.py:scale=tiny")


def test_fingerprint_covers_what_is_computed_and_nothing_else() -> None:
    base = config.load(TOY).base
    host = dataclasses.replace(base.host, workdir="/elsewhere", log_every=7, mesh=config.MeshConfig(data=4))
    same = dataclasses.replace(base, study="s", arm="a", scale="x", host=host)
    assert same.fingerprint == base.fingerprint
    for path, value in (("seeds", "1"), ("optim.eps", "1e-9"), ("model.width", "9"), ("data.count", "65")):
        assert config.load(TOY, [(path, value)]).base.fingerprint != base.fingerprint, path


def test_seeds_make_the_members_of_a_cohort() -> None:
    cohort = config.load(TOY, [("seeds", "0,1,2")])
    assert [run.seed for run in cohort.runs] == [0, 1, 2]
    assert len({run.fingerprint for run in cohort.runs}) == 3
    wider = dataclasses.replace(cohort.base, training=dataclasses.replace(cohort.base.training, steps=9))
    with pytest.raises(UserError, match=r"training\.steps differs inside a cohort"):
        config.Cohort((cohort.base, wider))


def test_integer_is_taken_where_a_float_is_meant_and_gives_the_same_run() -> None:
    assert config.load(TOY, [("optim.learning_rate", "1")]) == config.load(
        TOY, [("optim.learning_rate", "1.0")]
    )


MISTAKES = [
    (["--config=configs/nope.py"], ["configs/nope.py", "no such file", "did you mean"]),
    (["--config=nowhere/x.py"], ["nowhere/x.py", "no folder 'nowhere'"]),
    (["--config=LICENSE"], ["LICENSE", "not a Python file"]),
    (["--config=configs/ctclip.py:flash_rsm"], ["arm='flash_rsm'", "did you mean 'flash_rms'?"]),
    (["--config=configs/ctclip.py:arm=flash_rms,scal=tiny"], ["scal=tiny", "did you mean 'scale'?"]),
    (["--config=configs/ctclip.py:flash_rms,scale=papr"], ["scale='papr'", "did you mean 'paper'?"]),
    (["--config=configs/flash_rms.py:arm=baseline"], ["arm=baseline", "given twice"]),
    ([f"--config={TOY}:x"], ["takes no argument", "remove ':x'"]),
    ([f"--config={TOY}", "--config.optim.learning_rat=1"], ["optim.learning_rat", "'optim.learning_rate'?"]),
    ([f"--config={TOY}", "--config.optm.eps=1"], ["optm", "did you mean 'optim'?"]),
    ([f"--config={TOY}", "--config.optim=1"], ["config.optim", "is a section"]),
    ([f"--config={TOY}", "--config.seeds.x=1"], ["seeds", "remove '.x'"]),
    ([f"--config={TOY}", "--config.model.width=eight"], ["model.width='eight'", "must be int"]),
    ([f"--config={TOY}", "--config.model.width=8.5"], ["model.width=8.5", "must be int"]),
    ([f"--config={TOY}", "--config.seeds=a,b"], ["seeds='a,b'", "must be tuple"]),
    ([f"--config={TOY}", "--config.seeds=0.5"], ["seeds", "must be int"]),
    ([f"--config={TOY}", "--config.seeds=1,1"], ["seeds", "given twice"]),
    ([f"--config={TOY}", "--config.seeds=()"], ["seeds=()", "at least one"]),
    (
        [f"--config={TOY}", "--config.optim.schedule=cosin"],
        ["optim.schedule='cosin'", "did you mean 'cosine'?"],
    ),
    ([f"--config={TOY}", "--config.training.steps=0"], ["training.steps=0", "1 or more"]),
    (
        [f"--config={TOY}", "--config.training.accumulation=3"],
        ["accumulation=3", "must divide", "batch_size=8"],
    ),
    ([f"--config={TOY}", "--config.seeds=3000000000"], ["seeds=3000000000", "in [0, 2**31)"]),
    ([f"--config={TOY}", "--config.optim.learning_rate=1e400"], ["learning_rate=inf", "must be finite"]),
    ([f"--config={TOY}", "--config.optim.clip_norm=-1"], ["clip_norm=-1.0", "0 or more"]),
    ([f"--config={TOY}", "--config.optim.b2=1"], ["b2=1.0", "in [0, 1)"]),
    ([f"--config={TOY}", "--config.arm=../../escape"], ["arm='../../escape'", "letters"]),
    ([f"--config={TOY}", "--config.arm="], ["arm=''", "letters"]),
    ([f"--config={TOY}", "--config.task=tests.toy:ToyTsk"], ["tests.toy:ToyTsk", "did you mean 'ToyTask'?"]),
    ([f"--config={TOY}", "--config.task=no_such_module:X"], ["no module 'no_such_module'"]),
    ([f"--config={TOY}", "--config.task=x"], ["config.task='x'", "package.module:Class"]),
    ([f"--config={TOY}", "--config.data.problem=broken"], ["toy.csv", "mend it"]),
    ([f"--config={TOY}", "--config.host.mesh.data=64"], ["mesh", "needs 64 devices"]),
    ([f"--config={TOY}", "--confg.x=1"], ["--confg.x", "did you mean"]),
    ([f"--config={TOY}", "--config.seeds"], ["--config.seeds", "needs a value"]),
    (["--config=configs/flash_rms.py", "--config.model.image.attention.impl=flsh"], ["impl='flsh'", "flash"]),
    (
        ["--config=configs/flash_rms.py", "--config.model.image.patch=(5,12,12)"],
        ["volume", "patch=(5, 12, 12)"],
    ),
]


@pytest.mark.parametrize("args,words", MISTAKES, ids=lambda v: v[-1] if isinstance(v, list) else None)
def test_mistake_is_one_line_and_exit_code_2(
    args: list[str], words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*args, f"--config.host.workdir={tmp_path}"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert captured.out == ""
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert list(tmp_path.iterdir()) == []  # nothing was half-written


@pytest.mark.parametrize(
    "source,words",
    [
        ("def get_config():\n    return {}\n", ["returned dict", "ConfigDict"]),
        ("def get_config():\n    pass\n", ["returned NoneType"]),
        ("x = 1\n", ["defines no get_config()"]),
        ("def get_config():\n    return 1 / 0\n", ["ZeroDivisionError at line 2"]),
        ("import nonexistent_thing\n", ["ModuleNotFoundError at line 1"]),
        ("def get_config(:\n", ["SyntaxError at line 1"]),
        (
            "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n",
            ["config.task: missing"],
        ),
    ],
)
def test_config_file_that_is_wrong_is_one_line(
    source: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(source)
    assert main([f"--config={path}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    for word in words:
        assert word in line


def test_unlisted_or_missing_field_in_a_config_file_is_refused() -> None:
    values = config.load_config_dict(TOY)
    values.model.depth = 3
    with pytest.raises(UserError, match=r"config\.model\.depth: no such field"):
        config.resolve(values)
    values = config.load_config_dict(TOY)
    del values.model.width
    with pytest.raises(UserError, match=r"config\.model\.width: missing"):
        config.resolve(values)


def test_print_config_shows_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--config={TOY}", "--config.seeds=3,4", "--print-config"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [run["seed"] for run in shown] == [3, 4]
    assert shown[0]["optim"]["learning_rate"] == 0.01
