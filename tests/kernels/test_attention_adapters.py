"""The adapters to other libraries' attention: our semantics around their kernels, and what they refuse.

Their kernels need a GPU, so what runs here is the same adapter around the library's plain version.
"""

import dataclasses
import functools
import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import allowed_keys, differences, oracle, run
from jax._src.cudnn import fused_attention_stablehlo

from jaxablate_kernels import KernelUnsupported, attention, kernels_in, load, require, resolve
from jaxablate_kernels.attention import AttentionSpec, cudnn
from jaxablate_kernels.attention.cases import PAPER, SMALL, Case
from jaxablate_kernels.devices import compiling_for

pytestmark = pytest.mark.filterwarnings("error")

HAS_TOKAMAX = importlib.util.find_spec("tokamax") is not None
FLOAT32 = tuple(case for case in SMALL if case.dtype == "float32")


def square(case: Case) -> bool:
    """Whether a causal diagonal is the same from either corner."""
    return not case.causal or case.q_len == case.kv_len


CUDNN_FUNCTION = functools.partial(cudnn.attention_cudnn, implementation="xla")
CUDNN_CASES = tuple(case for case in FLOAT32 if square(case) and case.softcap is None)


@pytest.mark.parametrize("case", CUDNN_CASES, ids=lambda case: case.name)
def test_cudnn_adapter_equals_the_oracle(case):
    """Masks, segments, bias, groups, QK-norm and rotary positions, value and gradients."""
    assert differences(run(case, CUDNN_FUNCTION), oracle(case)) == {}


def test_the_cases_above_hold_each_option_and_rows_that_see_nothing():
    assert {case.segments for case in CUDNN_CASES} == {"none", "packed", "random"}
    assert {case.kv_mask for case in CUDNN_CASES} == {"none", "lengths", "random", "empty"}
    assert {bool(case.bias) for case in CUDNN_CASES} == {True, False}
    assert {case.causal for case in CUDNN_CASES} == {True, False}
    blind = [c for c in CUDNN_CASES if not allowed_keys(c, c.inputs()).any(axis=2).all()]
    assert {case.causal for case in blind} == {True, False}


def test_without_the_adapter_a_query_that_sees_nothing_gets_the_mean():
    """The negative control of the zeros above, and why the adapter has to put them there."""
    case = next(case for case in CUDNN_CASES if case.name == "empty_sequence_causal")

    def plain(q, k, v, *, kv_mask, scale, causal, **_):
        mask = kv_mask[:, None, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=causal)

    assert set(differences(run(case, plain), oracle(case))) >= {"o", "dv"}


def test_bias_of_minus_infinity_is_a_mask():
    """Also where it hides all keys of a query."""
    case = Case("adapter_hidden", 20, 30, 2, 2, 8, batch=2, bias="bs")
    x = case.inputs()
    hidden = x.bias.at[0, :, :, ::2].set(-jnp.inf).at[1].set(-jnp.inf)
    by_bias = run(case, CUDNN_FUNCTION, dataclasses.replace(x, bias=hidden))
    seen = jnp.isfinite(hidden)
    by_mask = run(
        case, CUDNN_FUNCTION, dataclasses.replace(x, bias=jnp.where(seen, x.bias, 0), kv_mask=seen[:, 0, 0])
    )
    assert differences(by_bias, by_mask) == {}
    assert np.all(by_bias.o[1] == 0)
    assert np.all(by_bias.o[0] != 0)


