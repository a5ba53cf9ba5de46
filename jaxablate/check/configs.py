"""The rule on configs: an arm changes what it declares, and `get_config` gives the same arm."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from jaxablate import config, userfile
from jaxablate.check.report import Finding
from jaxablate.config import RunConfig
from jaxablate.errors import UserError
from jaxablate.study import Study, load

Run = RunConfig[Any, Any]
LABELS = ("study", "arm", "seed", "host")  # not an arm's to change, and nothing computes with them


def declared(study: Study, runs: Mapping[str, Run], reference: Run) -> Iterator[Finding]:
    """Each arm differs from the base config in exactly what it declares, and no two arms are one."""
    by_fingerprint: dict[str, str] = {}
    for arm, run in runs.items():
        problems = list(_declared(study, arm, run, reference))
        twin = by_fingerprint.setdefault(run.fingerprint, arm)
        if twin != arm:
            problems.append(
                Finding(arm, "config", "fail", f"is the same run as arm '{twin}' under another name")
            )
        changes = study.changes(study.set_levels(arm))
        said = ", ".join(f"{path}={value}" for path, value in changes.items())
        fine = Finding(
            arm, "config", "ok", f"changes {said}, and nothing else" if said else "is the base config"
        )
        yield from problems or [fine]


def _declared(study: Study, arm: str, run: Run, reference: Run) -> Iterator[Finding]:
    changes = study.changes(study.set_levels(arm))
    differing = _differences(reference, run)
    resolved = config.flatten(run.complete())
    for path, value in changes.items():
        if path not in differing:
            reason = f"declares {path}={value!r}, which the base config has already"
            yield Finding(arm, "config", "fail", reason, {"path": path})
        elif resolved.get(path) != json.loads(json.dumps(value)):
            reason = f"declares {path}={value!r} and resolves to {resolved.get(path)!r}"
            yield Finding(arm, "config", "fail", reason, {"path": path})
    for path, (before, after) in differing.items():
        if path not in changes:
            reason = f"changes {path} from {before!r} to {after!r}, which it does not declare"
            yield Finding(arm, "config", "fail", reason, {"path": path, "arm": after, "baseline": before})


def _differences(one: Run, other: Run) -> dict[str, tuple[Any, Any]]:
    return {
        path: values
        for path, values in config.diff(one, other).items()
        if path.partition(".")[0] not in LABELS
    }


def from_file(study: Study, spec: str, arms: list[str]) -> Iterator[Finding]:
    """What `get_config` of the study's file gives for an arm is the arm of `get_study`.

    A file that trains one arm by hand (`--config=file.py:arm=NAME`) may differ from the study unnoticed.
    Both are read from the file anew, so that overrides on the command line concern neither.
    """
    file, _, arg = spec.partition(":")
    if not callable(getattr(userfile.load_module(file), "get_config", None)):
        return
    pristine = load(spec)
    problems: dict[str, str] = {}
    differing: list[Finding] = []
    for arm in dict.fromkeys((study.baseline, *arms)):
        given = ",".join(part for part in (f"arm={arm}", arg) if part)
        try:
            meant = config.resolve(pristine.config(arm)).base
            made = config.resolve(config.load_config_dict(f"{file}:{given}")).base
        except UserError as error:
            problems[arm] = str(error)
            continue
        wrong = _differences(meant, made) | ({} if made.arm == arm else {"arm": (arm, made.arm)})
        for path, (ours, theirs) in wrong.items():
            reason = f"get_config('{given}') gives {path}={theirs!r}, get_study() has {ours!r} for this arm"
            values = {"path": path, "get_config": theirs, "get_study": ours}
            differing.append(Finding(arm, "config", "fail", reason, values))
    if problems.keys() >= {study.baseline, *arms}:  # it takes no arm at all, which is no arm's fault
        for arm in arms:
            reason = f"get_config was not compared, since it takes no such argument: {problems[arm]}"
            yield Finding(arm, "config", "note", reason)
        return
    yield from (finding for finding in differing if finding.arm in arms)
    for arm in problems.keys() & set(arms):
        yield Finding(arm, "config", "fail", f"get_config fails: {problems[arm]}")
