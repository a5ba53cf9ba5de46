"""Estimates of arms, made by processes of their own, since they need jax and flags of XLA; kept for the next plan."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shlex
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jaxablate
from jaxablate import disk
from jaxablate.analysis import sentences
from jaxablate.config import RunConfig, cache_dir, canonical
from jaxablate.errors import UserError
from jaxablate.estimate.facts import Estimate
from jaxablate.schedule.plan.processes import Ended, Late, Processes
from jaxablate.targets import TARGETS

logger = logging.getLogger(__name__)

_PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax", "tokamax")
_JOBS = 2  # estimates at a time: a compiler uses several cores by itself
_PATIENCE_S = 3600.0  # for one of them; the largest program compiles in minutes
_DECIDES = ("JAX_", "XLA_")  # how variables begin that decide what a compiler makes, and what memory there is


@dataclass(frozen=True, order=True)
class Cohort:
    """What an estimate is of."""

    arm: str
    members: int


@dataclass(frozen=True)
class Problem:
    """Why there is no estimate."""

    reason: str


@dataclass(frozen=True)
class Estimator:
    """Makes the estimates of one study.

    Attributes:
        spec: the study's file with its argument.
        overrides: of its base config.
        resolved: arm -> its resolved config.
        target: a name of `targets`; empty for this machine.
        mfu: the share of the peak that steps are taken to reach; None: not stated.
        device: the kind of this machine's devices, where the target is this machine.
        probe: whether steps are timed here; then one cohort after the other is estimated.
        beside: processes that train at a time on a CPU: they share its memory, and a probe starts the others.
    """

    spec: str
    overrides: Sequence[tuple[str, str]]
    resolved: Mapping[str, RunConfig[Any, Any]]
    target: str = ""
    device: str = ""
    mfu: float | None = None
    probe: Literal["yes", "no"] = "no"
    beside: int = 1

    def estimate(self, cohorts: Iterable[Cohort]) -> dict[Cohort, Estimate | Problem]:
        """An estimate of each cohort, or why there is none. Says on stderr how far it is."""
        wanted = list(dict.fromkeys(cohorts))
        found: dict[Cohort, Estimate | Problem] = {}
        for cohort in wanted:
            if (kept := self._kept(cohort)) is not None:
                found[cohort] = kept
        missing = [cohort for cohort in wanted if cohort not in found]
        if missing:
            logger.info("%s", self._announced(len(missing)))
        # A probe's time is from the start of a process, which then holds a device.
        jobs, times = (1, "once") if self.probe == "yes" else (min(_JOBS, os.cpu_count() or 1), "again")
        with Processes(self.command(), _PATIENCE_S, times) as processes, ThreadPoolExecutor(jobs) as pool:
            asked = {pool.submit(self._ask, processes, cohort): cohort for cohort in missing}
            try:
                for number, future in enumerate(as_completed(asked), 1):
                    cohort = asked[future]
                    found[cohort] = future.result()
                    logger.info(
                        "estimate %d of %d: %s", number, len(missing), _in_words(cohort, found[cohort])
                    )
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return {cohort: found[cohort] for cohort in wanted}

    def command(self) -> list[str]:
        """What makes estimates."""
        options = ["--served", f"--parent={os.getpid()}"]
        if self.target:
            options.append(f"--target={self.target}")
        if self.mfu is not None:
            options.append(f"--mfu={self.mfu!r}")
        if self.probe == "yes":
            options.append("--probe")
        if self.beside > 1:
            options.append(f"--beside={self.beside}")
        options += [f"--config.{path}={text}" for path, text in self.overrides]
        return [sys.executable, "-m", "jaxablate.estimate", self.spec, *options]

    def _announced(self, count: int) -> str:
        how = "steps are timed here, one after another" if self.probe == "yes" else "programs are compiled"
        slow = "; a program for a GPU may take minutes to compile" if self.target in TARGETS else ""
        return f"{sentences.count(count, 'estimate')} to make: {how}{slow}; they are kept for the next time"

    def _ask(self, processes: Processes, cohort: Cohort) -> Estimate | Problem:
        mesh = self.resolved[cohort.arm].host.mesh  # jax makes the devices of a process once
        try:
            answer = json.loads(processes.ask(mesh, json.dumps([cohort.arm, cohort.members])))
            if isinstance(answer, dict) and "problem" in answer:
                return Problem(answer["problem"])
            found = Estimate.from_dict(answer)
        except Ended as ended:
            return Problem(str(ended))
        except Late:
            by_hand = [part for part in self.command() if not part.startswith(("--served", "--parent="))]
            by_hand += [f"--arm={cohort.arm}", f"--members={cohort.members}"]
            return Problem(
                f"no estimate within {_PATIENCE_S / 60:g} minutes; to see what it waits for: {shlex.join(by_hand)}"
            )
        except (ValueError, UserError) as error:
            return Problem(f"the estimate cannot be read: {error}")
        self._keep(cohort, found)
        return found

    # ------------------------------------------------------------------------------------ kept ones

    def _path(self, cohort: Cohort) -> Path:
        """By all that an estimate depends on: config, program, versions, environment, and mostly this machine."""
        run = self.resolved[cohort.arm]
        host = {key: value for key, value in run.to_dict()["host"].items() if key not in ("workdir", "cache")}
        anywhere = self.target in TARGETS and self.probe == "no"  # a GPU that need not be here
        here = [] if anywhere else [socket.gethostname(), self.device, self.beside]
        said = {name: value for name, value in os.environ.items() if name.startswith(_DECIDES)}
        facts = [
            run.fingerprint, host, cohort.members, self.target, self.mfu, self.probe, here, said, _versions()
        ]  # fmt: skip
        name = hashlib.sha256(canonical(facts).encode()).hexdigest()[:32]
        return cache_dir(run.host) / "estimates" / f"{name}.json"

    def _kept(self, cohort: Cohort) -> Estimate | None:
        path = self._path(cohort)
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(kept, dict):
                raise UserError("not an object")
            return Estimate.from_dict(kept)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, UserError) as error:
            logger.warning("%s: is not an estimate and is made again: %s", path, error)
            return None

    def _keep(self, cohort: Cohort, found: Estimate) -> None:
        path = self._path(cohort)
        try:
            disk.make_private(path.parent)
            disk.write_json(path, found.to_dict())
        except (OSError, UserError) as error:  # the plan is as good without
            logger.warning("%s: cannot be kept: %s", path, error)


@functools.cache
def _versions() -> str:
    """A digest of what makes estimates: the packages' versions, and this one's own code."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        try:
            digest.update(f"{package}={importlib.metadata.version(package)}\n".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    code = [Path(jaxablate.__file__).parent]
    if (kernels := importlib.util.find_spec("jaxablate_kernels")) and kernels.origin:
        code.append(Path(kernels.origin).parent)
    for folder in code:
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _in_words(cohort: Cohort, found: Estimate | Problem) -> str:
    members = f", {cohort.members} members" if cohort.members > 1 else ""
    what = f": {found.reason}" if isinstance(found, Problem) else ""
    return f"{cohort.arm}{members}{what}"
