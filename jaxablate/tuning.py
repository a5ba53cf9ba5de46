"""Choosing each arm's learning rate from its tuning runs, by the rule that the study declares. No jax.

What is reported comes from other, fresh seeds: reporting the seeds that chose the rate gives 13 to 15 % false
positives (simulated).

An arm's row of `rates.json` is its choice with the evidence; whoever shows it takes it from there:

    learning_rate   the rate; null if at none every seed gave a value
    rule, response  what chose it
    edge            where in the grid the best rate is: "lowest", "highest", "only" (rate), or "" for inside
    grid            the rates that were tried, in rising order; the next three have an entry for each
    means           mean response by which the rule compared the rate (geometric if the response's scale is
                    log); null where a run diverged or has no value, so that the rate was not eligible
    diverged, runs  how many tuning runs diverged, of how many
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxablate.analysis.results import Result
from jaxablate.errors import UserError
from jaxablate.study import LearningRate, Response, Study

Edge = Literal["", "lowest", "highest", "only"]  # where in the grid the optimum is; "": inside


@dataclass(frozen=True)
class Tried:
    """One rate of an arm's grid: what its tuning seeds gave."""

    learning_rate: float
    mean: float | None  # of the response, geometric if its scale is log; None unless every seed gave one
    runs: int
    diverged: int


@dataclass(frozen=True)
class Choice:
    """The rate of one arm with the evidence for it."""

    arm: str
    rule: str
    response: str
    learning_rate: float | None  # None: at no rate did every seed give a value
    edge: Edge
    extend_by: float | None  # a further rate to try before the choice stands
    grid: tuple[Tried, ...]

    def to_dict(self) -> dict[str, Any]:
        """The row of `rates.json`."""
        return {
            "learning_rate": self.learning_rate,
            "rule": self.rule,
            "response": self.response,
            "edge": self.edge,
            "grid": [tried.learning_rate for tried in self.grid],
            "means": [tried.mean for tried in self.grid],
            "diverged": [tried.diverged for tried in self.grid],
            "runs": [tried.runs for tried in self.grid],
        }

    @classmethod
    def from_dict(cls, arm: str, row: Mapping[str, Any]) -> Choice:
        """An arm's choice from its row of `rates.json`, as `to_dict` gave it.

        Raises:
          UserError: the row lacks something.
        """
        try:
            columns = (row[key] for key in ("grid", "means", "runs", "diverged"))
            grid = tuple(Tried(*tried) for tried in zip(*columns, strict=True))
            return cls(
                arm,
                row["rule"],
                row["response"],
                row["learning_rate"],
                row["edge"],
                extend_by=None,
                grid=grid,
            )
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"rates.json: arm '{arm}': not the row of a tuned arm; restore the file"
            ) from None


def warning(arm: str, chosen: Mapping[str, Any]) -> str:
    """What a reader must know of a row of `rates.json`, in one line; empty if nothing."""
    rate, edge = chosen["learning_rate"], chosen["edge"]
    if rate is None:
        return f"arm {arm}: no learning rate of {chosen['grid']} worked at every seed"
    if not edge:
        return ""
    where = "the only rate" if edge == "only" else f"the {edge} rate"
    return f"arm {arm}: learning rate {rate:g} is {where} of its grid; a wider grid may have a better one"


def choose(study: Study, tuning: Iterable[Result]) -> dict[str, Choice]:
    """arm -> its choice, for each arm whose tuning runs in `tuning` have all ended in a result.

    A run that failed otherwise than by diverging says nothing about its rate, so its arm has to wait.

    Raises:
      UserError: the response cannot choose a rate.
    """
    rule, response = _rule(study), tuning_response(study)
    arms: dict[str, list[Result]] = {}
    for run in tuning:
        if run.phase == "tuning":
            arms.setdefault(run.arm, []).append(run)
    return {
        arm: _choose(arm, rule, response, runs)
        for arm, runs in arms.items()
        if not any(run.without_result for run in runs)
    }


def tuning_response(study: Study) -> Response:
    """The response that chooses the rates.

    Raises:
      UserError: its target is a share of the baseline's confirmatory best, which is not known yet.
    """
    response = study.response(_rule(study).response)
    if response.fraction is not None:
        raise UserError(
            f"study: learning_rate.response='{response.name}': its target is a fraction of what the "
            "baseline's confirmatory runs reach, and tuning comes before; name another response"
        )
    return response


def _rule(study: Study) -> LearningRate:
    assert study.learning_rate is not None, "only a study with a rule tunes"
    return study.learning_rate


def _choose(arm: str, rule: LearningRate, response: Response, runs: Sequence[Result]) -> Choice:
    rates = sorted({_rate(run) for run in runs})
    grid = tuple(_tried(rate, [run for run in runs if run.learning_rate == rate], response) for rate in rates)
    eligible = [tried for tried in grid if tried.mean is not None]
    if not eligible:
        chosen = None
    elif rule.rule == "largest_stable":
        chosen = eligible[-1].learning_rate
    else:
        chosen = max(eligible, key=lambda t: response.better * (t.mean or 0.0)).learning_rate
    edge = _edge(rates, chosen, rule)
    extended = len(rates) - len(rule.grid_of(arm))
    extend_by = _beyond(rates, edge) if edge in ("lowest", "highest") and extended < rule.extend else None
    return Choice(arm, rule.rule, response.name, chosen, edge, extend_by, grid)


def _rate(run: Result) -> float:
    assert run.learning_rate is not None, "a tuning run has a rate"
    return run.learning_rate


def _tried(rate: float, runs: Sequence[Result], response: Response) -> Tried:
    """A rate is eligible, and has a mean, if none of its runs diverged and each has a value."""
    values = [run.values.get(response.name) for run in runs if run.state == "done"]
    known = [value for value in values if value is not None]
    mean = None
    if len(known) == len(runs):
        mean = _log_mean(known, response) if response.scale == "log" else statistics.fmean(known)
    return Tried(rate, mean, len(runs), sum(run.state == "diverged" for run in runs))


def _log_mean(values: Sequence[float], response: Response) -> float:
    if min(values) <= 0:
        raise UserError(
            f"study: response '{response.name}': scale='log' with a value of {min(values):g}; use scale='raw'"
        )
    return math.exp(statistics.fmean(math.log(value) for value in values))


def _edge(rates: Sequence[float], chosen: float | None, rule: LearningRate) -> Edge:
    """Where the optimum may lie outside. Rates above the chosen one that diverged are no open side."""
    if len(rates) == 1:
        return "only"
    if chosen is None:
        return "lowest"
    if chosen == rates[-1]:
        return "highest"
    return "lowest" if chosen == rates[0] and rule.rule == "best_mean" else ""


def _beyond(rates: Sequence[float], edge: Edge) -> float:
    """The grid's next rate beyond an edge, by the ratio it has there; six digits, for a readable name."""
    low, high = (rates[0], rates[1]) if edge == "lowest" else (rates[-2], rates[-1])
    return float(f"{low * low / high if edge == 'lowest' else high * high / low:.6g}")
