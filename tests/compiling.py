"""How the programs of tests are compiled. Imports no jax: XLA reads its flags once, when jax starts."""

from __future__ import annotations

import importlib.metadata
import os

CHOICE = "JAXABLATE_TESTS_COMPILE"  # `fully`: as a user's programs are


def quickly() -> str:
    """Flags of XLA for programs that run a few times: compiled without its optimisers and LLVM's, or none.

    A file of tests took about half the processor time with them, where compiling was most of it (jax 0.10.2).
    """
    if os.environ.get(CHOICE) == "fully":
        return ""
    flags = ["--xla_backend_optimization_level=0"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")  # which later ones do not know, and abort
    return " ".join(flags)
