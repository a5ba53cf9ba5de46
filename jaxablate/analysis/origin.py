"""Where a study's numbers come from, over all of its runs: code, packages, hardware; and whether these differ."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxablate import disk, provenance
from jaxablate.analysis.results import Results
from jaxablate.analysis.sentences import count, listed
from jaxablate.errors import UserError

NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Origin:
    """For each question (`code`, `jax`, …) the answers, with the number of runs that give each."""

    answers: Mapping[str, Mapping[str, int]]
    runs: int  # that have a record
    unread: tuple[str, ...] = ()  # records that could not be read, in words

    @property
    def differences(self) -> tuple[str, ...]:
        """What is not the same in all runs, a sentence each."""
        return tuple(
            f"runs differ in {question}: " + listed([f"{a} ({count(n, 'run')})" for a, n in found.items()])
            for question, found in self.answers.items()
            if len(found) > 1
        )

    def answer(self, question: str) -> str:
        """The answer in words; several with their counts."""
        found = self.answers.get(question, {})
        if not found:
            return NOT_RECORDED
        if len(found) == 1:
            return next(iter(found))
        return "; ".join(f"{answer} ({count(n, 'run')})" for answer, n in found.items())


def read(results: Results) -> Origin:
    """The origin of the confirmatory runs that have ended with a result."""
    answers: dict[str, dict[str, int]] = {}
    unread: list[str] = []
    runs = 0
    for run in results.confirm:
        if run.dir is None or run.without_result:
            continue
        try:
            record = disk.read_json(run.dir.provenance)
            said = _answers(record)
        except UserError as error:
            unread.append(str(error))
            continue
        except (AttributeError, KeyError, TypeError):
            unread.append(f"{run.dir.provenance}: not a record of provenance; restore the file")
            continue
        runs += 1
        for question, answer in said.items():
            found = answers.setdefault(question, {})
            found[answer] = found.get(answer, 0) + 1
    return Origin(answers, runs, tuple(unread))


def _answers(record: Mapping[str, Any]) -> dict[str, str]:
    packages = {name: version for name, version in record["packages"].items() if version}
    return {
        "code": _code(record.get("git")),
        "hardware": provenance.hardware(record),
        "python": record["python"],
        **packages,
        "XLA flags": record.get("xla_flags") or "none",
    }


def _code(git: Mapping[str, Any] | None) -> str:
    if not git:
        return "no git commit was recorded"
    commit = git["commit"][:12]
    if not git["dirty"]:
        return f"commit {commit}"
    changes = hashlib.sha256(git["diff"].encode()).hexdigest()[:8]
    return f"commit {commit} with uncommitted changes {changes}"
