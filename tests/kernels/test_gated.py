"""The gated product: every implementation gives the right numbers, keeps h alone, and runs where it says."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from rowwise_oracle import GATES, differences, gated_oracle, run_gated, worse_than
from scipy import special

from jaxablate_kernels import KernelUnsupported, kernels_in, load, require, resolve
from jaxablate_kernels.dispatch import equations
from jaxablate_kernels.gated import GatedSpec, gated, pallas_gpu
from jaxablate_kernels.gated.cases import CASES, LARGE, PAPER, Case
from jaxablate_kernels.gated.pallas_gpu import Config, candidates, heuristic

pytestmark = pytest.mark.filterwarnings("error")

BY_NAME = {case.name: case for case in (*CASES, *LARGE)}
EXACT = tuple(case for case in CASES if case.dtype == "float32")
LOW = tuple(case for case in CASES if case not in EXACT)
OTHERS = tuple(name for name in GATES if name != "reference")

results = functools.cache(lambda case, impl: run_gated(case, GATES[impl]))
truth = functools.cache(gated_oracle)

each_implementation = pytest.mark.parametrize("impl", GATES)
each_kind = pytest.mark.parametrize("kind", ["swiglu", "geglu"])


def test_case_names_are_unique_and_cover_the_papers():
    assert len(BY_NAME) == len(CASES) + len(LARGE)
    assert {(c.kind, c.width) for c in PAPER} >= {("geglu", 1365), ("swiglu", 1344)}
    assert {len(c.lead) for c in CASES} == {0, 1, 2, 3}


@each_implementation
@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_equals_oracle(case, impl):
    assert differences(results(case, impl), truth(case)) == {}


@pytest.mark.parametrize("impl", OTHERS)
@pytest.mark.parametrize("case", LOW, ids=lambda case: case.name)
def test_low_precision_is_as_accurate_as_the_reference(case, impl):
    mine, reference = results(case, impl), results(case, "reference")
    assert {name: value.dtype for name, value in mine.items()} == {n: v.dtype for n, v in reference.items()}
    assert worse_than(mine, reference, truth(case)) == {}


def test_low_precision_check_notices_rounding_on_the_way():
    """The negative control of the test above: each operation in bfloat16."""
    case = BY_NAME["brain_half"]
    i = case.inputs()
    first, second = i.h[:, 0], i.h[:, 1]
    gate = 1 / (1 + jnp.exp(-first))
    careless = {
        "y": first * gate * second,
        "dh": jnp.stack([i.dy * second * (gate + first * gate * (1 - gate)), i.dy * first * gate], 1),
    }
    found = worse_than(
        {k: np.asarray(v) for k, v in careless.items()}, results(case, "recompute"), truth(case)
    )
    assert set(found) == {"y", "dh"}


def reference(h, **options):
    return GATES["reference"](h, **options)


def swapped_gate(h, **options):
    return reference(h[..., ::-1, :], **options)


def other_kind(h, *, kind):
    return reference(h, kind={"swiglu": "geglu", "geglu": "swiglu"}[kind])


def approximate_gelu(h, *, kind):
    del kind
    return h[..., 0, :] * jax.nn.gelu(h[..., 1, :], approximate=True)


def gate_without_gradient(h, *, kind):
    del kind
    return jax.lax.stop_gradient(jax.nn.silu(h[..., 0, :])) * h[..., 1, :]


@pytest.mark.parametrize(
    "wrong, name, noticed_in",
    [
        (swapped_gate, "ctclip_geglu", {"y", "dh"}),
        (swapped_gate, "tinystories", {"y", "dh"}),
        (other_kind, "tinystories", {"y", "dh"}),
        (approximate_gelu, "ctclip_geglu", {"y", "dh"}),
        (gate_without_gradient, "tinystories", {"dh"}),
    ],
)
def test_comparison_notices(wrong, name, noticed_in):
    """The negative controls of the comparison that the tests above rely on."""
    case = BY_NAME[name]
    assert set(differences(run_gated(case, wrong), truth(case))) == noticed_in


def test_normal_distribution_is_as_accurate_as_it_says():
    """The kernel has a series of its own, for want of an error function; NaN stays NaN."""
    x = np.concatenate([np.linspace(-12, 12, 200_001), [-np.inf, np.inf, np.nan]]).astype(np.float32)
    below, density = (np.asarray(a, np.float64) for a in jax.jit(pallas_gpu._normal)(x))
    exact = x.astype(np.float64)
    assert np.nanmax(np.abs(below - special.ndtr(exact))) < 3e-7
    assert np.nanmax(np.abs(density - np.exp(-(exact**2) / 2) / np.sqrt(2 * np.pi))) < 2e-7
    assert np.array_equal(np.isnan(below), np.isnan(exact))


# Fields, not cases: the types of a case are checked when it is made, with random numbers, which hypothesis
# does not want while it draws its own.
any_fields = st.fixed_dictionaries(
    {
        "name": st.integers(0, 10**6).map("drawn_{}".format),
        "lead": st.sampled_from(((), (1,), (3,), (17,), (40,), (2, 3), (2, 1, 5))),
        "width": st.integers(1, 150),
        "kind": st.sampled_from(("swiglu", "geglu")),
        "dtype": st.sampled_from(("float32", "float32", "bfloat16", "float16")),
    }
)
powers = st.sampled_from((1, 2, 8, 64))


def check_drawn(case, config):
    expected, reference = gated_oracle(case), run_gated(case, GATES["reference"])
    for implementation in (GATES["recompute"], functools.partial(GATES["pallas"], config=config)):
        mine = run_gated(case, implementation)
        if case.dtype == "float32":
            assert differences(mine, expected) == {}
        else:
            assert worse_than(mine, reference, expected, factor=2.0) == {}  # a few numbers: chance has a say


drawn = functools.partial(
    settings,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@drawn(max_examples=int(os.environ.get("JAXABLATE_CASES", "10")))
@given(fields=any_fields, rows=powers, width=powers)
def test_equals_oracle_for_any_shape_and_config(fields, rows, width):
    check_drawn(Case(**fields), Config(rows, width, 1))


@each_kind
@pytest.mark.parametrize("impl", ["reference", "recompute"])
def test_gradients_are_those_of_the_function(impl, kind):
    """Against finite differences, in float64."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # check_grads promotes
        h = Case("gradients", (2, 3), 5, dtype="float64").inputs().h

        def f(factor, h):
            y = GATES[impl](jnp.asarray(h), kind=kind)  # check_grads passes numpy arrays
            return jax.lax.stop_gradient(y) * (1 - factor) + factor * y

        check_grads(functools.partial(f, 1.0), (h,), order=1, modes=["rev"], atol=1e-7, rtol=1e-7)
        with pytest.raises(AssertionError):  # the control: a gradient that is wrong by a thousandth
            check_grads(functools.partial(f, 1.001), (h,), order=1, modes=["rev"], atol=1e-7, rtol=1e-7)


