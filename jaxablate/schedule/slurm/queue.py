"""Asking SLURM, and telling it: its own tools, called with argument lists, in bounded time.

What the queue says is news of the queue alone. That a job is not in it means nothing for the runs: SLURM
forgets jobs, after MinJobAge or with a controller that was killed, and the run directories do not.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxablate.errors import UserError

# What SLURM's tools say while the controller, the database or munge is down, restarts or is too busy; measured
# with 22.05, and the rest from its table of errors (slurm_errno.c). Whatever else they say is an answer.
_PASSING = re.compile(
    r"Unable to contact|Unexpected message received|timed out|Connection (refused|reset)|connect failure"
    r"|Zero Bytes were transmitted|Transport endpoint|Resource temporarily unavailable|Broken pipe"
    r"|temporarily unable|in standby mode|Communication (connection|shutdown)|failed to open persistent"
    r"|Unable to connect to database|Protocol authentication error|Munged? communication|munge.sock",
    re.IGNORECASE,
)
# Where scancel has no words it ends with the number of the error: ESLURM_INVALID_JOB_ID, ESLURM_ALREADY_DONE.
_NOT_THERE = re.compile(
    rf"Invalid job id|already completing or completed|exit code ({2017 % 256}|{2021 % 256})$", re.IGNORECASE
)
_NO_ACCOUNTING = re.compile(r"accounting storage is disabled|supported accounting_storage", re.IGNORECASE)
_LONGEST_PAUSE_S = 8.0

Kind = Literal["absent", "silent", "refused"]


class SlurmError(UserError):
    """A tool of SLURM did not do what it was asked, in one line."""

    def __init__(self, message: str, kind: Kind):
        super().__init__(message)
        self.kind: Kind = kind  # it is not installed; it got no answer; the answer was no


@dataclass(frozen=True)
class Seen:
    """A job, or an element of an array, as SLURM has it."""

    job: str  # "123", or "123_4" for an element
    state: str  # SLURM's word: PENDING, RUNNING, COMPLETED, …
    reason: str  # why it waits or how it ended, if SLURM says; "" otherwise
    node: str  # "" while it has none
    source: Literal["squeue", "sacct"]

    @property
    def queued(self) -> bool:
        """Whether SLURM still means to do something with it. Only squeue can say: accounting goes stale."""
        return self.source == "squeue" and self.state in QUEUED

    @property
    def held(self) -> Literal["", "by slurm", "by hand"]:
        """By whom it is kept from starting until somebody releases it; empty if it is not.

        SLURM itself does it with what it could not start, such as after a controller that was killed.
        """
        if re.search("requeued.held", self.reason):
            return "by slurm"
        held = self.state in ("REQUEUE_HOLD", "SPECIAL_EXIT") or "held" in self.reason.lower()
        return "by hand" if held else ""


QUEUED = frozenset({"PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_FED",
                    "REQUEUE_HOLD", "RESIZING", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED"})  # fmt: skip


@dataclass(frozen=True)
class Bounds:
    """What one may submit here."""

    array: int  # elements of one array
    jobs: int | None  # elements in the queue at a time; None: nothing says so


def run_tool(argv: Sequence[str], *, timeout_s: float, retries: int = 0) -> str:
    """What a tool prints.

    Args:
      argv: the program, which is looked up on PATH, and its arguments; no shell sees them.
      timeout_s: seconds, for all attempts together.
      retries: how often it is tried again after an error that may pass, with longer and longer pauses. Only for
        what may be done twice: a tool that got no answer may all the same have had its effect.

    Raises:
      SlurmError: there is no such program, it got no answer, or was refused; `kind` says which.
    """
    name, until, pause = argv[0], time.monotonic() + timeout_s, 0.25
    program = shutil.which(name)
    if program is None:
        raise SlurmError(f"{name}: not on PATH; call jaxablate where SLURM's tools are installed", "absent")
    for left in range(retries, -1, -1):
        said = _attempt([program, *argv[1:]], until - time.monotonic())
        if isinstance(said, str):
            return said
        error = SlurmError(f"{name}: {said.words}", said.kind)
        if said.kind == "refused" or not left or time.monotonic() + pause >= until:
            raise error
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)
    raise AssertionError("the last attempt returns or raises")


@dataclass(frozen=True)
class _Failed:
    words: str
    kind: Kind


def _attempt(argv: Sequence[str], timeout_s: float) -> str | _Failed:
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=max(timeout_s, 0.01), check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return _Failed(f"no answer in {timeout_s:.0f} s", "silent")
    except OSError as error:
        return _Failed(f"cannot be started: {error.strerror}", "absent")
    if done.returncode == 0:
        return done.stdout
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    words = "; ".join(re.sub(r"^\w+: error: ", "", line) for line in lines) or f"exit code {done.returncode}"
    return _Failed(words, "silent" if _PASSING.search(words) else "refused")


# ------------------------------------------------------------------------------------------ asking


def look(jobs: Iterable[int | str], timeout_s: float = 10) -> tuple[dict[str, Seen], str]:
    """What SLURM knows of jobs: squeue first, then sacct for how those ended that are not in it any more.

    Args:
      jobs: whole jobs, such as 123 with all its elements, or single ones, such as "123_4".
      timeout_s: seconds, for each of the two tools.

    Returns:
      By job or element what was found, and in words what did not answer; "" if all that exists did. An
      accounting that is switched off is nothing to speak of. Never raises because SLURM fails.
    """
    wanted = list(dict.fromkeys(str(job) for job in jobs))
    if not wanted:
        return {}, ""
    found, silent = {}, []
    try:
        found = _squeue(_numbers(wanted), timeout_s)
    except SlurmError as error:
        silent.append(str(error))
    if missing := [job for job in wanted if not _among(job, found)]:
        try:
            ended = _sacct(_numbers(missing), timeout_s).items()
            found = {job: seen for job, seen in ended if seen.state not in QUEUED} | found
        except SlurmError as error:
            # Where squeue is not installed sacct is not either, and one such sentence is enough.
            if error.kind != "absent" and not _NO_ACCOUNTING.search(str(error)):
                silent.append(str(error))
    return _own(found, wanted), "; ".join(silent)


def queued(jobs: Iterable[int | str], timeout_s: float = 10) -> tuple[dict[str, Seen], str]:
    """Those of `jobs` that SLURM still means to do something with, by squeue alone; and why it did not say.

    A row of the accounting says RUNNING for ever if the database missed the end, so it proves nothing.
    """
    wanted = list(dict.fromkeys(str(job) for job in jobs))
    if not wanted:
        return {}, ""
    try:
        found = _own(_squeue(_numbers(wanted), timeout_s), wanted)
    except SlurmError as error:
        return {}, str(error)
    return {job: seen for job, seen in found.items() if seen.queued}, ""


def _own(found: dict[str, Seen], wanted: Sequence[str]) -> dict[str, Seen]:
    """What was asked for, of what a tool says of the same arrays."""
    numbers = {job for job in wanted if "_" not in job}
    return {job: seen for job, seen in found.items() if job in wanted or job.partition("_")[0] in numbers}


def _numbers(jobs: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(job.partition("_")[0] for job in jobs))


def _among(job: str, found: dict[str, Seen]) -> bool:
    return job in found or any(seen.startswith(f"{job}_") for seen in found)


def _squeue(numbers: Sequence[str], timeout_s: float) -> dict[str, Seen]:
    fields = "%i|%T|%N|%r"  # the reason last, since it is free text
    argv = [
        "squeue",
        "--noheader",
        "--array",
        "--states=all",
        f"--format={fields}",
        f"--jobs={','.join(numbers)}",
    ]
    try:
        return _rows(run_tool(argv, timeout_s=timeout_s, retries=3), "squeue")
    except SlurmError as error:
        if _NOT_THERE.search(str(error)):  # the only one that was asked for, and forgotten
            return {}
        raise


def _sacct(numbers: Sequence[str], timeout_s: float) -> dict[str, Seen]:
    fields = "JobID,State,NodeList,Reason"
    argv = ["sacct", "--noheader", "--parsable2", "--allocations", f"--format={fields}",
            f"--jobs={','.join(numbers)}"]  # fmt: skip
    return _rows(run_tool(argv, timeout_s=timeout_s, retries=3), "sacct")


def _rows(text: str, source: Literal["squeue", "sacct"]) -> dict[str, Seen]:
    found = {}
    for line in text.splitlines():
        job, *rest = line.strip().split("|", 3)
        if len(rest) != 3:
            continue
        state, node, reason = (field.strip() for field in rest)
        nothing = ("", "None", "(null)", "None assigned")
        node, reason = ("" if field in nothing else field for field in (node, reason))
        for one in _elements(job):  # "CANCELLED by 1000"
            found[one] = Seen(one, (state.split() or [""])[0], reason, node, source)
    return found


def _elements(job: str) -> list[str]:
    """ "7_[0,2-4%2]" -> 7_0, 7_2, 7_3, 7_4; a job or an element is itself; of anything else there are none."""
    if re.fullmatch(r"\d+(_\d+)?", job):
        return [job]
    match = re.fullmatch(r"(\d+)_\[([\d,-]+)(%\d+)?\]", job)
    if match is None:
        return []
    ranges = [part.partition("-") for part in match[2].split(",") if part]
    return [f"{match[1]}_{n}" for low, _, high in ranges for n in range(int(low), int(high or low) + 1)]


def bounds(account: str = "", qos: str = "", timeout_s: float = 10) -> Bounds:
    """What may be submitted at once: by the controller's config, and by the associations where there are any.

    Raises:
      SlurmError: the controller does not say.
    """
    config = run_tool(["scontrol", "show", "config"], timeout_s=timeout_s, retries=5)
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)
    size = int(match[1]) if match else 1001
    if not re.search(r"^AccountingStorageEnforce\s*=.*limits", config, re.MULTILINE):
        return Bounds(size, None)  # what the database says is not enforced
    user = _user()
    default = _records(["user", "where", f"name={user}", "format=DefaultAccount"], timeout_s)
    account = account or "".join(default[:1])
    where = [f"user={user}", *([f"account={account}"] if account else [])]
    found = _records(["assoc", "where", *where, "format=MaxSubmitJobs,GrpSubmitJobs"], timeout_s)
    if qos:
        found += _records(["qos", "where", f"name={qos}", "format=MaxSubmitPU,GrpSubmit"], timeout_s)
    counts = [int(word) for line in found for word in line.split("|") if word.isdigit()]
    return Bounds(size, min(counts, default=None))


def _records(words: Sequence[str], timeout_s: float) -> list[str]:
    """Lines of the accounting's tables; none if it does not answer: a limit shows itself when it is reached."""
    argv = ["sacctmgr", "--noheader", "--parsable2", "show", *words]
    try:
        return run_tool(argv, timeout_s=timeout_s, retries=3).splitlines()
    except SlurmError:
        return []


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


