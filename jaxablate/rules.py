"""Rules of a config: conditions with a name, listed by `validate`, and enforced where nothing works without them.

A rule is written once, as an item of what a `rules` function yields. `enforce` makes the first broken one an
error; `validate` shows them all, the broken ones and those that hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxablate.errors import UserError

# static: nothing can be computed without it. advice: it can, but hardly as it was meant. host: of this machine.
Kind = Literal["static", "advice", "host"]


@dataclass(frozen=True)
class Rule:
    """One condition.

    Attributes:
      name: dotted path of the field below the config, or what else the rule is about.
      value: what the config has there; None where there is no such value.
      holds: whether it does.
      detail: what must be, and where it is not obvious how to mend it; or what is so.
    """

    name: str
    value: Any
    holds: bool
    detail: str
    kind: Kind = "static"

    def __str__(self) -> str:
        return f"{self.name}{'' if self.value is None else f'={self.value!r}'}: {self.detail}"


class Broken(UserError):
    """A rule does not hold. `rules` are all that were asked together."""

    def __init__(self, rules: Iterable[Rule], prefix: str):
        self.rules = tuple(rules)
        super().__init__(prefix + next(str(rule) for rule in self.rules if not rule.holds))


def enforce(rules: Iterable[Rule], prefix: str = "config.") -> None:
    """Raises Broken, which is a UserError, with the first static rule that does not hold; others are advice."""
    found = [rule for rule in rules if rule.kind == "static"]
    if not all(rule.holds for rule in found):
        raise Broken(found, prefix)


def at_least(least: float, name: str, value: Any, kind: Kind = "static") -> Rule:
    """The number at `name` is `least` or more."""
    return Rule(name, value, value >= least, f"must be {least} or more", kind)


def within(low: float, high: float, name: str, value: Any, kind: Kind = "advice") -> Rule:
    """The number at `name` is from `low` to `high`."""
    return Rule(name, value, low <= value <= high, f"must be from {low:g} to {high:g}", kind)


def divides(name: str, value: int, of: str, whole: int) -> Rule:
    """The number at `name` divides the one at `of`."""
    return Rule(name, value, value > 0 and whole % value == 0, f"must divide {of}={whole}")


def there(named: Mapping[str, str]) -> Iterator[Rule]:
    """The files or folders that the config names are there: path of the field -> what it has, by commas if several.

    An empty field names none.
    """
    for name, paths in named.items():
        each = [paths] if Path(paths).exists() else [part.strip() for part in paths.split(",")]
        missing = [path for path in each if not Path(path).exists()]
        detail = f"no such file or folder: {missing[0]}; mend the path" if missing else "is there"
        if paths:
            yield Rule(name, paths, not missing, detail, "host")
