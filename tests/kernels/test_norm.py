"""RMSNorm and LayerNorm: every implementation gives the right numbers, keeps little, and runs where it says."""

import dataclasses
import functools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from rowwise_oracle import NORMS, differences, norm_oracle, run_norm, worse_than

from jaxablate.xla import quick
from jaxablate_kernels import KernelUnsupported, kernels_in, require, resolve
from jaxablate_kernels.dispatch import equations
from jaxablate_kernels.norm import NormSpec, add_layer_norm, add_rms_norm, layer_norm, pallas_gpu, rms_norm
from jaxablate_kernels.norm.cases import CASES, LARGE, PAPER, Case
from jaxablate_kernels.norm.pallas_config import Config

pytestmark = pytest.mark.filterwarnings("error")

BY_NAME = {case.name: case for case in (*CASES, *LARGE)}
EXACT = tuple(c for c in CASES if c.dtype == c.weight_dtype == "float32")
LOW = tuple(c for c in CASES if c not in EXACT)
OTHERS = tuple(name for name in NORMS if name != "reference")

results = functools.cache(lambda case, impl: run_norm(case, NORMS[impl]))
truth = functools.cache(norm_oracle)

each_implementation = pytest.mark.parametrize("impl", NORMS)


def test_case_names_are_unique_and_cover_the_papers():
    assert len(BY_NAME) == len(CASES) + len(LARGE)
    assert {(c.kind, c.dim) for c in PAPER} >= {("layer", 512), ("rms", 512), ("layer", 768)}
    assert {len(c.lead) for c in CASES} == {0, 1, 2, 3}


@each_implementation
@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_equals_oracle(case, impl):
    assert differences(results(case, impl), truth(case)) == {}


@pytest.mark.parametrize("impl", OTHERS)
@pytest.mark.parametrize("case", LOW, ids=lambda case: case.name)
def test_low_precision_is_as_accurate_as_the_reference(case, impl):
    """And what comes out in float32 is as accurate as ever: it was summed in float32."""
    mine, reference, expected = results(case, impl), results(case, "reference"), truth(case)
    assert {name: value.dtype for name, value in mine.items()} == {n: v.dtype for n, v in reference.items()}
    assert worse_than(mine, reference, expected) == {}
    single = {name: value for name, value in mine.items() if value.dtype == np.float32}
    only = dataclasses.replace(expected, values={name: expected.values[name] for name in single})
    assert differences(single, only) == {}


def test_low_precision_check_notices_statistics_in_low_precision():
    case = BY_NAME["brain_half"]

    def careless(x, residual, scale, bias, *, kind, eps, eps_at):
        total = x + residual
        inverse = jax.lax.rsqrt(jnp.mean(total * total, axis=-1, keepdims=True) + eps)
        return total * inverse * scale.astype(x.dtype)[None], total

    assert "dx" in worse_than(run_norm(case, careless), results(case, "reference"), truth(case))


def reference(*arrays, **options):
    return NORMS["reference"](*arrays, **options)


def eps_in_the_wrong_place(*arrays, eps_at, **options):
    return reference(*arrays, eps_at={"inside": "outside", "outside": "inside"}[eps_at], **options)


def without_the_residuals_gradient(x, residual, scale, bias, **options):
    y, _ = reference(x, residual, scale, bias, **options)
    return y, jax.lax.stop_gradient(x + residual)


def without_mean_subtraction(*arrays, kind, **options):
    return reference(*arrays, kind="rms", **options)


def mean_without_gradient(x, residual, scale, bias, **options):
    mean = jnp.mean(x + residual, axis=-1, keepdims=True)
    y, _ = reference(x - jax.lax.stop_gradient(mean), residual, scale, bias, **(options | {"kind": "rms"}))
    return y, x + residual


def without_bias(x, residual, scale, bias, **options):
    y, total = reference(x, residual, scale, None, **options)
    return y + 0.0 * jnp.sum(bias), total


def scale_from_one_feature_further(x, residual, scale, bias, **options):
    return reference(x, residual, jnp.roll(scale, 1), bias, **options)


