"""Every kernel test runs with JAX's strict modes, checked annotations and several host devices."""

import os
import sys
from pathlib import Path

# Before jax starts its backend; a conftest above this one may have asked already.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

sys.path.insert(0, str(Path(__file__).parent))  # for attention_oracle, under any import mode

import jax
import jaxtyping
import pytest

# Shapes and dtypes in the annotations are checked here, and only here.
jaxtyping.install_import_hook("jaxablate_kernels", "beartype.beartype")


@pytest.fixture(autouse=True)
def strict_modes():
    """No implicit dtype or rank promotion inside the kernels or the tests."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
