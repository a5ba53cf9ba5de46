"""The run directory: what a run leaves on disk, and how it survives being killed (design §7).

Standard library only, so that `status` and `report` start at once on a login node. Two promises:

* a file written with `write_json` is the old one or the new one, never half of each;
* a row written with `append_jsonl` is there or not; the torn line that a kill can leave at the very end of
  a file is reported by `read_jsonl` and removed by the next append.

Which of several processes works on a run is decided in `claims`.

JSON has no NaN and no infinity (RFC 8259), so both are written as `null`, in every file of this module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import math
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from jaxablate.errors import UserError

State = Literal[
    "pending", "running", "done", "diverged", "oom", "preempted", "timeout", "node_fail", "bug", "cancelled"
]
STATES: tuple[State, ...] = get_args(State)

# What a state means, for all who schedule and report.
OUTCOMES: tuple[State, ...] = ("done", "diverged")  # results: final, and never trained again
FAILURES: tuple[State, ...] = (
    "oom",
    "timeout",
    "node_fail",
    "bug",
)  # it broke, by itself or with its machine
INTERRUPTED: tuple[State, ...] = (
    "preempted",
    "node_fail",
)  # no fault of the run's: it goes on from a checkpoint

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_STRAY_AFTER_S = 600.0


# ---------------------------------------------------------------------------------------------- JSON


def plain(value: object) -> Any:
    """`value` as JSON can hold it: non-finite floats become None, tuples lists, array scalars numbers.

    A scalar of another library (numpy, jax) is recognised by its `.item()`, so that none is imported here.
    Raises TypeError for what has no JSON form, and for keys that are not strings.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"a JSON key must be a string, not {odd[0]!r}")
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", 0) == 0:
        return plain(item())
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def _fsync_directory(path: Path) -> None:
    """Make a rename in `path` survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as err:  # some network file systems refuse to sync a directory; the rename itself held
        if err.errno not in (errno.EINVAL, *_NO_LOCKS):
            raise
    finally:
        os.close(fd)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace `path` by `data` atomically: temp file beside it, fsync, rename, fsync of the directory.

    A process killed at any instant leaves the old file, or the new one. What it may also leave is a
    `.<name>.<random>.tmp`; `RunDir.begin_attempt` removes those once they are old.
    """
    path = Path(path)
    temp = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temp)
        raise
    _fsync_directory(path.parent)


