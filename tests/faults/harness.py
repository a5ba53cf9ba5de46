"""What the fault tests share: a lab of real processes, an undisturbed run to compare with, and counts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxablate import disk
from jaxablate.analysis.goodput import Goodput
from jaxablate.runstore import RunDir
from tests.compiling import quickly

REPO = Path(__file__).resolve().parents[2]
PATIENCE_S = 180.0
_LOOK_S = 0.003


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below a directory with its content."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def environment(cache: Path) -> dict[str, str]:
    """What a child gets: a CPU with one device, and a compilation cache of its own, which a kill may tear."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "kernels")]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": quickly(),
        "MPLBACKEND": "agg",
        "OPENBLAS_NUM_THREADS": "1",
        "JAXABLATE_CACHE": str(cache),
        "JAX_COMPILATION_CACHE_DIR": str(cache / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


# ------------------------------------------------------------------------------------------- processes


class Child:
    """A process that a nursery has forked."""

    def __init__(self, nursery: Nursery, pid: int, output: Path):
        self.pid, self.output, self._nursery = pid, output, nursery
        self.returncode: int | None = None

    def send(self, number: signal.Signals) -> None:
        """A signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        """Its exit code, -N for signal N; None while it runs."""
        return self._ask("none")

    def wait(self) -> int:
        """Its exit code, when it has ended."""
        code = self._ask("any")
        assert code is not None
        return code

    def _ask(self, patience: str) -> int | None:
        if self.returncode is None:
            self.returncode = self._nursery.ask({"wait": self.pid, "patience": patience})["code"]
        return self.returncode

    def words(self) -> str:
        """What it and those before it with the same output have said."""
        return self.output.read_text(errors="replace")


@dataclass(frozen=True)
class Failing:
    """From call number `after` on, a function of `os` raises OSError(error) in the child."""

    call: str
    after: int
    error: int


class Nursery:
    """See the module of that name. A context manager; what it started is killed in the end."""

    def __init__(self, env: Mapping[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nursery"],
            cwd=REPO,
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._children: list[Child] = []
        self._answer()  # it is ready

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer to an order."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        entry: str,
        argv: Sequence[str],
        output: Path,
        env: Mapping[str, str] | None = None,
        file_size: int = 0,
        failing: Failing | None = None,
        cwd: Path = REPO,
    ) -> Child:
        """A process that runs `main(argv)` of a module, with its output appended to a file.

        `file_size` limits what it may write to one file, in bytes; 0: as much as it likes.
        """
        order = {"start": entry, "argv": list(argv), "output": str(output), "cwd": str(cwd)}
        order |= {"env": dict(env or {}), "file_size": file_size}
        order |= {"failing": failing and dataclasses.asdict(failing)}
        child = Child(self, self.ask(order)["pid"], output)
        self._children = [*(other for other in self._children if other.returncode is None), child]
        return child

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *exc: object) -> None:
        for child in self._children:
            child.send(signal.SIGKILL)
            child.wait()
        self._process.communicate()


def wait_for(condition: Callable[[], Any], child: Child) -> Any:
    """What `condition` gives once it is true, or None if the child ends before."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        if child.poll() is not None:
            return None
        assert time.monotonic() < deadline, f"nothing happens: {child.words()[-2000:]}"
        time.sleep(_LOOK_S)
    return found


# ------------------------------------------------------------------------------------------------ runs


@dataclass(frozen=True)
class Toy:
    """The toy config with some fields replaced, as a command line that can be given again and again."""

    fields: Mapping[str, Any]
    entry: str = "jaxablate.main"

    def argv(self, workdir: Path) -> list[str]:
        """The command that trains it below `workdir`."""
        pairs = [f"--config.{name}={value}" for name, value in self.fields.items()]
        return ["--config=tests/configs/toy.py", *pairs, f"--config.host.workdir={workdir}"]

    def but(self, **fields: Any) -> Toy:
        """With other values of some fields; `__` in a keyword is a dot."""
        changed = {name.replace("__", "."): value for name, value in fields.items()}
        return dataclasses.replace(self, fields={**self.fields, **changed})


# Two members, so that a kill can fall between the files of one and those of the other; noise, so that a step
# that is done twice or not at all shows; a checkpoint of every other step, so that many kills fall into one.
TOY = Toy({"seeds": "0,1", "model.noise": 0.1, "training.steps": 40, "host.checkpoint_every": 2})


def start(nursery: Nursery, toy: Toy, workdir: Path, **options: Any) -> Child:
    """A process that trains, or continues, a toy below `workdir`."""
    workdir.mkdir(parents=True, exist_ok=True)
    return nursery.start(toy.entry, toy.argv(workdir), workdir / "output.txt", **options)


def finish(nursery: Nursery, toy: Toy, workdir: Path) -> Path:
    """Trains a toy to its end, from whatever is there; returns `workdir`."""
    child = start(nursery, toy, workdir)
    assert child.wait() == 0, child.words()[-3000:]
    return workdir


def interrupted(nursery: Nursery, workdir: Path, rows: int = 36, **options: Any) -> Path:
    """A toy that was killed once each member had written so many rows, by default late; returns `workdir`."""
    child = start(nursery, TOY, workdir, **options)
    wait_for(lambda: progress(workdir) >= rows, child)
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, child.words()
    return workdir


def runs(workdir: Path) -> list[RunDir]:
    """The run directories below a workdir, in a stable order."""
    return [RunDir(path.parent) for path in sorted(workdir.glob("*/*/*/config.json"))]


def rows(run: RunDir) -> int:
    """Rows of metrics.jsonl, whole or torn."""
    return run.metrics.read_bytes().count(b"\n") if run.metrics.exists() else 0


def progress(workdir: Path) -> int:
    """Rows that the slowest run has written; 0 before the first."""
    return min(map(rows, runs(workdir)), default=0)


def attempts(workdir: Path) -> int:
    """Rows of attempts.jsonl over all runs."""
    return sum(run.attempts.read_bytes().count(b"\n") for run in runs(workdir) if run.attempts.exists())


def committed(run: RunDir) -> set[int]:
    """Steps whose checkpoint is complete: the manifest, which is written last, is there and says `regular`."""
    found = set()
    for path in run.checkpoints.glob("*.json"):
        with contextlib.suppress(FileNotFoundError):
            if json.loads(path.read_bytes())["regular"]:
                found.add(int(path.stem))
    return found


def common_step(workdir: Path) -> int:
    """The newest step that all members have committed; 0 if there is none."""
    steps = [committed(run) for run in runs(workdir)]
    return max(set.intersection(*steps), default=0) if steps else 0


def begun(run: RunDir) -> list[dict[str, Any]]:
    """The rows with which the attempts on a run began."""
    return [row for row in run.history() if row["state"] == "running"]


# ---------------------------------------------------------------------------------------- the comparison


def summaries(workdir: Path) -> list[dict[str, Any]]:
    """The summaries below a workdir, in the order of `runs`."""
    return [json.loads(run.summary.read_bytes()) for run in runs(workdir)]


def differences(whole: Path, disturbed: Path) -> list[str]:
    """In what a disturbed workdir differs from an undisturbed one, in words; empty if in nothing that counts.

    Final parameters, statistics and metrics.jsonl must be equal to the bit; no step may stand twice in
    metrics.jsonl; each run must have exactly one outcome.
    """
    names = [[str(run.path.relative_to(root)) for run in runs(root)] for root in (whole, disturbed)]
    if names[0] != names[1]:
        return [f"other runs: {names}"]
    found = []
    for one, other in zip(runs(whole), runs(disturbed), strict=True):
        a, b = (_timeless(json.loads(run.summary.read_bytes())) for run in (one, other))
        found += [
            f"{other.path}: {key} differs"
            for key in ("params_digest", "statistics", "state")
            if a[key] != b[key]
        ]
        if one.metrics.read_bytes() != other.metrics.read_bytes():
            found.append(f"{other.path}: metrics.jsonl differs")
        if again := twice(other):
            found.append(f"{other.path}: written twice: {again[:3]}")
        ends = [row["state"] for row in other.history()].count(b["state"])
        if ends != 1:
            found.append(f"{other.path}: trained to its end {ends} times")
    return found


def _timeless(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary whose statistics are without those of the clock."""
    kept = {k: v for k, v in summary["statistics"].items() if not k.startswith("total_wallclock")}
    return {**summary, "statistics": kept}


def twice(run: RunDir) -> list[tuple[int, str]]:
    """(step, metric) pairs that metrics.jsonl holds more than once."""
    written, torn = disk.read_jsonl(run.metrics)
    assert not torn, run.metrics
    count = Counter((row["step"], key) for row in written for key in row if key != "step")
    return [pair for pair, n in count.items() if n > 1]


def shown_twice(run: RunDir) -> list[tuple[int, str]]:
    """(step, tag) pairs that TensorBoard would show more than once, read by its own loader."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    count: Counter[tuple[int, str]] = Counter()
    for path in run.path.glob("events.out.tfevents.*"):
        for event in EventFileLoader(str(path)).Load():
            count.update((event.step, value.tag) for value in event.summary.value if "/" in value.tag)
    assert count, f"{run.path}: TensorBoard would show nothing"
    return [pair for pair, n in count.items() if n > 1]


# ------------------------------------------------------------------------------------------------- counts


@dataclass
class Counts:
    """What an experiment on one row of the fault table has found; `wrong` must stay empty."""

    row: int
    fault: str
    unit: str  # what `faults` counts
    faults: int = 0
    held: Counter[str] = field(default_factory=Counter)  # what was seen to hold, and how often
    wrong: list[str] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    goodput: Goodput = field(default_factory=Goodput)  # of what was trained under these faults
    kinds: Counter[str] = field(default_factory=Counter)  # of the faults, where there are several
    operator: Counter[str] = field(default_factory=Counter)  # what had to be done by hand afterwards

    def expect(self, what: str, holds: object, detail: object = "") -> None:
        """Counts a property that holds, or notes that it does not."""
        if holds:
            self.held[what] += 1
        else:
            self.wrong.append(f"not so: {what} {detail}".strip())

    def __add__(self, other: Counts) -> Counts:
        assert (self.row, self.unit) == (other.row, other.unit)
        total, held = self.faults + other.faults, self.held + other.held
        measured = {
            k: max(v, other.measured.get(k, v)) for k, v in {**other.measured, **self.measured}.items()
        }
        wrong = [*self.wrong, *other.wrong]
        return dataclasses.replace(
            self, faults=total, held=held, wrong=wrong, measured=measured, goodput=self.goodput + other.goodput,
            kinds=self.kinds + other.kinds, operator=self.operator + other.operator,
        )  # fmt: skip

    def __str__(self) -> str:
        held = "".join(f", {n} × {what}" for what, n in self.held.items())
        measured = "".join(f", {what} {value:g}" for what, value in self.measured.items())
        return f"fault row {self.row}: {self.faults} {self.unit}{held}{measured}, {len(self.wrong)} wrong"

    def check(self) -> Counts:
        """Prints the counts in one line; raises AssertionError if anything is wrong."""
        print(self)
        assert not self.wrong, "\n".join(self.wrong)
        assert self.faults, f"{self}: nothing was tried"
        return self

    def to_dict(self) -> dict[str, Any]:
        """As data, for the raw results."""
        counters = {name: dict(getattr(self, name)) for name in ("held", "kinds", "operator")}
        return {**dataclasses.asdict(self), **counters, "goodput": self.goodput.to_dict()}
