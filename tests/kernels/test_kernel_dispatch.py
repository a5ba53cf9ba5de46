"""A name runs or raises, and the program says which kernel it holds."""

import dataclasses
import functools
import importlib.util
import pickle
import re
import sys
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
    gated,
    implementations,
    kernel_names,
    kernels_in,
    load,
    operations,
    require,
    resolve,
    rms_norm,
)
from jaxablate_kernels.attention import AttentionSpec
from jaxablate_kernels.devices import compiling_for, target

pytestmark = pytest.mark.filterwarnings("error")

EACH = [(op, name) for op in operations() for name in implementations(op)]
PLATFORMS = ("cpu", "gpu", "tpu")
# What an implementation of this name needs beyond jax: how Python and how pip call it.
NEEDS = {"tokamax": ("tokamax", "tokamax"), "triton": ("jax_triton", "jax-triton")}


def is_installed(name: str) -> bool:
    return name not in NEEDS or importlib.util.find_spec(NEEDS[name][0]) is not None


@pytest.mark.parametrize("op, name", EACH)
def test_table_agrees_with_the_module_it_names(op, name):
    resolved = resolve(op, name, "cpu")
    assert resolved == Resolved(op, requested=name, name=name, kernel_name=f"{op}_{name}")
    if is_installed(name):
        implementation = load(op, name)
        assert (implementation.op, implementation.name) == (op, name)
        assert implementation.kernel_name == resolved.kernel_name
    else:
        with pytest.raises(ImportError) as caught:
            load(op, name)
        assert str(caught.value) == (
            f"{op} implementation {name!r} needs a package that is not installed: "
            f"pip install {NEEDS[name][1]}"
        )


@pytest.mark.parametrize("package, pip_name", NEEDS.values())
def test_a_missing_package_is_named_as_pip_calls_it(monkeypatch, package, pip_name):
    """Whether it is here or not; and an import of ours that fails is not taken for it."""
    module = f"needs_{package}"
    monkeypatch.setitem(dispatch._IMPLEMENTATIONS["norm"], module, module)
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    importer = _Importer({f"jaxablate_kernels.norm.{module}": f"import {package}.something"})
    monkeypatch.setattr(sys, "meta_path", [importer, *sys.meta_path])
    with pytest.raises(
        ImportError, match=f"norm implementation '{module}' needs .*: pip install {pip_name}$"
    ):
        load("norm", module)
    importer.sources[f"jaxablate_kernels.norm.{module}"] = "import jaxablate_kernels.misspelt"
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'jaxablate_kernels\.misspelt'"):
        load("norm", module)


class _Importer:
    """Imports modules from texts."""

    def __init__(self, sources):
        self.sources = sources

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in self.sources else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        exec(self.sources[module.__name__], module.__dict__)


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


def test_flash_on_a_gpu_is_the_kernel():
    assert resolve("attention", "flash", "gpu").name == "pallas"


def test_a_new_kernel_is_one_entry_of_the_table(monkeypatch):
    monkeypatch.setitem(dispatch._ALGORITHMS["attention"]["flash"], "gpu", "reference")
    assert resolve("attention", "flash", "gpu").name == "reference"
    assert resolve("attention", "flash", "cpu").name == "blockwise"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("attention", "blockwize", "cpu"), "'blockwize'; did you mean 'blockwise'.*valid: reference"),
        (("attention", "falsh", "cpu"), "did you mean 'flash'"),
        (("attention", "zzz", "cpu"), r"'zzz' \(valid: reference, blockwise, .*, flash, auto\)"),
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
    """Two implementations more: one takes multiples of 16 on GPUs only; the other is not installed."""
    module = types.ModuleType("picky")

    def supports(spec, platform):
        if platform != "gpu":
            return f"platform is {platform}, supported is gpu"
        return None if spec.q_len % 16 == 0 else f"q has {spec.q_len} queries, supported are multiples of 16"

    module.IMPLEMENTATION = dispatch.Implementation(  # pyright: ignore[reportAttributeAccessIssue]
        "attention", "picky", "attention_picky", supports, attention
    )
    monkeypatch.setitem(sys.modules, "jaxablate_kernels.attention.picky", module)
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    importer = _Importer({"jaxablate_kernels.attention.absent": "import jax_triton"})
    monkeypatch.setattr(sys, "meta_path", [importer, *sys.meta_path])
    table = {"reference": "reference", "blockwise": "blockwise", "picky": "picky", "absent": "absent"}
    monkeypatch.setitem(dispatch._IMPLEMENTATIONS, "attention", table)
    monkeypatch.setitem(dispatch._AUTO_ORDER, "gpu", ("absent", "picky", "blockwise", "reference"))


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
    with pytest.raises(ImportError, match=r"'absent' needs .*: pip install jax-triton"):
        attention(q, q, q, impl="absent", scale=1.0)


