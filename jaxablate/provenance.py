"""Where a result comes from: code, packages, hardware, kernels. Recorded beside every run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # reports start without jax
    from jaxablate_kernels import Resolved

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "ml-collections",
    "grain",
    "numpy",
    "jaxablate",
)

DIFF_LIMIT = 200_000  # characters of uncommitted changes that are kept


def collect(devices: list[Any], kernels: Mapping[str, Resolved], mesh: Mapping[str, int]) -> dict[str, Any]:
    """The record, in JSON's types. `kernels` maps a slot to what carries it."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "git": _git(Path.cwd()),
        "packages": versions,
        "python": platform.python_version(),
        "host": {"system": platform.platform(), "processor": _processor(), "cores": os.cpu_count()},
        "devices": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
        "mesh": dict(mesh),
        "kernels": {slot: {"requested": k.requested, "resolved": k.name} for slot, k in kernels.items()},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "command": sys.argv,
    }


def hardware(facts: Mapping[str, Any]) -> str:
    """What a speed was measured on, in a few words: `2 x NVIDIA H200`, `Xeon … (2 cores)`."""
    devices, host = facts["devices"], facts["host"]
    if devices["platform"] == "cpu":
        return f"{host['processor'] or 'CPU'} ({host['cores']} cores)"
    return f"{devices['count']} x {devices['kind']}"


def _git(directory: Path) -> dict[str, Any] | None:
    """Commit and uncommitted changes of the working directory; None outside a repository or without git."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=directory, capture_output=True, text=True, check=True
        ).stdout

    try:
        diff = git("diff", "HEAD")
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(diff), "diff": diff[:DIFF_LIMIT]}
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
