"""What a study varies: factors with levels, and the arms that combine them. Data only; no jax.

A study's file has all of it from `jaxablate.study`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxablate.errors import UserError

Kind = Literal["model", "implementation", "data", "training"]
NAME = re.compile(r"\w[\w.-]*")


def require(holds: bool, what: str) -> None:
    """Raises a UserError with `what` is wrong with the study unless it `holds`."""
    if not holds:
        raise UserError(f"study: {what}")


@dataclass(frozen=True)
class Factor:
    """One thing that is varied, with named levels; the first is the reference and changes nothing.

    The kind says what `check` holds it to. `model`: changes the function that is computed.
    `implementation`: must not change it. `data`: changes the batches and not the function.
    `training`: changes the update (optimiser, schedule, loss weights) and neither function nor batches.
    """

    name: str
    kind: Kind
    levels: Mapping[str, Mapping[str, Any]]  # level -> dotted config path -> value
    same_parameters: float | None = (
        None  # largest relative difference in parameters between levels, if declared
    )

    def __post_init__(self) -> None:
        require(
            NAME.fullmatch(self.name) is not None, f"factor '{self.name}': letters, digits, '_', '-', '.'"
        )
        require(len(self.levels) >= 2, f"factor '{self.name}' has {len(self.levels)} level; give two or more")
        require(
            not self.levels[self.reference],
            f"factor '{self.name}': its first level '{self.reference}' is the reference and must change nothing",
        )
        for level, changes in self.levels.items():
            require(
                level == self.reference or bool(changes),
                f"factor '{self.name}': level '{level}' changes nothing",
            )

    @property
    def reference(self) -> str:
        """The level that the base config has."""
        return next(iter(self.levels))


def switch(name: str, kind: Kind, changes: Mapping[str, Any], same_parameters: float | None = None) -> Factor:
    """A factor that is off or on."""
    return Factor(name, kind, {"off": {}, "on": changes}, same_parameters)


@dataclass(frozen=True)
class Arm:
    """A name and the levels of the factors that it sets; the others stay at their reference."""

    name: str
    levels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(
            NAME.fullmatch(self.name) is not None, f"arm '{self.name}': use letters, digits, '_', '-', '.'"
        )


Axis = Factor | Sequence[Mapping[str, str]]


def zipped(*factors: Factor) -> list[dict[str, str]]:
    """An axis for `product` along which factors move together: first levels, second levels, …"""
    counts = {len(f.levels) for f in factors}
    require(len(counts) == 1, f"zipped factors must have equally many levels, not {sorted(counts)}")
    return [
        dict(zip((f.name for f in factors), levels, strict=True))
        for levels in zip(*(f.levels for f in factors), strict=True)
    ]


def product(
    *axes: Axis,
    where: Callable[[Mapping[str, str]], bool] = lambda levels: True,
    names: Mapping[frozenset[str], str] | Callable[[Mapping[str, str]], str] | None = None,
) -> tuple[Arm, ...]:
    """All combinations of the axes' levels for which `where` holds, as arms; fewest changes first.

    Args:
      *axes: a factor, or `zipped(...)` factors.
      where: given factor -> level, whether to keep the combination.
      names: an arm's name by the set of factors that are not at their reference, or a function of
        factor -> level; by default `baseline`, or the changed levels joined by `_`.
    """
    steps: list[list[dict[str, str]]] = []
    reference: dict[str, str] = {}
    for axis in axes:
        rows = (
            [{axis.name: level} for level in axis.levels] if isinstance(axis, Factor) else [*map(dict, axis)]
        )
        steps.append(rows)
        reference |= rows[0]
    arms = []
    for rows in itertools.product(*steps):
        levels = {name: level for row in rows for name, level in row.items()}
        if not where(levels):
            continue
        changed = {n: level for n, level in levels.items() if level != reference[n]}
        if callable(names):
            name = names(levels)
        elif names is not None:
            name = names[frozenset(changed)]
        else:
            name = (
                "_".join(n if level == "on" else f"{n}-{level}" for n, level in changed.items()) or "baseline"
            )
        arms.append(Arm(name, levels))

    def rank(arm: Arm) -> tuple[int, list[int]]:
        changed = [i for i, name in enumerate(reference) if arm.levels[name] != reference[name]]
        return len(changed), changed

    return tuple(sorted(arms, key=rank))


def factorial(
    factors: Sequence[Factor], names: Mapping[frozenset[str], str] | None = None
) -> tuple[Arm, ...]:
    """Every combination of every level: 2^k arms of k switches."""
    return product(*factors, names=names)


def one_factor_out(factors: Sequence[Factor], baseline: str = "baseline") -> tuple[Arm, ...]:
    """The baseline, and each other level of each factor by itself, all else at the reference."""

    def alone() -> Iterator[Arm]:
        for factor in factors:
            for level in list(factor.levels)[1:]:
                name = (
                    factor.name
                    if level == "on"
                    else level
                    if len(factor.levels) == 2
                    else f"{factor.name}-{level}"
                )
                yield Arm(name, {factor.name: level})

    return (Arm(baseline), *alone())
