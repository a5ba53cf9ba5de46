"""Low-rank adapters and stored kernels, put beside projections of models that know nothing of them."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamNotFoundError
from flax.traverse_util import flatten_dict

from jaxablate import sharding
from jaxablate.config import MeshConfig
from jaxablate.errors import UserError
from jaxablate.nn import lora, quantized
from jaxablate.nn.attention import Attention
from jaxablate.nn.block import Stack
from jaxablate.nn.layout import laid_out_on
from jaxablate.nn.linear import linear
from jaxablate.nn.lora import Lora
from jaxablate.nn.norm import Norm
from jaxablate.nn.projections import Quantization, projections
from tests.lines import one_line

KEY = jax.random.key(0)
SPEC = Lora(("*/attention/*",))
NF4 = Quantization("nf4", ("*",))


class Layer(nn.Module):
    dim: int
    heads: int
    kv_heads: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        attention = Attention(
            heads=self.heads,
            head_dim=128 if self.dim > 128 else self.dim // self.heads,
            kv_heads=self.kv_heads,
            bias="all",
            impl="reference",
            name="attention",
        )
        return x + attention(Norm("rmsnorm", name="norm")(x))


def decoder(dim: int, heads: int, depth: int, loop: Any = "unrolled", **options: Any) -> Stack:
    return Stack(functools.partial(Layer, dim, heads, **options), depth, loop=loop)


X = jax.random.normal(jax.random.key(1), (4, 3, 16))


@functools.cache
def adapted(loop: str = "unrolled", base: Quantization | None = None) -> tuple[Stack, dict[str, Any]]:
    """A small model, and its variables with adapters whose B is not zero any more."""
    model = decoder(16, 2, 2, loop)
    variables = init(model, adapters=SPEC, base=base)
    return model, variables | {"params": trained(variables["params"])}


def init(model: Stack, **options: Any) -> dict[str, Any]:
    def start() -> Any:
        with projections(**options):
            return nn.unbox(model.init(KEY, X))

    return jax.jit(start)()


def trained(params: Any) -> Any:
    def moved(path: Any, x: jax.Array) -> jax.Array:
        is_b = any(getattr(k, "key", "") == lora.B for k in path)
        return 0.1 * jax.random.normal(KEY, x.shape) if is_b else x

    return jax.tree_util.tree_map_with_path(moved, params)


def apply(model: nn.Module, variables: Any, x: jax.Array = X, **options: Any) -> jax.Array:
    def run(variables: Any, x: jax.Array) -> Any:
        with projections(**{"adapters": SPEC, **options}):
            return model.apply(variables, x, rngs={"dropout": KEY})

    return jax.jit(run)(variables, x)


def plain_apply(model: Stack, params: Any) -> jax.Array:
    return jax.jit(model.apply)({"params": params}, X)


def size(tree: Any) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def equal(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


# --------------------------------------------------------------------------------------- the function


class Out(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linear((3, 4), (None,) * 4, name="out", dtype=self.dtype, bias_fan_in=10, contract=2)(x)


def test_an_adapter_adds_its_low_rank_product() -> None:
    x, spec = jax.random.normal(KEY, (7, 2, 5)), Lora(("out",), rank=3, alpha=12.0)
    with projections(adapters=spec):
        params = trained(nn.unbox(Out().init(KEY, x)["params"]))
        y = Out().apply({"params": params}, x)
    a, b = params["out"][lora.A]["kernel"], params["out"][lora.B]["kernel"]
    assert a.shape == (2, 5, 3)
    assert b.shape == (3, 3, 4)
    w = np.asarray(params["out"]["kernel"], np.float64).reshape(10, 12)
    inputs = np.asarray(x, np.float64).reshape(7, 10)
    low = inputs @ np.asarray(a, np.float64).reshape(10, 3) @ np.asarray(b, np.float64).reshape(3, 12)
    expected = (inputs @ w + 12 / 3 * low).reshape(7, 3, 4) + np.asarray(params["out"]["bias"])
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert np.abs(4 * low).max() > 0.1


def test_it_computes_in_the_dtype_of_the_projection_from_float32_parameters() -> None:
    x = jax.random.normal(KEY, (7, 2, 5)).astype(jnp.bfloat16)
    with projections(adapters=Lora(("out",)), base=Quantization("int8", ("out",))):
        variables = nn.unbox(Out(jnp.bfloat16).init(KEY, x))
        assert Out(jnp.bfloat16).apply(variables, x).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("loop", ["unrolled", "scan"])
def test_a_fresh_adapter_changes_neither_the_function_nor_the_base(loop: str) -> None:
    model = decoder(16, 2, 2, loop)
    plain, variables = init(model), init(model, adapters=SPEC)
    base, adapter = lora.split(variables["params"])
    equal(base, plain["params"])
    expected = plain_apply(model, plain["params"])
    np.testing.assert_allclose(apply(model, variables), expected, atol=1e-6)
    changed = {"params": trained(variables["params"])}
    assert not np.allclose(apply(model, changed), expected, atol=1e-3)
    leaves = {path[-2:]: leaf for path, leaf in flatten_dict(adapter).items()}
    assert set(leaves) == {(lora.A, "kernel"), (lora.B, "kernel")}
    assert not leaves[lora.B, "kernel"].any()
    a = np.asarray(leaves[lora.A, "kernel"])
    assert 0.2 < np.abs(a).max() <= 16**-0.5  # Kaiming's uniform with a = sqrt(5): 1 / sqrt(16) is the bound


def test_sizes_of_the_adapters() -> None:
    """Sum of rank x (inputs + outputs) over q, k, v and out; the large model is never made."""

    def adapters(model: Stack, dim: int) -> int:
        with projections(adapters=SPEC):
            variables = jax.eval_shape(model.init, KEY, jax.ShapeDtypeStruct((1, 2, dim), jnp.float32))
        return size(lora.split(variables["params"])[1])

    assert adapters(decoder(64, 4, 2), 64) == 4_096
    assert adapters(decoder(4096, 32, 36, "scan", kv_heads=8), 4096) == 3_833_856
    assert adapters(decoder(4096, 32, 1, "scan", kv_heads=8), 4096) == 106_496


# -------------------------------------------------------------------------------------------- dropout


def keys(*seeds: int) -> jax.Array:
    return jax.vmap(jax.random.key)(jnp.asarray(seeds))


class Halves(nn.Module):
    """A layer that is its projection."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linear(256, (None, None), name="p", dtype=jnp.float32)(x)


