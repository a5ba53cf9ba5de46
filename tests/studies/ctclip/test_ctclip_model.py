"""CT-CLIP: sizes, golden losses, and that each arm changes what it says."""

from __future__ import annotations

import dataclasses
import functools
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxablate import config
from jaxablate.program import Program
from jaxablate.sharding import make_mesh
from jaxablate.studies.ctclip.config import AttentionConfig, ImageConfig
from jaxablate.studies.ctclip.model import (
    CosineCodebook,
    CtVitLayer,
    ImageEncoder,
    siglip_loss,
    softmax_loss,
)
from jaxablate.studies.ctclip.task import CtClipTask
from jaxablate.trees import digest, flat
from jaxablate_kernels import kernels_in
from jaxablate_kernels.devices import compiling_for

ARMS = [
    "baseline",
    "flash_only",
    "rms_only",
    "swiglu_only",
    "flash_rms",
    "flash_swiglu",
    "rms_swiglu",
    "optimized_full",
]

# Half of the factorial, in which every two factors still meet at all their levels; all of it with JAXABLATE_CASES=300.
MEETING = ("baseline", "flash_rms", "flash_swiglu", "rms_swiglu")
if int(os.environ.get("JAXABLATE_CASES", "0")) >= 300:
    MEETING = ARMS


@pytest.fixture(autouse=True)
def _in_repo(repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


def task_of(arm: str, scale: str = "tiny", **overrides: str) -> CtClipTask:
    pairs = [(path.replace("__", "."), value) for path, value in overrides.items()]
    return CtClipTask(config.load(f"configs/ctclip.py:{arm},scale={scale}", pairs).base, "cpu")


@functools.cache
def parameters(arm: str, scale: str = "tiny", overrides: tuple[tuple[str, str], ...] = ()) -> dict:
    task = task_of(arm, scale, **dict(overrides))
    return jax.tree.map(
        lambda x: int(np.prod(x.shape)), nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    )


def total(tree) -> int:
    return sum(jax.tree.leaves(tree))


# ------------------------------------------------------------------------------------------ sizes


def test_parameter_counts_at_tiny() -> None:
    plain = parameters("baseline", "tiny", (("model__image__position_bias", "off"),))
    assert total(plain["params"]["image"]) == 87_360


def test_parameter_counts_at_paper_scale() -> None:
    full = parameters("baseline", "paper")
    image = dict(full["params"]["image"])
    assert total(full["codebook"]) == 4_194_304
    assert total(full["params"]["image_projection"]) == 150_994_944
    assert total(full["params"]["text_projection"]) == 393_216
    assert total(full["params"]["text"]) == 108_891_648
    assert total(image["patch"]) + total(image["patch_norm"]) + total(image["patch_out_norm"]) == 2_057_536
    layer = image["space"]["layer_0"]
    assert total(layer["peg"]) == 14_336
    assert total(layer["block"]["ffn"]) + total(layer["block"]["ffn_norm"]) == 2_097_664
    attention = total(layer["block"]["attention"]) + total(layer["block"]["attention_norm"])
    unused_norm = 512  # upstream makes a context norm for each layer that it never applies
    assert attention + unused_norm == 525_376
    assert total(image.pop("position_bias")) == 268_296
    assert total(image) == 23_153_472
    assert total(image) + 268_296 + 8 * unused_norm == 23_425_864


def test_parameters_of_the_arms() -> None:
    base = total(parameters("baseline", "paper")["params"]["image"])
    for arm in MEETING:
        has_rms = "rms" in arm or arm == "optimized_full"
        biases = (4000 + 512 + 8 * 512) * has_rms  # what LayerNorm has and RMSNorm has not
        assert total(parameters(arm, "paper")["params"]["image"]) == base - biases, arm


# -------------------------------------------------------------------------- one step at paper scale


@pytest.mark.parametrize("arm", MEETING)
def test_one_training_step_has_its_shapes_at_paper_scale_and_the_declared_kernel(arm: str) -> None:
    cohort = config.load(f"configs/ctclip.py:{arm},scale=paper")
    task = CtClipTask(cohort.base, "cpu")
    mesh = make_mesh(cohort.base.host.mesh, 1, 4, jax.devices()[:1])
    program = Program(task, cohort, task.stages()[0], mesh)
    state, batch = program.abstract_member, {k: _batched(s, 4) for k, s in task.example().items()}
    member = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype), program.member)
    n = jax.ShapeDtypeStruct((), jnp.int32)
    new, metrics = jax.eval_shape(program.member_step, state, member, batch, n, {})
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["train/loss"].shape == ()
    variables = {"params": state.params, **state.collections}
    attention = {"attention_blockwise", "attention_blockwise_backward"}
    if not is_flash(arm):
        attention = {"attention_reference"}
    assert image_kernels(task, variables, batch["image"]) == attention | {"norm_reference", "gated_reference"}


