"""The strict modes of conftest.py do bite."""

from __future__ import annotations

import importlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import pytest


def test_eight_devices_on_the_cpu():
    assert [device.platform for device in jax.devices()] == ["cpu"] * 8


def test_rank_promotion_raises():
    with pytest.raises(ValueError, match="rank_promotion"):
        _ = jnp.ones((2, 3)) + jnp.ones(3)


@pytest.mark.strict_dtypes
def test_dtype_promotion_raises_where_asked():
    with pytest.raises(Exception, match="no available implicit dtype promotion"):
        _ = jnp.ones(3, jnp.bfloat16) + jnp.ones(3, jnp.float32)


def test_dtype_promotion_is_jax_own_elsewhere():
    assert (jnp.ones(3, jnp.bfloat16) + jnp.ones(3, jnp.float32)).dtype == jnp.float32


def test_a_wrong_shape_is_caught_in_nn():
    from jaxablate.nn.resample import halve

    halve(jnp.ones((1, 4, 2)))
    with pytest.raises(jaxtyping.TypeCheckError):
        halve(jnp.ones((4, 2)))


def test_a_wrong_shape_is_caught_in_a_flax_module():
    from jaxablate.nn.attention import Attention

    module = Attention(impl="reference", heads=2, head_dim=4)
    jax.eval_shape(module.init, jax.random.key(0), jnp.ones((2, 3, 8)))
    with pytest.raises(jaxtyping.TypeCheckError):
        jax.eval_shape(module.init, jax.random.key(0), jnp.ones((2, 8)))


@pytest.mark.parametrize("module", ["jaxablate.studies.ctclip.config", "jaxablate_kernels.attention"])
def test_the_other_packages_are_checked_too(module):
    spec = importlib.import_module(module).__spec__
    assert spec is not None
    assert type(spec.loader).__module__.startswith("jaxtyping")


@pytest.mark.slow
def test_many_steps_in_flight_do_not_hang():
    """Without NPROC in conftest.py jax 0.10 aborts here after 40 s."""
    mesh = jax.make_mesh((8,), ("data",))
    rows = jax.device_put(jnp.ones((64, 8)), jax.NamedSharding(mesh, jax.P("data")))
    weights = jax.device_put(jnp.eye(8), jax.NamedSharding(mesh, jax.P()))
    step = jax.jit(lambda w, x: w - 0.1 * jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w))
    for _ in range(50):
        weights = step(weights, rows)
    assert jnp.isfinite(weights).all()


def test_a_child_sees_one_device_and_no_strict_modes(child_env):
    code = "import jax, jax.numpy as jnp; print(jax.device_count(), (jnp.ones((2, 3)) + jnp.ones(3)).shape)"
    child = subprocess.run(
        [sys.executable, "-c", code], env=child_env, capture_output=True, text=True, check=True
    )
    assert child.stdout.split("\n")[0] == "1 (2, 3)"