def test_dropout_is_the_examples_own_however_the_batch_is_split() -> None:
    spec, x = Lora(("p",), dropout=0.5), jnp.ones((4, 256))
    with projections(adapters=spec):
        variables = {"params": trained(nn.unbox(Halves().init(KEY, x)["params"]))}
    run = functools.partial(apply, Halves(), variables, adapters=spec)
    whole = run(x, keys=keys(1, 2, 3, 4))
    halves = [run(x[:2], keys=keys(1, 2)), run(x[2:], keys=keys(3, 4))]
    np.testing.assert_allclose(whole, np.concatenate(halves), atol=1e-6)
    assert not np.allclose(whole, run(x, keys=keys(1, 2, 3, 5)), atol=1e-3)
    assert not np.allclose(whole[0], whole[1], atol=1e-3)
    without = run(x)  # in evaluation there is none
    np.testing.assert_allclose(without, jnp.broadcast_to(without[0], without.shape))
    with pytest.raises(ValueError, match="4 rows"):
        run(x, keys=keys(1, 2))


def test_layers_of_a_scan_drop_other_elements() -> None:
    """They have one path between them. Adapters that give just their input show what was dropped."""
    model, x = Stack(Halves, 2, loop="scan"), jnp.ones((1, 256))
    spec = Lora(("*/p",), rank=256, alpha=256.0, dropout=0.5)
    eye = jnp.broadcast_to(jnp.eye(256), (2, 256, 256))
    params = {"p": {"kernel": jnp.zeros_like(eye), lora.A: {"kernel": eye}, lora.B: {"kernel": eye}}}
    got = np.asarray(apply(model, {"params": {"layers": params}}, x, adapters=spec, keys=keys(7)))
    assert set(np.unique(got)) == {0.0, 4.0}
    assert 0.15 < (got != 0).mean() < 0.35  # a half of a half; of the same half twice it would be 1 / 2


# --------------------------------------------------------------------------------- merging and trees


@pytest.mark.parametrize("loop", ["unrolled", "scan"])
def test_merged_kernels_compute_the_same_and_come_back(loop: str) -> None:
    model, variables = adapted(loop)
    params = variables["params"]
    merged = lora.merge(params, SPEC)
    assert size(merged) == size(lora.split(params)[0])
    np.testing.assert_allclose(plain_apply(model, merged), apply(model, variables), atol=1e-5)
    base, adapter = lora.split(params)
    assert not np.allclose(plain_apply(model, base), apply(model, variables), atol=1e-3)
    back = lora.unmerge(merged, adapter, SPEC)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(merged))
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(
            one, other, rtol=0, atol=2 * largest * 2.0**-24
        )  # two roundings to nearest
    equal(lora.join(*lora.split(params)), params)


def test_a_stored_kernel_is_not_merged_with() -> None:
    _, variables = adapted("scan", NF4)
    with pytest.raises(UserError, match="has no kernel to merge with; a quantised one") as error:
        lora.merge(variables["params"], SPEC)
    one_line(error)


# ---------------------------------------------------------------------------------- kernels in storage


