"""Linear cross-entropy: the right losses and gradients, and never the logits."""

import dataclasses
import functools
import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxablate.xla import quick
from jaxablate_kernels import KernelUnsupported, implementations, kernels_in
from jaxablate_kernels.cross_entropy import CrossEntropySpec, TokenLosses, chunked, linear_cross_entropy
from jaxablate_kernels.cross_entropy.cases import CASES, LONG, PAPER, SMALL, Case, Inputs
from jaxablate_kernels.cross_entropy.spec import Static
from jaxablate_kernels.dispatch import equations

pytestmark = pytest.mark.filterwarnings("error")

NAMES = ("nll", "z", "dx", "dw", "dbias")

IMPLS = implementations("cross_entropy")
each_implementation = pytest.mark.parametrize("impl", IMPLS)
BY_NAME = {case.name: case for case in CASES}
FLOAT32 = tuple(case for case in CASES if case.dtype == case.w_dtype == "float32")
LOW = tuple(case for case in CASES if case not in FLOAT32)


def in_blocks(block_n: int, block_v: int):
    """The chunked implementation with the signature of `linear_cross_entropy`, cut as told."""

    def call(x, w, targets, *, bias=None, ignore_index, z_loss, softcap):
        static = Static(ignore_index, z_loss, softcap)
        config = chunked.Config(block_n, block_v)
        return chunked.linear_cross_entropy(x, w, targets, bias=bias, static=static, config=config)

    return call


def run(case: Case, impl, x: Inputs | None = None) -> dict[str, np.ndarray]:
    """Losses and all gradients under one jit; `impl` is a name or a function like `linear_cross_entropy`."""
    x = case.inputs() if x is None else x
    function: Any = impl if callable(impl) else functools.partial(linear_cross_entropy, impl=impl)
    options = {"ignore_index": case.ignore_index, "z_loss": case.z_loss, "softcap": case.softcap}

    def value_and_gradients(features, w, targets, bias, cotangent):
        losses, pullback = jax.vjp(
            lambda features, w, bias: function(features, w, targets, bias=bias, **options), features, w, bias
        )
        return *losses, *pullback(cotangent)

    arguments = (x.x, x.w, x.targets, x.bias, TokenLosses(x.dnll, x.dz))
    compiled = jax.jit(value_and_gradients).lower(*arguments).compile(quick())
    results = zip(NAMES, compiled(*arguments), strict=True)
    return {name: np.asarray(a) for name, a in results if a is not None}


def oracle(case: Case, x: Inputs | None = None) -> dict[str, np.ndarray]:
    """The same in float64 numpy, one token at a time, from the derivative of -log p by the chain rule."""
    x = case.inputs() if x is None else x
    features, w = np.asarray(x.x, np.float64), np.asarray(x.w, np.float64)
    bias = np.zeros(case.vocab) if x.bias is None else np.asarray(x.bias, np.float64)
    nll, z, d_linear = np.zeros(case.tokens), np.zeros(case.tokens), np.zeros((case.tokens, case.vocab))
    linear = features @ w + bias
    for n, target in enumerate(np.asarray(x.targets)):
        if target == case.ignore_index:
            continue
        logits, slope = linear[n], np.ones(case.vocab)
        if case.softcap is not None:
            logits, slope = (
                case.softcap * np.tanh(linear[n] / case.softcap),
                1 / np.cosh(linear[n] / case.softcap) ** 2,
            )
        lse = np.log(np.sum(np.exp(logits - logits.max()))) + logits.max()
        p = np.exp(logits - lse)
        nll[n], z[n] = -np.log(p[target]), case.z_loss * lse**2
        d = float(x.dnll[n]) * p
        d[target] -= float(x.dnll[n])
        d_linear[n] = slope * (d + float(x.dz[n]) * 2 * case.z_loss * lse * p)
    dx, dw, dbias = d_linear @ w.T, features.T @ d_linear, d_linear.sum(axis=0)
    found = {"nll": nll, "z": z, "dx": dx, "dw": dw, "dbias": dbias}
    return found if x.bias is not None else {name: a for name, a in found.items() if name != "dbias"}


