"""What every test runs under: CPU, eight devices, strict jax, checked shapes, a compilation cache.

All of it is set before jax is imported, so this file comes first and imports no jax itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jaxtyping
import pytest

from tests.compiling import quickly

REPO = Path(__file__).resolve().parents[1]

if "jax" in sys.modules:
    raise RuntimeError(
        "jax was imported before tests/conftest.py; is a pytest plugin doing that? (-p no:NAME)"
    )

# The environment as the user's shell has it. A worker of pytest-xdist inherits what is set below from the
# process that started it, so that one leaves a copy.
OUTSIDE: dict[str, str] = json.loads(
    os.environ.get("JAXABLATE_TESTS_OUTSIDE") or json.dumps(dict(os.environ))
)
os.environ["JAXABLATE_TESTS_OUTSIDE"] = json.dumps(OUTSIDE)

# Started in the background, by nohup or a runner, a process ignores these, and its children with it; the
# tests that stop a child by them would wait for ever.
for _ignored in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_ignored) is signal.SIG_IGN:
        signal.signal(_ignored, signal.default_int_handler if _ignored == signal.SIGINT else signal.SIG_DFL)

# Eight host devices cost an ordinary test nothing measurable: same compile time, same step time as one.
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
# Split over as many threads as the machine may have, a program costs a third more of two cores to compile.
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
# The children of most tests, which have the user's environment, compile as a user's programs do.
os.environ["XLA_FLAGS"] += f" {quickly()}"
os.environ["JAX_PLATFORMS"] = "cpu"
# XLA's pool has as many threads as there are devices, unless NPROC says more. With two programs in
# flight, which any asynchronous loop has, each holding some of the eight threads while it waits for all
# its devices at an all-reduce, jax 0.10 hangs and aborts after 40 s. 16 is too few, 24 is enough.
os.environ.setdefault("NPROC", "32")
# An array of lower rank must be broadcast in so many words: `x + bias` on a wrong axis is silent otherwise.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Programs that compile for longer than this are kept for other tests, child processes and later runs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPO / ".cache" / "jax-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ["MPLBACKEND"] = "agg"
# Not the block sizes that someone tuned on this machine: other blocks, other rounding.
os.environ["JAXABLATE_TUNED"] = str(REPO / ".cache" / "no-tuned-kernels")

# Annotated shapes and dtypes are checked at every call, here and only here.
jaxtyping.install_import_hook(["jaxablate.nn", "jaxablate.studies", "jaxablate_kernels"], "beartype.beartype")

# The same examples on every machine; no deadline, since the first example compiles.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

STRICT_DTYPES_BELOW = (REPO / "tests" / "nn", REPO / "tests" / "kernels")


def _wants_strict_dtypes(item: pytest.Item) -> bool:
    if item.get_closest_marker("standard_dtypes"):
        return False
    below = any(folder in item.path.parents for folder in STRICT_DTYPES_BELOW)
    return below or item.get_closest_marker("strict_dtypes") is not None


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--alone`: `make test` runs most tests in two processes, and then those that need the machine to themselves."""
    parser.addoption(
        "--alone", choices=("with", "without", "only"), default="with", help="tests marked `alone`"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what `--alone` does not ask for."""
    wanted = config.getoption("--alone")
    if wanted == "with":
        return
    kept = [item for item in items if (item.get_closest_marker("alone") is not None) == (wanted == "only")]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Strict dtype promotion where no optimizer runs: optax adds int32 counts to floats, 0.2.8 does."""
    with contextlib.ExitStack() as stack:
        if _wants_strict_dtypes(item):
            import jax

            stack.enter_context(jax.numpy_dtype_promotion("strict"))
        return (yield)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """The verbs set logging up for their process: on the streams that a test captures, and that are closed after it."""
    root, own = logging.getLogger(), logging.getLogger("jaxablate")
    handlers, level = list(root.handlers), own.level
    yield
    root.handlers[:] = [handler for handler in root.handlers if handler in handlers]
    own.setLevel(level)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout, with sample volumes; a test that asks skips without it."""
    folder = REPO.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder} (optional sample data)")
    return folder


@pytest.fixture
def child_env() -> dict[str, str]:
    """The environment of a child process as a user on a CPU has it, plus the compilation cache.

    One device and jax's own promotion rules: without it a child inherits eight devices and strict modes.
    """
    keep = {
        name: os.environ[name]
        for name in os.environ
        if name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))
    }
    path = os.pathsep.join([str(REPO), str(REPO / "kernels")])
    return {**OUTSIDE, **keep, "JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg", "PYTHONPATH": path}