@pytest.mark.parametrize("loop", ["unrolled", "scan"])
def test_stored_kernels_are_the_models_own_rounded_and_outside_params(loop: str) -> None:
    model, variables = adapted(loop, NF4)
    plain = init(model)
    rest, stored = quantized.quantize_params(plain["params"], variables[quantized.COLLECTION])
    base, _ = lora.split(variables["params"])
    equal(base, rest)  # norms and biases: all else is in storage
    assert {path[-1] for path in flatten_dict(base)} == {"scale", "bias"}
    equal(stored, variables[quantized.COLLECTION])

    def unpacked(path: Any, kernel: jax.Array) -> jax.Array:
        found = stored
        for key in path:
            found = found.get(key.key, {}) if isinstance(found, dict) else found
        if isinstance(found, dict):
            return kernel
        back = functools.partial(quantized.dequantize, dtype=jnp.float32)
        back = jax.vmap(back) if loop == "scan" else back
        return back(found).swapaxes(-1, -2).reshape(kernel.shape)

    rounded = jax.tree_util.tree_map_with_path(unpacked, plain["params"])
    expected = plain_apply(model, rounded)
    untrained = {"params": plain["params"], quantized.COLLECTION: stored}
    got = apply(model, untrained, base=NF4, adapters=None)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert not np.allclose(got, plain_apply(model, plain["params"]), atol=1e-3)


def test_without_the_context_a_stored_kernel_is_missed_and_not_made_up() -> None:
    model, variables = adapted("scan", NF4)
    with pytest.raises(ScopeParamNotFoundError, match="kernel"):
        model.apply(variables, X)


# ---------------------------------------------------------------------------------------- bad targets


@pytest.mark.parametrize(
    "options",
    [{"adapters": Lora(("*/attention/q", "*/atention/k"))}, {"base": Quantization("nf4", ("*/atention/k",))}],
)
def test_a_pattern_that_matches_nothing_is_named(options: dict[str, Any]) -> None:
    model = decoder(16, 2, 1)
    with pytest.raises(UserError, match=r"'\*/atention/k', which matches no projection") as error:  # noqa: SIM117
        with projections(**options):
            jax.eval_shape(model.init, KEY, X)
    assert "layer_0/attention/k" in one_line(error)


def test_one_inside_the_other_is_refused() -> None:
    with projections(adapters=SPEC), pytest.raises(RuntimeError, match="name adapters and base in one"):  # noqa: SIM117
        with projections(base=NF4):
            pass
    with projections(base=NF4):  # which leaves the way free again
        pass


@pytest.mark.parametrize(
    "values,says",
    [
        ({"rank": 0}, "rank=0; must be at least 1"),
        ({"alpha": 0.0}, "alpha=0.0; must be positive"),
        ({"alpha": float("nan")}, "alpha=nan; must be positive"),
        ({"dropout": 1.0}, "dropout=1.0; must be at least 0 and below 1"),
        ({"targets": ()}, "targets is empty"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        Lora(**{"targets": ("*",), **values})
    one_line(error)
    with pytest.raises(UserError, match="quantization: targets is empty"):
        Quantization("nf4", ())


# -------------------------------------------------------------------------------------- on eight devices


@pytest.mark.alone
def test_adapters_and_stored_kernels_lie_where_their_kernels_would() -> None:
    """Axis names survive the scan; on a mesh the function is the same."""
    mesh = sharding.make_mesh(MeshConfig(member=1, data=2, fsdp=2, tensor=2), 1, 4)
    model, variables = adapted("scan", NF4)
    with projections(adapters=SPEC, base=NF4):
        boxed = jax.eval_shape(model.init, KEY, X)
    q = boxed[quantized.COLLECTION]["layers"]["attention"]["q"]["kernel"]
    a = boxed["params"]["layers"]["attention"]["q"][lora.A]["kernel"]
    assert a.names == ("layers", "embed", None)
    assert q.codes.names == ("layers", "heads", None)

    def placed(leaf: Any) -> jax.sharding.NamedSharding:
        names = leaf.names if isinstance(leaf, nn.Partitioned) else (None,) * leaf.ndim
        shape = (1, *nn.unbox(leaf).shape)
        full = sharding.state_sharding(mesh, names, shape)
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*full.spec[1:]))

    places = jax.tree.map(placed, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    spread = jax.device_put(variables, places)
    codes = spread[quantized.COLLECTION]["layers"]["attention"]["q"]["kernel"].codes
    assert codes.addressable_shards[0].data.shape[1] == codes.shape[1] // 2

    rows = jax.device_put(X, sharding.batch_sharding(mesh, len(X), per_member=False))
    with laid_out_on(mesh):
        together = apply(model, spread, rows, base=NF4)
    np.testing.assert_allclose(together, apply(model, variables, base=NF4), atol=1e-5)
