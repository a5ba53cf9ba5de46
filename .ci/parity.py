"""Installs what the tests that compare with torch, transformers and peft need (the extra `parity`), if that is cheap.

    .venv/bin/python .ci/parity.py

It is for CI, behind `make install`. A torch that brings CUDA's libraries, gigabytes that no test uses, is let be, and
so is anything that would replace a package that is there. What came of it is one line, and the exit code is always 0:
without these packages their tests are skipped.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
INSTALL = ("install", "--prefer-binary", "--constraint", str(ROOT / "constraints.txt"))


def main() -> int:
    """Installs the extra, or says why not; returns 0."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["optional-dependencies"]["parity"]
    sys.stderr.write(f"parity with torch, transformers and peft: {installed(wanted)}\n")
    return 0


def installed(wanted: Collection[str]) -> str:
    """Installs these requirements and what they need; returns what came of it, in a line.

    If they cannot be imported afterwards, all that came with them goes again.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        if told := failed(*PIP, *INSTALL, "--dry-run", "--report", str(report), *wanted):
            return f"not installed: {told}"
        names = [package["metadata"]["name"] for package in json.loads(report.read_text())["install"]]
    if not names:
        return "there already"
    there = {canonical(found.metadata["Name"]) for found in importlib.metadata.distributions()}
    if why := refusal(names, there):
        return f"not installed: {why}"
    imports = f"import {', '.join(requirement.partition('>')[0] for requirement in wanted)}"
    told = failed(*PIP, *INSTALL, *wanted) or failed(sys.executable, "-c", imports) or failed(*PIP, "check")
    if told:
        left = failed(*PIP, "uninstall", "--yes", *names)
        return f"not installed: {told}" + (f"; what had come could not be removed: {left}" if left else "")
    return f"installed, {len(names)} packages"


def refusal(names: Collection[str], there: Collection[str]) -> str:
    """Why these packages are not to be installed; empty if they may be.

    Args:
      there: canonical names of what is installed.
    """
    if gpu := sorted(name for name in names if canonical(name).startswith(("nvidia-", "cuda-"))):
        return f"this index's torch brings CUDA's libraries ({', '.join(gpu[:3])}, ...)"
    if replaced := sorted(name for name in names if canonical(name) in there):
        return f"it would replace {', '.join(replaced)}"
    return ""


def canonical(name: str) -> str:
    """A package's name as every spelling of it is compared."""
    return name.lower().replace("_", "-").replace(".", "-")


def failed(*command: Any) -> str:
    """Runs a command; its last line of complaint if it fails, else nothing."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode == 0:
        return ""
    said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return said[-1].strip() if said else f"exit code {done.returncode}"


if __name__ == "__main__":
    sys.exit(main())
