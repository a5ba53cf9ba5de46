"""The study on disk: its frozen declaration, the list of its runs, and what was changed later (design §7).

    <workdir>/<study>/study.json    declaration, resolved config of each arm, plan hash, amendments
    <workdir>/<study>/runs.jsonl    a row for each run, in the order of their index; rows are only ever added
    <workdir>/<study>/rates.json    the learning rate of each arm, once tuned, with the evidence

Resolved configs are kept once per arm: the runs of an arm differ from it in their row's numbers alone.
Imports no jax, so that `status` and `report` read it at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxablate import config, disk, runstore
from jaxablate.claims import Claim, Claimed
from jaxablate.config import RunConfig
from jaxablate.errors import UserError
from jaxablate.runstore import RunDir
from jaxablate.structure import from_mapping
from jaxablate.study import Phase, Run, Study

FORMAT = 1


@dataclass(frozen=True)
class _StudyFile:
    """What study.json holds."""

    format: int
    plan_hash: str
    locked: str | None
    amendments: tuple[Mapping[str, Any], ...]
    runs_sha256: tuple[str, ...]  # of runs.jsonl: as it is, and while it changes as it will be
    study: Mapping[str, Any]
    host: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Manifest:
    """A frozen study, as read from its directory. A value: whoever adds to it gets a new one."""

    path: Path  # <workdir>/<study>
    study: Study
    configs: Mapping[str, Mapping[str, Any]]  # arm -> resolved config without seed and host
    host: Mapping[str, Any]
    runs: tuple[Run, ...]
    locked: str | None  # when the first confirmatory run was about to start; the plan's hash holds from then
    plan_hash: str  # as locked, or as frozen last
    amendments: tuple[Mapping[str, Any], ...]  # {time, hash, changes} of each later edit of the plan

    def run_dir(self, run: Run) -> RunDir:
        """Where a run keeps its files."""
        return RunDir(self.path / run.arm / run.id)

    def config_of(self, run: Run) -> dict[str, Any]:
        """The resolved config of a run, as its `config.json` has it."""
        return _member(self.configs[run.arm], run.seed, run.learning_rate)

    # -------------------------------------------------------------------------------- reading

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Manifest:
        """The frozen study in the directory `path`.

        Raises:
          UserError: there is none, it is half-written, or a file is not what was frozen.
        """
        path = Path(path)
        if not (path / "study.json").is_file():
            what = "holds no study.json" if path.is_dir() else "no such directory"
            raise UserError(f"{path}: {what}; give a study file, or the directory of a study that was run")
        file, study = _read_study(path / "study.json")
        while (runs := _read_runs(path / "runs.jsonl", file.runs_sha256)) is None:
            # A writer names a list before it writes it, so a list that is no tampering has a newer study.json.
            before = file
            file, study = _read_study(path / "study.json")
            if file == before:
                what = "is not the list of runs that study.json froze"
                raise UserError(f"{path / 'runs.jsonl'}: {what}; restore the file, or use another --workdir")
        return cls(path, study, file.configs, file.host, runs, file.locked, file.plan_hash, file.amendments)

    # -------------------------------------------------------------------------------- freezing

    @classmethod
    def freeze(cls, study: Study, resolved: Mapping[str, RunConfig[Any, Any]]) -> Manifest:
        """Freezes a study in `<workdir>/<study>`, or brings the frozen one up to date with an edited file.

        New arms and seeds are added. What has been frozen never changes: a base config that would give
        existing runs other numbers is refused. An edit of the plan after it was locked is an amendment.

        Args:
          study: the declaration.
          resolved: arm -> its resolved config, of any seed; all on one host config.
        """
        path = _path(study, resolved)
        disk.make_private(path)
        with writing(path):
            before = cls.load(path).runs if (path / "study.json").exists() else ()
            return cls.preview(study, resolved)._saved(before)

    @classmethod
    def preview(cls, study: Study, resolved: Mapping[str, RunConfig[Any, Any]]) -> Manifest:
        """What `freeze` would give; writes nothing, and raises what it would."""
        path, study = _path(study, resolved), as_read(study)
        if (path / "study.json").exists():
            return cls.load(path)._updated(study, resolved)
        configs = {arm: _kept(run) for arm, run in resolved.items()}
        host = dataclasses.asdict(next(iter(resolved.values())).host)
        manifest = cls(path, study, configs, host, (), None, study.plan_hash, ())
        return manifest._extended(_first_runs(study, resolved))

    def _updated(self, study: Study, resolved: Mapping[str, RunConfig[Any, Any]]) -> Manifest:
        gone = sorted({run.arm for run in self.runs} - resolved.keys())
        if gone:
            raise UserError(
                f"{self.path / 'study.json'}: arm '{gone[0]}' has runs and is no longer in the study; "
                f"restore it, or use another --workdir"
            )
        dropped = sorted({run.seed for run in self.runs if run.phase == "confirm"} - set(study.seeds))
        if dropped:
            raise UserError(
                f"{self.path / 'study.json'}: seed {dropped[0]} has runs and is no longer in the study; "
                f"restore it, or use another --workdir"
            )
        for arm, run in resolved.items():
            if arm in self.configs and (lines := runstore.differences(self.configs[arm], _kept(run))):
                raise UserError(
                    f"{self.path / 'study.json'}: arm '{arm}' was frozen with another config ({lines[0]}); "
                    f"restore the old value or use another --workdir"
                )
        amendments, plan_hash = self.amendments, self.plan_hash
        if study.plan_hash != self.study.plan_hash:
            changes = runstore.differences(self.study.plan, study.plan)
            if self.locked is None:
                plan_hash = study.plan_hash
            else:
                amendments = (
                    *amendments,
                    {"time": runstore.now(), "hash": study.plan_hash, "changes": changes},
                )
        configs = {**self.configs, **{arm: _kept(run) for arm, run in resolved.items()}}
        host = dataclasses.asdict(next(iter(resolved.values())).host)
        new = dataclasses.replace(
            self, study=study, configs=configs, host=host, plan_hash=plan_hash, amendments=amendments
        )
        rates = read_rates(self.path)
        return new._extended([*_first_runs(study, resolved), *_confirmations(study, resolved, rates)])

    def with_rates(self, rates: Mapping[str, Any], resolved: Mapping[str, RunConfig[Any, Any]]) -> Manifest:
        """Records the chosen rates and adds the confirmatory runs at them.

        A rate that another launcher chose first, and that has its runs, stands.
        """
        with writing(self.path):
            newest = Manifest.load(self.path)
            confirmed = {run.arm for run in newest.runs if run.phase == "confirm"}
            rates = {arm: row for arm, row in rates.items() if arm not in confirmed}
            disk.write_json(self.path / "rates.json", {**read_rates(self.path), **rates})
            wanted = _confirmations(newest.study, resolved, rates)
            return newest._extended(wanted)._saved(newest.runs)

    def with_tuning(
        self, rates: Mapping[str, Sequence[float]], resolved: Mapping[str, RunConfig[Any, Any]]
    ) -> Manifest:
        """Adds tuning runs at further rates: arm -> rates."""
        rule = self.study.learning_rate
        assert rule is not None, "only a study with a rule tunes"
        with writing(self.path):
            newest = Manifest.load(self.path)
            wanted = [
                _run(resolved[arm], arm, "tuning", seed, rate)
                for arm in rates
                for rate in rates[arm]
                for seed in rule.tuning_seeds
            ]
            return newest._extended(wanted)._saved(newest.runs)

    def lock(self) -> Manifest:
        """Marks that confirmatory runs begin: from now on an edit of the plan shows in the report."""
        if self.locked:
            return self
        with writing(self.path):
            newest = Manifest.load(self.path)
            return dataclasses.replace(newest, locked=newest.locked or runstore.now())._saved(newest.runs)

    def _extended(self, runs: Iterable[Run]) -> Manifest:
        """With those of `runs` that it lacks, numbered on from the last."""
        first, known = len(self.runs), {(run.arm, run.id) for run in self.runs}
        added = [run for run in runs if (run.arm, run.id) not in known]
        numbered = [dataclasses.replace(run, index=first + i) for i, run in enumerate(added)]
        return dataclasses.replace(self, runs=(*self.runs, *numbered))

    def _saved(self, before: tuple[Run, ...]) -> Manifest:
        """Itself, on disk. While the list changes, study.json takes it as it will be and as it was `before`,
        should a kill come between the two files; after that only as it is."""
        if self.runs != before:
            self._write(self.runs, before)
            disk.write_bytes(self.path / "runs.jsonl", _encode(self.runs))
        self._write(self.runs)
        return self

    def _write(self, *lists: tuple[Run, ...]) -> None:
        """Writes study.json, which takes each of these as the list of runs."""
        file = _StudyFile(
            format=FORMAT,
            plan_hash=self.plan_hash,
            locked=self.locked,
            amendments=self.amendments,
            runs_sha256=tuple(_digest(_encode(runs)) for runs in lists),
            study=self.study.to_dict(),
            host=self.host,
            configs=self.configs,
        )
        disk.write_json(self.path / "study.json", vars(file))


def read_rates(path: Path) -> dict[str, Any]:
    """`rates.json` of a study directory: arm -> {learning_rate, edge, …}; empty before tuning is done."""
    file = path / "rates.json"
    rates = disk.read_json(file) if file.exists() else {}
    rows = rates.values() if isinstance(rates, dict) else [rates]
    if not all(isinstance(row, dict) and "learning_rate" in row for row in rows):
        raise UserError(f"{file}: not the learning rates of a study; restore the file")
    return rates


def as_read(study: Study) -> Study:
    """A declaration as study.json gives it back: no base config, and an int where a float is meant is one.

    So that a plan's hash is the same before and after.
    """
    return Study.from_dict(study.to_dict())


def study_dir(spec: str, overrides: Sequence[tuple[str, str]] = ()) -> Path:
    """The directory of the study that `spec` names: a study file with its argument, or the directory itself.

    Needs neither jax nor the study's task.
    """
    if Path(spec).is_dir():
        return Path(spec)
    from jaxablate import study

    declared = study.load(spec, overrides)
    assert declared.base is not None, "load gives a base"
    return Path(declared.base.to_dict()["host"]["workdir"]) / declared.name


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """The sole right to write the files of the study in `path`; waits a while for another launcher to finish.

    Raises:
      Claimed: it did not finish.
      UserError: they cannot be written.
    """
    claim, patience = Claim(path / "writing.json", "the study"), time.monotonic() + 30
    while True:
        try:
            claim.acquire()
            break
        except Claimed:
            if time.monotonic() > patience:
                raise
            time.sleep(0.05)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}; use another --workdir") from None
    try:
        yield
    except OSError as error:  # a full disk: what was there before is there still
        what = f"cannot be written: {error.strerror}; make room or use another --workdir"
        raise UserError(f"{path}: {what}") from None
    finally:
        claim.release()


# ------------------------------------------------------------------------------------- internals


def _path(study: Study, resolved: Mapping[str, RunConfig[Any, Any]]) -> Path:
    return Path(next(iter(resolved.values())).host.workdir) / study.name


def _kept(run: RunConfig[Any, Any]) -> dict[str, Any]:
    """The config of an arm: without what belongs to one run or one host."""
    return {key: value for key, value in run.to_dict().items() if key not in ("seed", "host")}


def _member(kept: Mapping[str, Any], seed: int, learning_rate: float) -> dict[str, Any]:
    return {**kept, "seed": seed, "optim": {**kept["optim"], "learning_rate": learning_rate}}


def _run(base: RunConfig[Any, Any], arm: str, phase: Phase, seed: int, learning_rate: float) -> Run:
    member = config.from_dict(_member(_kept(base), seed, learning_rate), base.host)
    fingerprint = member.fingerprint
    return Run(
        -1, arm, phase, seed, learning_rate, fingerprint, runstore.run_id(seed, learning_rate, fingerprint)
    )


def _first_runs(study: Study, resolved: Mapping[str, RunConfig[Any, Any]]) -> list[Run]:
    """The runs that are known before any has run: all of them, or those that tune the rates."""
    rule = study.learning_rate
    if rule is None:
        return [
            _run(base, arm, "confirm", seed, base.optim.learning_rate)
            for arm, base in resolved.items()
            for seed in study.seeds
        ]
    return [
        _run(base, arm, "tuning", seed, rate)
        for arm, base in resolved.items()
        for rate in rule.grid_of(arm)
        for seed in rule.tuning_seeds
    ]


def _confirmations(
    study: Study, resolved: Mapping[str, RunConfig[Any, Any]], rates: Mapping[str, Any]
) -> list[Run]:
    return [
        _run(resolved[arm], arm, "confirm", seed, rates[arm]["learning_rate"])
        for arm in resolved
        if arm in rates and rates[arm]["learning_rate"] is not None
        for seed in study.seeds
    ]


def _encode(runs: Iterable[Run]) -> bytes:
    return b"".join(disk.encode_row(dataclasses.asdict(run)) for run in runs)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_study(path: Path) -> tuple[_StudyFile, Study]:
    """What study.json holds, with its study, whose plan is the one that the file carries the hash of."""
    values = disk.read_json(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UserError(f"{path}: not a study of this version of jaxablate; restore the file")
    try:
        file = from_mapping(_StudyFile, values, "")
        study = Study.from_dict(file.study)
    except UserError as error:
        raise UserError(f"{path}: {error}; restore the file") from None
    if study.plan_hash != (file.amendments[-1].get("hash") if file.amendments else file.plan_hash):
        raise UserError(f"{path}: its plan is not the one whose hash it carries; restore the file")
    return file, study


def _read_runs(path: Path, frozen: Sequence[str]) -> tuple[Run, ...] | None:
    """The list of runs; None if it is none of those whose digests are in `frozen`."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""  # right if a kill came before the first list was written
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; restore the file") from None
    if _digest(data) not in frozen:
        return None
    return tuple(Run(**json.loads(line)) for line in data.splitlines())
