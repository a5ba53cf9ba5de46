"""The arrows of the design: who may import whom, who starts without jax, what no file may call.

Every checker takes a tree, so that each has a test with a small bad tree which it must report.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

KERNELS = "jaxablate_kernels"
ANY = frozenset({"*"})

# What each part of jaxablate may import of the others, besides itself. A part that is not named here
# is machinery of the training loop: it may import all but what stands on top of it.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "structure": frozenset({"errors"}),
    "userfile": frozenset({"errors"}),
    "rules": frozenset({"errors"}),
    "config": frozenset({"errors", "rules", "structure", "userfile"}),
    "arms": frozenset({"errors"}),
    "study": frozenset({"errors", "arms", "config", "structure", "userfile"}),
    "disk": frozenset({"errors"}),
    "runstore": frozenset({"errors", "disk"}),
    "text": frozenset({"errors", "disk"}),
    "stopping": frozenset(),
    "leases": frozenset({"stopping"}),
    "claims": frozenset({"errors", "disk", "runstore", "leases", "stopping"}),
    "places": frozenset({"errors"}),
    "cache": frozenset({"disk"}),
    "manifest": frozenset({"errors", "config", "study", "disk", "runstore", "claims", "structure"}),
    "data": frozenset({"errors", "config"}),
    "trees": frozenset(),
    "task": frozenset({"errors", "config", "rules", "text", "data", "trees", KERNELS}),
    "sharding": frozenset({"errors", "config"}),
    "targets": frozenset({"errors"}),
    "events": frozenset({"config", "disk", "runstore"}),
    "metrics": frozenset({"errors", "config", "disk", "runstore", "events"}),
    "optim": frozenset({"errors", "config"}),
    "nn": frozenset({"errors", "config", "sharding", KERNELS}),
    "peft": frozenset({"errors", "disk", "nn"}),
    "studies": frozenset(
        {
            "errors",
            "cache",
            "config",
            "rules",
            "study",
            "disk",
            "text",
            "data",
            "task",
            "metrics",
            "sharding",
            "optim",
            "nn",
            "peft",
            "decoding",
            "trees",
            KERNELS,
        }
    ),
    "studies.config": frozenset({"errors", "config"}),
    "studies.metrics": frozenset({"errors", "config"}),
    "studies.results": frozenset({"errors", "studies.metrics"}),
    "studies.report": frozenset(
        {
            "errors",
            "study",
            "disk",
            "runstore",
            "analysis",
            "studies.config",
            "studies.metrics",
            "studies.results",
        }
    ),
    "studies.pretraining": ANY,  # a base is trained by the loop, as a run of its own
    "studies.export": ANY,  # commands of a study, which stand on top as `main` does
    "studies.evaluate": ANY,
    "studies.speed": ANY,  # what is timed is the loop's own program
    "tuning": frozenset({"errors", "study", "analysis"}),
    "schedule": frozenset(
        {
            "errors",
            "config",
            "study",
            "disk",
            "runstore",
            "leases",
            "claims",
            "structure",
            "manifest",
            "events",
            "stopping",
            "analysis",
            "tuning",
            "estimate",  # `facts`, which imports no jax
            "targets",
        }
    ),
    "analysis": frozenset(
        {
            "errors",
            "structure",
            "config",
            "study",
            "disk",
            "runstore",
            "claims",
            "manifest",
            "metrics",
            "events",
            "provenance",
        }
    ),
    "main": ANY,
    "cli": ANY,
}
ON_TOP = ("train", "check", "validate", "estimate", "worker", "sampling", "main", "cli", "__main__")
NOT_BELOW_THE_TOP = {"main", "cli", "__main__"}

# These start on a login node in a fraction of a second, and need no working jax.
WITHOUT_JAX = (
    "errors",
    "structure",
    "userfile",
    "rules",
    "config",
    "arms",
    "study",
    "disk",
    "runstore",
    "text",
    "stopping",
    "leases",
    "claims",
    "places",
    "cache",
    "manifest",
    "tuning",
    "schedule",
    "analysis",
    "studies.config",
    "studies.metrics",
    "studies.results",
    "studies.report",
    "main",
    "cli",
)
JAX = frozenset({"jax", "jaxlib", "flax", "optax", "orbax", "chex"})
# numpy: jax itself needs it. The others are extras, of implementations that are imported when they are asked for.
KERNELS_MAY_IMPORT = frozenset(
    {"jax", "jaxtyping", "numpy", "tokamax", "absl", "jax_triton", "triton", "jaxablate_gpus", KERNELS}
)
CONFIGS_MAY_IMPORT = frozenset({"jaxablate", "ml_collections"})
NEVER_IMPORTED = frozenset({"tests", "configs", "kernels", "launch"})
MAX_LINES = {"jaxablate/train.py": 350, "jaxablate/main.py": 60}

UNSAFE_MODULES = frozenset({"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal"})
UNSAFE_NAMES = frozenset({"eval", "exec"})
UNSAFE_ATTRIBUTES = frozenset(
    {
        ("yaml", "load"),
        ("yaml", "load_all"),
        ("yaml", "full_load"),
        ("yaml", "unsafe_load"),
        ("os", "system"),
        ("os", "popen"),
        ("subprocess", "getoutput"),
        ("subprocess", "getstatusoutput"),
    }
)
UNSAFE_KEYWORDS = frozenset({"shell", "allow_pickle"})


class Import(NamedTuple):
    """One imported name, with where it stands and whether only a type checker sees it."""

    name: str
    line: int
    typing_only: bool


# ---------------------------------------------------------------------------------- what a file imports


def module_name(path: Path, root: Path) -> str:
    """`jaxablate/nn/norm.py` -> `jaxablate.nn.norm`; a package is named without its `__init__`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, root: Path) -> Iterator[Import]:
    """All imports at any depth, relative ones resolved, `from a import b` as `a.b`."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    package = path.relative_to(root).parent.parts
    if package[:1] == ("kernels",):  # a folder, not a package
        package = package[1:]
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom, ast.Call)):
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        elif ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                names = [first.value]
        for name in names:
            yield Import(name, node.lineno, id(node) in typing_only)


def sources(root: Path, *folders: str) -> list[Path]:
    """Python files below the named folders, in order."""
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def part(module: str) -> str:
    """The row of MAY_IMPORT that a module of jaxablate belongs to; "" for the package itself."""
    names = module.split(".")[1:]
    if len(names) >= 3 and names[0] == "studies" and f"studies.{names[2]}" in MAY_IMPORT:
        return f"studies.{names[2]}"  # without jax, unlike the rest of a study
    return names[0] if names else ""


def study_of(module: str) -> str | None:
    """`ctclip` for `jaxablate.studies.ctclip.data.text`; None outside the studies."""
    names = module.split(".")
    return names[2] if len(names) > 2 and names[1] == "studies" else None


# --------------------------------------------------------------------------------------------- checkers


def wrong_arrows(root: Path) -> list[str]:
    """Imports inside jaxablate that point up, or sideways from one study to another."""
    known = {module_name(path, root) for path in sources(root, "jaxablate")}
    parts = {part(module) for module in known} - {""}

    def allowed(here: str) -> set[str]:
        if here == "":
            return {"errors"}
        row = MAY_IMPORT.get(here)
        if row == ANY:
            return parts | {here, "", KERNELS}
        if row is not None:
            below = {f"studies.{name}" for name in ("config", "metrics", "results", "pretraining", "speed")}
            own = {here, *below} if here == "studies" else {here}
            return {*row, *own, ""}
        top = NOT_BELOW_THE_TOP if here in ON_TOP else set(ON_TOP)
        return (parts - top) | {here, "", KERNELS}

    found = []
    for path in sources(root, "jaxablate"):
        module = module_name(path, root)
        for name, line, _ in imports(path, root):
            where = f"{path.relative_to(root)}:{line}"
            if name.split(".")[0] == KERNELS:
                if KERNELS not in allowed(part(module)):
                    found.append(f"{where}: {part(module) or 'jaxablate'} must not import {name}")
                continue
            if name.split(".")[0] != "jaxablate":
                continue
            # `from jaxablate import study` names a module; `from jaxablate import __version__` does not.
            target = name
            while target not in known and "." in target:
                target = target.rpartition(".")[0]
            if part(target) not in allowed(part(module)):
                found.append(f"{where}: {part(module) or 'jaxablate'} must not import {target}")
            elif study_of(module) and study_of(target) and study_of(module) != study_of(target):
                found.append(f"{where}: study {study_of(module)} must not import study {study_of(target)}")
    return found


def jax_imports(root: Path) -> list[str]:
    """Direct imports of jax, even inside a function, in the parts that must do without."""
    found = []
    for path in sources(root, "jaxablate"):
        if part(module_name(path, root)) not in WITHOUT_JAX:
            continue
        for name, line, typing_only in imports(path, root):
            if name.split(".")[0] in JAX and not typing_only:
                found.append(f"{path.relative_to(root)}:{line}: imports {name}")
    return found


def modules_without_jax(root: Path) -> list[str]:
    """The modules that exist and must be importable without jax."""
    modules = [module_name(path, root) for path in sources(root, "jaxablate")]
    return [module for module in modules if part(module) in WITHOUT_JAX]


def loads_jax(root: Path, modules: list[str]) -> list[str]:
    """Which of the modules bring jax in, found by importing them one after another in a child process.

    Stops at the first, since after it jax is there for all.
    """
    code = (
        "import importlib, json, sys\n"
        "found = []\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    importlib.import_module(name)\n"
        f"    bad = sorted({set(JAX)!r} & set(sys.modules))\n"
        "    if bad:\n"
        "        found.append(f'importing {name} imports {bad[0]}')\n"
        "        break\n"
        "print(json.dumps(found))\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, json.dumps(modules)],
        cwd=root,
        env={"PYTHONPATH": f"{root}:{root / 'kernels'}", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def foreign_imports(root: Path) -> list[str]:
    """What kernels and configs import beyond what they may, and imports of folders that are no package."""
    found = []
    for path in sources(root, "kernels", "configs", "jaxablate", "launch"):
        folder = path.relative_to(root).parts[0]
        for name, line, _ in imports(path, root):
            top = name.split(".")[0]
            allowed = {"kernels": KERNELS_MAY_IMPORT, "configs": CONFIGS_MAY_IMPORT}.get(folder)
            foreign = allowed is not None and top not in allowed and top not in sys.stdlib_module_names
            if foreign or top in NEVER_IMPORTED:
                found.append(f"{path.relative_to(root)}:{line}: {folder} must not import {name}")
    return found


def unsafe_calls(root: Path) -> list[str]:
    """pickle and its kin, yaml.load, eval, exec, shells: nothing here may run what it reads."""
    found = []
    for path in sources(root, "jaxablate", "kernels", "configs", "launch"):
        where = path.relative_to(root)
        found += [
            f"{where}:{line}: imports {name}"
            for name, line, _ in imports(path, root)
            if name.split(".")[0] in UNSAFE_MODULES or tuple(name.split(".")) in UNSAFE_ATTRIBUTES
        ]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and (ast.unparse(node.value), node.attr) in UNSAFE_ATTRIBUTES:
                found.append(f"{where}:{node.lineno}: {ast.unparse(node)}")
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).removeprefix("builtins.")
            if name in UNSAFE_NAMES:
                found.append(f"{where}:{node.lineno}: {name}()")
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                if keyword.arg in UNSAFE_KEYWORDS and not off:
                    found.append(f"{where}:{node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}")
    return found


def too_long(root: Path) -> list[str]:
    """The files that a reader must be able to read top to bottom."""
    lengths = {
        name: len((root / name).read_text(encoding="utf-8").splitlines())
        for name in MAX_LINES
        if (root / name).exists()
    }
    return [
        f"{name}: {lines} lines, at most {MAX_LINES[name]}"
        for name, lines in lengths.items()
        if lines > MAX_LINES[name]
    ]


# ------------------------------------------------------------------------------------------ this project


def test_arrows_point_one_way(repo):
    assert wrong_arrows(repo) == []


def test_parts_without_jax_do_not_import_it(repo):
    assert jax_imports(repo) == []


def test_parts_without_jax_do_not_load_it(repo):
    modules = modules_without_jax(repo)
    assert "jaxablate.errors" in modules
    assert loads_jax(repo, modules) == []


def test_kernels_and_configs_import_little(repo):
    assert foreign_imports(repo) == []


def test_kernels_folder_is_no_package(repo):
    """`kernels` is another project's import name; with an `__init__.py` this folder would shadow it."""
    assert not (repo / "kernels" / "__init__.py").exists()
    assert (repo / "kernels" / KERNELS / "__init__.py").exists()


