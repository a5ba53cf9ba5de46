"""Promotion: an arm's config becomes a named production config, with the evidence for it, if its gates hold.

    <production_dir>/NAME.py               python -m jaxablate.main --config=<production_dir>/NAME.py
    <production_dir>/NAME.json             the resolved config, as it was frozen and run
    <production_dir>/NAME.promotion.json   the gates, the verdicts and the numbers that they rest on

Imports no jax.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxablate import disk, runstore
from jaxablate.analysis import origin
from jaxablate.analysis.findings import Analysis, Verdict
from jaxablate.analysis.results import Results
from jaxablate.errors import UserError, suggestion
from jaxablate.manifest import Manifest

Mode = Literal["write", "dry run"]
STUDY = "production"  # where its runs go: <workdir>/production/NAME

_LOADER = '''"""Arm {arm} of study {study}, promoted. Why: {name}.promotion.json."""

from pathlib import Path

from jaxablate.config import frozen_config


def get_config():
    return frozen_config(Path(__file__).with_suffix(".json"))
'''


@dataclass(frozen=True)
class Gate:
    """A condition of promotion, and why it holds or does not."""

    name: str
    state: Literal["open", "closed"]  # open: the arm may pass
    reason: str


@dataclass(frozen=True)
class Promotion:
    """What was written, or in a dry run would be. Files that were there already, the same, are not written."""

    name: str
    arm: str
    gates: tuple[Gate, ...]
    config: Path  # the file to train from
    files: Mapping[str, str]  # path -> content, of those to write
    mode: Mode

    def to_dict(self) -> dict[str, Any]:
        """Plain data in JSON's types."""
        return {**dataclasses.asdict(self), "config": str(self.config), "files": dict(self.files)}

    def text(self) -> str:
        """The gates, and what was written; in a dry run the contents too."""
        lines = [f"{self.arm} -> {self.name}", *(f"  {gate.name}: {gate.reason}" for gate in self.gates)]
        for path, content in self.files.items():
            lines += [f"would write {path}:", content] if self.mode == "dry run" else [f"wrote {path}"]
        if not self.files:
            lines.append("nothing to write: it was promoted before, with the same evidence")
        return "\n".join([*lines, f"train it: python -m jaxablate.main --config={self.config}"])


def promote(
    results: Results,
    analysis: Analysis,
    arm: str,
    *,
    name: str,
    production_dir: Path,
    gates: Sequence[str] = (),
    thresholds: Mapping[str, str | float] | None = None,
    mode: Mode = "write",
) -> Promotion:
    """Makes the resolved config of an arm a production config.

    Its gates: the plan was locked and not amended; every declared seed of the arm finished with a value; every
    primary hypothesis that is about the arm, or about a factor that it sets, is supported. An arm that no
    hypothesis is about needs a gate or a threshold.

    Args:
      results: of a study that was run.
      analysis: what was made of them.
      arm: which arm.
      name: of the production config.
      production_dir: where it goes; made if need be.
      gates: further hypotheses about the arm that must be supported.
      thresholds: response -> value that the arm's mean must reach, in the response's direction.
      mode: `dry run` writes nothing.

    Raises:
      UserError: a gate is closed, with its name and why; or another config has that name already.
    """
    if results.path is None:
        raise UserError(
            f"{results.source}: a table has no configs to promote; give a study that was run here"
        )
    arm = results.study.arm(arm).name
    if not re.fullmatch(r"\w[\w.-]*(?<!\.promotion)", name):
        raise UserError(f"--name={name}: letters, digits, '_', '-', '.'; and not ending in .promotion")
    found = _gates(results, analysis, arm, gates, thresholds or {})
    if closed := [f"{gate.name}: {gate.reason}" for gate in found if gate.state == "closed"]:
        raise UserError(f"arm '{arm}' is not promoted; {'; '.join(closed)}")
    config = _config(Manifest.load(results.path), arm, name)
    base = production_dir / name
    files = {
        f"{base}.json": _json(config),
        f"{base}.promotion.json": _json(_evidence(results, analysis, arm, name, found)),
        f"{base}.py": _LOADER.format(
            arm=arm, study=results.study.name, name=name
        ),  # last: it needs the others
    }
    files = {path: content for path, content in files.items() if not _there(Path(path), content)}
    if mode == "write":
        try:
            production_dir.mkdir(parents=True, exist_ok=True)
            for path, content in files.items():
                disk.write_bytes(path, content.encode())
        except OSError as error:
            raise UserError(
                f"{production_dir}: cannot be written: {error.strerror}; give another --production-dir"
            ) from None
    return Promotion(name, arm, tuple(found), Path(f"{base}.py"), files, mode)


# ------------------------------------------------------------------------------------------ gates