@pytest.mark.parametrize("arm", ARMS)
def test_on_a_gpu_each_arm_holds_the_kernels_that_it_declares_and_no_others(arm: str) -> None:
    fused = [("model.image.norm_impl", "fused"), ("model.image.ffn_impl", "fused")]
    cohort = config.load(f"configs/ctclip.py:{arm},scale=tiny", fused)
    task = CtClipTask(cohort.base, "gpu")
    assert task.kernels["model.image.norm_impl"].name == "pallas"
    with compiling_for("gpu", "NVIDIA H200"):
        variables = jax.eval_shape(task.init, jax.random.key(0))
        found = image_kernels(task, nn.unbox(variables), _batched(task.example()["image"], 2))
    declared = {"attention_pallas"} if is_flash(arm) else {"attention_reference"}
    declared |= {"norm_pallas", "gated_pallas"}
    assert {name.removesuffix("_backward") for name in found} == declared


def is_flash(arm: str) -> bool:
    return "flash" in arm or arm == "optimized_full"


def image_kernels(task: CtClipTask, variables, volume) -> set[str]:
    """The kernels in the gradient of the image encoder."""

    def image_only(variables, volume):
        features, _ = task.model.apply(variables, volume, method="encode_image")
        return features.sum()

    # Over the parameters: codes of the codebook are state.
    gradient = jax.grad(lambda params, rest, x: image_only({"params": params, **rest}, x))
    rest = {k: v for k, v in variables.items() if k != "params"}
    return kernels_in(jax.make_jaxpr(gradient)(variables["params"], rest, volume))


def _batched(struct: jax.ShapeDtypeStruct, size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size, *struct.shape), struct.dtype)


# ---------------------------------------------------------------------------- what an arm changes


@functools.cache
def initial(arm: str, seed: int = 0) -> dict:
    return nn.unbox(jax.jit(task_of(arm).init)(jax.random.key(seed)))


@pytest.mark.parametrize("arm", ARMS[1:])
def test_shared_parameters_start_bit_equal(arm: str) -> None:
    base, other = flat(initial("baseline")), flat(initial(arm))
    shared = base.keys() & other.keys()
    assert len(shared) >= len(base) - 10
    for name in shared:
        np.testing.assert_array_equal(base[name], other[name], err_msg=name)
    assert digest(base) != digest(flat(initial("baseline", seed=1)))


@pytest.fixture(scope="module")
def batch() -> dict:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(4, 12, 48, 48)).astype(np.float32)
    text = rng.integers(4, 128, size=(4, 32)).astype(np.int32)
    return {"image": jnp.asarray(image), "text": jnp.asarray(text)}


def outputs(arm: str, batch: dict, **overrides: str):
    task, variables = task_of(arm, **overrides), initial("baseline")

    def loss(params):
        own = {**variables, "params": params}
        features, _ = task.encode(own, batch, jax.random.key(0))
        return task.loss(own, features)[0], features

    # An arm takes from the baseline's parameters those it has; RMSNorm has no biases.
    wanted = jax.eval_shape(lambda: nn.unbox(task.init(jax.random.key(0))))["params"]
    params = _subset(variables["params"], wanted)
    (value, features), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, features["image"], grads


def _subset(values, wanted):
    if not isinstance(wanted, dict):
        return values
    return {key: _subset(values[key], wanted[key]) for key in wanted}


