"""What CI installs for the tests that compare with torch: only what costs little and changes nothing that is there."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

NAMES = ("no-torch", "no-transformers", "no-peft", "no-network")  # nowhere installed


@pytest.fixture
def parity(repo: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("parity", repo / ".ci" / "parity.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Puts a pip in the place of the real one, which would install these and fails at the steps named."""

    def put(names: Sequence[str] = NAMES, fails: Sequence[str] = ()) -> list[str]:
        done: list[str] = []

        def run(command: Sequence[str], **options: Any) -> Any:
            step = next((s for s in ("--dry-run", "uninstall", "check", "-c") if s in command), "install")
            done.append(step)
            if step == "--dry-run":
                rows = [{"metadata": {"name": name}} for name in names]
                report = Path(command[command.index("--report") + 1])
                report.write_text(json.dumps({"install": rows}))
            code = int(step in fails)
            return subprocess.CompletedProcess(
                command, code, "", "noise\nERROR: no such thing\n" if code else ""
            )

        monkeypatch.setattr(subprocess, "run", run)
        return done

    return put


def test_what_costs_little_is_installed_and_then_imported_and_checked(parity: Any, pip: Any) -> None:
    done = pip()
    assert parity.installed(["torch>=2.6", "peft>=0.18"]) == "installed, 4 packages"
    assert done == ["--dry-run", "install", "-c", "check"]
    assert parity.installed(["torch>=2.6"]) and "uninstall" not in done
    done = pip(names=())
    assert (parity.installed(["torch"]), done) == ("there already", ["--dry-run"])


@pytest.mark.parametrize(
    ("names", "fails", "told", "last"),
    [
        ((*NAMES, "nvidia-cublas"), (), "brings CUDA's libraries (nvidia-cublas, ...)", "--dry-run"),
        ((*NAMES, "JAXtyping"), (), "it would replace JAXtyping", "--dry-run"),
        (NAMES, ("--dry-run",), "ERROR: no such thing", "--dry-run"),
        (NAMES, ("install",), "ERROR: no such thing", "uninstall"),
        (NAMES, ("-c",), "ERROR: no such thing", "uninstall"),
        (NAMES, ("check",), "ERROR: no such thing", "uninstall"),
        (
            NAMES,
            ("check", "uninstall"),
            "what had come could not be removed: ERROR: no such thing",
            "uninstall",
        ),
    ],
)
def test_whatever_goes_wrong_is_a_line_and_what_had_come_goes_again(
    parity: Any, pip: Any, names: Sequence[str], fails: Sequence[str], told: str, last: str
) -> None:
    done = pip(names, fails)
    said = parity.installed(["torch>=2.6"])
    assert said.startswith("not installed: ") and told in said and "\n" not in said
    assert done[-1] == last
    assert ("install" in done) == ("uninstall" in done)


def test_it_never_fails(parity: Any, pip: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pip(fails=("--dry-run",))
    assert parity.main() == 0
    assert capsys.readouterr().err.startswith(
        "parity with torch, transformers and peft: not installed: ERROR"
    )
    assert sys.executable in parity.PIP
