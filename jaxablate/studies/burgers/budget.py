"""How many candidates test-time conditioning draws, and how many rewards it computes. Imports no jax."""

from __future__ import annotations

from jaxablate.studies.burgers.config import ConditioningConfig


def draws(config: ConditioningConfig) -> tuple[int, ...]:
    """Candidates that are drawn at each depth of the look-ahead, () for none; see `evaluations`.

    What `max_evaluations` leaves after the candidates of a depth is shared evenly among those that look ahead,
    because a total with a look-ahead and one without cannot be compared; where it leaves none, nobody does.
    """
    found: list[int] = []
    budget = config.max_evaluations
    for _ in range(max(config.horizon, 1)):
        count = min(config.candidates, budget)
        if count < 1:
            break
        found.append(count)
        width = min(config.beam, count)
        if width < 2:  # a single one needs no look-ahead to be chosen
            break
        budget = (budget - count) // width
    return tuple(found)


def evaluations(config: ConditioningConfig) -> int:
    """Rewards that are computed for one sample in one step: 8, 32, 104 for 8 candidates, beam 3, horizon 1, 2, 3."""
    total = 0
    for count in reversed(draws(config)):
        total = count + min(config.beam, count) * total
    return total