@each_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", OTHERS)
def test_kept_is_h_alone(impl, dtype, kind):
    h = jax.ShapeDtypeStruct((4, 16, 2, 24), dtype)

    def kept_bytes(impl):
        _, pullback = jax.eval_shape(lambda h: jax.vjp(functools.partial(GATES[impl], kind=kind), h), h)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))

    assert kept_bytes(impl) == h.size * h.dtype.itemsize
    assert kept_bytes("reference") >= 1.5 * h.size * h.dtype.itemsize  # the control


@each_implementation
@each_kind
def test_nan_in_stays_visible(impl, kind):
    h = BY_NAME["width_129"].inputs().h
    y = GATES[impl](h.at[0, 0, 0, 0, 5].set(jnp.nan).at[0, 0, 0, 1, 7].set(jnp.nan), kind=kind)
    assert np.array_equal(np.argwhere(np.isnan(y)), [[0, 0, 0, 5], [0, 0, 0, 7]])


MEMBER = Case("member", (2, 9), 40, "geglu")


def gradient(impl, case):
    return lambda h, dy: jax.vjp(functools.partial(GATES[impl], kind=case.kind), h)[1](dy)[0]


@each_implementation
def test_vmap_is_a_loop(impl):
    members = [dataclasses.replace(MEMBER, name=f"member_{m}").inputs() for m in range(3)]
    f = gradient(impl, MEMBER)
    together = jax.jit(jax.vmap(f))(jnp.stack([i.h for i in members]), jnp.stack([i.dy for i in members]))
    for m, i in enumerate(members):
        np.testing.assert_allclose(together[m], jax.jit(f)(i.h, i.dy), atol=2e-6)


