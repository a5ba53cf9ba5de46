"""The wheel, built and used outside the tree, holds the two packages and works."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import jaxablate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(repo, tmp_path_factory) -> Path:
    """Built by the hatchling of this environment, so that no index is needed."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(repo)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel alone, unpacked by pip into a folder that is not in the tree."""
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*command, "--target", str(folder), str(wheel)], capture_output=True, check=True)
    return folder


@pytest.fixture
def outside(installed, child_env) -> dict[str, str]:
    """An environment in which only the installed wheel is importable, not the tree."""
    return {**child_env, "PYTHONPATH": str(installed)}


def test_the_wheel_holds_the_two_packages_and_its_metadata(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    info = f"jaxablate-{jaxablate.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {
        "jaxablate",
        "jaxablate_gpus",
        "jaxablate_kernels",
        info,
    }
    assert {"jaxablate/launch/array.sbatch", "jaxablate/launch/multinode.sbatch"} <= set(names)
    assert {"jaxablate/__init__.py", "jaxablate_kernels/__init__.py", f"{info}/licenses/LICENSE"} <= set(
        names
    )


def test_the_wheel_holds_every_module_of_the_tree(wheel, repo):
    tree = {path.relative_to(repo).as_posix() for path in (repo / "jaxablate").rglob("*.py")}
    tree |= {path.relative_to(repo / "kernels").as_posix() for path in (repo / "kernels").rglob("*.py")}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")} == tree


def test_the_wheel_needs_no_gpu_package(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
    lines = archive.read(metadata).decode().splitlines()
    always = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert any(line.startswith("Requires-Dist: jax") for line in always)
    assert not [
        line for line in always if any(word in line for word in ("cuda", "triton", "torch", "pytest"))
    ]


def test_both_packages_import_from_the_wheel(installed, outside, tmp_path):
    # The tree may be installed as editable in this environment: the wheel's folder comes before it.
    code = "import jaxablate as j, jaxablate_kernels as k; print(j.__file__, k.__file__, j.__version__)"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=outside, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    first, second, version = child.stdout.split()
    assert Path(first) == installed / "jaxablate" / "__init__.py"
    assert Path(second) == installed / "jaxablate_kernels" / "__init__.py"
    assert version == jaxablate.__version__


def test_main_answers_from_the_wheel(installed, outside, tmp_path):
    if not (installed / "jaxablate" / "main.py").exists():
        pytest.skip("no jaxablate/main.py yet")
    child = subprocess.run(
        [sys.executable, "-m", "jaxablate.main", "--help"],
        cwd=tmp_path,
        env=outside,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert "--config" in child.stdout
