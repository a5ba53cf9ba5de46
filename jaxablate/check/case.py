"""What a rule is given, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
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
class Beside:
    """What an arm has to match but for its factors: the baseline, or a parent, which lacks one of them."""

    label: str
    name: str  # in words
    probe: Probe
    factors: tuple[Factor, ...]  # those in which the two are at different levels
    paths: tuple[str, ...]  # dotted config paths in which these factors set them apart

    def declares(self, *paths: str) -> bool:
        """Whether one of the factors between the two changes something at, or below, one of the config paths."""
        return any(under(path, *paths) for path in self.paths)


def under(path: str, *sections: str) -> bool:
    """Whether a dotted config path is one of the sections, or lies below it."""
    return any(path == section or path.startswith(f"{section}.") for section in sections)


def precision(*probes: Probe) -> str:
    """The coarsest type that one of them computes in."""
    kinds = {probe.run.training.compute_dtype for probe in probes}
    return "float32" if kinds == {"float32"} else "bfloat16"


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
    def beside(self) -> tuple[Beside, ...]:
        """The baseline first, then every parent that builds.

        A factor excuses what it declares only where it is the difference: the parents tell what each of the
        arm's factors does alone, and the baseline what they do together.
        """
        probes = {self.study.baseline: self.base}
        probes |= {p.label: p.probe for p in self.parents if isinstance(p.probe, Probe)}
        return tuple(self._beside(label, probe) for label, probe in probes.items() if label != self.arm)

    def _beside(self, label: str, probe: Probe) -> Beside:
        own, there = self.study.set_levels(self.arm), self._levels(label)
        factors = tuple(f for f in self.study.factors if own.get(f.name) != there.get(f.name))
        pairs: list[Mapping[str, Any]] = [self.study.changes(levels) for levels in (own, there)]
        paths = dict.fromkeys(path for changes in pairs for path in changes)
        name = "the baseline" if label == self.study.baseline else f"'{label}'"
        apart = [p for p in paths if (p in pairs[0], pairs[0].get(p)) != (p in pairs[1], pairs[1].get(p))]
        return Beside(label, name, probe, factors, tuple(apart))

    def _levels(self, label: str) -> dict[str, str]:
        if label == self.study.baseline:
            return self.study.set_levels(label)
        lacking = next(parent.factor.name for parent in self.parents if parent.label == label)
        return {name: level for name, level in self.study.set_levels(self.arm).items() if name != lacking}

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