@each_implementation
def test_gradient_through_remat_and_scan(impl):
    i = MEMBER.inputs()

    def scanned(h):
        def body(h, _):
            y = jax.checkpoint(functools.partial(GATES[impl], kind="geglu"))(h)
            return h + y[..., None, :], None

        return jnp.vdot(jax.lax.scan(body, h, None, length=3)[0][..., 0, :], i.dy)

    def unrolled(h):
        for _ in range(3):
            h = h + GATES[impl](h, kind="geglu")[..., None, :]
        return jnp.vdot(h[..., 0, :], i.dy)

    expected = np.asarray(jax.jit(jax.grad(unrolled))(i.h))
    np.testing.assert_allclose(
        jax.jit(jax.grad(scanned))(i.h), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.alone
@each_implementation
def test_shard_map_over_eight_devices_equals_one_call(impl):
    """Rows over four devices, the width over two.

    Interpret mode has no types of what varies, and JAX 0.12 loses them in erf's own derivative.
    """
    case = dataclasses.replace(MEMBER, lead=(8, 5))
    i = case.inputs()
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = P("data", None, None, "tensor"), P("data", None, "tensor")
    f = gradient(impl, case)
    sharded = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=impl == "recompute")
    np.testing.assert_allclose(jax.jit(sharded)(i.h, i.dy), jax.jit(f)(i.h, i.dy), atol=2e-6)


@each_implementation
def test_the_same_bits_each_time_also_when_compiled_again(impl):
    first = run_gated(MEMBER, GATES[impl])
    jax.clear_caches()
    again = run_gated(MEMBER, GATES[impl])
    assert all(np.array_equal(first[name], again[name]) for name in first)


@each_implementation
def test_kernel_names_are_in_the_program(impl):
    i, name = MEMBER.inputs(), f"gated_{impl}"
    assert kernels_in(jax.make_jaxpr(functools.partial(GATES[impl], kind="geglu"))(i.h)) == {name}
    jaxpr = jax.make_jaxpr(gradient(impl, MEMBER))(i.h, i.dy)
    assert kernels_in(jaxpr) == ({name} if impl == "reference" else {name, f"{name}_backward"})
    calls = {e.params["name"] for e in equations(jaxpr) if e.primitive.name == "pallas_call"}
    assert calls == ({name, f"{name}_backward"} if impl == "pallas" else set())


def program_for(case, device):
    """Value and gradient of a case as a GPU would run it, and abstract arguments."""
    config = heuristic(case.spec, device)

    def value_and_gradient(h, dy):
        y, pullback = jax.vjp(functools.partial(pallas_gpu.gated, kind=case.kind, config=config), h)
        return y, pullback(dy)

    shape = (*case.lead, 2, case.width)
    return value_and_gradient, (
        jax.ShapeDtypeStruct(shape, case.dtype),
        jax.ShapeDtypeStruct((*case.lead, case.width), case.dtype),
    )


@pytest.mark.parametrize("name", ["ctclip_geglu", "tinystories", "one_unit", "brain_half"])
def test_lowers_for_cuda_by_name(name):
    cuda = pytest.importorskip("cuda")
    program, arguments = program_for(BY_NAME[name], "NVIDIA H200")
    text = cuda.lower(program, *arguments)
    assert "gated_pallas" in text
    assert "gated_pallas_backward" in text