# ----------------------------------------------------------------------------------------- telling


def requeue(job: str, timeout_s: float = 60) -> None:
    """Puts one job, or one element ("123_4"), back into the queue; goes on trying while SLURM does not answer.

    Never with the bare number of an array's task: that of the last one is the number of the whole array.

    Raises:
      SlurmError: it was refused, or there was no answer in that time.
    """
    run_tool(["scontrol", "requeue", job], timeout_s=timeout_s, retries=100)


def release(jobs: Sequence[str], timeout_s: float = 60) -> None:
    """Lets held jobs or elements start; with none it does nothing.

    Raises:
      SlurmError: it was refused, or there was no answer in that time.
    """
    if jobs:
        run_tool(["scontrol", "release", ",".join(jobs)], timeout_s=timeout_s, retries=100)


def scancel(jobs: Sequence[str], timeout_s: float = 60) -> None:
    """Cancels jobs or elements; those that have ended, or that SLURM has forgotten, are none to cancel.

    Raises:
      SlurmError: it was refused, or there was no answer in that time.
    """
    if not jobs:
        return
    try:
        run_tool(["scancel", "--quiet", *jobs], timeout_s=timeout_s, retries=100)
    except SlurmError as error:
        if not _NOT_THERE.search(str(error)):
            raise
