"""A name runs or raises, and the program says which kernel it holds."""

import dataclasses
import importlib
import pickle
import re
import types

import jax
import jax.numpy as jnp
import pytest

from jaxablate_kernels import (
    KernelUnsupported,
    Resolved,
    algorithms,
    attention,
    dispatch,
    implementations,
    kernel_names,
    kernels_in,
    load,
    operations,
    require,
    resolve,
)
from jaxablate_kernels.attention import AttentionSpec

pytestmark = pytest.mark.filterwarnings("error")

EACH = [(op, name) for op in operations() for name in implementations(op)]
PLATFORMS = ("cpu", "gpu", "tpu")


@pytest.mark.parametrize("op, name", EACH)
def test_table_agrees_with_the_module_it_names(op, name):
    implementation = load(op, name)
    resolved = resolve(op, name, "cpu")
    assert (implementation.op, implementation.name) == (op, name)
    assert implementation.kernel_name == resolved.kernel_name
    assert resolved == Resolved(op, requested=name, name=name, kernel_name=f"{op}_{name}")


def test_kernel_names_are_unique():
    names = [resolve(op, name, "cpu").kernel_name for op, name in EACH]
    assert len(names) == len(set(names))
    assert set(names) < kernel_names()


@pytest.mark.parametrize("platform", PLATFORMS)
def test_an_algorithm_has_an_implementation_on_every_platform(platform):
    for op in operations():
        for algorithm in algorithms(op):
            resolved = resolve(op, algorithm, platform)
            assert resolved.requested == algorithm
            assert resolved.name in implementations(op)


def test_flash_is_blockwise_on_cpu_and_other_names_of_a_platform_mean_the_same():
    expected = Resolved("attention", "flash", "blockwise", "attention_blockwise")
    assert resolve("attention", "flash", "cpu") == expected
    assert resolve("attention", "flash", "cuda") == resolve("attention", "flash", "gpu")


def test_a_new_kernel_is_one_entry_of_the_table(monkeypatch):
    monkeypatch.setitem(dispatch._ALGORITHMS["attention"]["flash"], "gpu", "reference")
    assert resolve("attention", "flash", "gpu").name == "reference"
    assert resolve("attention", "flash", "cpu").name == "blockwise"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("attention", "blockwize", "cpu"), "'blockwize'; did you mean 'blockwise'.*valid: reference"),
        (("attention", "falsh", "cpu"), "did you mean 'flash'"),
        (("attention", "zzz", "cpu"), r"'zzz' \(valid: reference, blockwise, flash\)"),
        (("atention", "flash", "cpu"), "unknown operation 'atention'; did you mean 'attention'"),
        (("attention", "flash", "metal"), r"unknown platform.*'metal' \(valid: cpu, gpu, tpu\)"),
    ],
)
def test_an_unknown_name_raises_with_the_nearest(arguments, message):
    with pytest.raises(ValueError, match=message):
        resolve(*arguments)


def test_load_wants_an_implementation_not_an_algorithm():
    with pytest.raises(ValueError, match="unknown attention implementation 'flash'"):
        load("attention", "flash")


def test_an_explicit_name_does_not_depend_on_the_platform():
    assert resolve("attention", "reference", "metal").name == "reference"


SPEC = AttentionSpec(1, 8, 8, 2, 2, 16, "float32", False, False, None, None)


@pytest.fixture
def picky(monkeypatch):
    """A third implementation, which takes multiples of 16 on GPUs only; and one that is not installed."""
    module = types.ModuleType("picky_attention")

    def supports(spec, platform):
        if platform != "gpu":
            return f"platform is {platform}, supported is gpu"
        return None if spec.q_len % 16 == 0 else f"q has {spec.q_len} queries, supported are multiples of 16"

    module.IMPLEMENTATION = dispatch.Implementation(  # pyright: ignore[reportAttributeAccessIssue]
        "attention", "picky", "attention_picky", supports, attention
    )
    monkeypatch.setitem(importlib.import_module("sys").modules, "picky_attention", module)
    table = dispatch._IMPLEMENTATIONS["attention"]
    monkeypatch.setitem(table, "picky", dispatch._Entry("picky_attention", "attention_picky"))
    monkeypatch.setitem(table, "absent", dispatch._Entry("no_such_package", "attention_absent"))


