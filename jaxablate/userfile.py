"""Config and study files: Python that the user wrote, and that is run. Load only your own."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxablate.errors import UserError, suggestion


def load_module(name: str) -> ModuleType:
    """The module that the file `name` is.

    Raises:
      UserError: there is no such file, or it raises; with the nearest file, or the line.
    """
    path = Path(name)
    if not path.parent.is_dir():
        raise UserError(f"{name}: no such file; there is no folder '{path.parent}'")
    if not path.is_file():
        near = [str(p) for p in path.parent.glob("*.py")]
        raise UserError(
            f"{name}: no such file; {suggestion(name, near) if near else 'the folder has no .py'}"
        )
    spec = importlib.util.spec_from_file_location(f"jaxablate_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{name}: is not a Python file; give one that defines get_config() or get_study()")
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    sys.modules[module.__name__] = module  # where dataclasses look up the annotations of theirs
    _guarded(name, lambda: loader.exec_module(module))
    return module


def call(spec: str, function: str, kind: type, what: str) -> Any:
    """Runs `function(arg)` of the file in `file.py:arg`, which must return a `kind`.

    Raises:
      UserError: no such file or function, an argument that it does not take, or whatever it raises.
    """
    name, colon, arg = spec.partition(":")
    found = getattr(load_module(name), function, None)
    if not callable(found):
        raise UserError(f"{name}: defines no {function}(); add `def {function}(arg=''): …`")
    takes_arg = bool(inspect.signature(found).parameters)
    if colon and arg and not takes_arg:
        raise UserError(f"{spec}: {function}() takes no argument; remove ':{arg}'")
    result = _guarded(name, lambda: found(arg) if takes_arg else found())
    if not isinstance(result, kind):
        raise UserError(f"{name}: {function}() returned {type(result).__name__}; return {what}")
    return result


def _guarded(name: str, run: Callable[[], Any]) -> Any:
    """Runs code of a user's file; whatever it raises becomes one line with the place in that file."""
    try:
        return run()
    except UserError:
        raise
    except Exception as error:  # a user's file may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if Path(f.filename).name == Path(name).name]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else "?"
        text = " ".join(str(error).split())
        raise UserError(f"{name}: {type(error).__name__} at line {line}: {text}") from error