MULTIPLE = dataclasses.replace(SPEC, q_len=32)


@pytest.mark.usefixtures("picky")
@pytest.mark.parametrize(
    "platform, spec, name",
    [
        ("gpu", MULTIPLE, "picky"),
        ("cuda", MULTIPLE, "picky"),
        ("gpu", SPEC, "blockwise"),
        ("cpu", MULTIPLE, "blockwise"),
    ],
)
def test_auto_without_measurements_is_the_first_that_takes_the_problem(monkeypatch, platform, spec, name):
    monkeypatch.setattr(dispatch.tuning, "fastest", lambda *_: ())
    resolved = resolve("attention", "auto", platform, spec=spec, device="Imagined 1")
    assert resolved == Resolved("attention", "auto", name, f"attention_{name}")
    assert require(resolved, spec, platform).name == name


@pytest.mark.usefixtures("picky")
@pytest.mark.parametrize(
    "measured, name",
    [
        (("reference", "picky"), "reference"),
        (("picky", "reference"), "picky"),
        (("absent", "removed_since", "reference"), "reference"),  # what is not to be had is passed over
        (("absent",), "picky"),
    ],
)
def test_auto_is_the_fastest_that_was_measured(monkeypatch, measured, name):
    asked = []
    monkeypatch.setattr(dispatch.tuning, "fastest", lambda *problem: asked.append(problem) or measured)
    assert resolve("attention", "auto", "gpu", spec=MULTIPLE, device="Imagined 1").name == name
    assert asked == [("attention", MULTIPLE, "Imagined 1")]


@pytest.mark.usefixtures("picky")
def test_auto_does_not_pass_over_an_implementation_that_is_broken(monkeypatch):
    """Only what is not installed or does not take the problem; an import of ours that fails is a bug."""
    table = {"reference": "reference", "misspelt": "misspelt"}
    monkeypatch.setitem(dispatch._IMPLEMENTATIONS, "attention", table)
    monkeypatch.setattr(dispatch.tuning, "fastest", lambda *_: ("misspelt", "reference"))
    with pytest.raises(ModuleNotFoundError, match="misspelt"):
        resolve("attention", "auto", "gpu", spec=MULTIPLE, device="Imagined 1")


@pytest.mark.parametrize("op", operations())
def test_auto_needs_the_problem(op):
    message = f"{op} implementation 'auto' chooses per problem and cannot stand in a config that must name its kernels"
    with pytest.raises(ValueError, match=message) as caught:
        resolve(op, "auto", "gpu")
    assert "; name one of reference, " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_auto_that_finds_nobody_says_why():
    with pytest.raises(KernelUnsupported) as caught:
        resolve("attention", "auto", "cpu", spec=dataclasses.replace(SPEC, dtype="int8"), device="cpu")
    assert str(caught.value).startswith(
        "attention implementation 'auto' cannot run this: q, k and v are int8"
    )
    assert str(caught.value).endswith("no implementation takes it")


def test_the_order_of_auto_names_implementations_and_ends_with_what_takes_everything():
    for platform in PLATFORMS:
        order = dispatch._AUTO_ORDER[platform]
        assert order[-1] == "reference"
        assert set(order) <= {name for _, name in EACH}


def test_auto_is_a_name_that_the_function_takes():
    q = jnp.ones((1, 16, 2, 4))
    jaxpr = jax.make_jaxpr(lambda q: attention(q, q, q, impl="auto", scale=1.0))(q)
    assert kernels_in(jaxpr) <= {f"attention_{name}" for name in implementations("attention")}
    assert len(kernels_in(jaxpr)) == 1


FLASH = functools.partial(attention, impl="flash", scale=1.0)