def compile_all(cases, capability):
    pytest.importorskip("triton")
    cuda = pytest.importorskip("cuda")
    for case in cases:
        program, arguments = program_for(case, cuda.DEVICES[capability].kind)
        kernels = cuda.compiled_kernels(program, *arguments, capability=capability)
        assert [k.name for k in kernels] == ["gated_pallas", "gated_pallas_backward"]
        for kernel in kernels:
            # 64 registers let a multiprocessor run 32 warps at a time, enough to keep its memory busy.
            assert cuda.over_budget(kernel, registers=64) == [], case.name


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_without_spills(capability):
    compile_all(
        [BY_NAME[name] for name in ("ctclip_geglu", "ctclip_batch_4", "tinystories_batch_64")], capability
    )


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_all_cases_compile_without_spills(capability):
    compile_all(BY_NAME.values(), capability)


def test_candidates_begin_with_the_heuristic_and_differ():
    for case in BY_NAME.values():
        found = candidates(case.spec, "NVIDIA H200")
        assert found[0] == heuristic(case.spec, "NVIDIA H200")
        assert len(set(found)) == len(found) > 1


def test_a_tile_has_few_columns_beyond_the_width():
    for case in BY_NAME.values():
        width = heuristic(case.spec, "NVIDIA H200").width
        beyond = -case.width % width
        assert beyond <= case.width / 8 or width <= 64


def test_configs_that_make_no_sense():
    with pytest.raises(ValueError, match="width must be a power of two, got 96"):
        Config(1, 96, 4)


@pytest.mark.parametrize(
    "h, kind, message",
    [
        (
            (8, 3, 4),
            "swiglu",
            r"h must be \(..., 2, W\), the halves as an axis of their own, got \(8, 3, 4\)",
        ),
        ((2,), "swiglu", r"h must be \(..., 2, W\)"),
        ((0, 2, 4), "swiglu", r"no axis may be empty, got h \(0, 2, 4\)"),
        ((8, 2, 4), "reglu", "kind must be one of swiglu, geglu, got 'reglu'"),
    ],
)
def test_arguments_that_make_no_sense(h, kind, message):
    with pytest.raises(ValueError, match=message):
        GatedSpec.of(jax.ShapeDtypeStruct(h, jnp.float32), kind=kind)


@pytest.mark.parametrize(
    "name, platform, dtype, message",
    [
        (
            "pallas",
            "cpu",
            "float32",
            "platform is cpu, supported is gpu; choose 'reference' or 'recompute' for it",
        ),
        ("pallas", "gpu", "float64", "h is float64, supported are float32, bfloat16, float16; choose"),
        ("recompute", "cpu", "int8", "h is int8, supported are float32.*no implementation takes it"),
    ],
)
def test_what_an_implementation_cannot_do_is_said_in_a_line(name, platform, dtype, message):
    spec = dataclasses.replace(BY_NAME["tinystories"].spec, dtype=dtype)
    with pytest.raises(KernelUnsupported, match=message) as caught:
        require(resolve("gated", name, platform), spec, platform)
    assert "\n" not in str(caught.value)


@each_kind
def test_the_function_takes_any_implementation_by_name(kind):
    i = BY_NAME["tinystories"].inputs()
    right = gated(i.h, kind=kind, impl="reference")
    np.testing.assert_allclose(gated(i.h, kind=kind, impl="fused"), right, atol=2e-5)
    with pytest.raises(KernelUnsupported, match="platform is cpu, supported is gpu"):
        gated(i.h, kind=kind, impl="pallas")
    assert load("gated", "pallas").supports(BY_NAME["ctclip_batch_4"].spec, "gpu") is None


def test_every_case_is_accepted_by_shape_alone():
    """A plan asks for memory before there are arrays."""
    for case in (*CASES, *LARGE):
        program, arguments = program_for(case, "cpu")
        y, (dh,) = jax.eval_shape(program, *arguments)
        assert (y.shape, dh.shape) == ((*case.lead, case.width), (*case.lead, 2, case.width))