@pytest.mark.parametrize(
    "wrong, name, noticed_in",
    [
        (eps_in_the_wrong_place, "tiny_inside", {"y", "dx", "dresidual", "dscale"}),
        (eps_in_the_wrong_place, "tiny_outside", {"y", "dx", "dscale"}),
        (without_the_residuals_gradient, "tinystories", {"dx", "dresidual"}),
        (without_mean_subtraction, "burgers", {"y", "dx", "dresidual", "dscale"}),
        (mean_without_gradient, "burgers", {"dx", "dresidual"}),
        (without_bias, "one_row", {"y", "dbias"}),
        (scale_from_one_feature_further, "ctclip_rms", {"y", "dx", "dscale"}),
    ],
)
def test_comparison_notices(wrong, name, noticed_in):
    """The negative controls of the comparison that the tests above rely on."""
    case = BY_NAME[name]
    assert set(differences(run_norm(case, wrong), truth(case))) == noticed_in


def test_comparison_notices_a_relative_error_of_a_ten_thousandth():
    right = results(BY_NAME["bert"], "reference")
    found = differences(right | {"dx": right["dx"] * 1.0001}, truth(BY_NAME["bert"]))
    assert set(found) == {"dx"}


# Fields, not cases: the types of a case are checked when it is made, with random numbers, which hypothesis
# does not want while it draws its own.
any_fields = st.fixed_dictionaries(
    {
        "name": st.integers(0, 10**6).map("drawn_{}".format),
        "lead": st.sampled_from(((), (1,), (3,), (17,), (40,), (2, 3), (2, 1, 5))),
        "dim": st.integers(2, 70),
        "add": st.sampled_from(("residual", "nothing")),
        "dtype": st.sampled_from(("float32", "float32", "bfloat16", "float16")),
        "eps": st.sampled_from((1e-6, 1e-3)),
        "eps_at": st.sampled_from(("inside", "outside")),
    }
)
any_kind = st.sampled_from(({"kind": "rms"}, {"kind": "layer"}, {"kind": "layer", "bias": "per_feature"}))


@st.composite
def any_config(draw):
    rows, backward_rows = (draw(st.sampled_from((1, 2, 8, 32))) for _ in range(2))
    return Config(rows, 1, backward_rows, 1, draw(st.integers(1, 9)), draw(st.sampled_from((1, 2))))


def check_drawn(case, config):
    expected = norm_oracle(case)
    reference = run_norm(case, NORMS["reference"])
    for norm in (NORMS["recompute"], functools.partial(NORMS["pallas"], config=config)):
        mine = run_norm(case, norm)
        assert worse_than(mine, reference, expected, factor=2.0) == {}  # a few numbers: chance has a say
        single = {name: value for name, value in mine.items() if value.dtype == np.float32}
        only = dataclasses.replace(expected, values={name: expected.values[name] for name in single})
        assert differences(single, only) == {}


