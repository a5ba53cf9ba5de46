"""What a study declares: factors and arms. Data only; imports no jax."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ml_collections import ConfigDict

from jaxablate.config import set_path


@dataclass(frozen=True)
class Arm:
    """A name and the dotted config paths that it changes, with the values it gives them."""

    name: str
    changes: Mapping[str, Any]

    def apply(self, config: ConfigDict) -> None:
        """Changes `config` in place; a path that does not exist is a UserError."""
        for path, value in self.changes.items():
            set_path(config, path, value)
        config.arm = self.name


@dataclass(frozen=True)
class Factor:
    """One thing that is varied, off and on.

    Kind `model` changes the function that is computed; `implementation` must not.
    """

    name: str
    kind: Literal["model", "implementation"]
    changes: Mapping[str, Any]  # what the factor's second level sets; its first level is the base config


def factorial(factors: Sequence[Factor], names: Mapping[frozenset[str], str]) -> dict[str, Arm]:
    """All 2^k combinations of factors as arms, from none to all.

    Args:
      factors: k factors whose changes touch different paths.
      names: the arm's name for each set of factors that are on.
    """
    arms = {}
    for size in range(len(factors) + 1):
        for chosen in itertools.combinations(factors, size):
            name = names[frozenset(f.name for f in chosen)]
            arms[name] = Arm(name, {path: value for f in chosen for path, value in f.changes.items()})
    return arms
