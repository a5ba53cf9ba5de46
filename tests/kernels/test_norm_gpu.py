"""The norm kernels for GPUs, on a machine without one: lowered, compiled, and what was asked of the device."""

import dataclasses
import functools
import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from rowwise_oracle import differences, norm_oracle, run_norm

from jaxablate_kernels import dispatch, load, rms_norm
from jaxablate_kernels.norm import pallas_gpu
from jaxablate_kernels.norm.cases import CASES, LARGE, Case
from jaxablate_kernels.norm.pallas_config import WIDEST, Config, candidates, heuristic

cuda = pytest.importorskip("cuda")

pytestmark = pytest.mark.filterwarnings("error")

BY_NAME = {case.name: case for case in (*CASES, *LARGE)}
DEVICES = tuple(device.kind for device in cuda.DEVICES.values())


def program_for(case, device):
    """Forward and backward of a case as a GPU would run it, and abstract arguments."""
    spec = case.spec
    x = jax.ShapeDtypeStruct((*case.lead, case.dim), case.dtype)
    weight = jax.ShapeDtypeStruct((case.dim,), case.weight_dtype)
    arrays = (x, x if spec.residual else None, weight, weight if spec.bias_dtype else None)
    f = functools.partial(
        pallas_gpu.norm, kind=case.kind, eps=case.eps, eps_at=case.eps_at, config=heuristic(spec, device)
    )

    def forward_and_gradients(arrays, cotangents):
        y, pullback = jax.vjp(f, *arrays)
        return y, pullback(cotangents)

    return forward_and_gradients, (arrays, (x, arrays[1]))


@pytest.mark.parametrize("name", ["ctclip_add_layer", "width_129", "width_16384", "one_feature", "all_low"])
def test_lowers_for_cuda_by_name(name):
    program, arguments = program_for(BY_NAME[name], DEVICES[0])
    assert [kernel.name for kernel in cuda.kernels(program, *arguments)] == [
        "norm_pallas",
        "norm_pallas_backward",
    ]


def test_lowers_for_cuda_under_vmap_and_in_a_shard_map_that_checks_types():
    program, ((x, residual, scale, bias), cotangents) = program_for(BY_NAME["bert"], DEVICES[0])
    members = jax.tree.map(lambda a: jax.ShapeDtypeStruct((3, *a.shape), a.dtype), (x, residual, cotangents))

    def cohort(x, residual, cotangents, scale, bias):
        return jax.vmap(lambda x, r, c: program((x, r, scale, bias), c))(x, residual, cotangents)

    assert len(cuda.kernels(cohort, *members, scale, bias)) == 2

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = P(None, "data")
    sharded = jax.shard_map(
        lambda *a: program(a[:4], a[4:])[0],
        mesh=mesh,
        in_specs=(rows, rows, P(), P(), rows, rows),
        out_specs=rows,
        check_vma=True,
    )
    jaxpr = jax.make_jaxpr(sharded)(x, residual, scale, bias, *cotangents)
    assert dispatch.kernels_in(jaxpr) == {"norm_pallas", "norm_pallas_backward"}


# A width that is a power of two and one that is not, both types, with and without sums in registers.
COMPILED = ("ctclip_add_layer", "tinystories_batch_64", "add_layer_4096", "width_129", "width_16384")


def compile_all(cases, capability):
    pytest.importorskip("triton")
    device = cuda.DEVICES[capability]
    for case in cases:
        program, arguments = program_for(case, device.kind)
        forward, backward = cuda.compiled_kernels(program, *arguments, capability=capability)
        assert (forward.name, backward.name) == ("norm_pallas", "norm_pallas_backward")
        assert cuda.over_budget(forward, registers=64) == [], case.name
        assert cuda.over_budget(backward) == [], case.name
        # All programs of the backward pass run at a time: a second wave of a few would take as long again.
        threads, registers = 32 * backward.num_warps, -(-backward.registers // 8) * 8
        at_a_time = device.cores * (64 * 1024 // (threads * registers))
        assert backward.grid[0] <= at_a_time, (case.name, backward.registers, backward.grid)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_without_spills(capability):
    compile_all([BY_NAME[name] for name in COMPILED], capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_all_cases_compile_without_spills(capability):
    compile_all(BY_NAME.values(), capability)


@pytest.mark.parametrize("device", [*DEVICES, "something else", "cpu"])
def test_candidates_begin_with_the_heuristic_and_differ(device):
    for case in BY_NAME.values():
        found = candidates(case.spec, device)
        assert found[0] == heuristic(case.spec, device)
        assert len(set(found)) == len(found) > 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rows": 3}, "rows must be a power of two, got 3"),
        ({"backward_warps": 0}, "backward_warps must be a power of two, got 0"),
        ({"groups": 0}, "groups must be at least 1, got 0"),
        ({"stages": 3}, "stages must be 1 or 2, got 3"),
    ],
)
def test_configs_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Config(4, 4, 4, 4, 10, 1), **changes)


def test_all_cases_are_supported_where_they_are_meant_to_run():
    assert all(load("norm", "pallas").supports(case.spec, "gpu") is None for case in BY_NAME.values())
    assert max(case.dim for case in CASES) == max(WIDEST.values())


def test_every_case_is_accepted_by_shape_alone():
    """A plan asks for memory before there are arrays."""
    for case in BY_NAME.values():
        program, arguments = program_for(case, DEVICES[0])
        (y, _), (dx, *_) = jax.eval_shape(program, *arguments)
        assert y.shape == dx.shape == (*case.lead, case.dim)