def kernels_of(jaxpr):
    return sorted(kernels_in(jaxpr))


def test_a_program_can_be_traced_for_a_device_that_is_not_here():
    q = jax.ShapeDtypeStruct((1, 64, 2, 32), jnp.bfloat16)

    def program(q):
        return FLASH(q, q, q)

    with compiling_for("cuda", "NVIDIA H200"):
        assert target() == ("gpu", "NVIDIA H200")
        assert kernels_of(jax.make_jaxpr(program)(q)) == ["attention_pallas"]
    assert target() == ("cpu", "cpu")
    assert kernels_of(jax.make_jaxpr(program)(q)) == ["attention_blockwise"]


def test_what_jit_traced_outside_is_not_taken_inside_nor_the_other_way_round():
    """Entered after tracing the context says nothing, and it leaves nothing behind."""
    q = jax.ShapeDtypeStruct((1, 64, 2, 32), jnp.bfloat16)
    jitted = jax.jit(lambda q: FLASH(q, q, q))
    outside = jitted.trace(q)
    with compiling_for("gpu", "NVIDIA H200"):
        assert kernels_of(jitted.trace(q).jaxpr) == ["attention_pallas"]
        assert kernels_of(outside.jaxpr) == ["attention_blockwise"]
    assert kernels_of(jitted.trace(q).jaxpr) == ["attention_blockwise"]


def test_a_mesh_of_other_devices_says_what_they_are():
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="cuda")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=h200)
    q = jax.ShapeDtypeStruct((1, 64, 2, 32), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        assert target() == ("gpu", "NVIDIA H200")
        assert kernels_of(jax.make_jaxpr(lambda q: FLASH(q, q, q))(q)) == ["attention_pallas"]
    assert target() == ("cpu", "cpu")


@pytest.mark.parametrize("module, call", [
    ("norm.pallas_gpu", lambda x: rms_norm(x, jnp.ones(64), eps=1e-5, impl="pallas")),
    ("gated.pallas_gpu", lambda x: gated(x.reshape(8, 2, 32), kind="swiglu", impl="pallas")),
    ("attention.pallas_gpu", lambda x: FLASH(*[x.reshape(1, 8, 2, 32)] * 3)),
])  # fmt: skip
def test_blocks_are_chosen_for_the_device_that_is_compiled_for(monkeypatch, module, call):
    asked = []
    module = importlib.import_module(f"jaxablate_kernels.{module}")
    monkeypatch.setattr(module.tuning, "config_for", lambda op, name, spec, device, cls: asked.append(device))
    with compiling_for("gpu", "NVIDIA H200"):
        jax.make_jaxpr(call)(jnp.ones((8, 64)))
    assert set(asked) == {"NVIDIA H200"}


# The implementations of attention that run on a CPU, without a package of their own.
ON_CPU = ("reference", "blockwise")


@pytest.mark.parametrize("name", ["pallas", "cudnn"])
def test_what_is_written_for_gpus_refuses_a_cpu_in_words(name):
    half = dataclasses.replace(SPEC, dtype="bfloat16")
    with pytest.raises(KernelUnsupported, match="platform is cpu, supported is gpu; choose 'reference' or"):
        require(resolve("attention", name, "cpu"), half, "cpu")
    assert require(resolve("attention", name, "gpu"), half, "gpu").name == name


@pytest.mark.parametrize("name", [name for name in implementations("attention") if name not in NEEDS])
def test_types_that_nobody_takes(name):
    resolved, platform = resolve("attention", name, "cpu"), "cpu" if name in ON_CPU else "gpu"
    half = dataclasses.replace(SPEC, dtype="bfloat16")
    for spec, reason in [
        (dataclasses.replace(SPEC, dtype="int8"), "q, k and v are int8, supported"),
        (dataclasses.replace(half, bias=(1, 1, 8, 8), bias_dtype="bool"), "bias is bool, supported"),
    ]:
        with pytest.raises(KernelUnsupported, match=f"{reason}.*; no implementation takes it") as caught:
            require(resolved, spec, platform)
        assert "\n" not in str(caught.value)


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
@pytest.mark.parametrize("impl", ON_CPU)
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


@pytest.mark.parametrize("impl", ON_CPU)
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