def differences(actual, expected, tolerance=1e-5) -> dict[str, float]:
    """What differs by more than the tolerance, as a share of the largest expected entry, at least of 1."""
    assert actual.keys() == expected.keys()
    found = {}
    for name, e in expected.items():
        a = np.asarray(actual[name], np.float64)
        assert a.shape == e.shape, (name, a.shape, e.shape)
        error = np.abs(a - e).max() / max(1.0, np.abs(e).max())
        if not error <= tolerance:  # a NaN is a difference
            found[name] = float(error / tolerance)
    return found


results = functools.cache(run)
truth = functools.cache(oracle)
each_case = pytest.mark.parametrize("case", FLOAT32, ids=lambda case: case.name)


@each_implementation
@each_case
def test_equals_the_oracle(case, impl):
    assert differences(results(case, impl), truth(case)) == {}


@pytest.mark.parametrize("case", LOW, ids=lambda case: case.name)
def test_low_precision_is_as_accurate_as_the_reference(case):
    """Root mean square error against float64 on the same rounded inputs."""
    mine, reference, expected = results(case, "chunked"), results(case, "reference"), truth(case)
    types = {
        "nll": jnp.float32,
        "z": jnp.float32,
        "dx": case.dtype,
        "dw": case.w_dtype,
        "dbias": case.w_dtype,
    }
    for name, e in expected.items():
        assert mine[name].dtype == reference[name].dtype == jnp.dtype(types[name]), name
        assert rms(mine[name] - e) <= 1.5 * rms(reference[name] - e), name


def test_low_precision_check_notices_sums_in_low_precision():
    """The negative control of the test above: the same formula, logits and sums in bfloat16."""
    case = BY_NAME["brain_half"]

    def careless(x, w, targets, *, bias, ignore_index, z_loss, softcap):
        logits = softcap * jnp.tanh((x @ w + bias[None, :]) / softcap)
        lse = jax.nn.logsumexp(logits, axis=1)
        kept = targets != ignore_index
        picked = jnp.take_along_axis(logits, jnp.where(kept, targets, 0)[:, None], axis=1)[:, 0]
        losses = jnp.where(kept, lse - picked, 0), jnp.where(kept, z_loss * lse**2, 0)
        return TokenLosses(*(loss.astype(jnp.float32) for loss in losses))

    expected, reference = truth(case), results(case, "reference")
    noticed = {
        name for name, a in run(case, careless).items()
        if rms(a - expected[name]) > 1.5 * rms(reference[name] - expected[name])
    }  # fmt: skip
    assert noticed >= {"nll", "z", "dbias"}


def rms(error) -> float:
    return float(np.sqrt(np.mean(np.asarray(error, np.float64) ** 2)))


@st.composite
def any_case(draw):
    vocab = draw(st.integers(1, 60))
    return Case(
        name=f"drawn_{draw(st.integers(0, 10**6))}",
        tokens=draw(st.integers(1, 40)),
        dim=draw(st.integers(1, 9)),
        vocab=vocab,
        bias=draw(st.sampled_from(("none", "per_word"))),
        ignored=draw(st.sampled_from(("none", "some", "all"))),
        ignore_index=draw(st.sampled_from((-100, 0, vocab - 1, vocab))),
        z_loss=draw(st.sampled_from((0.0, 0.3))),
        softcap=draw(st.sampled_from((None, 2.0))),
    )


@settings(
    max_examples=int(os.environ.get("JAXABLATE_CASES", "20")),
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],  # a smaller case costs minutes of compilation to find
)
@given(case=any_case(), block_n=st.integers(1, 50), block_v=st.integers(1, 70))
def test_chunked_equals_the_oracle_for_any_shape_and_block(case, block_n, block_v):
    assert differences(run(case, in_blocks(block_n, block_v)), oracle(case)) == {}


def ignored_tokens_counted(x, w, targets, *, ignore_index, **arguments):
    # No token has the target -1, and word 0 stands in for the ignored ones.
    targets = jnp.where(targets == ignore_index, 0, targets)
    return linear_cross_entropy(x, w, targets, impl="chunked", ignore_index=-1, **arguments)


def z_loss_forgotten(x, w, targets, *, z_loss, **arguments):
    return linear_cross_entropy(x, w, targets, impl="chunked", z_loss=0.0 * z_loss, **arguments)


