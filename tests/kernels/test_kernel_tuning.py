"""The table of tuned configurations: what was measured is found again, and nothing else is."""

import dataclasses
import importlib.metadata
import json

import jax
import jax.numpy as jnp
import pytest

from jaxablate_kernels import tuning
from jaxablate_kernels.attention import AttentionSpec
from jaxablate_kernels.cross_entropy import CrossEntropySpec, chunked, linear_cross_entropy
from jaxablate_kernels.dispatch import equations, implementations, operations
from jaxablate_kernels.trials import Timing
from jaxablate_kernels.tuning import Measurement

pytestmark = pytest.mark.filterwarnings("error")

DEVICE = "Imagined X100-80GB"
SPEC = AttentionSpec(2, 64, 64, 4, 4, 32, "bfloat16", True, False, (1, 4, 64, 64), "bfloat16")


@dataclasses.dataclass(frozen=True)
class Blocks:
    q: int
    k: int


@dataclasses.dataclass(frozen=True)
class Config:
    forward: Blocks
    stages: tuple[int, ...]
    warps: int = 4

    def __post_init__(self):
        if self.warps < 1:
            raise ValueError(f"warps must be at least 1, got {self.warps}")


VERSIONS = tuning._versions()
CONFIG = Config(Blocks(64, 32), (2, 3), 8)


@pytest.fixture(autouse=True)
def own_tables(monkeypatch, tmp_path):
    """Neither the tables of whoever runs this nor what other tests looked up."""
    monkeypatch.setenv("JAXABLATE_TUNED", str(tmp_path / "own"))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tuning, "_USED", {})
    tuning._read.cache_clear()
    yield
    tuning._read.cache_clear()


def look_up(spec=SPEC, device=DEVICE, op="attention", name="pallas"):
    return tuning.config_for(op, name, spec, device, Config)


def save(config=CONFIG, seconds=1e-3, folder=None, spec=SPEC):
    return tuning.save_config("attention", "pallas", spec, DEVICE, Timing(config, seconds), folder)


def test_a_saved_config_is_found_for_its_problem_and_for_no_other():
    assert look_up() is None
    path = save()
    assert path.name == "imagined-x100-80gb.json"
    assert look_up() == CONFIG
    others = {
        "batch": 9,
        "head_dim": 64,
        "q_len": 65,
        "dtype": "float16",
        "causal": False,
        "bias": (1, 1, 64, 64),
        "rotary": "halves",
    }
    for name, value in others.items():
        assert look_up(dataclasses.replace(SPEC, **{name: value})) is None, name
    assert look_up(device="Imagined X100-40GB") is None
    assert look_up(name="blockwise") is None
    assert look_up(op="norm") is None


def test_a_config_holds_for_other_batches_of_the_same_problem_the_nearest_first():
    save()
    near = dataclasses.replace(SPEC, batch=8)
    save(dataclasses.replace(CONFIG, warps=1), spec=near)
    save(dataclasses.replace(CONFIG, warps=2), spec=dataclasses.replace(near, head_dim=64))
    assert look_up() == CONFIG
    assert look_up(dataclasses.replace(SPEC, batch=6)).warps == 1
    assert tuning.used_configs().popitem()[1].endswith("(own table, tuned at batch 8)")
    assert look_up(dataclasses.replace(SPEC, batch=33)) is None  # more than four times as much


def test_a_bias_of_each_sequence_has_the_batch_in_its_shape():
    spec = dataclasses.replace(SPEC, bias=(2, 4, 64, 64))
    save(spec=spec)
    assert look_up(dataclasses.replace(spec, batch=4, bias=(4, 4, 64, 64))) == CONFIG
    assert look_up(dataclasses.replace(spec, batch=4, bias=(1, 4, 64, 64))) is None
    assert look_up(dataclasses.replace(spec, batch=4, bias=(4, 1, 64, 64))) is None


@pytest.mark.parametrize("op", operations())
def test_every_spec_says_which_of_its_fields_are_sizes(op):
    spec = importlib.import_module(f"jaxablate_kernels.{op}.spec")
    (cls,) = [c for name, c in vars(spec).items() if name.endswith("Spec") and c.__module__ == spec.__name__]
    fields = {field.name for field in dataclasses.fields(cls)}
    assert set(cls.batch_fields) < set(cls.size_fields) < fields


