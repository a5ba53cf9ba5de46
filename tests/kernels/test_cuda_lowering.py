"""Every Pallas kernel lowers for CUDA, under its name, on a machine without a GPU and on every jax we support."""

import os

import cuda
import cuda_problems
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda_problems import Problem
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pl_triton

from jaxablate_kernels import dispatch, rms_norm

pytestmark = pytest.mark.filterwarnings("error")

# The studies' shapes, and the awkward ones too where all cases are asked for.
GROUPS = {"PAPER": "bfloat16"}
if int(os.environ.get("JAXABLATE_CASES", "0")) >= 300:
    GROUPS["SMALL"] = ""
PROBLEMS = [
    problem
    for op in cuda_problems.operations()
    for group, dtype in GROUPS.items()
    for problem in cuda_problems.problems(op, group, *([dtype] if dtype else []))
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.id)
def test_kernels_are_in_the_lowered_program_by_name(problem: Problem):
    device = cuda.DEVICES[90]
    fn = problem.program(device.kind)
    text = cuda.lower(fn, problem.arrays, problem.constants)
    forward = dispatch.kernel_name(problem.op, "pallas")
    for name in (forward, f"{forward}_backward"):
        assert f"@{name}(" in text  # the function that holds the kernel, which profiles show too
    names = [kernel.name for kernel in cuda.kernels(fn, problem.arrays, problem.constants)]
    assert len(names) >= 2
    assert all(name.startswith(forward) for name in names)
    assert any("backward" in name for name in names)
    assert all(f'"{name}"' in text for name in names)


def test_every_operation_with_a_pallas_implementation_has_problems_here():
    assert {problem.op for problem in PROBLEMS} == set(cuda_problems.operations()) != set()


def test_a_program_without_pallas_has_no_kernels():
    x, scale = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16,), jnp.float32)

    def plain(x, scale):
        return rms_norm(x, scale, eps=1e-6, impl="reference")

    assert cuda.kernels(plain, x, scale) == []
    assert "norm_reference" in cuda.lower(plain, x, scale)
    assert "norm_pallas" not in cuda.lower(plain, x, scale)


def test_what_triton_cannot_do_fails_at_lowering():
    """The control: a block that is no power of two runs when interpreted, and would fail on a GPU."""

    def double(x, interpret=False):
        return pl.pallas_call(
            lambda x_ref, o_ref: o_ref.__setitem__(..., x_ref[...] * 2),
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            compiler_params=pl_triton.CompilerParams(num_warps=1, num_stages=1),
            interpret=interpret,
        )(x)

    assert len(cuda.kernels(double, jnp.ones(4))) == 1
    np.testing.assert_array_equal(double(jnp.ones(3), interpret=True), 2.0)
    with pytest.raises(ValueError, match="power of 2"):
        cuda.lower(double, jnp.ones(3))
