"""The ablated slots against their definitions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxablate.nn.attention import Attention
from jaxablate.nn.block import Block, Stack
from jaxablate.nn.ffn import Ffn, ffn_flops, ffn_params, gated_width, matching_width
from jaxablate.nn.linear import linear
from jaxablate.nn.norm import Norm
from jaxablate.nn.position import OffsetBias, Peg, PositionEmbedding, rotary_tables, sinusoidal
from jaxablate_kernels import gated
from jaxablate_kernels.attention.prologue import rotate

KEY = jax.random.key(0)


def parameters(variables) -> int:
    return sum(x.size for x in jax.tree.leaves(variables["params"]))


# ------------------------------------------------------------------------------------------- norm


def norm(x: np.ndarray, **options) -> np.ndarray:
    module = Norm(**options)
    inputs = jnp.asarray(x, jnp.float32)
    return np.asarray(module.apply(module.init(KEY, inputs), inputs))


V = np.array([1.0, 2.0, 4.0, -3.0])


def test_norms_give_the_specified_values() -> None:
    layer = [0, 0.392232, 1.176696, -1.568928]
    np.testing.assert_allclose(norm(V, kind="layernorm"), layer, atol=2e-6)
    np.testing.assert_allclose(norm(V, kind="layernorm_nobias"), layer, atol=2e-6)
    rms = [0.365148, 0.730297, 1.460593, -1.095445]
    np.testing.assert_allclose(norm(V, kind="rmsnorm", eps=1e-8, eps_at="outside"), rms, atol=1e-6)
    np.testing.assert_array_equal(norm(V, kind="none"), V)
    assert np.abs(np.array(layer) - rms).max() > 0.1  # or the factor would change nothing


def test_where_eps_stands_matters_for_tiny_inputs() -> None:
    outside = norm(1e-6 * V, kind="rmsnorm", eps=1e-8, eps_at="outside")
    inside = norm(1e-6 * V, kind="rmsnorm", eps=1e-5, eps_at="inside")
    np.testing.assert_allclose(outside[0], 0.363820, rtol=1e-5)
    np.testing.assert_allclose(inside[0], 0.000316228, rtol=1e-5)


@pytest.mark.parametrize("eps_at", ["inside", "outside"])
def test_gradient_at_zero_is_finite(eps_at: str) -> None:
    module = Norm("rmsnorm", eps=1e-8, eps_at=eps_at)
    variables = module.init(KEY, jnp.ones(4))
    grad = jax.grad(lambda x: module.apply(variables, x).sum())(jnp.zeros(4))
    assert np.isfinite(grad).all()


def test_only_layernorm_has_a_bias() -> None:
    names = {
        k: set(Norm(k).init(KEY, jnp.ones(4)).get("params", {})) for k in ("layernorm", "rmsnorm", "none")
    }
    assert names == {"layernorm": {"scale", "bias"}, "rmsnorm": {"scale"}, "none": set()}


def test_norm_computes_in_float32_whatever_comes_in() -> None:
    x = (1000 + V).astype(np.float32)
    module = Norm("layernorm")
    low = module.apply(module.init(KEY, jnp.asarray(x)), jnp.asarray(x, jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    exact = norm(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32), kind="layernorm")
    np.testing.assert_allclose(np.asarray(low, np.float32), exact, rtol=1e-2, atol=1e-2)


# -------------------------------------------------------------------------------------------- ffn


def test_gated_products_give_the_specified_values() -> None:
    halves = jnp.array([[1.0, -2.0], [0.5, 3.0]])
    reference = functools.partial(gated, impl="reference")
    np.testing.assert_allclose(reference(halves, kind="geglu"), [0.345731, -5.991901], rtol=2e-6)
    np.testing.assert_allclose(reference(halves, kind="swiglu"), [0.365529, -0.715218], rtol=2e-6)
    wrong_half = reference(halves[::-1], kind="swiglu")
    np.testing.assert_allclose(wrong_half, [0.311230, -5.715445], rtol=2e-6)


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("kind", ["gelu", "silu", "geglu", "swiglu"])
def test_parameter_count_is_what_the_width_rules_assume(kind, bias) -> None:
    variables = Ffn(kind, 24, bias=bias).init(KEY, jnp.ones((2, 10)))
    assert parameters(variables) == ffn_params(kind, 10, 24, bias)


def test_widths_that_keep_parameters_or_flops_equal() -> None:
    assert gated_width(512, 4.0) == 1365
    for rule, cost in (("params", ffn_params), ("flops", ffn_flops)):
        width = matching_width("swiglu", "gelu", 2048, 512, rule)
        assert cost("swiglu", 512, width) <= cost("gelu", 512, 2048) < cost("swiglu", 512, width + 1)
    # Without the rule a gated layer of the same width is half as large again.
    assert ffn_params("swiglu", 512, 2048) / ffn_params("gelu", 512, 2048) == 1.5


def test_gated_kinds_share_their_parameters() -> None:
    geglu, swiglu = (Ffn(kind, 16).init(KEY, jnp.ones((2, 8))) for kind in ("geglu", "swiglu"))
    for a, b in zip(jax.tree.leaves(geglu), jax.tree.leaves(swiglu), strict=True):
        np.testing.assert_array_equal(a, b)
    x = jax.random.normal(KEY, (2, 8))
    assert not np.allclose(Ffn("geglu", 16).apply(geglu, x), Ffn("swiglu", 16).apply(geglu, x))


# --------------------------------------------------------------------------------------- position


def test_rope_scores_depend_on_the_distance_alone() -> None:
    q, k = jax.random.normal(KEY, (2, 1, 1, 1, 8))
    turned = lambda x, i: rotate(x, rotary_tables(jnp.array([i]), 8), "adjacent")
    score = lambda i, j: (turned(q, i) * turned(k, j)).sum()
    np.testing.assert_allclose(score(7, 4), score(103, 100), rtol=1e-4)
    assert abs(score(7, 4) - score(7, 5)) > 1e-3


def test_rope_turns_the_first_pair_by_one_radian_per_position() -> None:
    x = jnp.array([1.0, 0.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    turned = rotate(x, rotary_tables(jnp.array([1]), 4), "adjacent")
    np.testing.assert_allclose(turned[0, 0, 0], [np.cos(1), np.sin(1), 0, 0], rtol=1e-6)


def test_sinusoidal_table_is_that_of_the_paper() -> None:
    table = sinusoidal(50, 6)
    np.testing.assert_allclose(table[7, 2], np.sin(7 / 10000 ** (2 / 6)), rtol=1e-6)
    np.testing.assert_allclose(table[7, 3], np.cos(7 / 10000 ** (2 / 6)), rtol=1e-6)


@pytest.mark.parametrize(
    "kind,adds", [("learned", True), ("sinusoidal", True), ("rope", False), ("none", False)]
)
def test_which_positions_are_added_to_tokens(kind, adds) -> None:
    module, x = PositionEmbedding(kind, 12), jnp.zeros((2, 10, 6))
    variables = module.init(KEY, x)
    assert bool(jnp.any(module.apply(variables, x) != 0)) == adds
    assert parameters({"params": variables.get("params", {})}) == (72 if kind == "learned" else 0)


def test_peg_is_the_depthwise_convolution_and_causal_in_time() -> None:
    x = jax.random.normal(KEY, (2, 4, 3, 5, 6))
    module = Peg()
    variables = module.init(KEY, x)
    params = jax.tree.map(lambda b: b, variables["params"])
    kernel, bias = (getattr(params[n], "value", params[n]) for n in ("kernel", "bias"))
    expected = lax.conv_general_dilated(
        x,
        kernel[:, :, :, None, :],
        window_strides=(1, 1, 1),
        padding=((2, 0), (1, 1), (1, 1)),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        feature_group_count=6,
    )
    np.testing.assert_allclose(module.apply(variables, x), np.asarray(expected) + np.asarray(bias), atol=1e-5)
    later = x.at[:, 2].add(1.0)
    change = np.abs(np.asarray(module.apply(variables, later) - module.apply(variables, x))).max((0, 2, 3, 4))
    assert (change[:2] == 0).all()
    assert (change[2:] > 0).all()


def test_offset_bias_depends_on_the_offset_alone_and_has_the_specified_size() -> None:
    module = OffsetBias(heads=8, hidden=512)
    variables = module.init(KEY, 3, 4)
    assert parameters(variables) == 268_296
    bias = np.asarray(module.apply(variables, 3, 4))[0].reshape(8, 3, 4, 3, 4)
    np.testing.assert_allclose(bias[:, 0, 0, 1, 2], bias[:, 1, 1, 2, 3], rtol=1e-6)
    assert np.abs(bias[:, 0, 0, 1, 2] - bias[:, 1, 2, 0, 0]).max() > 1e-3  # the sign counts
    assert np.abs(bias[:, 0, 0, 1, 0] - bias[:, 0, 0, 0, 1]).max() > 1e-3  # so does the axis


# -------------------------------------------------------------------------------------- attention

GOLDEN_X = jnp.array([[[1, 0, 2, -1], [0.5, 1.5, -1, 0], [-2, 1, 0, 1.0]]])


def identity_attention(x: jax.Array, context: jax.Array, impl: str, **options) -> np.ndarray:
    """One head with identity projections; row 0."""
    module = Attention(heads=1, head_dim=4, impl=impl, **options)
    variables = module.init(KEY, x, context)

    def identity(path, leaf):
        return (
            jnp.ones_like(leaf) if "scale" in str(path) and leaf.ndim == 1 else jnp.eye(4).reshape(leaf.shape)
        )

    params = jax.tree_util.tree_map_with_path(identity, variables["params"])
    return np.asarray(module.apply({"params": params}, x, context))[0, 0]


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
def test_attention_variants_give_the_specified_values(impl: str) -> None:
    x = GOLDEN_X
    layer = Norm("layernorm_nobias")
    normed = layer.apply(layer.init(KEY, x), x)
    cosine = identity_attention(normed, x, impl, qk_norm="l2", scale=8.0)
    np.testing.assert_allclose(cosine, [0.999967, 0.0000305, 1.999939, -0.999968], atol=2e-6)
    faithful_flash = identity_attention(normed, x, impl)
    np.testing.assert_allclose(faithful_flash, [0.901395, 0.087236, 1.825528, -0.907080], atol=2e-6)
    textbook = identity_attention(normed, normed, impl)
    np.testing.assert_allclose(textbook, [0.353491, -0.311003, 1.161239, -1.203728], atol=2e-6)


@pytest.mark.parametrize(
    "options", [{}, {"causal": "causal"}, {"qk_norm": "l2", "scale": 8.0}, {"position": "rope"}]
)
def test_kernel_choice_does_not_change_the_function(options) -> None:
    x = jax.random.normal(KEY, (2, 9, 16))
    reference = Attention(4, 4, "reference", kv_heads=2, **options)
    variables = reference.init(KEY, x)
    other = Attention(4, 4, "blockwise", kv_heads=2, **options)
    np.testing.assert_allclose(other.apply(variables, x), reference.apply(variables, x), atol=1e-5)


def test_each_attention_option_changes_the_function() -> None:
    x = jax.random.normal(KEY, (2, 9, 16))
    plain = Attention(4, 4, "reference")
    variables = plain.init(KEY, x)
    for options in ({"causal": "causal"}, {"scale": 8.0}, {"position": "rope"}):
        other = Attention(4, 4, "reference", **options).apply(variables, x)
        assert np.abs(np.asarray(other - plain.apply(variables, x))).max() > 1e-3, options


def test_masked_keys_do_not_matter() -> None:
    x = jax.random.normal(KEY, (1, 6, 16))
    module = Attention(4, 4, "reference")
    variables = module.init(KEY, x)
    mask = jnp.arange(6)[None] < 4
    context = x.at[:, 4:].set(99.0)
    a, b = (module.apply(variables, x, c, mask=mask) for c in (x, context))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(module.apply(variables, x, context), a)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="kv_heads=3"):
        Attention(4, 4, "reference", kv_heads=3).init(KEY, jnp.ones((1, 2, 8)))


# ------------------------------------------------------------------------------------------ block


def make_block(placement: str = "pre", kv_input: str = "normed", name: str | None = None) -> Block:
    return Block(
        attention=functools.partial(Attention, heads=2, head_dim=4, impl="reference"),
        ffn=functools.partial(Ffn, kind="swiglu", width=16),
        norm=functools.partial(Norm, kind="layernorm"),
        placement=placement,
        kv_input=kv_input,
        name=name,
    )


def test_post_norm_leaves_normalised_outputs_and_pre_norm_does_not() -> None:
    x = 5 * jax.random.normal(KEY, (2, 3, 8))
    for placement, unit in (("post", True), ("pre", False)):
        block = make_block(placement)
        y = np.asarray(block.apply(block.init(KEY, x), x))
        assert np.allclose(y.std(-1), 1.0, atol=1e-3) == unit


def test_raw_and_normed_keys_and_values_differ() -> None:
    x = 5 * jax.random.normal(KEY, (2, 3, 8))
    block = make_block()
    variables = block.init(KEY, x)
    assert not np.allclose(
        block.apply(variables, x), make_block(kv_input="raw").apply(variables, x), atol=1e-3
    )


def test_remat_changes_neither_values_nor_gradients() -> None:
    x = jax.random.normal(KEY, (2, 3, 8))
    plain, saving = Stack(make_block, 2), Stack(make_block, 2, remat="block")
    variables = plain.init(KEY, x)
    run = lambda module: jax.value_and_grad(lambda v: module.apply(v, x).sum())(variables)
    for a, b in zip(jax.tree.leaves(run(plain)), jax.tree.leaves(run(saving)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    text = str(jax.make_jaxpr(lambda v: jax.grad(lambda v: saving.apply(v, x).sum())(v))(variables))
    assert "remat" in text or "checkpoint" in text


def test_scanned_stack_computes_what_the_unrolled_one_does() -> None:
    x = jax.random.normal(KEY, (2, 3, 8))
    unrolled, scanned = Stack(make_block, 3), Stack(make_block, 3, loop="scan")
    from flax.linen import unbox

    layers = unbox(unrolled.init(KEY, x))["params"]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layers[f"layer_{i}"] for i in range(3)))
    expected = unrolled.apply({"params": layers}, x)
    np.testing.assert_allclose(
        scanned.apply({"params": {"layers": stacked}}, x), expected, rtol=1e-5, atol=1e-5
    )
    boxed = jax.eval_shape(scanned.init, KEY, x)
    kernel = boxed["params"]["layers"]["attention"]["q"]["kernel"]
    assert kernel.names[0] == "layers"
    assert kernel.value.shape[0] == 3


def test_projections_start_like_torchs() -> None:
    module = linear(256, ("embed", "mlp"), name="x", dtype=jnp.float32, bias_fan_in=64)
    from flax.linen import unbox

    params = unbox(module.init(KEY, jnp.ones((1, 64))))["params"]
    for leaf in (params["kernel"], params["bias"]):
        assert np.abs(leaf).max() <= 1 / 8
        np.testing.assert_allclose(np.std(leaf), 1 / 8 / 3**0.5, rtol=0.15)