@pytest.mark.parametrize("package", ["jax", "jaxlib", "jax-cuda13-plugin"])
def test_another_version_of_jax_or_jaxlib_knows_nothing_of_it(monkeypatch, package):
    save()
    assert look_up() == CONFIG
    monkeypatch.setattr(tuning, "_versions", lambda: VERSIONS | {package: "99.1"})
    tuning._read.cache_clear()
    assert look_up() is None
    save(dataclasses.replace(CONFIG, warps=2))
    assert look_up().warps == 2


def test_the_versions_of_what_competes_count_for_measurements_only(monkeypatch):
    installed = {"jax": "1", "jaxlib": "1", "jax-cuda13-plugin": "1", "tokamax": "1"}

    def version(package):
        if package not in installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    save()
    path = tuning.save_measurements(measured(pallas=1.0), DEVICE)
    document = json.loads(path.read_text())
    assert document["measurements"][0]["versions"] == installed
    assert document["configs"][0]["versions"] == {p: v for p, v in installed.items() if p != "tokamax"}
    assert (look_up(), fastest()) == (CONFIG, ("pallas",))
    installed["tokamax"] = "2"
    tuning._read.cache_clear()
    assert (look_up(), fastest()) == (CONFIG, ())
    installed["jax-cuda13-plugin"] = "2"
    tuning._read.cache_clear()
    assert (look_up(), fastest()) == (None, ())


def test_versions_live_side_by_side(monkeypatch):
    path = save()
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_versions", lambda: VERSIONS | {"jax": "99.1"})
        save(dataclasses.replace(CONFIG, warps=2))
    assert len(json.loads(path.read_text())["configs"]) == 2
    tuning._read.cache_clear()
    assert look_up() == CONFIG


def test_saving_again_replaces_and_other_problems_stay():
    other = dataclasses.replace(SPEC, q_len=128)
    save(spec=other)
    save()
    path = save(dataclasses.replace(CONFIG, warps=1), seconds=2e-3)
    assert look_up().warps == 1
    assert look_up(other) == CONFIG
    document = json.loads(path.read_text())
    assert len(document["configs"]) == 2
    assert document["device"] == DEVICE


def test_ones_own_table_comes_before_the_shipped_one():
    save(folder=tuning.SHIPPED)
    assert look_up() == CONFIG
    assert tuning.used_configs().popitem()[1].endswith("(shipped table)")
    save(dataclasses.replace(CONFIG, warps=1))
    assert look_up().warps == 1
    assert tuning.used_configs().popitem()[1].endswith("(own table)")


def test_a_table_is_read_once(monkeypatch):
    save()
    assert look_up() == CONFIG
    monkeypatch.setattr(tuning.Path, "read_text", lambda path, **_: pytest.fail(f"read again: {path}"))
    assert look_up() == CONFIG


def test_a_failed_write_leaves_the_table_as_it_was(monkeypatch):
    path = save()
    before = path.read_text()

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(tuning.os, "replace", full)
        with pytest.raises(OSError, match="no space left"):
            save(dataclasses.replace(CONFIG, warps=1))
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not a readable table of tuned kernels"),
        ("[]", "not a table of tuned kernels but a list"),
        ('{"configs": [{"op": "attention"}]}', r"an entry is incomplete \(KeyError: 'versions'\)"),
        ('{"configs": [7]}', "an entry is incomplete"),
    ],
)
def test_a_broken_table_is_an_error_that_names_the_file(text, message):
    path = tuning.file_for(DEVICE, tuning.user_folder())
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        look_up()
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"warps": 0}, {"tiles": 3}, {"forward": {"q": 1}}])
def test_a_config_that_does_not_fit_is_an_error_that_names_the_file(change):
    path = save()
    document = json.loads(path.read_text())
    document["configs"][0]["config"] |= change
    path.write_text(json.dumps(document))
    tuning._read.cache_clear()
    with pytest.raises(
        ValueError, match=r"of attention 'pallas' does not fit it \(.*\); tune it again"
    ) as caught:
        look_up()
    assert str(caught.value).startswith(f"{path}: ")


def test_a_run_can_record_which_configs_it_used():
    assert tuning.used_configs() == {}
    other = dataclasses.replace(SPEC, q_len=128)
    save()
    look_up()
    look_up(other)
    first, second = tuning.used_configs().items()
    assert first == (
        f"attention pallas on {DEVICE}: {tuning.canonical(SPEC)}",
        "Config(forward=Blocks(q=64, k=32), stages=(2, 3), warps=8) (own table)",
    )
    assert second[1] == "heuristic"
    tuning.used_configs().clear()  # a copy
    assert len(tuning.used_configs()) == 2