def test_nothing_runs_what_it_reads(repo):
    assert unsafe_calls(repo) == []


def test_the_loop_and_its_door_stay_short(repo):
    assert too_long(repo) == []


# --------------------------------------------------------------------------- the checkers can say no


def grow(root: Path, **files: str) -> Path:
    """A tree of files; `__` in a keyword is a slash, and each gets its suffix."""
    for name, text in files.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for folder in path.relative_to(root).parents:
            if folder.parts and folder.parts[0] == "jaxablate":
                (root / folder / "__init__.py").touch()
    return root


@pytest.mark.parametrize(
    ("file", "text", "other", "message"),
    [
        ("errors", "import jaxablate.config", "config", "errors must not import jaxablate.config"),
        ("nn__norm", "from jaxablate import train", "train", "nn must not import jaxablate.train"),
        ("nn__a", "def f():\n    from ..studies.x import m", "studies__x__m", "nn must not import"),
        ("studies__x__m", "from jaxablate.train import train", "train", "studies must not import"),
        ("studies__x__m", "import jaxablate.studies.y.m", "studies__y__m", "study x must not import study y"),
        ("studies__x__config", "from . import model", "studies__x__model", "config must not import"),
        ("checkpoint", "import jaxablate.train", "train", "checkpoint must not import jaxablate.train"),
        ("train", "import jaxablate.cli", "cli", "train must not import jaxablate.cli"),
        ("analysis__a", "import_module('jaxablate.nn')", "nn__b", "analysis must not import jaxablate.nn"),
        ("runstore", "import jaxablate_kernels.dispatch", "errors", "runstore must not import jaxablate_k"),
    ],
)
def test_a_wrong_arrow_is_reported(tmp_path, file, text, other, message):
    tree = grow(tmp_path, **{f"jaxablate__{file}": text, f"jaxablate__{other}": ""})
    found = wrong_arrows(tree)
    assert len(found) == 1
    assert message in found[0]