HALF = AttentionSpec(1, 64, 64, 4, 2, 32, "bfloat16", False, False, None, None)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "float16"},
        {"causal": True},
        {"head_dim": 128},
        {"q_len": 62, "kv_len": 30},
        {"has_kv_mask": True, "segments": True},
        {"bias": (1, 4, 64, 64), "bias_dtype": "bfloat16"},
        {"qk_norm": "l2", "rotary": "halves"},
    ],
)
def test_what_cudnn_takes(changes):
    assert cudnn.supports(dataclasses.replace(HALF, **changes), "gpu") is None


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"dtype": "float32"}, "q, k and v are float32, supported are bfloat16, float16"),
        ({"bias": (1, 1, 1, 1), "bias_dtype": "float32"}, "bias is float32, supported is the type of q, bfloat16"),
        ({"head_dim": 12}, "head dimension is 12, supported are multiples of 8 up to 128"),
        ({"head_dim": 136}, "head dimension is 136, supported are multiples of 8 up to 128"),
        ({"softcap": True}, "softcap is given, supported is none"),
        ({"causal": True, "q_len": 32}, "causal with 32 queries and 64 keys, supported are equal lengths"),
        ({"q_len": 7}, "7 queries and 64 keys, supported are even lengths"),
        ({"kv_len": 7}, "64 queries and 7 keys, supported are even lengths"),
    ],
)  # fmt: skip
def test_what_cudnn_refuses(changes, reason):
    spec = dataclasses.replace(HALF, **changes)
    with pytest.raises(KernelUnsupported) as caught:
        require(resolve("attention", "cudnn", "gpu"), spec, "gpu")
    assert str(caught.value).startswith(f"attention implementation 'cudnn' cannot run this: {reason}")
    assert "\n" not in str(caught.value)
    assert "reference" in caught.value.alternatives


def test_cudnn_refuses_a_cpu():
    q = jnp.ones((1, 8, 2, 16), jnp.bfloat16)
    with pytest.raises(KernelUnsupported, match="platform is cpu, supported is gpu; choose 'reference' or"):
        attention(q, q, q, impl="cudnn", scale=0.25)


@dataclasses.dataclass
class Device:
    compute_capability: str
    platform: str = "gpu"
    device_kind: str = "Imagined X100"


@pytest.mark.parametrize("capability, largest", [("8.0", 128), ("9.0", 256), ("10.0", 256)])
def test_cudnn_takes_larger_heads_from_hopper_on(monkeypatch, capability, largest):
    monkeypatch.setattr(jax, "devices", lambda: [Device(capability)])
    assert cudnn.supports(dataclasses.replace(HALF, head_dim=largest), "gpu") is None
    assert f"up to {largest}" in cudnn.supports(dataclasses.replace(HALF, head_dim=largest + 8), "gpu")


@pytest.mark.parametrize("kind, largest", [("NVIDIA A100-SXM4-80GB", 128), ("NVIDIA H200", 256)])
def test_cudnn_knows_a_gpu_that_is_not_here_by_its_name(kind, largest):
    with compiling_for("gpu", kind):
        assert cudnn.supports(dataclasses.replace(HALF, head_dim=largest), "gpu") is None
        assert f"up to {largest}" in cudnn.supports(dataclasses.replace(HALF, head_dim=264), "gpu")


def lowered_for_cuda(monkeypatch, case: Case) -> tuple[str, set[str]]:
    """The lowered text of the gradient, and the kernels of its jaxpr."""
    # Without a GPU there is no cuDNN to ask for its version, which is all that lowering needs of it.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91100)
    x = case.inputs()

    def loss(q, k, v):
        return jnp.sum(cudnn.attention_cudnn(q, k, v, **case.keywords(x)).astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x.q, x.k, x.v)
    return traced.lower(lowering_platforms=("cuda",)).as_text(), kernels_in(traced.jaxpr)