def measured(spec=SPEC, direction="both", **seconds):
    return [
        Measurement("attention", name, tuning.spec_fields(spec), direction, s) for name, s in seconds.items()
    ]


def fastest(spec=SPEC, device=DEVICE):
    return tuning.fastest("attention", spec, device)


def test_fastest_is_the_order_measured_on_this_problem():
    assert fastest() == ()
    tuning.save_measurements(measured(pallas=2.0, cudnn=1.0, reference=9.0), DEVICE)
    assert fastest() == ("cudnn", "pallas", "reference")
    assert fastest(device="other") == ()
    assert tuning.fastest("norm", SPEC, DEVICE) == ()
    tuning.save_measurements(measured(pallas=0.5), DEVICE)
    assert fastest() == ("pallas", "cudnn", "reference")


def test_only_forward_and_backward_together_count():
    tuning.save_measurements(measured(direction="forward", pallas=2.0, cudnn=1.0), DEVICE)
    assert fastest() == ()


def test_the_nearest_problem_speaks():
    near, far = dataclasses.replace(SPEC, batch=4), dataclasses.replace(SPEC, batch=8, head_dim=64)
    tuning.save_measurements(
        measured(near, pallas=1.0, cudnn=2.0) + measured(far, pallas=2.0, cudnn=1.0), DEVICE
    )
    assert fastest() == ("pallas", "cudnn")
    assert fastest(dataclasses.replace(far, batch=16)) == ("cudnn", "pallas")


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 9},  # more than four times as much
        {"head_dim": 64},
        {"dtype": "float16"},
        {"causal": False},
        {"softcap": True},
        {"bias": None, "bias_dtype": None},
        {"bias": (2, 4, 64, 64)},  # a full axis is something else than a broadcast one
    ],
)
def test_a_problem_of_another_kind_says_nothing(change):
    tuning.save_measurements(measured(pallas=1.0), DEVICE)
    assert fastest(dataclasses.replace(SPEC, batch=8)) == ("pallas",)  # the control
    assert fastest(dataclasses.replace(SPEC, **change)) == ()


def test_ones_own_measurements_come_before_the_shipped_ones():
    tuning.save_measurements(measured(pallas=1.0, cudnn=2.0), DEVICE, tuning.SHIPPED)
    assert fastest() == ("pallas", "cudnn")
    tuning.save_measurements(measured(cudnn=1.0), DEVICE)
    assert fastest() == ("cudnn",)


def test_configs_and_measurements_share_a_file():
    assert save() == tuning.save_measurements(measured(pallas=1.0), DEVICE)
    assert (look_up(), fastest()) == (CONFIG, ("pallas",))


def test_a_config_that_did_not_run_is_not_kept():
    failed = Timing(CONFIG, None, "too large")
    with pytest.raises(ValueError, match=r"did not run \(too large\), so it is not kept"):
        tuning.save_config("attention", "pallas", SPEC, DEVICE, failed)
    assert look_up() is None


def test_what_is_shipped_was_measured_for_implementations_that_exist(monkeypatch):
    monkeypatch.undo()
    for path in tuning.SHIPPED.glob("*.json"):
        document = json.loads(path.read_text())
        assert tuning.file_for(document["device"], tuning.SHIPPED) == path
        for entry in [*document.get("configs", []), *document.get("measurements", [])]:
            assert entry["op"] in operations()
            assert entry["implementation"] in implementations(entry["op"])
            assert entry["seconds"] > 0


def test_a_tuned_config_is_what_a_kernel_runs_with():
    """From the table to the program."""
    x, w, targets = jnp.ones((64, 8)), jnp.ones((8, 300)), jnp.zeros(64, jnp.int32)
    spec = CrossEntropySpec.of(x, w, targets, bias=None, ignore_index=-100, z_loss=0.0, softcap=None)

    def largest_array():
        jaxpr = jax.make_jaxpr(lambda x: linear_cross_entropy(x, w, targets, impl="chunked"))(x)
        return max(out.aval.size for eqn in equations(jaxpr) for out in eqn.outvars)

    config = chunked.Config(block_n=32, block_v=50)
    assert largest_array() == 64 * 300
    device = jax.devices()[0].device_kind
    tuning.save_config("cross_entropy", "chunked", spec, device, Timing(config, 1e-3))
    assert largest_array() == 32 * 50
    assert [*tuning.used_configs().values()] == [f"{config} (own table)"]
