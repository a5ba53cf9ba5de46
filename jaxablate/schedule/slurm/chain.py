"""What elements owe to those before them: SLURM says only that these have ended, the run directories say how."""

from __future__ import annotations

import sys

from jaxablate.manifest import Manifest
from jaxablate.runstore import OUTCOMES
from jaxablate.schedule.retries import Outlook
from jaxablate.schedule.slurm.submission import Element, Submission
from jaxablate.schedule.survey import Survey
from jaxablate.study import Run


def well(look: Outlook) -> bool:
    """Whether a run has what was asked of it: an outcome, or the end of the stage."""
    return look.state in OUTCOMES or bool(look.paused)


def until(submission: Submission, element: Element) -> tuple[str, ...]:
    """The stages at whose end a run has done what this element asks of it: its own, and those after it."""
    return tuple(one.stage for one in submission.later(element)) if element.stage else ()


def lost(manifest: Manifest, submission: Submission, element: Element) -> dict[Run, str]:
    """The runs that elements before this one were to bring to their end and did not, with the reason.

    A predecessor without runs, whose rate was not chosen, has none to lose.
    """
    found: dict[Run, str] = {}
    for index in element.after:
        before = submission.elements[index]
        survey = Survey("", sys.maxsize, until(submission, before))
        for run in before.runs_of(manifest):
            if not well(look := survey.look(manifest, run)):
                found[run] = f"element {index}, {run.arm}/{run.id}, is {look.state} {look.reason}".rstrip()
    return found
