"""A worker: the process that trains one cohort, as its launcher sees it. How it ended, and who writes that down."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jaxablate.claims import Claim
from jaxablate.disk import make_private
from jaxablate.errors import UserError
from jaxablate.estimate.share import limited
from jaxablate.manifest import Manifest
from jaxablate.runstore import OUTCOMES, RunDir, State
from jaxablate.schedule import step
from jaxablate.schedule.cohorts import Job
from jaxablate.schedule.retries import outlook
from jaxablate.stopping import EXIT_AGAIN, EXIT_DISK, EXIT_PAUSED, EXIT_TAKEN

_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP)
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
_EXCEPTION = re.compile(
    r"\w[\w.]*(Error|Exception|Interrupt|Stopped)\b(:|$)"
)  # the line that ends a traceback
_END_OF_LOG = 65_536  # bytes; an allocator that has run out of memory lists what it holds
_STEP_LINES = 1000  # of its output, in which srun says how its tasks ended
_DRIVER_S = 30.0  # in which a driver that works has long answered


@dataclass(frozen=True)
class Command:
    """How workers are started: by themselves, or as the tasks of a step over several nodes."""

    prefix: tuple[str, ...] = ()  # such as srun with its options; the step then has one worker on each node
    until: str = ""  # the stage at whose end confirmatory runs stop; empty: at the end of the last one

    def of(self, job: Job) -> Command:
        """The same for one job: a tuning run teaches its arm's rate only by its outcome, so it goes to its end."""
        return self if job.phase == "confirm" else dataclasses.replace(self, until="")

    @property
    def stop_signal(self) -> signal.Signals:
        """What asks a worker to stop. srun passes SIGUSR2 on to all tasks; SIGTERM would end them at once."""
        return signal.SIGUSR2 if self.prefix else signal.SIGTERM

    @property
    def kill_signal(self) -> signal.Signals:
        """What ends it: srun must live to end the tasks on the other nodes."""
        return signal.SIGTERM if self.prefix else signal.SIGKILL


DIRECT = Command()  # on this machine


@dataclass
class Worker:
    """A running process and its job."""

    job: Job
    process: subprocess.Popen[bytes]
    log: str  # its output, relative to the study's directory
    device: str  # of CUDA_VISIBLE_DEVICES; empty on the CPU
    began: float  # time.monotonic()
    oom_kills: int  # of the kernel before it started
    command: Command = DIRECT
    asked: str = ""  # why this launcher asked it to stop; empty if it did not

    def stop(self, why: str) -> None:
        """Asks it to stop at a step boundary."""
        self.asked = self.asked or why
        self._send(self.command.stop_signal)

    def kill(self, why: str) -> None:
        """Ends it at once; what it did since its last checkpoint is lost."""
        self.asked = why
        self._send(self.command.kill_signal)

    def _send(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)


