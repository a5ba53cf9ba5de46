"""Which device a program is traced for: it decides implementations, block sizes and warps."""

import contextlib
from collections.abc import Iterator

import jax

# The names JAX uses for the same platform in other places (`lowering_platforms`, `Device.platform`).
PLATFORM_ALIASES = {"cuda": "gpu", "rocm": "gpu"}

# One that JAX knows: it is part of the key under which `jax.jit` keeps what it traced.
_compiling_for = jax.make_user_context(None)


@contextlib.contextmanager
def compiling_for(platform: str, device_kind: str) -> Iterator[None]:
    """Trace for a device that need not be here, such as ``compiling_for("gpu", "NVIDIA H200")``.

    Enter it while tracing: around ``jax.jit(f).trace(...)``, ``.lower(...)`` or ``jax.make_jaxpr(f)(...)``.
    What was traced outside stays what it is, however it is lowered; a function under ``jax.jit`` is traced
    again inside.  With a mesh of the device (``jax.set_mesh``) it is not needed, see `target`.

    Args:
        platform: ``cpu``, ``gpu`` (or ``cuda``, ``rocm``) or ``tpu``.
        device_kind: a `jax.Device.device_kind`.
    """
    with _compiling_for((platform, device_kind)):
        yield


def target() -> tuple[str, str]:
    """(platform, device kind) of what is being traced for.

    These are what `compiling_for` says, else the devices of the mesh around (``jax.set_mesh``,
    ``jax.shard_map``), else JAX's first device.
    """
    if _compiling_for.value is not None:
        platform, kind = _compiling_for.value
    else:
        device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
        platform, kind = str(device.platform), device.device_kind
    return PLATFORM_ALIASES.get(platform, platform), kind
