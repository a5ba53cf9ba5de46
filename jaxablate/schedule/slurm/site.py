"""A site's profile: what jobs ask of SLURM there. TOML -> a frozen dataclass, strictly.

partition = "gpu"
gres = "gpu:1"
time = "08:00:00"
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxablate.disk import plain
from jaxablate.errors import UserError
from jaxablate.structure import from_mapping

STOPPING_SIGNALS = ("USR2", "USR1", "TERM", "INT", "HUP")  # which the elements listen to
# Of the environment of `submit`, by name. Whatever else is there, such as a token, reaches no job.
ENVIRONMENT = (
    "HOME", "USER", "LANG", "LC_ALL", "PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "TMPDIR",
    "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "JAX_COORDINATOR_ADDRESS", "XLA_FLAGS", "XLA_CLIENT_MEM_FRACTION", "NCCL_SOCKET_IFNAME",
    "JAXABLATE_CACHE", "JAXABLATE_TUNED",
)  # fmt: skip

_WORD = re.compile(r"[^\s\x00-\x1f\x7f-][^\x00-\x1f\x7f]*")  # no option, no line break
_TIME = re.compile(r"\d+(-\d+(:\d+){0,2})?|\d+:\d+(:\d+)?|UNLIMITED|INFINITE")
_SIGNAL = re.compile(rf"({'|'.join(STOPPING_SIGNALS)})(@\d{{1,5}})?")
_MODULE = re.compile(r"[\w.+][\w.+/-]*")
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True)
class Site:
    """What an element asks for. An empty text or a zero leaves it to SLURM's own default."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    gres: str = ""  # of each node, such as gpu:1
    nodes: int = 1  # of an element; more than one: one program over all of them
    tasks_per_node: int = 1  # processes of such a program on each node
    cpus: int = 0  # of each process
    memory: str = ""  # of each node, such as 32G
    time: str = ""  # of one attempt; what has not ended by then is requeued
    signal: str = "USR2@120"  # what asks an element to stop, and how many seconds before the end
    modules: tuple[str, ...] = ()  # environment modules to load, in this order
    environment: tuple[str, ...] = ENVIRONMENT  # names of variables to pass on
    array_limit: int = 0  # elements at a time; 0: as many as SLURM starts
    max_submit: int = 0  # elements that may be queued at once; 0: as many as SLURM says
    max_attempts: int = 20  # of an element and of a run, interruptions of all kinds together
    python: str = ""  # interpreter on the nodes; empty: the one that calls `submit`

    def __post_init__(self) -> None:
        for name in ("partition", "account", "qos", "constraint", "gres", "memory", "python"):
            value = getattr(self, name)
            _require(not value or _WORD.fullmatch(value), name, value, "one line that begins with no dash")
        _require(not self.memory or re.fullmatch(r"\d+[KMGT]?", self.memory), "memory", self.memory,
                 "a number with K, M, G or T, such as '32G'")  # fmt: skip
        _require(not self.time or _TIME.fullmatch(self.time), "time", self.time,
                 "as SLURM writes it, such as '08:00:00' or '2-12:00:00'")  # fmt: skip
        _require(_SIGNAL.fullmatch(self.signal), "signal", self.signal,
                 f"NAME@SECONDS such as 'USR2@120', with NAME of {', '.join(STOPPING_SIGNALS)}")  # fmt: skip
        for name in ("nodes", "tasks_per_node", "max_attempts"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("cpus", "array_limit", "max_submit"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for module in self.modules:
            _require(_MODULE.fullmatch(module), "modules", module, "names such as 'cuda/13.0'")
        for variable in self.environment:
            _require(_VARIABLE.fullmatch(variable), "environment", variable, "names of variables, no values")

    def to_dict(self) -> dict[str, Any]:
        """As a profile has it, defaults included, in JSON's types."""
        return plain(dataclasses.asdict(self))


def load(path: str) -> Site:
    """The profile in a file; without one, SLURM's own defaults.

    Raises:
      UserError: no such file, no TOML, a key that is not known (with the nearest one), or a wrong value.
    """
    if not path:
        return Site()
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        near = sorted(str(found) for found in Path(path).parent.glob("*.toml"))
        known = f"; there are {', '.join(near)}" if near else ""
        raise UserError(f"--site={path}: cannot be read: {error.strerror}{known}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--site={path}: not TOML: {' '.join(str(error).split())}") from None
    return replaced(Site(), values, f"--site={path}")


def replaced(site: Site, values: dict[str, Any], where: str) -> Site:
    """A site with other values for some fields; `where` is what messages begin with."""
    try:
        return from_mapping(Site, {**site.to_dict(), **values}, "")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _require(holds: object, name: str, value: object, must: str) -> None:
    if not holds:
        raise UserError(f"{name}={value!r}: must be {must}")
