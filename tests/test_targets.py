"""Compiling for a GPU without one: what a target says of itself, and that XLA takes it."""

from __future__ import annotations

import dataclasses
import importlib.util
import re

import pytest

from jaxablate import targets
from jaxablate.errors import UserError
from jaxablate_gpus import Gpu, find, peak_flops

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
needs_cuda_compiler = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, PLUGINS)),
    reason="needs jax's CUDA plugin: pip install 'jax[cuda13]'",
)


@pytest.mark.parametrize("target", targets.TARGETS.values(), ids=lambda target: target.name)
def test_a_target_describes_one_device_in_every_place(target: Gpu):
    text = targets.description(target)
    assert f'"{target.kind}"' in text
    assert f"device_memory_size: {target.memory_bytes}\n" in text
    assert f"shared_memory_per_block_optin: {target.shared_bytes}\n" in text
    assert text.count("{") == text.count("}")
    assert target.name.upper() in target.kind
    assert peak_flops(target.kind, "bfloat16") is not None


def test_each_newer_device_has_more_memory_and_bandwidth():
    """A typing error in a number of nine digits is seen in its order."""
    devices = [targets.find(name) for name in ("a100", "h100", "h200", "b200")]
    for what in ("memory_bandwidth", "capability", "shared_bytes", "l2_bytes"):
        values = [getattr(device, what) for device in devices]
        assert values == sorted(values), what
    assert targets.find("l4").memory_bytes < 24 * 2**30 < devices[0].memory_bytes
    assert all(79 * 2**30 <= device.memory_bytes <= 192e9 for device in devices)
    assert all(device.shared_bytes == device.shared_bytes_per_core - 1024 for device in devices)


def test_a_field_more_or_less_is_seen_in_the_description():
    """The control: the description follows the fields."""
    target = targets.find("h200")
    smaller = dataclasses.replace(target, shared_bytes=1, l2_bytes=2)
    differing = set(targets.description(target).splitlines()) ^ set(targets.description(smaller).splitlines())
    assert {re.sub(r":.*", "", line).strip() for line in differing} == {
        "shared_memory_per_block_optin",
        "l2_cache_size",
    }


@pytest.mark.parametrize(
    "kind, name", [("NVIDIA L4", "l4"), ("NVIDIA GB200", "b200"), ("NVIDIA H200 NVL", "h200")]
)
def test_a_device_is_known_by_its_kind(kind: str, name: str):
    known = find(kind)
    assert known is not None and known.name == name


@pytest.mark.parametrize("kind", ["NVIDIA L40", "NVIDIA L40S", "NVIDIA H20", "cpu"])
def test_a_device_is_not_taken_for_one_with_a_shorter_name(kind: str):
    assert find(kind) is None


def test_an_unknown_target_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"target 'h20' is unknown: did you mean 'h200'\?"):
        targets.target_mesh("h20")


def test_without_the_cuda_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"target 'h200' needs jax's CUDA compiler.*pip install"):
        targets.target_mesh("h200")


@needs_cuda_compiler
@pytest.mark.parametrize("name", targets.TARGETS)
def test_a_program_compiles_for_a_mesh_of_devices_that_are_not_there(name: str):
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = targets.target_mesh(name, {"data": 2, "tensor": 2})
    assert dict(mesh.shape) == {"data": 2, "tensor": 2}
    assert {device.device_kind for device in mesh.devices.flat} == {targets.find(name).kind}
    split = NamedSharding(mesh, PartitionSpec("data", "tensor"))
    x = jax.ShapeDtypeStruct((512, 256), jnp.float32, sharding=split)
    compiled = jax.jit(lambda x: jnp.sum(x * x)).lower(x).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == 512 * 256 * 4 / 4  # of one device
    assert "all-reduce" in compiled.as_text()


@needs_cuda_compiler
def test_a_training_step_adds_up_gradients_in_a_fixed_order():
    """Without the option XLA uses atomics in the gradient of a gather: the negative control."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxablate import xla

    def gradient(table, rows, cotangent):
        return jax.vjp(lambda table: table[rows], table)[1](cotangent)[0]

    whole = NamedSharding(targets.target_mesh("h200"), PartitionSpec())
    shapes = (((2209, 8), jnp.float32), ((576, 576), jnp.int32), ((576, 576, 8), jnp.float32))
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=whole) for shape, dtype in shapes]

    def sorts(platform: str) -> bool:
        options = xla.reproducible(platform)
        text = jax.jit(gradient, compiler_options=options).lower(*arrays).compile().as_text()
        return (
            re.search(r" sort\(|DeviceRadixSort", text) is not None
        )  # not the names of functions in its notes

    assert sorts("gpu")
    assert not sorts("cpu")


@needs_cuda_compiler
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_a_kernel_that_wants_too_much_shared_memory_is_refused_with_the_device_s_number():
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as pl_triton
    from jax.sharding import NamedSharding, PartitionSpec

    def product(size: int):
        def kernel(x_ref, y_ref, o_ref):
            o_ref[...] = x_ref[...] @ y_ref[...]

        return lambda x: pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((size, size), x.dtype),
            compiler_params=pl_triton.CompilerParams(num_warps=8, num_stages=1),
        )(x, x)

    def compile_for(name: str, size: int):
        mesh = targets.target_mesh(name)
        sharding = NamedSharding(mesh, PartitionSpec())
        x = jax.ShapeDtypeStruct((size, size), jnp.bfloat16, sharding=sharding)
        with jax.set_mesh(mesh):
            return jax.jit(product(size)).lower(x).compile()

    assert "__gpu$xla.gpu.triton" in compile_for("h200", 64).as_text()
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=f"Shared memory.*{targets.find('a100').shared_bytes}"
    ):
        compile_for("a100", 512)
