"""The run directory: what a run leaves on disk, and the history of its states (design §7).

How its files outlive a kill is in `disk`; which of several processes works on a run is decided in `claims`.
Standard library only, so that `status` and `report` start at once on a login node.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from jaxablate import disk
from jaxablate.errors import UserError

State = Literal[
    "pending", "running", "done", "diverged", "oom", "preempted", "timeout", "node_fail", "bug", "cancelled"
]
STATES: tuple[State, ...] = get_args(State)

# What a state means, for all who schedule and report.
OUTCOMES: tuple[State, ...] = ("done", "diverged")  # results: final, and never trained again
FAILURES: tuple[State, ...] = ("oom", "timeout", "node_fail", "bug")  # it broke, or its machine did
INTERRUPTED: tuple[State, ...] = (
    "preempted",
    "node_fail",
)  # no fault of its own: it goes on from a checkpoint


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def run_id(seed: int, learning_rate: float, fingerprint: str) -> str:
    """The name of a run's directory, such as `seed0-lr0.001-1a2b3c4d5e`.

    The learning rate is written in full (Python's repr), and the first ten characters of the fingerprint of
    the resolved config tell apart what the first two do not.
    """
    if len(fingerprint) < 10 or not fingerprint.isalnum():
        raise ValueError(f"fingerprint: {fingerprint!r} is not at least ten letters and digits")
    return f"seed{seed}-lr{float(learning_rate)!r}-{fingerprint[:10]}"


def _flatten(value: object, prefix: str = "") -> dict[str, str]:
    """Dotted key -> JSON text of each leaf. Text, because 1, 1.0 and true are equal in Python."""
    pairs: list[tuple[str, object]] = []
    if isinstance(value, dict) and value:
        pairs = [(f"{prefix}.{key}" if prefix else key, item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        pairs = [(f"{prefix}[{i}]", item) for i, item in enumerate(value)]
    else:
        return {prefix: json.dumps(value)}
    flat: dict[str, str] = {}
    for key, item in pairs:
        flat |= _flatten(item, key)
    return flat


def differences(old: object, new: object) -> list[str]:
    """`key: old -> new` for every dotted key in which two configs differ, in the order of `old`."""
    before, after = _flatten(disk.plain(old)), _flatten(disk.plain(new))

    def short(text: str) -> str:
        return text if len(text) <= 60 else text[:57] + "..."

    return [
        f"{key}: {short(before.get(key, '(absent)'))} -> {short(after.get(key, '(absent)'))}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]


def now() -> str:
    """The time as UTC in ISO 8601, to the millisecond."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _age() -> float | None:
    """Seconds that this process has lived; None where /proc does not say (field 22 of proc_pid_stat(5))."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return round(time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK"), 2)


def slurm_job() -> dict[str, Any]:
    """The job of SLURM that this process belongs to, as an attempt's row has it; empty outside of one."""
    name = os.environ.get("SLURM_JOB_ID")
    if name is None:
        return {}
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        name = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    node = os.environ.get("SLURMD_NODENAME", "")
    return {"slurm": {"job": name, "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0), "node": node}}


def moment(time: object) -> float | None:
    """What `now` wrote, as seconds since the epoch; None if it is nothing of the kind."""
    try:
        found = datetime.datetime.fromisoformat(time) if isinstance(time, str) else None
    except ValueError:
        return None
    return found.timestamp() if found is not None and found.tzinfo is not None else None


def read_steps(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], bool]:
    """As `disk.read_jsonl`, of metrics.jsonl or perf.jsonl: every row has its step, and else numbers or nulls."""
    rows, torn = disk.read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        odd = [key for key, value in row.items() if value is not None and not isinstance(value, int | float)]
        if type(row.get("step")) is not int or odd:
            raise UserError(
                f"{path}: row {number} has {odd[0] if odd else 'step'} {row.get(odd[0] if odd else 'step')!r}; "
                f"the file is damaged, restore it or delete the run directory"
            )
    return rows, torn


@dataclasses.dataclass(frozen=True)
class RunDir:
    """The directory of one run. A value: it says where things are, and touches the disk only when asked."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config, frozen when the run was made."""
        return self.path / "config.json"

    @property
    def provenance(self) -> Path:
        """Code, packages, hardware, kernels and flags."""
        return self.path / "provenance.json"

    @property
    def attempts(self) -> Path:
        """The history of states, a row for each change."""
        return self.path / "attempts.jsonl"

    @property
    def metrics(self) -> Path:
        """The source of truth of what was measured."""
        return self.path / "metrics.jsonl"

    @property
    def perf(self) -> Path:
        """What depends on the clock: timings and rates."""
        return self.path / "perf.jsonl"

    @property
    def summary(self) -> Path:
        """Statistics and final state."""
        return self.path / "summary.json"

    @property
    def curves(self) -> Path:
        """The figure of the losses."""
        return self.path / "loss_curves.png"

    @property
    def schedule(self) -> Path:
        """The figure of the learning rate."""
        return self.path / "lr_schedule.png"

    @property
    def metrics_csv(self) -> Path:
        """What was measured as a table, for other programs."""
        return self.path / "metrics.csv"

    @property
    def metrics_json(self) -> Path:
        """The same rows as JSON."""
        return self.path / "metrics.json"

    @property
    def predictions(self) -> Path:
        """A few predictions of the last evaluation, of tasks that keep some."""
        return self.path / "predictions.npz"

    @property
    def closing(self) -> Path:
        """Outputs of the closing metrics while they are made; gone when the run has finished."""
        return self.path / "closing"

    @property
    def checkpoints(self) -> Path:
        """The directory of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def claim(self) -> Path:
        """The lock file of whoever works on the run."""
        return self.path / "claim.json"

    def create(self, config: Mapping[str, Any]) -> bool:
        """Make the directory and freeze `config` in it; True if it was new.

        When a config is there already the two must be equal, because continuing a run under another config
        gives a result that belongs to neither. Raises UserError naming what differs.
        """
        disk.make_private(self.path)
        if self.config.exists():
            self._same_config(config)
            return False
        try:
            disk.write_json(self.config, config)
        except OSError as err:
            raise UserError(f"{self.config}: cannot be written: {err.strerror}") from None
        return True

    def _same_config(self, config: Mapping[str, Any]) -> None:
        lines = differences(disk.read_json(self.config), config)
        if not lines:
            return
        more = f" and {len(lines) - 4} more" if len(lines) > 4 else ""
        raise UserError(
            f"{self.config}: this run was started with another config ({'; '.join(lines[:4])}{more}); "
            f"restore the old value or use another workdir"
        )

    # Attempts. Each state is written by whoever knows it, and read back as it was written.

    def history(self) -> list[dict[str, Any]]:
        """The rows of attempts.jsonl, oldest first."""
        rows, _ = disk.read_jsonl(self.attempts)
        for number, row in enumerate(rows, start=1):
            attempt, state = row.get("attempt"), row.get("state")
            if state not in STATES or type(attempt) is not int:
                raise UserError(
                    f"{self.attempts}:{number}: attempt {attempt!r} with state {state!r}; "
                    f"an attempt is a number, a state one of {' '.join(STATES)}"
                )
            counts = [row.get(key, 1) for key in ("members", "split")]
            timeless = "time" in row and moment(row["time"]) is None
            if timeless or any(type(n) is not int or n < 1 for n in counts):
                raise UserError(
                    f"{self.attempts}:{number}: time {row.get('time')!r}, members and split {counts}; "
                    f"the file is damaged, restore it or delete that line"
                )
        return rows

    def state(self) -> State:
        """The state in the last row; `pending` when there is none.

        `running` means that an attempt said it began and none has said that it ended. Whether its process
        still lives is not guessed here: the claim knows, and whoever takes a stale one over writes it down.
        """
        rows = self.history()
        return rows[-1]["state"] if rows else "pending"

    def begin_attempt(self, **info: Any) -> int:
        """Record that this process starts to work on the run; returns the number of the attempt, from 1.

        Call it while holding the claim. Temporary files that killed writers left are removed here.
        """
        disk.sweep(self.path)
        number = 1 + max((row["attempt"] for row in self.history()), default=0)
        self._record(number, "running", {"age": _age(), **slurm_job(), **info})
        return number

    def end_attempt(self, number: int, state: State, reason: str, **info: Any) -> None:
        """Record how attempt `number` ended, in words. Another process may say it (`node_fail`)."""
        if state in ("pending", "running"):
            raise ValueError(f"an attempt does not end in state {state!r}")
        if all(row["attempt"] != number for row in self.history()):
            raise ValueError(f"{self.attempts}: attempt {number} never began")
        self._record(number, state, {"reason": _one_line(reason), **info})

    def mark(self, state: State, reason: str, **info: Any) -> None:
        """Record a state that no attempt caused: `cancelled` before the start, `pending` for a retry."""
        last = max((row["attempt"] for row in self.history()), default=0)
        self._record(last, state, {"reason": _one_line(reason), **info})

    def _record(self, number: int, state: State, info: Mapping[str, Any]) -> None:
        if state not in STATES:
            raise ValueError(f"state {state!r} is not one of {' '.join(STATES)}")
        own = {
            "attempt": number,
            "state": state,
            "time": now(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        if taken := own.keys() & info.keys():
            raise ValueError(f"{sorted(taken)} are written by the run store itself")
        disk.append_jsonl(self.attempts, {**own, **info}, sync=True)
