"""How programs are compiled, and where compiled ones are kept."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import jax


def keep_compiled(cache: Path) -> None:
    """Keeps compiled programs below `cache` for later processes, unless the user has chosen a place."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def reproducible(platform: str) -> dict[str, str | bool] | None:
    """`compiler_options` of a training step: the same bits on every run of the compiled program.

    On a GPU XLA otherwise adds up the gradient of a gather (an embedding, a table of position biases) with
    atomics, in whatever order they come. On a CPU there is nothing to ask for. Autotuned matrix products may
    still differ between two compilations; a program that is kept (`keep_compiled`) is not compiled twice.
    """
    return {"xla_gpu_exclude_nondeterministic_ops": True} if platform == "gpu" else None


Effort = Literal["least", "little"]  # of the compiler


@functools.cache
def quick(effort: Effort = "least") -> dict[str, str | bool]:
    """`compiler_options` for a program that runs a few times on a CPU: compiled fast, and not to be fast.

    Without LLVM's optimiser and XLA's fusion emitters a CT-CLIP step compiled in 1.6 s instead of 5.8 (jax
    0.10.2). An option that another version of XLA does not have is left out.

    Args:
      effort: `little` is for a program of few operations on many numbers, whose loops LLVM then vectorises: 26 million
        initial weights are drawn in 0.3 s instead of 1.7, and the program is compiled in 0.8 s instead of 0.4.
        The two may round differently, since a product and a sum then become one operation.
    """
    known: dict[str, str | bool] = {}
    for name, value in (
        ("xla_backend_optimization_level", {"least": "0", "little": "1"}[effort]),
        ("xla_cpu_use_fusion_emitters", False),
        # Threads that share one program repeat some of each other's work, and there are others to compile.
        ("xla_cpu_parallel_codegen_split_count", "1"),
    ):
        try:
            jax.jit(lambda: 0.0).lower().compile(compiler_options={name: value})
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
        else:
            known[name] = value
    return known