def test_right_arrows_are_not_reported(tmp_path):
    tree = grow(
        tmp_path,
        jaxablate__errors="",
        jaxablate__train="from jaxablate import __version__, checkpoint\nfrom jaxablate.studies.x import m",
        jaxablate__checkpoint="from jaxablate.errors import UserError",
        jaxablate__nn__norm="from jaxablate_kernels import rms_norm\nfrom .linear import linear",
        jaxablate__nn__linear="import numpy",
        jaxablate__studies__x__m="from jaxablate.nn.norm import N\nfrom jaxablate.studies.x.config import C",
        jaxablate__studies__x__config="from jaxablate.errors import UserError",
        jaxablate__main="from jaxablate.train import train",
    )
    assert wrong_arrows(tree) == []


def test_a_direct_jax_import_is_reported(tmp_path):
    lazy = "if TYPE_CHECKING:\n    import jax\ndef f():\n    from flax import linen\n"
    found = jax_imports(grow(tmp_path, jaxablate__analysis__a=lazy, jaxablate__train="import jax"))
    assert found == ["jaxablate/analysis/a.py:4: imports flax.linen"]


def test_a_jax_import_through_another_module_is_reported(tmp_path):
    tree = grow(
        tmp_path,
        jaxablate__errors="",
        jaxablate__runstore="import jaxablate.sharding",
        jaxablate__sharding="import optax",
        optax="",
    )
    modules = modules_without_jax(tree)
    assert modules == ["jaxablate.errors", "jaxablate.runstore"]
    assert loads_jax(tree, modules) == ["importing jaxablate.runstore imports optax"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("kernels__jaxablate_kernels__a", "import jaxablate.errors"),
        ("kernels__jaxablate_kernels__a", "from flax import linen"),
        ("configs__a", "import jax"),
        ("configs__a", "from configs import ctclip"),
        ("jaxablate__a", "from tests.conftest import REPO"),
        ("jaxablate__a", "import kernels.jaxablate_kernels"),
        ("launch__a", "import configs.ctclip"),
    ],
)
def test_a_foreign_import_is_reported(tmp_path, file, text):
    assert len(foreign_imports(grow(tmp_path, **{file: text}))) == 1