TRITON = Case("triton", (13,), 50)


def test_triton_kernels_equal_the_oracle(tmp_path, child_env):
    pytest.importorskip("triton")
    i = TRITON.inputs()
    np.savez(tmp_path / "inputs.npz", x=i.x, scale=i.scale, dy=i.dy, eps=TRITON.eps)
    script = Path(__file__).with_name("triton_interpreter.py")
    command = [sys.executable, script, tmp_path / "inputs.npz", tmp_path / "outputs.npz"]
    subprocess.run(command, check=True, env=child_env | {"TRITON_INTERPRET": "1"})
    with np.load(tmp_path / "outputs.npz") as file:
        found = dict(file)
    assert differences(found, norm_oracle(TRITON)) == {}
    assert set(differences(found | {"dx": found["y"]}, norm_oracle(TRITON))) == {"dx"}  # the control


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_triton_kernels_compile(capability, dtype):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from jaxablate_kernels.norm import triton_kernels

    sizes = {"COUNT": 4096, "DIM": 512, "EPS": 1e-5, "ROWS": 4, "WIDTH": 512}
    arrays = {"x": dtype, "scale": "fp32", "mean_square": "fp32", "y": dtype, "dy": dtype, "dx": dtype}
    for kernel, more in ((triton_kernels.rms_forward, {}), (triton_kernels.rms_backward, {"STEPS": 8})):
        names = [name for name in kernel.arg_names if not name.isupper()]
        signature = {name: f"*{arrays.get(name, 'fp32')}" for name in names}
        constants = sizes | more
        source = triton.compiler.ASTSource(
            kernel,
            signature | dict.fromkeys(constants, "constexpr"),
            constants,
            {(at,): [["tt.divisibility", 16]] for at in range(len(names))},
        )
        options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert "ld.global.v4" in compiled.asm["ptx"]  # 16 bytes at a time
        assert "atom" not in compiled.asm["ptx"]


HAS_JAX_TRITON = importlib.util.find_spec("jax_triton") is not None


@pytest.mark.skipif(HAS_JAX_TRITON, reason="jax-triton is installed")
def test_triton_without_its_package_says_what_to_install():
    with pytest.raises(ImportError, match="pip install jax-triton"):
        load("norm", "triton")


@pytest.mark.skipif(not HAS_JAX_TRITON, reason="jax-triton is an extra")
@pytest.mark.parametrize(
    "platform, changes, message",
    [
        ("cpu", {}, "platform is cpu, supported is gpu"),
        ("gpu", {"kind": "layer"}, "kind is layer, supported is rms"),
        ("gpu", {"residual": True}, "residual is given, supported is none"),
        ("gpu", {"eps_at": "outside"}, "eps_at is outside, supported is inside"),
        ("gpu", {"dim": 8193}, "x has 8193 features, supported are at most 8192"),
        ("gpu", {"scale_dtype": "float64"}, "scale is float64, supported are"),
    ],
)
def test_triton_says_what_it_cannot(platform, changes, message):
    supports = load("norm", "triton").supports
    assert message in supports(dataclasses.replace(TRITON.spec, **changes), platform)
    assert supports(TRITON.spec, "gpu") is None


@pytest.mark.skipif(not HAS_JAX_TRITON, reason="jax-triton is an extra")
def test_triton_is_in_the_program_by_name_also_of_a_cohort():
    i, call = TRITON.inputs(), load("norm", "triton").call
    f = functools.partial(call, kind="rms", eps=1e-5, eps_at="inside")
    gradient = jax.grad(lambda x, scale: jnp.sum(f(x, None, scale, None)[0]), argnums=(0, 1))
    jaxpr = jax.make_jaxpr(gradient)(i.x, i.scale)
    assert dispatch.kernels_in(jaxpr) == {"norm_triton", "norm_triton_backward"}
    for axes, scale in ((0, jnp.stack([i.scale, i.scale])), (None, i.scale)):
        cohort = jax.vmap(gradient, in_axes=(0, axes))
        x = jnp.stack([i.x, i.x])
        jaxpr = jax.make_jaxpr(cohort)(x, scale)
        assert dispatch.kernels_in(jaxpr) == {"norm_triton", "norm_triton_backward"}
        found = jax.eval_shape(cohort, x, scale)
        assert [array.shape for array in found] == [(2, *i.x.shape), (2, *i.scale.shape)]


@pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="tokamax is an extra")
@pytest.mark.parametrize("name", ["ctclip_layer", "tinystories", "bert", "one_row", "low_weights"])
def test_tokamax_is_right_and_named(name):
    case = BY_NAME[name]
    tokamax = load("norm", "tokamax")
    i = case.inputs()
    found = run_norm(case, tokamax.call)
    single = {name: value for name, value in found.items() if value.dtype == np.float32}
    expected = norm_oracle(case)
    only = dataclasses.replace(expected, values={name: expected.values[name] for name in single})
    assert differences(single, only) == {}
    jaxpr = jax.make_jaxpr(functools.partial(rms_norm, eps=1e-5, impl="tokamax"))(i.x, i.scale)
    assert dispatch.kernels_in(jaxpr) == {"norm_tokamax"}
    assert "eps_at is outside" in tokamax.supports(dataclasses.replace(case.spec, eps_at="outside"), "gpu")