def test_flash_is_an_implementation_factor(batch: dict) -> None:
    value, image, grads = outputs("baseline", batch)
    other_value, other_image, other_grads = outputs("flash_only", batch)
    np.testing.assert_allclose(other_value, value, atol=1e-5)
    np.testing.assert_allclose(other_image, image, atol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("arm", ["rms_only", "swiglu_only"])
def test_norm_and_ffn_are_model_factors(arm: str, batch: dict) -> None:
    assert np.abs(np.asarray(outputs(arm, batch)[1] - outputs("baseline", batch)[1])).max() > 1e-3


def test_upstreams_flash_is_another_function(batch: dict) -> None:
    task = task_of("flash_only", model__image__attention__variant="faithful_flash")
    names = flat(jax.eval_shape(lambda: nn.unbox(task.init(jax.random.key(0))))["params"])
    assert not any("q_scale" in name or "position_bias" in name for name in names)
    assert any(name.endswith("attention_norm/bias") for name in names)
    variables = nn.unbox(jax.jit(task.init)(jax.random.key(0)))
    faithful, _ = jax.jit(lambda v: task.model.apply(v, batch["image"], method="encode_image"))(variables)
    assert np.abs(np.asarray(faithful - outputs("baseline", batch)[1])).max() > 1e-3


def test_faithful_rms_scope_leaves_the_other_norms_alone() -> None:
    config_of = lambda scope: ImageConfig(norm="rmsnorm", norm_scope=scope)
    from jaxablate.studies.ctclip.model import image_norm

    kinds = lambda scope: [
        image_norm(config_of(scope), s).keywords["kind"] for s in ("attention", "out", "ffn", "patch_in")
    ]
    assert kinds("all") == ["rmsnorm"] * 4
    assert kinds("faithful") == ["rmsnorm", "rmsnorm", "layernorm", "layernorm"]


# ----------------------------------------------------------------------------------- the encoder


def test_position_bias_sees_where_things_are(batch: dict) -> None:
    """Moving a spot by whole cells changes the pooled tokens' multiset only if offsets are biased."""
    image = ImageConfig(
        patch=(4, 12, 12),
        dim=16,
        spatial_depth=1,
        temporal_depth=0,
        attention=AttentionConfig(heads=2, head_dim=4),
        peg="none",
        codebook="none",
    )

    def tokens(position_bias: str, column: int) -> np.ndarray:
        own = dataclasses.replace(image, position_bias=position_bias)
        encoder = ImageEncoder(own, jnp.float32, "none")
        volume = jnp.zeros((1, 4, 48, 48)).at[:, :, 12:18, 12 * column + 3 : 12 * column + 6].set(1.0)
        variables = encoder.init(jax.random.key(0), volume)
        if position_bias == "on":
            big = jax.tree.map(lambda x: 5 * x, variables["params"]["position_bias"])
            variables = {"params": {**variables["params"], "position_bias": big}}
        out, _ = encoder.apply(variables, volume)
        return np.sort(np.asarray(out).reshape(-1, 16), axis=0)

    np.testing.assert_allclose(tokens("off", 0), tokens("off", 2), atol=1e-5)
    assert np.abs(tokens("on", 0) - tokens("on", 2)).max() > 1e-4


def test_peg_in_the_temporal_stack_keeps_the_grid_apart() -> None:
    """An impulse on a (2, 3, 5) grid: the clean layer moves it to its neighbours, upstream's to strangers."""

    def touched(peg: str, axis: str) -> set[tuple[int, ...]]:
        own = ImageConfig(dim=8, attention=AttentionConfig(heads=2, head_dim=4), peg=peg, position_bias="off")
        layer = CtVitLayer(own, axis, jnp.float32)
        x = jnp.zeros((1, 2, 3, 5, 8))
        variables = nn.unbox(layer.init(jax.random.key(0), x, None))
        params = variables["params"]
        params = {**params, "block": jax.tree.map(jnp.zeros_like, params["block"])}  # PEG alone
        run = lambda x: layer.apply({"params": params}, x, None)
        change = np.abs(np.asarray(run(x.at[0, 0, 1, 2].set(1.0)) - run(x))).max(-1)[0]
        return {tuple(map(int, cell)) for cell in np.argwhere(change > 1e-6)}

    neighbours = {(t, h, w) for t in (0, 1) for h in (0, 1, 2) for w in (1, 2, 3)}
    assert touched("peg", "time") == touched("peg", "space") == touched("faithful", "space") == neighbours
    assert touched("faithful", "time") != neighbours


def test_upstreams_memory_order_keeps_24_of_13824_tokens() -> None:
    order = np.arange(24**3).reshape(24, 24, 24)  # (T, H, W)
    misread = order.transpose(1, 2, 0).reshape(24, 24, 24)
    assert (order == misread).sum() == 24


def test_codebook_gives_nearest_codes_a_straight_gradient_and_a_mean() -> None:
    module = CosineCodebook(size=5, chunk=4)
    x = jax.random.normal(jax.random.key(1), (2, 7, 3))
    variables = module.init(jax.random.key(0), x)
    quantised, sums = module.apply(variables, x)
    codes = np.asarray(variables["codebook"]["codes"])
    unit = lambda v: v / np.linalg.norm(v, axis=-1, keepdims=True)
    nearest = (unit(np.asarray(x)).reshape(-1, 3) @ unit(codes).T).argmax(-1)
    np.testing.assert_allclose(np.asarray(quantised).reshape(-1, 3), unit(codes)[nearest], atol=1e-6)
    np.testing.assert_allclose(sums["count"], np.bincount(nearest, minlength=5))
    grad = jax.grad(lambda x: module.apply(variables, x)[0].sum())(x)
    np.testing.assert_allclose(grad, 1.0)
    updated = np.asarray(CosineCodebook.update(jnp.asarray(codes), sums, 0.8))
    for code in range(5):
        mean = (
            unit(unit(np.asarray(x)).reshape(-1, 3)[nearest == code].sum(0))
            if (nearest == code).any()
            else codes[code]
        )
        np.testing.assert_allclose(updated[code], 0.8 * codes[code] + 0.2 * mean, atol=1e-6)


# ----------------------------------------------------------------------------------------- losses

TEXT = jnp.array([[0.6, 0.8, 0], [0, 1, 0], [0.8, 0, 0.6]])
IMAGE = jnp.array([[1, 0, 0], [0, 0.6, 0.8], [0, 0, 1.0]])


def test_losses_give_the_specified_values() -> None:
    np.testing.assert_allclose(softmax_loss(IMAGE, TEXT, jnp.float32(1.0)), 0.752100, rtol=1e-5)
    siglip = siglip_loss(IMAGE, TEXT, jnp.float32(np.log(10)), jnp.float32(-10.0))
    np.testing.assert_allclose(siglip, 4.064172, rtol=1e-5)
    swapped = softmax_loss(IMAGE[::-1], TEXT, jnp.float32(1.0))
    assert abs(float(swapped) - 0.752100) > 0.05


@pytest.mark.parametrize("loss,theta", [("softmax", 1.0), ("siglip", np.log(10.0))])
def test_temperature_starts_as_specified(loss: str, theta: float) -> None:
    params = nn.unbox(jax.jit(task_of("baseline", model__loss=loss).init)(jax.random.key(0)))["params"]
    np.testing.assert_allclose(params["log_temperature"], theta, rtol=1e-6)
    assert ("logit_bias" in params) == (loss == "siglip")


def test_bfloat16_keeps_parameters_and_loss_in_float32(batch: dict) -> None:
    smooth = {"model__image__codebook": "none"}  # or rounding may move a token to another code
    task = task_of("optimized_full", training__compute_dtype="bfloat16", **smooth)
    variables = nn.unbox(jax.jit(task.init)(jax.random.key(0)))
    assert {x.dtype for x in jax.tree.leaves(variables["params"])} == {jnp.dtype("float32")}
    features, _ = jax.jit(task.encode)(variables, batch, jax.random.key(0))
    loss, _ = task.loss(variables, features)
    assert loss.dtype == jnp.float32
    exact = jax.jit(task_of("optimized_full", **smooth).encode)(variables, batch, jax.random.key(0))[0][
        "image"
    ]
    assert 0 < np.abs(np.asarray(features["image"] - exact)).max() < 0.05