@pytest.mark.usefixtures("picky")
def test_an_implementation_that_cannot_run_raises_and_says_who_can():
    resolved = resolve("attention", "picky", "gpu")
    with pytest.raises(KernelUnsupported) as caught:
        require(resolved, SPEC, "cuda")
    error = caught.value
    assert error.alternatives == ("reference", "blockwise")
    assert str(error) == (
        "attention implementation 'picky' cannot run this: q has 8 queries, supported are multiples of 16; "
        "choose 'reference' or 'blockwise' for it"
    )
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.alternatives) == (str(error), error.alternatives)
    assert require(resolved, dataclasses.replace(SPEC, q_len=32), "cuda").name == "picky"


@pytest.mark.usefixtures("picky")
def test_attention_never_falls_back():
    q = jnp.ones((1, 16, 2, 4))
    with pytest.raises(KernelUnsupported, match="platform is cpu, supported is gpu"):
        attention(q, q, q, impl="picky", scale=1.0)
    with pytest.raises(ImportError, match="no_such_package"):
        attention(q, q, q, impl="absent", scale=1.0)


@pytest.mark.parametrize("name", implementations("attention"))
def test_types_that_nobody_takes(name):
    resolved = resolve("attention", name, "cpu")
    with pytest.raises(KernelUnsupported, match="q, k and v are int8, supported are float32"):
        require(resolved, dataclasses.replace(SPEC, dtype="int8"), "cpu")
    with pytest.raises(KernelUnsupported, match=r"bias is bool.*use kv_mask.*; no implementation takes it"):
        require(resolved, dataclasses.replace(SPEC, bias=(1, 1, 8, 8), bias_dtype="bool"), "cpu")


def test_spec_describes_the_arguments():
    q = jax.ShapeDtypeStruct((2, 5, 6, 16), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, 7, 3, 16), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((6, 1, 7), jnp.float32)
    spec = AttentionSpec.of(q, k, k, causal=True, kv_mask=None, bias=bias, scale=1)
    assert spec == AttentionSpec(2, 5, 7, 6, 3, 16, "bfloat16", True, False, (1, 6, 1, 7), "float32")


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": shape(5, 6, 16)}, r"q must be \(B, T, H, D\)"),
        ({"v": shape(2, 7, 3, 8)}, "k and v must have one shape"),
        ({"q": shape(3, 5, 6, 16)}, "must agree in batch"),
        ({"q": shape(2, 5, 6, 8)}, "must agree in batch.*head dimension"),
        ({"q": shape(2, 0, 6, 16)}, "no axis may be empty"),
        ({"q": shape(2, 5, 4, 16)}, "4 query heads are not a multiple of 3"),
        ({"q": shape(2, 5, 6, 16, dtype=jnp.bfloat16)}, "must have one dtype"),
        ({"kv_mask": shape(2, 5, dtype=jnp.bool_)}, r"kv_mask must be bool of shape \(2, 7\)"),
        ({"kv_mask": shape(2, 7)}, "kv_mask must be bool"),
        ({"bias": shape(2, 6, 5, 3)}, r"cannot be broadcast to \(B, H, T, S\) = \(2, 6, 5, 7\)"),
        ({"bias": shape(1, 1, 1, 1, 1)}, "cannot be broadcast"),
        ({"scale": float("nan")}, "finite Python number, got nan"),
        ({"scale": True}, "finite Python number, got True"),
    ],
)
def test_arguments_that_do_not_fit_together(changes, message):
    k = shape(2, 7, 3, 16)
    arguments = {
        "q": shape(2, 5, 6, 16),
        "k": k,
        "v": k,
        "kv_mask": None,
        "bias": None,
        "scale": 0.25,
    } | changes
    with pytest.raises(ValueError, match=message):
        AttentionSpec.of(causal=False, **arguments)