@pytest.mark.parametrize(
    "options, kernel, mask_type",
    [
        ({}, "fmhaSoftmax", "NO_MASK"),
        ({"causal": True}, "fmhaSoftmax", "CAUSAL"),
        ({"kv_mask": "lengths"}, "fmhaScaleBiasSoftmax", "NO_MASK"),
        ({"causal": True, "bias": "h"}, "fmhaScaleBiasSoftmax", "CAUSAL"),
    ],
)
def test_cudnn_lowers_to_its_calls_forward_and_backward(monkeypatch, options, kernel, mask_type):
    case = Case("adapter_lowering", 64, 64, 4, 2, 32, batch=2, dtype="bfloat16", **options)
    assert cudnn.supports(case.spec, "gpu") is None
    text, kernels = lowered_for_cuda(monkeypatch, case)
    assert kernels == {"attention_cudnn"}
    assert "func private @attention_cudnn" in text
    calls = re.findall(r"__cudnn\$(\w+)", text)
    assert sorted(calls) == [kernel, f"{kernel}Backward"]
    configs = [
        json.loads(c.replace("\\22", '"'))
        for c in re.findall(r'backend_config = "(.*?)"[,}]', text)
        if "fmha" in c
    ]
    found = {
        (c["cudnn_fmha_backend_config"]["mask_type"], c["cudnn_fmha_backend_config"]["fmha_scale"])
        for c in configs
    }
    assert found == {(mask_type, case.scale)}


@pytest.mark.parametrize("kv_mask", ["none", "lengths"])
def test_the_lengths_that_supports_refuses_are_those_that_jax_refuses(monkeypatch, kv_mask):
    """So that a newer JAX which takes them is noticed."""
    even = Case("adapter_even", 62, 64, 2, 2, 32, dtype="bfloat16", kv_mask=kv_mask)
    assert cudnn.supports(even.spec, "gpu") is None
    lowered_for_cuda(monkeypatch, even)
    odd = dataclasses.replace(even, q_len=63)
    assert cudnn.supports(odd.spec, "gpu") is not None
    with pytest.raises(NotImplementedError, match="Unsupported sequence length"):
        lowered_for_cuda(monkeypatch, odd)


MAPPED = Case("adapter_mapped", 16, 16, 4, 2, 8, batch=2, kv_mask="random", bias="hs", causal=True)


def cohort(case: Case, mapped: str, function):
    """(gradient in q, k, v and bias, axes for vmap, arrays): 3 members; those named in `mapped` have an axis."""
    x = case.inputs()
    keywords = case.keywords(x)
    arrays = {"q": x.q, "k": x.k, "v": x.v, "kv_mask": x.kv_mask, "bias": x.bias}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    axes = {name: 0 if name in mapped.split() else None for name in arrays}

    def members(array):
        return jnp.stack([jnp.roll(array, i, axis=-1) for i in range(3)])

    many = {name: array if axes[name] is None else members(array) for name, array in arrays.items()}

    def gradient(arrays):
        def loss(learned):
            given = arrays | learned
            q, k, v = (given.pop(name) for name in "qkv")
            # The cotangent of a plain sum has no mapped axis.
            return jnp.sum(function(q, k, v, **{**keywords, **given}).astype(jnp.float32))

        return jax.grad(loss)({name: array for name, array in arrays.items() if name != "kv_mask"})

    return gradient, axes, many


MAPPINGS = ("q k v", "q", "k v kv_mask", "q kv_mask bias")