def _gates(
    results: Results,
    analysis: Analysis,
    arm: str,
    further: Sequence[str],
    thresholds: Mapping[str, str | float],
) -> list[Gate]:
    study = results.study
    about = [h for h in study.hypotheses if h.treatment == arm or h.factor in study.set_levels(arm)]
    names = [h.name for h in about]
    for name in further:
        if name not in names:
            known = {h.name for h in study.hypotheses}
            why = (
                f"is not about arm '{arm}'"
                if name in known
                else f"no such hypothesis; {suggestion(name, known)}"
            )
            raise UserError(f"--gate={name}: {why}")
    wanted = [h.name for h in about if h.primary or h.name in further]
    verdicts = {verdict.hypothesis: verdict for verdict in analysis.verdicts}
    gates = [_plan(results), _seeds(results, analysis, arm)]
    gates += [_verdict(verdicts[name], len(study.seeds)) for name in wanted]
    gates += [_threshold(results, analysis, arm, name, value) for name, value in thresholds.items()]
    if len(gates) == 2:
        gates.append(
            Gate("evidence", "closed", "no primary hypothesis is about it; give --gate or --threshold")
        )
    return gates


def _plan(results: Results) -> Gate:
    if not results.locked:
        return Gate("plan", "closed", "the plan was never locked: no confirmatory run has begun")
    if results.amendments:
        first = results.amendments[0]
        return Gate("plan", "closed", f"amended at {first['time']} ({'; '.join(first['changes'][:2])})")
    return Gate("plan", "open", f"{results.plan_hash}, locked at {results.locked} and not amended")


def _seeds(results: Results, analysis: Analysis, arm: str) -> Gate:
    planned = results.study.seeds
    states = {run.seed: run.state for run in results.of(arm)}
    missing = [f"{seed} is {state}" for seed in planned if (state := states.get(seed, "pending")) != "done"]
    if missing:
        done = len(planned) - len(missing)
        return Gate("seeds", "closed", f"{done} of {len(planned)} are done (seed {', '.join(missing)})")
    response = results.study.response().name
    if not analysis.arm(arm, response).complete:
        return Gate("seeds", "closed", f"some have no value of {response}")
    return Gate("seeds", "open", f"all {len(planned)} are done, none diverged")


def _verdict(verdict: Verdict, seeds: int) -> Gate:
    """Open on the final look only: a verdict on a factor rests on other arms too, which may be incomplete."""
    if verdict.declared != "confirmatory":
        why = "exploratory: the hypothesis was not fixed before the runs"
    elif verdict.estimate.n != seeds:
        why = f"an interim look: {verdict.outcome} on {verdict.estimate.n} of {seeds} seeds"
    else:
        why = f"{verdict.outcome}: {verdict.reason}"
        if verdict.outcome == "supported":
            return Gate(verdict.hypothesis, "open", why)
    return Gate(verdict.hypothesis, "closed", why)


def _threshold(results: Results, analysis: Analysis, arm: str, name: str, value: str | float) -> Gate:
    response = results.study.response(name)
    try:
        bound = float(value)
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        raise UserError(f"--threshold={name}={value}: must be a number")
    mean = analysis.arm(arm, response.name).mean.value
    side = "at least" if response.better > 0 else "at most"
    holds = mean is not None and response.better * (mean - bound) >= 0
    reason = f"mean {'unknown' if mean is None else f'{mean:.6g}'}, to be {side} {bound:g}"
    return Gate(f"threshold {response.name}", "open" if holds else "closed", reason)


# ------------------------------------------------------------------------------------------ files


def _config(manifest: Manifest, arm: str, name: str) -> dict[str, Any]:
    """The config of the arm's first confirmatory run, under the name it will have. Hosts are not in it."""
    runs = [run for run in manifest.runs if run.arm == arm and run.phase == "confirm"]
    rates = sorted({run.learning_rate for run in runs})
    if len(rates) > 1:
        raise UserError(f"arm '{arm}' is not promoted; its runs have several learning rates: {rates}")
    config = manifest.config_of(runs[0])
    labels = {"study": STUDY, "arm": name, "seeds": [config.pop("seed")]}
    return {**labels, **config, **labels}  # first, and not the study's own


def _evidence(
    results: Results, analysis: Analysis, arm: str, name: str, gates: Sequence[Gate]
) -> dict[str, Any]:
    runs = results.of(arm)
    used = {gate.name for gate in gates}
    values = {}
    for value in analysis.arms:
        if value.arm == arm:
            seeds = {str(seed): number for seed, number in value.values.items()}
            values[value.response] = dataclasses.asdict(value) | {"values": seeds}
    return {
        "name": name,
        "time": runstore.now(),
        "study": results.study.name,
        "arm": arm,
        "levels": results.study.levels(arm),
        "plan_hash": results.plan_hash,
        "locked": results.locked,
        "code": origin.read(dataclasses.replace(results, runs=runs)).answer("code"),
        "learning_rate": runs[0].learning_rate,
        "seeds": [run.seed for run in runs],
        "runs": [run.run_id for run in runs],
        "gates": [dataclasses.asdict(gate) for gate in gates],
        "verdicts": [dataclasses.asdict(v) for v in analysis.verdicts if v.hypothesis in used],
        "values": values,
    }


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(disk.plain(values), indent=2) + "\n"


def _there(path: Path, content: str) -> bool:
    """Whether the file is there with this content; the time of a promotion may differ."""
    if not path.exists():
        return False
    if path.suffix == ".json":
        old, new = disk.read_json(path), json.loads(content)
        same = isinstance(old, dict) and {**old, "time": 0} == {**new, "time": 0}
    else:
        same = path.read_bytes() == content.encode()
    if not same:
        raise UserError(f"{path}: is another promotion of that name; give another --name, or remove it")
    return True
