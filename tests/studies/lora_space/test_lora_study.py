"""The LoRA weight-space study as a user meets it: the declaration, the guide's flags, what a mistake says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jaxablate import config, study
from jaxablate.check import check_study
from jaxablate.config import set_path
from jaxablate.errors import UserError
from jaxablate.main import main
from jaxablate.studies.lora_space.config import REPRESENTATIONS, TENSORS
from jaxablate.study import Arm, Factor, Study

SPEC = "configs/lora_space.py"
SMALL = [("model.hidden", "16"), ("training.batch_size", "16")]


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


def test_the_documents_arms_are_all_and_bear_its_names():
    found = study.load(SPEC)
    names = [f"{r}_{t}" for r in REPRESENTATIONS if r != "product" for t in ("all_layers", "visual_only")]
    assert {arm.name for arm in found.arms} == set(names)
    assert len(names) == 20
    assert found.baseline == "simple_stats_all_layers"
    every = study.load(f"{SPEC}:arms=all")
    assert {arm.name for arm in every.arms} == {f"{r}_{t}" for r in REPRESENTATIONS for t in TENSORS}
    resampled = study.load(f"{SPEC}:arms=resampled")
    assert len(resampled.arms) == 20 * 5
    # A verdict would be over seeds, and those say nothing of other adapters.
    assert found.hypotheses == every.hypotheses == resampled.hypotheses == ()


def test_an_arm_of_another_list_than_the_one_given_is_refused() -> None:
    given = config.load(f"{SPEC}:spectral_visual_only,arms=all").base
    assert (given.arm, given.study) == ("spectral_visual_only", "lora_space")
    assert config.load(f"{SPEC}:simple_stats_all_layers_split43").base.study == "lora_space_resampled"
    with pytest.raises(UserError, match=r"arms='resampled': has no arm 'spectral_visual_only'"):
        config.load(f"{SPEC}:spectral_visual_only,arms=resampled")


def test_paper_is_the_documents_largest_scale():
    paper, largest, other = (config.load(f"{SPEC}:scale={scale}").base for scale in ("paper", "50k", "10k"))
    assert paper == largest and paper.data.samples == 50_000
    assert paper.fingerprint != other.fingerprint
    assert study.load(f"{SPEC}:scale=paper").seeds == study.load(f"{SPEC}:scale=50k").seeds
    assert config.load(f"{SPEC}:spectral_visual_only,scale=paper").base.data.samples == 50_000


@pytest.mark.parametrize(
    ("arg", "seeds"),
    [("", 3), ("scale=1k", 10), ("scale=1k,runs=quick", 3), ("scale=1k,runs=7", 7), ("scale=50k", 10)],
)
def test_runs_are_seeded_from_42_on(arg: str, seeds: int):
    assert study.load(f"{SPEC}:{arg}").seeds == tuple(range(42, 42 + seeds))


@pytest.mark.parametrize(
    ("arg", "overrides", "epoch", "epochs"),
    [
        ("scale=1k", (), 3, 200),  # 700 training adapters
        ("scale=10k", (), 28, 200),
        ("scale=1k", (("training.batch_size", "64"),), 11, 200),
        ("scale=1k", (("data.samples", "997"),), 3, 200),
        ("", (), 7, 40),
        ("scale=1k,data=preprocessed", (("data.path", "x"), ("data.samples", "512")), 2, 200),
    ],
)
def test_an_epoch_follows_from_the_adapters_and_the_batch(arg, overrides, epoch, epochs):
    base = config.load(f"{SPEC}:{arg}" if arg else SPEC, overrides).base
    assert base.training.eval_every == epoch
    assert base.training.steps == epochs * epoch
    assert (base.training.early_stop, base.training.restore) == (15, "best")
    assert (base.optim.decay_at, base.optim.plateau_factor, base.optim.plateau_patience) == (
        "gradient",
        0.5,
        10,
    )


def test_every_flag_of_the_guide_is_a_field():
    """The table in the file's docstring says what a flag of the guide is called here; it is so."""
    text = Path(SPEC).read_text().split('"""')[1]
    flags = re.findall(r"^    --([\w-]+)", text, re.MULTILINE)
    guide = (
        "dataset num-runs output-dir quick cache-features cache-dir dropout weight-decay hidden-dim batch-size "
        "sample-layers no-amp num-workers preprocess-only dataset-cache-dir"
    )
    assert set(flags) == set(guide.split())
    given = re.findall(r"--config\.([\w.]+)=([\w.]+)?", text)
    assert len(given) >= 9
    base = study.load(SPEC).base
    assert base is not None
    for path, _ in given:
        section: object = base
        for key in path.split("."):
            section = section[key]  # type: ignore[index]
        set_path(base, path, section)


