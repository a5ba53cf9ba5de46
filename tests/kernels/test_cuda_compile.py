"""Every Pallas kernel compiles to machine code for A100, H200 and B200, within the resources of the chip.

Needs the triton package (`pip install triton`), and no GPU.  An ordinary run compiles the studies' shapes;
with JAXABLATE_CASES=300 in the environment every case, in its own and in half precision.
"""

import dataclasses
import os
import re

import cuda
import cuda_problems
import jax
import jax.numpy as jnp
import pytest
from cuda_problems import Problem
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxablate_kernels.attention.pallas_config import Config as AttentionConfig

pytest.importorskip("triton", reason="compiling for GPUs needs the triton package: pip install triton")
pytestmark = pytest.mark.filterwarnings("error")

# What a kernel may use.  255 registers are all there are.
BUDGET = {"registers": 255, "spills": 0}

# Bytes that a kernel of a problem spills nevertheless. All are the triton package's for 10.0, whose ptxas stopped
# at 80 or 96 of 255 registers; XLA's own compiler (jax 0.12, `deviceless.py b200 --group=CASES`) spills none there.
SPILLS = {
    ("attention-ctclip_spatial_plain-bfloat16", 100): 40,
    ("attention-grouped-bfloat16", 100): 4,
    ("attention-all_other_kinds-float32", 100): 8,
}

# Of each path and each way through a kernel one, at the studies' sizes.
ORDINARY = {
    "attention": ("ctclip_spatial", "ctclip_temporal", "tinystories", "burgers_256", "bert_base"),
    "norm": ("ctclip_add_layer", "tinystories", "width_4096"),
    "gated": ("ctclip_geglu", "tinystories"),
}

ALL = int(os.environ.get("JAXABLATE_CASES", "0")) >= 300


def problems() -> list[Problem]:
    """The ordinary ones, or all, each once."""
    found = []
    for op in cuda_problems.operations():
        if ALL:
            found += [*cuda_problems.problems(op, "CASES", "bfloat16"), *cuda_problems.problems(op, "CASES")]
        else:
            found += [cuda_problems.problem(op, case, "bfloat16") for case in ORDINARY[op]]
    return list({problem.id: problem for problem in found}.values())


@pytest.mark.parametrize("capability", cuda.DEVICES)
@pytest.mark.parametrize("problem", problems(), ids=lambda problem: problem.id)
def test_kernels_compile_within_budget(problem: Problem, capability: int):
    fn = problem.program(cuda.DEVICES[capability].kind)
    compiled = cuda.compiled_kernels(fn, problem.arrays, problem.constants, capability=capability)
    assert len(compiled) >= 2  # forward and backward
    assert all(kernel.code_bytes > 0 for kernel in compiled)
    budget = {**BUDGET, "spills": SPILLS.get((problem.id, capability), BUDGET["spills"])}
    report = [line for kernel in compiled for line in cuda.over_budget(kernel, **budget)]
    assert not report, "; ".join(report)


# Of Triton IR and of the machine's own text: what adds to memory in whatever order programs come.
ATOMIC = re.compile(r"\btt\.atomic\w*|\batomic_\w+|\bred\.\w+")


@pytest.mark.parametrize("problem", problems(), ids=lambda problem: problem.id)
def test_kernels_have_no_atomics(problem: Problem):
    """Sums are the same bits each time."""
    fn = problem.program(cuda.DEVICES[90].kind)
    for kernel in cuda.kernels(fn, problem.arrays, problem.constants):
        assert not ATOMIC.findall(kernel.text), kernel.name


def test_an_atomic_is_noticed():
    """The control: a kernel that adds to its output."""

    def add(x_ref, y_ref):
        plgpu.atomic_add(y_ref, (0,), x_ref[0])

    def program(x):
        call = pl.pallas_call(
            add, out_shape=jax.ShapeDtypeStruct((16,), x.dtype), compiler_params=plgpu.CompilerParams()
        )
        return call(x)

    (kernel,) = cuda.kernels(program, jax.ShapeDtypeStruct((16,), jnp.float32))
    assert ATOMIC.findall(kernel.text)


def test_a_config_that_is_too_large_is_reported():
    """The control: far too many rows for two warps, in a kernel that is well within its budget otherwise."""
    problem = cuda_problems.problem("attention", "burgers_256", "bfloat16")
    config = AttentionConfig("streaming", 128, 128, 2, 8, 16, 16, 4, 1)

    def forward(arrays):
        return problem.call(arrays, {"kv_mask": None, "segment_ids": None, "rotary": None}, config)

    (kernel,) = cuda.compiled_kernels(forward, problem.arrays, capability=80)
    report = cuda.over_budget(kernel, **BUDGET)
    assert any("shared_bytes" in line and "at most 166912" in line for line in report)
    assert any("spills" in line for line in report)


def test_what_is_no_triton_is_refused():
    problem = cuda_problems.problem("gated", "tinystories")
    kernel, *_ = cuda.kernels(problem.program(cuda.DEVICES[90].kind), problem.arrays, problem.constants)
    with pytest.raises(cuda.CompilationFailed, match=f"{kernel.name} for sm_90"):
        cuda.compile(dataclasses.replace(kernel, text="module {"), 90)