drawn = functools.partial(
    settings,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@drawn(max_examples=int(os.environ.get("JAXABLATE_CASES", "10")))
@given(fields=any_fields, kind=any_kind, config=any_config())
def test_equals_oracle_for_any_shape_and_config(fields, kind, config):
    check_drawn(Case(**fields, **kind), config)


GRADIENTS = Case(
    "gradients", (2, 3), 5, "layer", "residual", "per_feature", dtype="float64", weight_dtype="float64"
)


@pytest.mark.parametrize("impl", ["reference", "recompute"])
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("eps_at", ["inside", "outside"])
def test_gradients_are_those_of_the_function(impl, kind, eps_at):
    """Against finite differences, in float64."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # check_grads promotes
        case = dataclasses.replace(GRADIENTS, kind=kind, bias="none" if kind == "rms" else "per_feature")
        i = case.inputs()

        def f(factor, x, residual, scale, bias):
            x, residual, scale = map(jnp.asarray, (x, residual, scale))  # check_grads passes numpy arrays
            bias = None if bias is None else jnp.asarray(bias)
            y, total = NORMS[impl](x, residual, scale, bias, kind=kind, eps=0.1, eps_at=eps_at)
            stopped = jax.lax.stop_gradient(y)
            return stopped + factor * (y - stopped), total

        arguments = (i.x, i.residual, i.scale, i.bias)
        check_grads(functools.partial(f, 1.0), arguments, order=1, modes=["rev"], atol=1e-7, rtol=1e-7)
        with pytest.raises(AssertionError):  # the control: a gradient that is wrong by a thousandth
            check_grads(functools.partial(f, 1.001), arguments, order=1, modes=["rev"], atol=1e-7, rtol=1e-7)


def kept_bytes(case, impl) -> int:
    """Bytes of what the forward pass leaves for the backward pass."""
    i = case.inputs()

    def f(x, residual, scale, bias):
        return NORMS[impl](x, residual, scale, bias, kind=case.kind, eps=case.eps, eps_at=case.eps_at)

    _, pullback = jax.eval_shape(lambda *a: jax.vjp(f, *a), i.x, i.residual, i.scale, i.bias)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))


@pytest.mark.parametrize("impl", OTHERS)
@pytest.mark.parametrize("name", ["ctclip_batch_4", "rms_2048", "tinystories", "bert"])
def test_kept_is_one_array_and_a_number_per_row(name, impl):
    case = dataclasses.replace(BY_NAME[name], lead=(4, 16))
    array = 64 * case.dim * jnp.dtype(case.dtype).itemsize
    assert kept_bytes(case, impl) == array + 64 * 4 + case.dim * 4  # and the scale
    assert kept_bytes(case, "reference") > 1.9 * array  # the control


@each_implementation
def test_nan_in_stays_visible(impl):
    """A diverged run must show, in the whole row and in no other."""
    for name in ("width_129", "tiny_inside"):
        case = BY_NAME[name]
        i = case.inputs()
        r = run_norm(case, NORMS[impl], dataclasses.replace(i, x=i.x.at[(0,) * i.x.ndim].set(jnp.nan)))
        y = r["y"].reshape(-1, case.dim)
        assert np.all(np.isnan(y[0]))
        assert np.all(np.isfinite(y[1:]))


def call(impl, case):
    def f(x, residual, scale, bias):
        return NORMS[impl](x, residual, scale, bias, kind=case.kind, eps=case.eps, eps_at=case.eps_at)

    return f


def gradient(f):
    """(arrays, cotangents) -> all gradients."""
    return lambda arrays, cotangents: jax.vjp(f, *arrays)[1](cotangents)


MEMBER = Case("member", (2, 9), 40, "layer", "residual", "per_feature")


@each_implementation
@pytest.mark.parametrize("scale", ["own", "shared"])
def test_vmap_is_a_loop(impl, scale):
    """Over members of a cohort, whose scale and bias are their own, or all the same."""
    members = [dataclasses.replace(MEMBER, name=f"member_{m}").inputs() for m in range(3)]
    first = members[0]
    each = [
        (
            (i.x, i.residual, *((i.scale, i.bias) if scale == "own" else (first.scale, first.bias))),
            (i.dy, i.dtotal),
        )
        for i in members
    ]
    weights = 0 if scale == "own" else None
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *each)
    if scale == "shared":
        stacked = ((*stacked[0][:2], first.scale, first.bias), stacked[1])
    f = gradient(call(impl, MEMBER))
    together = jax.jit(jax.vmap(f, in_axes=((0, 0, weights, weights), 0)), compiler_options=quick())(*stacked)
    alone = jax.jit(f, compiler_options=quick())
    for m, arguments in enumerate(each):
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone(*arguments)), strict=True):
            np.testing.assert_allclose(a[m], b, atol=5e-6)


@each_implementation
def test_gradient_through_remat_and_scan(impl):
    """Three layers in a scan of rematerialised bodies equal three layers."""
    i = MEMBER.inputs()
    assert i.residual is not None
    f = call(impl, MEMBER)

    def scanned(arrays):
        def body(stream, _):
            y, total = jax.checkpoint(f)(*stream, *arrays[2:])
            return (y, total), None

        (y, total), _ = jax.lax.scan(body, arrays[:2], None, length=3)
        return jnp.vdot(y, i.dy) + jnp.vdot(total, i.dtotal)

    def unrolled(arrays):
        y, total = arrays[:2]
        for _ in range(3):
            y, total = f(y, total, *arrays[2:])
        return jnp.vdot(y, i.dy) + jnp.vdot(total, i.dtotal)

    arrays = (i.x, i.residual, i.scale, i.bias)
    for a, b in zip(jax.jit(jax.grad(scanned))(arrays), jax.jit(jax.grad(unrolled))(arrays), strict=True):
        assert np.abs(b).max() > 0.01
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.alone
@each_implementation
@pytest.mark.parametrize("members", [0, 2])
def test_shard_map_over_eight_devices_equals_one_call(impl, members):
    """Rows are split over devices, and members of a cohort; the weights' gradients are summed over the rows.

    In interpret mode, which has no types of what varies, and in a cohort JAX cannot check these types.
    """
    case = dataclasses.replace(MEMBER, name="shard", lead=(8, 5))
    inputs = [dataclasses.replace(case, name=f"shard_{m}").inputs() for m in range(max(members, 1))]
    mesh = jax.make_mesh((4, 2), ("data", "member"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = P("data") if members else P(("data", "member"))
    check = not members and impl != "pallas"
    sharded = jax.shard_map(
        call(impl, case), mesh=mesh, in_specs=(rows, rows, P(), P()), out_specs=(rows, rows), check_vma=check
    )
    together = gradient(sharded)
    if members:
        together = jax.vmap(together, spmd_axis_name="member")
    each = [((i.x, i.residual, i.scale, i.bias), (i.dy, i.dtotal)) for i in inputs]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *each) if members else each[0]
    found = jax.jit(together, compiler_options=quick())(*stacked)
    alone = jax.jit(gradient(call(impl, case)), compiler_options=quick())
    for m, arguments in enumerate(each):
        for a, b in zip(found, alone(*arguments), strict=True):
            assert np.abs(b).max() > 0.01  # there is something to compare
            np.testing.assert_allclose(a[m] if members else a, b, atol=5e-6)


@each_implementation
def test_the_same_bits_each_time_also_when_compiled_again(impl):
    first = run_norm(MEMBER, NORMS[impl])
    jax.clear_caches()
    again = run_norm(MEMBER, NORMS[impl])
    for name in first:
        assert np.array_equal(first[name], again[name]), name


def test_the_sum_over_rows_has_as_many_terms_as_groups():
    """What is left to sum for XLA is (groups, D), and no scatter or atomic is in the program."""
    case, config = BY_NAME["seven_features"], Config(8, 1, 8, 1, 5, 1)
    i = case.inputs()

    def f(x, residual, scale):
        return pallas_gpu.norm(x, residual, scale, None, kind="rms", eps=1e-5, eps_at="inside", config=config)

    jaxpr = jax.make_jaxpr(lambda *a: jax.vjp(f, *a)[1]((i.dy, i.dtotal)))(i.x, i.residual, i.scale)
    calls = {e.params["name"]: e for e in equations(jaxpr) if e.primitive.name == "pallas_call"}
    assert set(calls) == {"norm_pallas", "norm_pallas_backward"}
    assert [v.aval.shape for v in calls["norm_pallas_backward"].outvars] == [(1000, 7), (5, 7)]
    assert not {e.primitive.name for e in equations(jaxpr)} & {"scatter", "scatter-add", "atomic_rmw"}


@each_implementation
def test_kernel_names_are_in_the_program(impl):
    i = MEMBER.inputs()
    f = call(impl, MEMBER)
    arrays = (i.x, i.residual, i.scale, i.bias)
    name = f"norm_{impl}"
    assert kernels_in(jax.make_jaxpr(f)(*arrays)) == {name}
    found = kernels_in(jax.make_jaxpr(gradient(f))(arrays, (i.dy, i.dtotal)))
    assert found == ({name} if impl == "reference" else {name, f"{name}_backward"})


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": shape()}, r"x must be \(..., D\), got a scalar"),
        ({"x": shape(0, 3, 8)}, r"no axis may be empty, got x \(0, 3, 8\)"),
        ({"scale": shape(7)}, r"scale must have shape \(8,\), that of x's last axis, got \(7,\)"),
        ({"bias": shape(1)}, r"bias must have shape \(8,\)"),
        (
            {"residual": shape(1, 3, 8)},
            r"residual must be as x, float32 of \(2, 3, 8\), got float32 of \(1, 3, 8\)",
        ),
        ({"residual": shape(2, 3, 8, dtype="bfloat16")}, "residual must be as x, float32 of .* got bfloat16"),
        ({"eps": 0.0}, "eps must be a positive, finite Python number, got 0.0"),
        ({"eps": True}, "eps must be a positive, finite Python number, got True"),
        ({"eps": math.inf}, "eps must be a positive, finite Python number, got inf"),
        ({"eps_at": "beside"}, "eps_at must be 'inside' or 'outside' of the root, got 'beside'"),
    ],
)
def test_arguments_that_make_no_sense(changes, message):
    arguments = {
        "x": shape(2, 3, 8),
        "residual": None,
        "scale": shape(8),
        "bias": None,
        "eps": 1e-5,
        "eps_at": "inside",
    } | changes
    with pytest.raises(ValueError, match=message):
        NormSpec.of(kind="layer", **arguments)


def test_an_unknown_implementation_raises_with_the_nearest():
    with pytest.raises(ValueError, match="'recomputed'; did you mean 'recompute'"):
        rms_norm(jnp.ones((2, 8)), jnp.ones(8), eps=1e-5, impl="recomputed")


@pytest.mark.parametrize(
    "name, platform, changes, message",
    [
        ("pallas", "cpu", {}, "platform is cpu, supported is gpu; choose 'reference' or 'recompute' for it"),
        ("pallas", "gpu", {"dtype": "float64"}, "x is float64, supported are float32, bfloat16, float16"),
        ("pallas", "gpu", {"dim": 16385}, "x has 16385 features, supported are at most 16384 for kind 'rms'"),
        ("pallas", "gpu", {"kind": "layer", "dim": 8193}, "supported are at most 8192 for kind 'layer'"),
        (
            "recompute",
            "tpu",
            {"scale_dtype": "int8"},
            "scale is int8, supported are.*no implementation takes it",
        ),
        ("reference", "cpu", {"bias_dtype": "int32"}, "bias is int32, supported are"),
    ],
)
def test_what_an_implementation_cannot_do_is_said_in_a_line(name, platform, changes, message):
    spec = dataclasses.replace(BY_NAME["ctclip_rms"].spec, **changes)
    with pytest.raises(KernelUnsupported, match=message) as caught:
        require(resolve("norm", name, platform), spec, platform)
    assert "\n" not in str(caught.value)


def test_the_functions_are_one_formula():
    i = BY_NAME["bert"].inputs()
    assert i.residual is not None
    for impl in ("reference", "fused"):
        y, total = add_layer_norm(i.x, i.residual, i.scale, i.bias, eps=1e-12, impl=impl)
        assert np.array_equal(total, i.x + i.residual)
        np.testing.assert_allclose(y, layer_norm(total, i.scale, i.bias, eps=1e-12, impl=impl), atol=1e-6)
        without_mean = total - jnp.mean(total, axis=-1, keepdims=True)
        np.testing.assert_allclose(
            y - i.bias[None, None], rms_norm(without_mean, i.scale, eps=1e-12, impl=impl), atol=1e-5
        )
        z, _ = add_rms_norm(i.x, i.residual, i.scale, eps=1e-12, impl=impl)
        assert np.abs(z - y).max() > 0.1  # the control: the mean is not zero