def test_published_numbers_are_expected_of_real_adapters_alone():
    assert not study.load(f"{SPEC}:scale=10k").expectations
    real = study.load(f"{SPEC}:scale=10k,data=folder", [("data.path", "x")]).expectations
    assert len(real) == 20
    (one,) = [e for e in real if e.arm == "ensemble_visual_only"]
    assert (one.low, one.high) == pytest.approx((0.35, 0.38))


@pytest.mark.slow
def test_arms_ablate_what_they_say_and_one_that_does_not_is_caught():
    """A representation is another first layer on other data; the check knows both as declared."""
    every = study.load(f"{SPEC}:arms=all", SMALL)
    report = check_study(every, arms=["spectral_visual_only", "product_all_layers", "stats_text_only"])
    assert not report.failed, report.table(120, verbose=True)
    assert {row.function for row in report.rows if row.arm != every.baseline} == {"changed"}
    # Of all the layers another draw chooses the same ones.
    idle = Factor("layers", "model", {"drawn": {}, "again": {"data.sample_seed": 7}})
    arms = (Arm("baseline"), Arm("again", {"layers": "again"}))
    broken = Study("lora_space", (idle,), arms, (0,), every.responses[:1], base=every.base)
    report = check_study(broken, arms=["again"])
    (finding,) = [f for f in report.of("again", "fail") if f.check == "function"]
    assert "changes nothing" in finding.reason


@pytest.mark.slow
def test_two_representations_of_one_width_differ_in_what_the_model_is_shown():
    """On equal batches they are the same function, and so is a factor that does nothing (see above)."""
    document = study.load(SPEC, SMALL)
    base = document.config("stats_all_layers")
    factor = Factor(
        "representation", "model", {"stats": {}, "norms": {"data.representation": "matrix_norms"}}
    )
    arms = (Arm("baseline"), Arm("norms", {"representation": "norms"}))
    found = Study("lora_space", (factor,), arms, (0,), document.responses[:1], base=base)
    report = check_study(found, arms=["norms"])
    assert not report.failed, report.table(120, verbose=True)
    (row,) = [row for row in report.rows if row.arm == "norms"]
    assert row.function == "changed"


@pytest.mark.slow
def test_another_split_is_data_and_no_other_function():
    found = study.load(f"{SPEC}:arms=resampled", SMALL)
    report = check_study(found, arms=["simple_stats_all_layers_split43"])
    assert not report.failed, report.table(120, verbose=True)
    assert {row.function for row in report.rows if row.arm != found.baseline} == {"same"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["model.dropout=1.0"], ("model.dropout=1.0", "[0, 1)")),
        (["model.layers=0"], ("model.layers=0", "1 or more")),
        (["training.batch_size=1"], ("training.batch_size=1", "2 or more")),
        (["training.accumulation=2"], ("training.accumulation=2", "batch norm")),
        (["host.split=2"], ("host.split=2", "batch norm")),
        (["data.source=folder"], ("data.path", "needs a path")),
        (["data.path=nowhere"], ("data.path=", "must be empty")),
        (["data.sample_layers=0.0"], ("data.sample_layers=0.0", "at most 1")),
        (["data.classes=1"], ("data.classes=1", "from 2 to 10")),
        (["data.representation=spectrum"], ("data.representation='spectrum'", "spectral")),
        (["model.norm_momentum=0.0"], ("model.norm_momentum=0.0", "(0, 1]")),
    ],
)
def test_a_mistake_is_one_line(options, says, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [f"--config.{option}" for option in (*options, f"host.workdir={tmp_path}")]
    assert main([f"--config={SPEC}", *args]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert all(part in line for part in says), line
    assert not (tmp_path / "lora_space").exists()