def test_own_imports_are_not_foreign(tmp_path):
    tree = grow(
        tmp_path,
        kernels__jaxablate_kernels__a="import math\nimport jax.numpy\nfrom . import b\nimport jaxtyping",
        kernels__jaxablate_kernels__b="",
        configs__a="from ml_collections import ConfigDict\nfrom jaxablate.study import Arm",
    )
    assert foreign_imports(tree) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "def f():\n    from dill import loads",
        "import yaml\nyaml.load(text)",
        "from yaml import unsafe_load",
        "eval('1')",
        "import builtins\nbuiltins.exec('1')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess\nsubprocess.run('ls', shell=flag)",
        "import os\nos.system('ls')",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
    ],
)
@pytest.mark.parametrize("folder", ["jaxablate", "kernels", "configs", "launch"])
def test_an_unsafe_call_is_reported(tmp_path, folder, text):
    assert len(unsafe_calls(grow(tmp_path, **{f"{folder}__a": text}))) == 1


def test_safe_calls_are_not_reported(tmp_path):
    text = "yaml.safe_load(t)\nmodel.eval()\nnp.load(path, allow_pickle=False)\nrun([], shell=False)"
    assert unsafe_calls(grow(tmp_path, jaxablate__a=text)) == []


def test_a_long_file_is_reported(tmp_path):
    tree = grow(tmp_path, jaxablate__train="x = 1\n" * 351, jaxablate__main="x = 1\n" * 60)
    assert too_long(tree) == ["jaxablate/train.py: 351 lines, at most 350"]
