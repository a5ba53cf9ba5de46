"""What is to become of a run, by what its attempts left: bounded retries by kind of failure (design §2).

    oom                   half as many members, down to one; then more micro-batches of the same batch, and evaluation
                          in as many parts; never for a run that said that it cannot be split
    node_fail, preempted  again as it was, a few times in one launch
    bug                   never; but the members of a cohort that failed are tried once each by itself, since one
                          program holds them all and one of them is guilty
    timeout, cancelled    never
    done, diverged        outcomes
    paused                preempted at the end of the stage that was asked for, which is no interruption

All of it follows from attempts.jsonl, so that a launcher that was killed loses no count. `retry` starts the
counts anew: what came before its `pending` row no longer matters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxablate.runstore import INTERRUPTED, OUTCOMES, State

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Outlook:
    """Whether a run is to be trained, and in what company. The last two hold for all runs of its arm."""

    state: State
    reason: str
    next: Literal["train", "nothing"]
    company: Literal["cohort", "alone"] = "cohort"
    members: int | None = None  # that a cohort had room for, at most; None: any number so far
    split: int = 1  # times more micro-batches than the config says
    paused: str = ""  # the stage at whose end it is, or that it has left behind, if no more is asked of it
    behind: str = ""  # the last stage that it was trained to the end of and left at, asked or not


PENDING = Outlook("pending", "", "train")


def outlook(
    history: Rows, micro_batch: int, since: str = "", retries: int = 3, until: Collection[str] = ()
) -> Outlook:
    """What follows from a run's history.

    Args:
      history: the rows of attempts.jsonl.
      micro_batch: examples of one micro-batch at split 1; every split must divide it.
      since: when this launch began; earlier interruptions were another command's.
      retries: how often a launch takes up a run that was interrupted.
      until: at the end of these stages nothing more is asked of the run.
    """
    rows = _since_retry(history)
    if not rows:
        return PENDING
    last = rows[-1]
    if last["state"] not in OUTCOMES and (marks := [row for row in rows if row["state"] == "cancelled"]):
        last = marks[-1]  # what its process wrote while it stopped does not undo it
    state, reason = last["state"], last.get("reason", "")
    members, split, fits = _room(rows, micro_batch)
    guilty = state == "bug" and (_begin(rows, last).get("members", 1) == 1 or _refused(reason))
    paused: str = last.get("paused", "")
    behind = next((row["paused"] for row in reversed(rows) if row.get("paused")), "")
    passed = (
        behind if _passes(state) and behind in until else ""
    )  # until "" means the end of the run, no pause
    interrupted = sum(
        row["state"] in INTERRUPTED and row["time"] >= since and not row.get("paused") for row in rows
    )
    ended = (
        state in (*OUTCOMES, "timeout", "cancelled")
        or bool(passed)
        or guilty
        or (state == "oom" and not fits)
        or (state in INTERRUPTED and not paused and interrupted > retries)
    )
    alone = any(row["state"] == "bug" for row in rows)
    return Outlook(
        state,
        reason,
        "nothing" if ended else "train",
        "alone" if alone else "cohort",
        members,
        split,
        passed,
        behind,
    )


def _passes(state: State) -> bool:
    """Whether a stage that was trained to its end still counts, whatever became of the run in the one after it."""
    return state in (*INTERRUPTED, "running", "oom")


def _since_retry(history: Rows) -> Rows:
    marks = [i for i, row in enumerate(history) if row["state"] == "pending"]
    return history[marks[-1] :] if marks else history


def _begin(rows: Rows, end: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with which the attempt began that `end` ended."""
    began = (row for row in rows if row["attempt"] == end["attempt"] and row["state"] == "running")
    return next(began, {})


def _room(rows: Rows, micro_batch: int) -> tuple[int | None, int, bool]:
    """(members at most, split, whether there is anything left to try) after what ran out of memory so far."""
    members, split = None, 1
    for row in rows:
        if row["state"] != "oom":
            continue
        begin = _begin(rows, row)
        had = begin.get("members", 1)
        if had > 1:
            members = min(members or had, had // 2)
            continue
        members, further = 1, 2 * begin.get("split", 1)
        if micro_batch % further or "unsplittable" in begin:
            return members, begin.get("split", 1), False
        split = max(split, further)
    return members, split, True


def _refused(reason: str) -> bool:
    """Whether it was bad input, which does not depend on the company."""
    return reason.startswith("UserError: ")