def test_a_learned_scale_is_refused_in_words():
    k, scale = shape(2, 7, 3, 16), jnp.ones(())
    with pytest.raises(ValueError, match="fold a learned scale into q"):
        AttentionSpec.of(k, k, k, causal=False, kv_mask=None, bias=None, scale=scale)


def loss(impl):
    def f(q, k, bias):
        return jnp.sum(attention(q, k, k, impl=impl, causal=True, bias=bias, scale=0.25))

    return f


def programs(impl):
    """Name -> (function, whether it holds a gradient), the ways a study uses an operation."""
    f = loss(impl)
    gradient = jax.grad(f, argnums=(0, 1, 2))

    def scanned(q, k, bias):
        return jax.lax.scan(lambda total, _: (total + f(q, k, bias), None), 0.0, None, length=3)[0]

    def branched(q, k, bias):
        return jax.lax.cond(q[0, 0, 0, 0] > 0, f, lambda q, k, bias: jnp.sum(q), q, k, bias)

    def vmapped(g):
        return lambda *arrays: jax.vmap(g)(*(x[None] for x in arrays))

    return {
        "plain": (f, False),
        "jit": (jax.jit(f), False),
        "scan": (scanned, False),
        "cond": (branched, False),
        "vmap": (vmapped(f), False),
        "grad": (gradient, True),
        "remat": (jax.grad(jax.checkpoint(f)), True),
        "vmap of grad": (vmapped(gradient), True),
        "grad of vmap": (jax.grad(lambda *arrays: jnp.sum(vmapped(f)(*arrays))), True),
        "grad of scan": (jax.grad(scanned), True),
    }


ARGUMENTS = (shape(2, 20, 4, 8), shape(2, 150, 2, 8), shape(4, 20, 150))


@pytest.mark.parametrize("way", programs("reference"))
@pytest.mark.parametrize("impl", implementations("attention"))
def test_kernel_name_is_in_jaxpr_and_lowered_text_and_no_other_is(impl, way):
    program, differentiated = programs(impl)[way]
    kernel = resolve("attention", impl, "cpu").kernel_name
    found = kernels_in(jax.make_jaxpr(program)(*ARGUMENTS))
    text = jax.jit(program).lower(*ARGUMENTS).as_text()
    functions = set(re.findall(r"func private @(attention\w*?)(?:_\d+)?\(", text))
    assert kernel in found
    assert found <= {kernel, f"{kernel}_backward"}
    assert functions == found
    if differentiated and impl != "reference":  # autodiff's half of the reference has the forward's name
        assert f"{kernel}_backward" in found


@pytest.mark.parametrize("impl", implementations("attention"))
def test_both_halves_of_a_gradient_carry_the_name(impl):
    """Forward and backward are two calls; each is named."""
    kernel = resolve("attention", impl, "cpu").kernel_name
    jaxpr = jax.make_jaxpr(jax.grad(loss(impl)))(*ARGUMENTS)
    named = [e.params["name"] for e in dispatch.equations(jaxpr) if e.params.get("name") in kernel_names()]
    assert len(named) == 2
    assert all(name.startswith(kernel) for name in named)


def test_a_program_without_a_kernel_has_none():
    q = jnp.ones((1, 8, 2, 4))
    plain = jax.make_jaxpr(jax.jit(lambda q: jax.nn.dot_product_attention(q, q, q)))(q)
    assert kernels_in(plain) == set()
    both = jax.make_jaxpr(
        lambda q: (
            attention(q, q, q, impl="reference", scale=1.0) + attention(q, q, q, impl="flash", scale=1.0)
        )
    )(q)
    assert kernels_in(both) == {"attention_reference", "attention_blockwise"}
    assert kernels_in(both.jaxpr) == kernels_in(both)


def test_kernels_in_wants_a_jaxpr():
    with pytest.raises(TypeError, match=r"expected a jaxpr, as from jax.make_jaxpr\(f\)"):
        kernels_in(lambda x: x)
