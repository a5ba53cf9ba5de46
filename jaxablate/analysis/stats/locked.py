"""What of the analysis plan was declared before the first confirmatory run. The rest is exploratory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from jaxablate.analysis.results import Result, Results
from jaxablate.study import Study

# Amendments to these bear on which runs there are, and not on how two arms are compared.
_RUNS_ONLY = ("seeds", "name")
# These decide which arms the design of a main effect has.
_DESIGN = ("arms", "factors")


@dataclass(frozen=True)
class Standing:
    """How the plan that is reported differs from the one that was locked."""

    exploratory: Mapping[str, str]  # hypothesis -> why it is
    warnings: tuple[str, ...]
    seeds_changed: bool


def standing(results: Results) -> Standing:
    """Reads it off the amendments, whose changes say `path: old -> new`.

    A change that could bear on every verdict, or of which one cannot tell, makes all of them exploratory.
    Seeds that were added after the lock may have been added because of what the others said.
    """
    study, found = results.study, dict[str, str]()
    if results.locked is None:
        why = "the plan was never locked"
        warning = (f"{why}: all verdicts are exploratory",) if study.hypotheses else ()
        return Standing({h.name: why for h in study.hypotheses}, warning, False)
    warnings = []
    seeds_changed = False
    if early := begun_before_lock(results):
        found |= {h.name: "runs began before the plan was locked" for h in study.hypotheses}
        names = [f"{run.arm}/{run.run_id}" for run in early[:3]]
        more = f" and {len(early) - 3} more" if len(early) > 3 else ""
        warnings.append(
            f"confirmatory runs began before the plan was locked, so that all verdicts are exploratory: "
            f"{', '.join(names)}{more}"
        )
    for amendment in results.amendments:
        changes = tuple(str(change) for change in amendment.get("changes", ()))
        for change in changes:
            for name in _touched(study, change):
                found.setdefault(name, "was changed or added after the plan was locked")
            seeds_changed |= change.startswith("seeds")
        shown = "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")
        warnings.append(
            f"the plan was amended after it was locked ({amendment.get('time', 'no date')}): {shown}"
        )
    if results.amendments and found and not early:
        warnings.append(f"exploratory because of amendments: {', '.join(found)}")
    if seeds_changed:
        warnings.append(
            "seeds were changed after the lock: if results were looked at before, the error rates are higher than "
            "stated (going from 3 seeds to 6 one at a time gives 12 % false positives at a nominal 5 %)"
        )
    return Standing(found, tuple(warnings), seeds_changed)


def begun_before_lock(results: Results) -> list[Result]:
    """Confirmatory runs whose first attempt is older than the lock; of a run without a time nobody can tell."""
    locked = _moment(results.locked)
    return [
        run
        for run in results.confirm
        if locked is not None and (began := _moment(run.started)) is not None and began < locked
    ]


def _moment(time: str | None) -> datetime | None:
    try:
        moment = datetime.fromisoformat(time or "")
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _touched(study: Study, change: str) -> list[str]:
    """The hypotheses that a change `path: old -> new` of the plan bears on."""
    everything = [h.name for h in study.hypotheses]
    match = re.match(r"(\w+)(?:\[(\d+)\])?([^:]*): (\(absent\))?", change)
    if match is None:
        return everything
    section, index, rest, added = match[1], match[2], match[3], match[4] is not None
    if section in _RUNS_ONLY:
        return []
    if section in _DESIGN:
        return [h.name for h in study.hypotheses if h.factor]
    if section not in ("hypotheses", "responses"):
        return everything
    if index is None:  # of a list that was empty: its items follow by their index
        return []
    if section == "responses":
        if int(index) >= len(study.responses):
            return []  # one that nothing asks for any more
        name = study.responses[int(index)].name
        return [h.name for h in study.hypotheses if study.response(h.response).name == name]
    # Fewer primary hypotheses, by removal or by demotion, make Holm's correction of the others milder.
    if int(index) >= len(study.hypotheses) or (rest == ".primary" and not added):
        return everything
    return [study.hypotheses[int(index)].name]