def write_json(path: str | os.PathLike[str], obj: object) -> None:
    """Write `obj` as indented JSON, atomically (see `write_bytes`); NaN and infinities become null."""
    text = json.dumps(plain(obj), indent=2, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_STRICT = json.JSONDecoder(parse_constant=_no_constant)  # once: json.loads would make one for every row


def _loads(data: bytes) -> Any:
    """Parse strict JSON. Raises ValueError, whatever is wrong with `data`."""
    try:
        return _STRICT.decode(data.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file. Raises UserError when it is missing, unreadable or not JSON."""
    try:
        return _loads(Path(path).read_bytes())
    except OSError as err:
        raise UserError(f"{path}: cannot be read: {err.strerror}") from None
    except ValueError as err:
        raise UserError(f"{path}: not valid JSON ({_one_line(err)}); restore the file or delete it") from None


# ------------------------------------------------------------------------------------------ JSON lines


def encode_row(row: Mapping[str, Any]) -> bytes:
    """One row as one line of JSON, with its newline. Keys keep their order; floats are Python's repr."""
    return (json.dumps(plain(row), allow_nan=False) + "\n").encode()


def open_append(path: str | os.PathLike[str]) -> int:
    """A file descriptor for `write_row`; the caller closes it. Creates the file if need be."""
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)


def write_row(fd: int, line: bytes) -> None:
    """Append one whole line with a single `os.write`; raise OSError, and leave nothing, if it does not fit.

    With O_APPEND and one write the lines of several writers never interleave. A full disk can accept a part
    of the line: that part is taken back, so the file stays readable and the run resumable.
    """
    written = os.write(fd, line)
    if written != len(line):
        with contextlib.suppress(OSError):
            os.ftruncate(fd, os.fstat(fd).st_size - written)
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({written} of {len(line)} bytes written)")


def _committed(data: bytes) -> tuple[int, bool]:
    """(bytes up to the end of the last whole row, whether that row only lacks its newline)."""
    end = data.rfind(b"\n") + 1
    if end < len(data) and parse_row(data[end:]) is not None:
        # A row ends with the brace that closes it, so it is whole even when its newline is missing.
        return len(data), True
    return end, False


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The JSON object that a line holds; None if it holds anything else."""
    try:
        row = _loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


@contextlib.contextmanager
def locked(fd: int, how: int = fcntl.LOCK_EX) -> Iterator[bool]:
    """Hold a flock on `fd`, exclusive by default; yields False where the file system has no locks.

    Raises BlockingIOError if `how` has LOCK_NB and another has the lock.
    """
    try:
        fcntl.flock(fd, how)
    except OSError as err:
        if err.errno not in _NO_LOCKS:
            raise
        yield False
        return
    try:
        yield True
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)


def append_jsonl(path: str | os.PathLike[str], row: Mapping[str, Any], *, sync: bool = False) -> None:
    """Append one row as one line. `sync` makes it survive a power cut as well as a kill.

    A torn line that a killed writer left at the end is cut off first; otherwise the new row would be glued
    to it and both would be lost.
    """
    fd = open_append(path)
    try:
        with locked(fd):
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                end, lacks_newline = _committed(os.pread(fd, size, 0))
                if lacks_newline:
                    write_row(fd, b"\n")
                else:
                    os.ftruncate(fd, end)
            write_row(fd, encode_row(row))
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def read_jsonl(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], bool]:
    """(rows, torn): the rows of a file, and whether a torn last line was left out. No file is no rows.

    Torn means: the end of the file, without a newline, and not a whole row. A line that is broken in any
    other way was not made by a kill, and raises UserError naming the file and the line.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return [], False
    except OSError as err:
        raise UserError(f"{path}: cannot be read: {err.strerror}") from None
    end, _ = _committed(data)
    rows = []
    for number, line in enumerate(data[:end].split(b"\n"), start=1):
        if not line.strip():
            continue
        row = parse_row(line)
        if row is None:
            raise UserError(
                f"{path}:{number}: not a JSON object: {line[:60].decode(errors='replace')!r}; "
                f"the file is damaged, delete that line or restore the file"
            )
        rows.append(row)
    return rows, end < len(data)


def read_steps(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], bool]:
    """As `read_jsonl`, of metrics.jsonl or perf.jsonl: every row has its step, and else numbers or nulls."""
    rows, torn = read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        odd = [key for key, value in row.items() if value is not None and not isinstance(value, int | float)]
        if type(row.get("step")) is not int or odd:
            raise UserError(
                f"{path}: row {number} has {odd[0] if odd else 'step'} {row.get(odd[0] if odd else 'step')!r}; "
                f"the file is damaged, restore it or delete the run directory"
            )
    return rows, torn


# ------------------------------------------------------------------------------------- run directories


def make_private(path: str | os.PathLike[str]) -> None:
    """Create a directory and its missing parents for the owner alone (0700); existing ones stay as they are.

    The default of `os.makedirs` gives parents the umask's mode, which on most sites lets everyone read.
    Raises UserError when that is not possible.
    """
    path = Path(path)
    missing = [p for p in (path, *path.parents) if not p.exists()]
    try:
        for parent in reversed(missing):
            parent.mkdir(mode=0o700, exist_ok=True)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except OSError as err:
        raise UserError(
            f"{path}: cannot create the directory: {err.strerror}; choose another workdir"
        ) from None


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
    before, after = _flatten(plain(old)), _flatten(plain(new))

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
        make_private(self.path)
        if self.config.exists():
            self._same_config(config)
            return False
        try:
            write_json(self.config, config)
        except OSError as err:
            raise UserError(f"{self.config}: cannot be written: {err.strerror}") from None
        return True

    def _same_config(self, config: Mapping[str, Any]) -> None:
        lines = differences(read_json(self.config), config)
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
        rows, _ = read_jsonl(self.attempts)
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

        Call it while holding the claim. Temporary files that killed writers left are removed here, if they
        are old enough that nobody can still be writing them.
        """
        for stray in self.path.glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - stray.stat().st_mtime > _STRAY_AFTER_S:
                    stray.unlink()
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
        append_jsonl(self.attempts, {**own, **info}, sync=True)
