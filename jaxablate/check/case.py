"""What a rule is given, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

from jaxablate.check.probes import Bench, Broken, Probe, Skipped
from jaxablate.check.report import Finding, Verdict
from jaxablate.study import Factor, Study


@dataclass(frozen=True)
class Said:
    """A verdict with its reason, before it is known whose it is."""

    verdict: Verdict
    reason: str
    values: dict[str, Any] = field(default_factory=dict)


# A rule yields what is wrong, and returns what to say if nothing is.
Rule = Callable[["Case"], Generator[Said, None, Said | None]]


def fail(reason: str, **values: Any) -> Said:
    """The arm does not ablate what it says."""
    return Said("fail", reason, values)


def note(reason: str, **values: Any) -> Said:
    """Right or wrong is for a person to say."""
    return Said("note", reason, values)


def ok(reason: str, **values: Any) -> Said:
    """What was found right."""
    return Said("ok", reason, values)


def missing(*got: object) -> Said:
    """There is nothing to look at: it was not tried, or the study's own code raised."""
    broken = next((g for g in got if isinstance(g, Broken)), None)
    if broken is not None:
        return fail(broken.reason)
    return Said("skipped", next(g.reason for g in got if isinstance(g, Skipped)))


@dataclass(frozen=True)
class Parent:
    """A factor that an arm takes from its reference, and the arm without it."""

    factor: Factor
    level: str
    label: str  # of the arm without it
    probe: Probe | Broken

    @property
    def name(self) -> str:
        """`model factor 'norm' (model.norm=rmsnorm)`."""
        changes = ", ".join(f"{path}={value}" for path, value in self.factor.levels[self.level].items())
        return f"{self.factor.kind} factor '{self.factor.name}' ({changes})"


@dataclass(frozen=True)
class Case:
    """An arm with all that it is compared with."""

    study: Study
    arm: str
    probe: Probe
    base: Probe  # of the study's baseline
    parents: tuple[Parent, ...]
    bench: Bench

    @property
    def kinds(self) -> set[str]:
        """The kinds of the factors that the arm sets."""
        return {parent.factor.kind for parent in self.parents}

    def declares(self, *paths: str) -> bool:
        """Whether the arm declares a change at, or below, one of the dotted config paths."""
        declared = self.study.changes(self.study.set_levels(self.arm))
        return any(path == p or path.startswith(f"{p}.") for path in declared for p in paths)

    def judge(self, check: str, rule: Rule) -> Iterable[Finding]:
        """What the rule finds: its problems, or that there is none."""
        said: list[Said] = []

        def listen() -> Generator[Said, None, None]:
            fine = yield from rule(self)
            if fine is not None and not any(s.verdict in ("fail", "skipped") for s in said):
                yield fine

        for one in listen():
            said.append(one)
            yield Finding(self.arm, check, one.verdict, one.reason, one.values)