def target_shifted_by_one(x, w, targets, *, ignore_index, **arguments):
    targets = jnp.where(targets == ignore_index, targets, (targets + 1) % w.shape[1])
    return linear_cross_entropy(x, w, targets, impl="chunked", ignore_index=ignore_index, **arguments)


def cap_forgotten(x, w, targets, *, softcap, **arguments):
    del softcap
    return linear_cross_entropy(x, w, targets, impl="chunked", **arguments)


def last_chunk_forgotten(x, w, targets, *, bias, **arguments):
    seen = jnp.arange(w.shape[1]) < 768
    bias = jnp.where(seen, bias, bias - 50.0)
    return linear_cross_entropy(x, w, targets, impl="chunked", bias=bias, **arguments)


@pytest.mark.parametrize(
    "wrong, noticed_in",
    [
        (ignored_tokens_counted, {"nll", "z", "dx", "dw", "dbias"}),
        (z_loss_forgotten, {"z", "dx", "dw", "dbias"}),
        (target_shifted_by_one, {"nll", "dx", "dw", "dbias"}),
        (cap_forgotten, {"nll", "z", "dx", "dw", "dbias"}),
        (last_chunk_forgotten, {"nll", "z", "dx", "dw", "dbias"}),
    ],
)
def test_comparison_notices(wrong, noticed_in):
    """The negative controls of the comparison that the tests above rely on."""
    case = BY_NAME["everything"]
    assert set(differences(run(case, wrong), truth(case))) == noticed_in


@each_implementation
def test_ignored_tokens_cost_nothing_and_pass_nothing(impl):
    nothing = results(BY_NAME["all_ignored"], impl)
    assert all(np.all(a == 0) for a in nothing.values())
    some = results(BY_NAME["everything"], impl)
    ignored = np.asarray(BY_NAME["everything"].inputs().targets) == -100
    for name in ("nll", "z", "dx"):
        assert np.all(some[name][ignored] == 0), name
        assert np.all(some[name][~ignored] != 0), name  # the control


@each_implementation
@pytest.mark.parametrize("strange", [-1, 100, 2**31 - 1])
def test_a_target_outside_of_the_vocabulary_gives_nan(impl, strange):
    """For its own loss and feature and for the weights; not for the losses of others."""
    case = Case("strange", 9, 4, 100, z_loss=0.1)
    x = case.inputs()
    r = run(case, impl, dataclasses.replace(x, targets=x.targets.at[3].set(strange)))
    others = np.arange(9) != 3
    for name in ("nll", "dx"):
        assert np.all(np.isnan(r[name][3])), name
        assert np.all(np.isfinite(r[name][others])), name
    assert np.all(np.isfinite(r["z"]))
    assert np.all(np.isnan(r["dw"]))
    assert all(np.all(np.isfinite(a)) for a in run(case, impl).values())  # the control


@each_implementation
@pytest.mark.parametrize("size", [1e-18, 300.0, 1e15])
def test_extreme_logits_give_no_nan(impl, size):
    case = Case("extreme", 20, 8, 200, bias="per_word")
    x = case.inputs()
    r = run(case, impl, dataclasses.replace(x, x=x.x * size, w=x.w * size, bias=x.bias * size))
    assert all(np.all(np.isfinite(a)) for a in r.values())


def test_a_large_bias_does_not_reach_the_gradient_through_padding():
    """Blocks of tokens are filled up with zeros, whose logits are the bias: exp(200) is infinite."""
    case = Case("padding", 13, 4, 50, bias="per_word")
    x = dataclasses.replace(case.inputs(), bias=jnp.full(50, 200.0))
    assert differences(run(case, in_blocks(8, 16), x), oracle(case, x)) == {}


@each_implementation
def test_a_word_may_be_ruled_out_by_its_bias(impl):
    case = Case("ruled_out", 20, 8, 90, bias="per_word")
    x = case.inputs()
    out = jnp.arange(90) >= 80
    x = dataclasses.replace(x, bias=jnp.where(out, -jnp.inf, x.bias), targets=x.targets % 80)
    r = run(case, in_blocks(8, 32) if impl == "chunked" else impl, x)
    assert np.all(r["dw"][:, 80:] == 0)
    assert np.all(np.isfinite(r["nll"]))
    fewer = dataclasses.replace(x, w=x.w[:, :80], bias=x.bias[:80])
    expected = oracle(dataclasses.replace(case, vocab=80), fewer)
    assert differences({"nll": r["nll"], "dx": r["dx"]}, {k: expected[k] for k in ("nll", "dx")}) == {}