@pytest.mark.parametrize("mapped", MAPPINGS)
def test_a_cohort_through_cudnns_adapter_is_its_members(mapped):
    gradient, axes, many = cohort(MAPPED, mapped, CUDNN_FUNCTION)
    together = jax.vmap(gradient, in_axes=(axes,))(many)
    for i in range(3):
        alone = gradient({name: a if axes[name] is None else a[i] for name, a in many.items()})
        for name, expected in alone.items():
            np.testing.assert_allclose(together[name][i], expected, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("mapped", MAPPINGS)
@pytest.mark.parametrize("options", [{}, {"kv_mask": "none"}, {"bias": None}], ids=str)
def test_cudnn_lowers_under_vmap_with_mask_and_bias(monkeypatch, mapped, options):
    """Whatever has the mapped axis: one call forward and one backward, of all members together."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91100)
    case = dataclasses.replace(MAPPED, dtype="bfloat16", **options)
    gradient, axes, many = cohort(case, mapped, cudnn.attention_cudnn)
    traced = jax.jit(jax.vmap(gradient, in_axes=(axes,))).trace(many)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernel = "fmhaScaleBiasSoftmax"
    assert sorted(re.findall(r"__cudnn\$(\w+)", text)) == [kernel, f"{kernel}Backward"]
    assert kernels_in(traced.jaxpr) == {"attention_cudnn"}
    # Queries and bias of the call: 3 members of batch 2.
    (operands,) = re.findall(rf"@__cudnn\${kernel}\(.*?: \((.*?)\) ->", text)
    assert operands.count("tensor<6x16x4x8xbf16>") == 1
    assert operands.count("tensor<6x4x16x16xbf16>") == 1


def test_jaxs_own_batching_of_cudnn_takes_no_broadcast_bias(monkeypatch):
    """The control: why the adapter expands it; so that a JAX which takes one is noticed."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91100)
    q = jax.ShapeDtypeStruct((3, 2, 64, 4, 32), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((3, 2, 1, 64, 64), jnp.bfloat16)

    def plain(q, bias):
        return jax.nn.dot_product_attention(q, q, q, bias=bias, implementation="cudnn")

    with pytest.raises(TypeError, match="cannot reshape array"):
        jax.jit(jax.vmap(plain)).trace(q, bias)


def test_tokamax_that_is_not_installed_is_named():
    if HAS_TOKAMAX:
        assert load("attention", "tokamax").name == "tokamax"
        return
    with pytest.raises(
        ImportError, match=r"attention implementation 'tokamax' needs.*: pip install tokamax$"
    ):
        load("attention", "tokamax")


@pytest.fixture
def default_promotion():
    """Of dtypes and ranks, which tokamax's own code relies on."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


with_tokamax = pytest.mark.skipif(not HAS_TOKAMAX, reason="tokamax is not installed (pip install tokamax)")
TOKAMAX_CASES = tuple(
    case for case in FLOAT32 if square(case) and not (case.softcap and case.bias is not None)
)


@with_tokamax
@pytest.mark.usefixtures("default_promotion")
@pytest.mark.parametrize("case", TOKAMAX_CASES, ids=lambda case: case.name)
def test_tokamax_equals_the_oracle(case):
    assert differences(run(case, "tokamax"), oracle(case)) == {}


@with_tokamax
@pytest.mark.parametrize(
    "changes, platform, reason",
    [
        ({"dtype": "float64"}, "cpu", "q, k and v are float64, supported are float32, bfloat16, float16"),
        ({"causal": True, "q_len": 32}, "gpu", "causal with 32 queries and 64 keys, supported are equal"),
        ({"softcap": True}, "gpu", "softcap is given, supported is none on a gpu"),
        ({"softcap": True, "bias": (1, 1, 1, 1), "bias_dtype": "bfloat16"}, "cpu", "softcap with bias"),
    ],
)
def test_what_tokamax_refuses(changes, platform, reason):
    with pytest.raises(KernelUnsupported, match=reason) as caught:
        require(resolve("attention", "tokamax", platform), dataclasses.replace(HALF, **changes), platform)
    assert "\n" not in str(caught.value)


@with_tokamax
@pytest.mark.usefixtures("default_promotion")
def test_tokamax_shows_in_the_program():
    q = jnp.ones((1, 8, 2, 16))
    jaxpr = jax.make_jaxpr(jax.grad(lambda q: jnp.sum(attention(q, q, q, impl="tokamax", scale=0.25))))(q)
    assert kernels_in(jaxpr) == {"attention_tokamax"}


def test_every_paper_shape_is_judged():
    """Of the studies' problems in bfloat16, cuDNN takes all but the one with a bias in float32."""
    judged = {
        case.name: cudnn.supports(dataclasses.replace(case, dtype="bfloat16").spec, "gpu") for case in PAPER
    }
    refused = {name: reason for name, reason in judged.items() if reason is not None}
    assert refused == {"ctclip_spatial": "bias is float32, supported is the type of q, bfloat16"}