def start(
    manifest: Manifest, job: Job, device: str, command: Command = DIRECT, memory: float | None = None
) -> Worker:
    """Starts a worker for a job, with its output in a file of its own under `<study>/logs`.

    It is the leader of its own session, so that the terminal's Ctrl-C reaches the launcher alone.

    Args:
      memory: the share of its GPU's memory that it may take; None: jax's own rule, which is for one process.
    """
    log, output = _new_log(manifest.path, f"logs/{job.arm}-{job.phase}")
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": device} if device else {})}
    if memory is not None:
        environment = limited(environment, memory)
    with output:
        process = subprocess.Popen(
            argv(manifest, job, log, command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    return Worker(job, process, log, device, time.monotonic(), oom_kills(), command)


def argv(manifest: Manifest, job: Job, log: str, command: Command) -> list[str]:
    """The command line of a worker."""
    return [
        *command.prefix,
        # faulthandler: a crash in native code leaves its stack in the log.
        sys.executable, "-X", "faulthandler", "-m", "jaxablate.worker", str(manifest.path), f"--arm={job.arm}",
        f"--runs={','.join(run.id for run in job.runs)}", f"--host={json.dumps({'split': job.split})}",
        f"--log={log}", *([f"--until={command.until}"] if command.until else []),
        # The parent of a step's task is the node's daemon, which ends it when its job ends.
        "--processes=slurm" if command.prefix else f"--parent={os.getpid()}",
    ]  # fmt: skip


def _new_log(study: Path, stem: str) -> tuple[str, BinaryIO]:
    """A log of this process's own. Launchers of several machines may have the same number in the same second."""
    make_private(study / "logs")
    stamp = f"{stem}-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
    for n in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            name = f"{stamp}-{n}.log"
            return name, (study / name).open("xb")
    raise AssertionError("the numbers do not end")


def settle(manifest: Manifest, worker: Worker) -> None:
    """Writes down how the runs of a worker that has ended came out, where it could not say so itself.

    Attempts that it left open are ended. Runs that it never began get an attempt that failed, unless it began
    others of its job: then their turn was yet to come. What a damaged run lacks is left to who reads it.
    """
    code = worker.process.wait()
    if worker.command.prefix:
        code = step.code_of(tail(manifest.path / worker.log, _STEP_LINES), code)
    ending = ending_of(
        code, last_words(manifest.path / worker.log), worker.asked, oom_kills() > worker.oom_kills
    )
    job, log = worker.job, worker.log
    began = {run for run in job.runs if any(r.get("log") == log for r in readable(manifest.run_dir(run)))}
    for run in job.runs:
        where = manifest.run_dir(run)
        with contextlib.suppress(UserError):  # a damaged config, of which the worker ended, takes a row too
            where.create(manifest.config_of(run))
        with contextlib.suppress(UserError), Claim(where.claim):  # claimed: another has taken it up since
            rows = where.history()
            state = rows[-1]["state"] if rows else "pending"
            if run in began and state == "running":
                word = ending or ("bug", f"ended with code {code} and no word")
                where.end_attempt(rows[-1]["attempt"], *word)
            elif ending and not began and not worker.asked and state not in (*OUTCOMES, "cancelled"):
                # Before it began no member can have been the cause, so the company matters for memory alone.
                company = {"members": len(job.runs), "split": job.split} if ending[0] == "oom" else {}
                where.end_attempt(where.begin_attempt(step=0, log=log, **company), *ending)
            look = outlook(where.history(), 1)
            if look.state == "cancelled" and where.state() != "cancelled":
                where.mark("cancelled", look.reason)


def readable(where: RunDir) -> list[dict[str, Any]]:
    """The history of a run; nothing if it is damaged, which is said where its state is shown."""
    try:
        return where.history()
    except UserError:
        return []


Ending = tuple[State, str]


def ending_of(code: int, last_words: str, asked: str, memory: bool) -> Ending | None:
    """State and reason that an exit code stands for; None if the worker has recorded them itself.

    Args:
      code: as of `Popen.returncode`; -N for signal N.
      last_words: the line of its output that says most; see the function of that name.
      asked: why the launcher asked it to stop, empty if it did not.
      memory: whether the kernel has killed a process for memory meanwhile.
    """
    if code in (0, EXIT_TAKEN, EXIT_PAUSED):
        return None
    if code == EXIT_AGAIN:
        return "preempted", asked or last_words
    if code < 0:
        number = signal.Signals(-code) if -code in set(signal.Signals) else None
        name = number.name if number else f"signal {-code}"
        if number in _CRASHES:
            return "bug", f"{name}: {last_words}" if last_words else name
        if number == signal.SIGKILL and memory and not asked:
            return "oom", "killed by the kernel, which was out of memory"
        if asked:
            return "preempted", asked
        if number in _STOPS:
            return "preempted", f"{name} before it could stop cleanly"
        return "node_fail", f"killed by {name}"
    if code == EXIT_DISK:
        return "node_fail", last_words.removeprefix("error: ")
    if code == 2:
        return "bug", f"UserError: {last_words.removeprefix('error: ')}"
    if "RESOURCE_EXHAUSTED" in last_words or last_words.startswith("MemoryError"):
        return "oom", last_words
    return "bug", last_words or f"exit code {code}"


def last_words(log: Path) -> str:
    """What a worker's output ended with: the exception of its traceback, or else the last line that is not blank.

    jax puts a note on its tracebacks behind the exception, and some exceptions have many lines.
    """
    lines = [line.strip() for line in tail(log, 1000) if line.strip() and not step.is_of_slurm(line)]
    if lines and "error: " in lines[-1]:  # bad input, in one line
        return lines[-1]
    exceptions = (line for line in reversed(lines) if _EXCEPTION.match(line))
    return next(exceptions, lines[-1] if lines else "")


def tail(log: Path, lines: int) -> list[str]:
    """The last lines of a file, of some kilobytes at most; none if it cannot be read."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _END_OF_LOG, 0))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except OSError:
        return []


# ------------------------------------------------------------------------------ what the machine has


def oom_kills() -> int:
    """How many processes the kernel has killed for memory in this control group, or else on this machine."""
    for path in _counters():
        try:
            fields = (line.split() for line in path.read_text().splitlines())
            return next(int(value) for name, value in fields if name == "oom_kill")
        except (OSError, StopIteration, ValueError):
            continue
    return 0


def _counters() -> list[Path]:
    paths = [Path("/proc/vmstat")]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                paths.insert(0, Path(f"/sys/fs/cgroup{line[3:]}/memory.events"))
    return paths


def gpus() -> list[str]:
    """The GPUs that workers may use, each as a value of CUDA_VISIBLE_DEVICES; none if jax will use the CPU.

    Asks the driver's tool, since to ask jax is to load it, and to take hold of the devices.
    """
    if os.environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu"):
        return []
    plugins = [m.name for m in pkgutil.iter_modules() if m.name.startswith("jax_cuda")]
    if not plugins:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device.strip() for device in visible.split(",") if device.strip() not in ("", "-1")]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False, timeout=_DRIVER_S)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{tool}: no answer in {_DRIVER_S:g} s; mend the driver, or name the GPUs in CUDA_VISIBLE_DEVICES"
        ) from None
    count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return [str(n) for n in range(count)]