@each_implementation
def test_nan_in_stays_visible(impl):
    case = BY_NAME["uneven"]
    x = case.inputs()
    kept = int(np.flatnonzero(np.asarray(x.targets) != case.ignore_index)[0])
    assert np.isnan(run(case, impl, dataclasses.replace(x, x=x.x.at[kept, 2].set(jnp.nan)))["nll"][kept])


@each_implementation
def test_gradients_are_those_of_the_function(impl):
    """Against finite differences, in float64."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # check_grads promotes
        case = Case("gradients", 5, 3, 7, "float64", "float64", "per_word", "some", z_loss=0.1, softcap=2.0)
        x = case.inputs()
        options = {"ignore_index": -100, "z_loss": 0.1, "softcap": 2.0}
        function = (
            in_blocks(2, 3) if impl == "chunked" else functools.partial(linear_cross_entropy, impl=impl)
        )

        def f(features, w, bias):
            features, w, bias = map(jnp.asarray, (features, w, bias))  # check_grads passes numpy arrays
            return function(features, w, x.targets, bias=bias, **options)

        check_grads(f, (x.x, x.w, x.bias), order=1, modes=["rev"], atol=1e-7, rtol=1e-7)
        mine, exact = run(case, function, x), oracle(case, x)
        assert mine["nll"].dtype == np.float64
        assert differences(mine, exact, tolerance=1e-13) == {}
        # The control: a wrong gradient is seen.
        with pytest.raises(AssertionError):
            check_grads(off_by_a_thousandth(f), (x.x, x.w, x.bias), order=1, modes=["rev"], rtol=1e-7)


def off_by_a_thousandth(f):
    @jax.custom_vjp
    def wrong(*arguments):
        return f(*arguments)

    wrong.defvjp(
        lambda *arguments: jax.vjp(f, *arguments),
        lambda pullback, ct: jax.tree.map(lambda g: 1.001 * g, pullback(ct)),
    )
    return wrong


MEMBERS = Case("members", 70, 12, 90, bias="per_word", ignored="some", z_loss=0.1)


def mean_loss(impl, features, w, bias, targets):
    function = in_blocks(16, 32) if impl == "chunked" else functools.partial(linear_cross_entropy, impl=impl)
    losses = function(features, w, targets, bias=bias, ignore_index=-100, z_loss=0.1, softcap=None)
    return jnp.sum(losses.nll + losses.z) / 50


@each_implementation
def test_vmap_and_remat_are_a_loop(impl):
    """Over the members of a cohort, several blocks each way."""
    inputs = [dataclasses.replace(MEMBERS, name=f"member_{i}").inputs() for i in range(3)]
    each = [(x.x, x.w, x.bias, x.targets) for x in inputs]
    gradient = jax.value_and_grad(jax.checkpoint(functools.partial(mean_loss, impl)), argnums=(0, 1, 2))
    stacked = (jnp.stack(arrays) for arrays in zip(*each, strict=True))
    together = jax.jit(jax.vmap(gradient), compiler_options=quick())(*stacked)
    alone = jax.jit(gradient, compiler_options=quick())
    for member, arrays in enumerate(each):
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone(*arrays)), strict=True):
            np.testing.assert_allclose(a[member], b, atol=1e-6)


@each_implementation
@pytest.mark.parametrize("members", [0, 2])
def test_shard_map_over_tokens(impl, members):
    """Tokens are split over devices, the weights are not; their gradient is summed over the devices."""
    case = dataclasses.replace(MEMBERS, tokens=80)
    mesh = jax.make_mesh((2, 2), ("data", "member"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    inputs = [dataclasses.replace(case, name=f"shard_{i}").inputs() for i in range(max(members, 1))]
    each = [(x.x, x.w, x.bias, x.targets) for x in inputs]

    def local(features, w, bias, targets):
        return jax.lax.psum(mean_loss(impl, features, w, bias, targets), "data")

    rows = P("data")
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(rows, P(), P(), rows), out_specs=P(), check_vma=not members
    )
    gradient = jax.grad(sharded, argnums=(0, 1, 2))
    if members:
        batched = jax.vmap(gradient, spmd_axis_name="member")
    else:
        batched = lambda *arrays: jax.tree.map(lambda a: a[None], gradient(*(a[0] for a in arrays)))
    stacked = (jnp.stack(arrays) for arrays in zip(*each, strict=True))
    together = jax.jit(batched, compiler_options=quick())(*stacked)
    plain = jax.jit(jax.grad(functools.partial(mean_loss, impl), argnums=(0, 1, 2)), compiler_options=quick())
    for member, arrays in enumerate(each):
        for a, b in zip(together, plain(*arrays), strict=True):
            assert np.abs(b).max() > 0.001  # there is something to compare
            np.testing.assert_allclose(a[member], b, atol=1e-6)


@each_implementation
def test_the_same_bits_each_time_also_when_compiled_again(impl):
    first = run(BY_NAME["everything"], impl)
    jax.clear_caches()
    again = run(BY_NAME["everything"], impl)
    assert all(np.array_equal(first[name], again[name]) for name in first)


def loss_and_arguments(impl, case: Case, block: int | None = None):
    """A scalar loss, whose gradient a training step takes, and abstract arguments."""
    function = (
        functools.partial(linear_cross_entropy, impl=impl) if block is None else in_blocks(block, block)
    )
    options = {"ignore_index": case.ignore_index, "z_loss": case.z_loss, "softcap": case.softcap}

    def loss(features, w, bias, targets):
        losses = function(features, w, targets, bias=bias, **options)
        return jnp.sum(losses.nll + losses.z)

    arguments = (
        jax.ShapeDtypeStruct((case.tokens, case.dim), case.dtype),
        jax.ShapeDtypeStruct((case.dim, case.vocab), case.w_dtype),
        jax.ShapeDtypeStruct((case.vocab,), case.w_dtype),
        jax.ShapeDtypeStruct((case.tokens,), jnp.int32),
    )
    return loss, arguments


WIDE = Case("wide", 512, 32, 4000, bias="per_word", z_loss=0.1)


def temporary_bytes(impl, case: Case) -> int:
    loss, arguments = loss_and_arguments(impl, case, block=128 if impl == "chunked" else None)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dtype, w_dtype", [("float32", "float32"), ("bfloat16", "float32")])
def test_memory_does_not_grow_with_the_vocabulary(dtype, w_dtype):
    """Of the gradient, beyond arguments and results; 4000 is no multiple of the chunk."""
    narrow = dataclasses.replace(WIDE, dtype=dtype, w_dtype=w_dtype)
    wide = dataclasses.replace(narrow, vocab=8 * narrow.vocab)
    before, after = temporary_bytes("chunked", narrow), temporary_bytes("chunked", wide)
    assert after <= 1.01 * before
    assert after < 4 * wide.tokens * wide.vocab / 16  # nowhere near the logits
    # The control: the same measure finds the logits in the reference.
    grown = temporary_bytes("reference", wide) - temporary_bytes("reference", narrow)
    assert grown >= 4 * narrow.tokens * 7 * narrow.vocab


def largest_intermediate(f, *arguments) -> int:
    """Elements of the largest array any equation of the program returns, at any depth."""
    return max(
        math.prod(getattr(out.aval, "shape", ()))
        for eqn in equations(jax.make_jaxpr(f)(*arguments))
        for out in eqn.outvars
    )


@pytest.mark.parametrize("case", [dataclasses.replace(WIDE, dim=4), *LONG], ids=lambda case: case.name)
def test_nothing_is_larger_than_an_argument_or_the_budget(case):
    case = dataclasses.replace(case, bias="per_word")
    spec = CrossEntropySpec(case.tokens, case.dim, case.vocab, case.dtype, case.w_dtype, case.w_dtype, False)
    config = chunked.heuristic(spec, "cpu")
    allowed = max(case.tokens * case.dim, case.dim * case.vocab, config.block_n * config.block_v)
    loss, arguments = loss_and_arguments("chunked", case)
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    assert largest_intermediate(loss, *arguments) <= allowed
    assert largest_intermediate(gradient, *arguments) <= allowed
    reference, _ = loss_and_arguments("reference", case)
    assert largest_intermediate(reference, *arguments) == case.tokens * case.vocab > allowed  # the control


@pytest.mark.parametrize("members", [0, 3])
def test_compiled_program_reads_and_writes_by_slices(members):
    """No gather and no scatter in what runs, also for a cohort, where the traced program has them."""
    loss, arguments = loss_and_arguments(
        "chunked", dataclasses.replace(WIDE, tokens=40, vocab=1000), block=16
    )
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    if members:
        gradient = jax.vmap(gradient)
        arguments = [jax.ShapeDtypeStruct((members, *a.shape), a.dtype) for a in arguments]
    text = jax.jit(gradient).lower(*arguments).compile().as_text()
    found = set(re.findall(r"\b(gather|scatter|dynamic-slice|dynamic-update-slice)\(", text))
    assert found == {"dynamic-slice", "dynamic-update-slice"}


@each_implementation
def test_kernel_name_is_in_the_program_and_no_other_is(impl):
    loss, arguments = loss_and_arguments(impl, WIDE)
    name = f"cross_entropy_{impl}"
    both = {name} if impl == "reference" else {name, f"{name}_backward"}
    assert kernels_in(jax.make_jaxpr(loss)(*arguments)) == {name}
    assert kernels_in(jax.make_jaxpr(jax.grad(loss))(*arguments)) == both
    text = jax.jit(jax.grad(loss)).lower(*arguments).as_text()
    assert set(re.findall(r"func private @(cross_entropy\w*?)(?:_\d+)?\(", text)) == both


def test_lowers_for_cuda():
    loss, arguments = loss_and_arguments("chunked", LONG[0])
    lowered = jax.jit(jax.grad(loss)).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "@cross_entropy_chunked_backward" in lowered.as_text()


def test_case_names_are_unique_and_shapes_are_accepted_without_arrays():
    every = (*PAPER, *SMALL, *LONG)
    assert len({case.name for case in every}) == len(every)
    for case in every:
        for impl in IMPLS:
            loss, arguments = loss_and_arguments(impl, case)
            assert jax.eval_shape(loss, *arguments).shape == ()


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": shape(2, 5, 8)}, r"x must be \(N, D\) and w \(D, V\).*reshape x to two axes"),
        ({"w": shape(9, 20)}, r"x must be \(N, D\) and w \(D, V\)"),
        ({"w": shape(8, 0)}, "no axis may be empty"),
        ({"targets": shape(5)}, r"targets must be int32 of shape \(5,\), got float32"),
        ({"targets": shape(4, dtype=jnp.int32)}, r"targets must be int32 of shape \(5,\).*\(4,\)"),
        ({"bias": shape(8)}, r"bias must have shape \(V,\) = \(20,\)"),
        ({"ignore_index": 1.0}, "ignore_index must be a Python integer, got 1.0"),
        ({"z_loss": -1}, "z_loss must be a Python number of at least 0, got -1"),
        ({"z_loss": float("nan")}, "z_loss must be a Python number"),
        ({"softcap": 0}, "softcap must be a positive Python number or None, got 0"),
    ],
)
def test_arguments_that_do_not_fit_together(changes, message):
    arguments = {"x": shape(5, 8), "w": shape(8, 20), "targets": shape(5, dtype=jnp.int32), "bias": None}
    arguments |= {"ignore_index": -100, "z_loss": 0.0, "softcap": None} | changes
    with pytest.raises(ValueError, match=message) as caught:
        CrossEntropySpec.of(**arguments)
    assert "\n" not in str(caught.value)


def test_types_that_nobody_takes():
    with pytest.raises(
        KernelUnsupported, match=r"w is float8_e4m3fn, supported are float32.*no implementation"
    ):
        linear_cross_entropy(
            jnp.ones((5, 8)), jnp.ones((8, 20), jnp.float8_e4m3fn), jnp.zeros(5, jnp.int32), impl="auto"
        )


@pytest.mark.parametrize("blocks", [(0, 4), (4, 0)])
def test_a_block_holds_something(blocks):
    with pytest.raises(ValueError, match=r"block_. must be at least 1, got 0"):
        chunked.Config(*blocks)
