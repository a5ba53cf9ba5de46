"""A SLURM cluster on this machine, for tests: munged, slurmctld and several slurmd, and slurmdbd if asked.

    with Lab(nodes=4) as lab:
        job = lab.sbatch("#!/bin/sh\nhostname\n", "--array=0-3")
        lab.wait_for(lambda: not lab.squeue(job), 30, "the array")

Needs Debian's packages (`.ci/run` installs them) and neither root, systemd, cgroups nor a line in /etc. All
it writes lies in one directory; its ports are free ones, so labs stand side by side. Every "node" is this
host: `hostname` is the same on all of them, SLURMD_NODENAME is not. Leaving the context ends every process
that knows this lab's slurm.conf: the daemons, the steps that outlive them, and what runs in these.

The environment that a job sees is that of whoever submitted it, plus SLURM_*, as everywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo", "srun")
ACCOUNTING = ("slurmdbd", "sacct", "sacctmgr", "mariadbd", "mariadb", "mariadb-install-db")
SBIN = "/usr/sbin:/usr/local/sbin"  # where daemons are, which is not on every user's PATH
PASSWORD = "lab"  # of a database that only this machine can reach, for as long as a test

Found = TypeVar("Found")
Accounting = Literal["none", "slurmdbd"]


class LabError(RuntimeError):
    """The cluster did not do what it was asked; with the end of its logs."""


def missing(accounting: Accounting = "none") -> list[str]:
    """The programs that a lab needs and this machine lacks."""
    wanted = (*PROGRAMS, *(ACCOUNTING if accounting == "slurmdbd" else ()))
    return [name for name in wanted if _program(name) is None]


@dataclasses.dataclass(frozen=True)
class Site:
    """How the cluster is configured. Times in seconds, memory in MB."""

    nodes: int = 4
    cpus: int = 4  # of a node, whatever this machine has
    memory: int = 4000
    gpus: int = 2
    accounting: Accounting = "none"
    cred_expire: int = 5  # a requeued job waits that long; SLURM takes less for the default, two minutes
    kill_wait: int = 5  # from SIGTERM to SIGKILL at a time limit
    grace: int = 10  # from the signal to the end at a preemption
    slurmd_timeout: int = 15  # after which a node that does not answer is down
    min_job_age: int = 3600  # after which squeue forgets a job that has ended; 2 is the least
    max_array_size: int = 1001  # the highest index is one less
    max_jobs: int = 10_000  # that the controller takes
    extra: str = ""  # further lines of slurm.conf


class Lab:
    """A running cluster with two partitions of all nodes: `main`, and `high`, which preempts it."""

    def __init__(self, site: Site | None = None, /, **changes: object):
        self.site = dataclasses.replace(site or Site(), **changes)
        self.dir = Path()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    # ------------------------------------------------------------------------------ start and stop

    def __enter__(self) -> Lab:
        # A short path, and not pytest's: the name of a Unix socket has room for 107 bytes.
        self.dir = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        try:
            self._configure()
            self._start_munge()
            if self.site.accounting == "slurmdbd":
                self._start_accounting()
            self.start_controller()
            for node in self.nodes:
                self.start_node(node)
            self.wait_for(lambda: self._idle() == set(self.nodes), 30, "the nodes")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends every process of this lab, and removes its directory."""
        for name in [name for name in self._daemons if name.startswith("slurm")]:
            self.kill(name)
        while left := self.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons.clear()
        shutil.rmtree(self.dir, ignore_errors=True)

    def processes(self, variable: str = "") -> list[int]:
        """The living processes that know this lab's slurm.conf, besides this one and its parent.

        Args:
          variable: of their environment, such as "SLURMD_NODENAME=n1".
        """
        marks = {f"SLURM_CONF={self.conf}".encode(), *([variable.encode()] if variable else [])}
        own = {os.getpid(), os.getppid()}
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) not in own:
                with contextlib.suppress(OSError):
                    alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
                    if alive and marks <= set((entry / "environ").read_bytes().split(b"\0")):
                        found.append(int(entry.name))
        return found

    @property
    def nodes(self) -> list[str]:
        """The names of the nodes."""
        return [f"n{i}" for i in range(self.site.nodes)]

    @property
    def conf(self) -> Path:
        """The slurm.conf."""
        return self.dir / "slurm.conf"

    def env(self, base: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment `base` (default: this process's) with this cluster in the place of any other."""
        base = os.environ if base is None else base
        own = {key: value for key, value in base.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        return {**own, "SLURM_CONF": str(self.conf)}

    # ------------------------------------------------------------------------------------ commands

    def run(self, *argv: str, check: bool = True, timeout: float = 60, **env: str) -> str:
        """What a command prints; `env` is added to its environment."""
        done = subprocess.run(
            argv, env={**self.env(), **env}, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and done.returncode:
            said = (done.stderr or done.stdout).strip()
            raise LabError(f"{' '.join(argv)}: {done.returncode}: {said}{self.logs()}")
        return done.stdout

    def sbatch(self, script: str, *options: str, **env: str) -> int:
        """Submits the text of a script; the job's id. Its output goes to `<job>.out` in the lab's directory."""
        path = self.dir / f"script-{random.getrandbits(64):x}"
        path.write_text(script)
        out = f"--output={self.dir}/%A_%a.out" if _is_array(options) else f"--output={self.dir}/%j.out"
        argv = ("sbatch", "--parsable", "--open-mode=append", out, *options, str(path))
        return int(self.run(*argv, **env).split(";")[0])

    def squeue(self, *jobs: int) -> dict[str, str]:
        """Job or element ("7", "7_2") -> state, of those in the queue: waiting, running or ending."""
        argv = ["squeue", "--noheader", "--array", "--format=%i %T"]
        argv += [f"--jobs={','.join(map(str, jobs))}"] if jobs else []
        patience = time.monotonic() + 30
        while True:  # a controller that does not answer has not said that nothing is queued
            try:
                return dict(line.split() for line in self.run(*argv).splitlines())
            except LabError as error:
                if "Invalid job id" in str(error):
                    return {}
                if time.monotonic() > patience:
                    raise
            time.sleep(0.2)

    def show(self, job: int | str) -> dict[str, str]:
        """What the controller says of a job or element: JobState, Reason, NodeList, Restarts …"""
        text = self.run("scontrol", "--oneliner", "show", "job", str(job))
        return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)

    def node(self, job: int | str) -> str:
        """On which node a job or element runs; empty if on none."""
        nodes = self.show(job).get("NodeList", "")
        return "" if nodes == "(null)" else nodes

    def sacct(self, *jobs: int) -> dict[str, str]:
        """Job or element -> state by the accounting."""
        argv = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State"]
        listed = self.run(*argv, f"--jobs={','.join(map(str, jobs))}")
        return dict(line.split("|") for line in listed.splitlines())

    def wait_for(self, what: Callable[[], Found], timeout: float, words: str) -> Found:
        """The first true value of `what()`.

        Raises:
          LabError: there was none in `timeout` seconds.
        """
        patience = time.monotonic() + timeout
        while not (found := what()):
            if time.monotonic() > patience:
                queue = self.run("squeue", "--array", "--noheader", check=False)
                raise LabError(f"{words}: not in {timeout:g} s\n{queue}{self.logs()}")
            time.sleep(0.05)
        return found

    def reset(self) -> None:
        """As it was at first: no job in the queue, every daemon running, every node up."""
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)
        self.run("scancel", "--user", str(os.getuid()))
        self.wait_for(self._no_jobs, 60, "the jobs' ends")
        for node in self.nodes:
            self.resume(node)
        self.wait_for(lambda: self._idle() == set(self.nodes), 30, "the nodes")

    def logs(self, lines: int = 12) -> str:
        """The ends of the daemons' logs, for messages."""
        logs = [log for log in sorted(self.dir.glob("*.log")) if not log.name.endswith(".out.log")]
        return "".join(f"\n--- {log.name}\n" + "\n".join(_tail(log, lines)) for log in logs)

    # -------------------------------------------------------------------------------------- faults

    def start_controller(self) -> None:
        """Starts slurmctld, unless it runs, and waits until it answers."""
        self._start("slurmctld", "slurmctld", "-D")
        self.wait_for(lambda: "UP" in self.run("scontrol", "ping", check=False), 30, "slurmctld")

    def start_node(self, node: str) -> None:
        """Starts the slurmd of a node, unless it runs."""
        self._start(f"slurmd-{node}", "slurmd", "-D", "-N", node)

    def kill(self, daemon: str, number: signal.Signals = signal.SIGKILL) -> bool:
        """Ends a daemon, "slurmctld" or "slurmd-n1", by a signal; whether it died of that. Jobs go on without it."""
        process = self._daemons.pop(daemon, None)
        if process is None:
            return False
        process.send_signal(number)
        return process.wait() == -number

    def settle(self) -> None:
        """Waits until the controller has written down what it knows now; killed before, it forgets the newest.

        A start by the backfill scheduler alone makes it write nothing, an edited job does.
        """
        now, record = time.time(), self.dir / "state" / "job_state"
        for job in set(self.run("squeue", "--noheader", "--format=%A").split()):
            self.run("scontrol", "update", f"jobid={job}", "admincomment=settled", check=False)
        self.wait_for(lambda: record.exists() and record.stat().st_mtime > now, 30, "the controller's record")

    def down(self, node: str) -> None:
        """Says that a node is lost, until `resume`: what runs there is requeued or fails, as its job wants it."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    def crash(self, node: str) -> None:
        """The power of a node fails: its daemon and all that runs there end at once, and nobody is told."""
        self.kill(f"slurmd-{node}")
        for pid in self.processes(f"SLURMD_NODENAME={node}"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def resume(self, node: str) -> bool:
        """Says that a node is well again; whether it was out."""
        state = self.run("sinfo", "--noheader", "--nodes", node, "--format=%T")
        out = any(word in state for word in ("down", "drain", "fail", "unk"))
        if out:
            self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        return out

    # ----------------------------------------------------------------------------------- internals

    def _no_jobs(self) -> bool:
        return not self.run("squeue", "--noheader").strip()

    def _idle(self) -> set[str]:
        listed = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--states=idle", "--format=%N",
                          check=False)  # fmt: skip
        return set(listed.split())

    def _start(self, name: str, *argv: str) -> None:
        if name in self._daemons:
            if self._daemons[name].poll() is None:
                return
            del self._daemons[name]  # ended by itself
        program = _program(argv[0])
        if program is None:
            raise LabError(f"{argv[0]}: not installed")
        command = [program, *argv[1:]]
        # Should this process be killed, its daemons end with it: the kernel sees to that when the *thread*
        # that started them ends, so only the main thread may ask for it.
        if threading.current_thread() is threading.main_thread() and (tool := shutil.which("setpriv")):
            command = [tool, "--pdeathsig", "KILL", *command]
        with (self.dir / f"{name}.out.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self.env(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=self.dir, start_new_session=True,
            )  # fmt: skip

    def _answers(self, *argv: str) -> bool:
        return subprocess.run(argv, env=self.env(), capture_output=True, check=False).returncode == 0

    def _start_munge(self) -> None:
        """Who may talk to whom: a key of this lab's own."""
        folder = self.dir / "munge"
        folder.mkdir(mode=0o700)
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o400)
        self._start(
            "munged", "munged", "--foreground", "--force", f"--socket={self._munge}",
            f"--key-file={folder / 'key'}", f"--seed-file={folder / 'seed'}", f"--log-file={folder / 'log'}",
            f"--pid-file={self.dir / 'munged.pid'}", "--num-threads=2",
        )  # fmt: skip
        self.wait_for(lambda: self._answers("munge", f"--socket={self._munge}", "--no-input"), 10, "munged")

    @property
    def _munge(self) -> Path:
        return self.dir / "munge.sock"

    def _start_accounting(self) -> None:
        """A database, which takes seconds to make, and slurmdbd, which writes to it."""
        data, sock = self.dir / "db", self.dir / "db.sock"
        plain = ["--no-defaults", f"--socket={sock}", "--user=root"]
        user = self.run("id", "-un").strip()
        self.run("mariadb-install-db", "--no-defaults", f"--datadir={data}", f"--user={user}",
                 "--auth-root-authentication-method=normal", "--skip-test-db", timeout=120)  # fmt: skip
        self._start(
            "mariadbd", "mariadbd", "--no-defaults", f"--datadir={data}", f"--socket={sock}", f"--user={user}",
            "--bind-address=127.0.0.1", f"--port={self.ports['database']}", "--skip-name-resolve",
            "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900",
            f"--pid-file={self.dir / 'mariadb.pid'}",
        )  # fmt: skip
        self.wait_for(lambda: self._answers("mariadb", *plain, "--execute=select 1"), 60, "mariadbd")
        self.run("mariadb", *plain, f"--execute=create database slurm_acct_db; "
                 f"grant all on slurm_acct_db.* to 'slurm'@'127.0.0.1' identified by '{PASSWORD}'")  # fmt: skip
        self._start("slurmdbd", "slurmdbd", "-D")
        self.wait_for(lambda: self._answers("sacctmgr", "--noheader", "show", "cluster"), 60, "slurmdbd")
        for words in (["cluster", "lab"], ["account", "tests"],
                      ["user", user, "account=tests", "defaultaccount=tests"]):  # fmt: skip
            self.run("sacctmgr", "--immediate", "--quiet", "add", *words, check=False)

    def _configure(self) -> None:
        site, last = self.site, self.site.nodes - 1
        names = ["controller", "database", "slurmdbd", *self.nodes]
        self.ports = dict(zip(names, _free_ports(len(names)), strict=True))
        user, host = self.run("id", "-un").strip(), socket.gethostname().split(".")[0]
        accounting = (
            f"AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\n"
            f"AccountingStoragePort={self.ports['slurmdbd']}\nAccountingStoragePass={self._munge}"
            if site.accounting == "slurmdbd"
            else "AccountingStorageType=accounting_storage/none"
        )
        gres = f" Gres=gpu:{site.gpus}" if site.gpus else ""
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={self.ports[node]} "
            f"CPUs={site.cpus} RealMemory={site.memory}{gres} State=UNKNOWN"
            for node in self.nodes
        )
        every = "n0" if last == 0 else f"n[0-{last}]"
        self.conf.write_text(
            f"""\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={self.ports["controller"]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={self._munge},cred_expire={site.cred_expire}
CredType=cred/munge
StateSaveLocation={self.dir}/state
SlurmdSpoolDir={self.dir}/spool-%n
SlurmctldPidFile={self.dir}/slurmctld.pid
SlurmdPidFile={self.dir}/slurmd-%n.pid
SlurmctldLogFile={self.dir}/slurmctld.log
SlurmdLogFile={self.dir}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=1
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=200
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1,bf_resolution=1,requeue_setup_env_fail
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait={site.kill_wait}
MessageTimeout=10
SlurmdTimeout={site.slurmd_timeout}
InactiveLimit=0
MinJobAge={site.min_job_age}
MaxArraySize={site.max_array_size}
MaxJobCount={site.max_jobs}
JobRequeue=1
GresTypes=gpu
{accounting}
{nodes}
PartitionName=DEFAULT Nodes={every} MaxTime=INFINITE DefaultTime=10
PartitionName=main Default=YES PriorityTier=10 PreemptMode=REQUEUE GraceTime={site.grace}
PartitionName=high PriorityTier=100 PreemptMode=OFF GraceTime=0
{site.extra}
"""
        )
        (self.dir / "gres.conf").write_text(self._gpus())
        (self.dir / "slurmdbd.conf").write_text(
            f"""\
AuthType=auth/munge
AuthInfo=socket={self._munge}
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={self.ports["slurmdbd"]}
SlurmUser={user}
LogFile={self.dir}/slurmdbd.log
PidFile={self.dir}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={self.ports["database"]}
StorageUser=slurm
StoragePass={PASSWORD}
"""
        )
        (self.dir / "slurmdbd.conf").chmod(0o600)

    def _gpus(self) -> str:
        """Character devices whose names end in a number, which becomes CUDA_VISIBLE_DEVICES; they are never opened."""
        if not self.site.gpus:
            return ""
        made = [self.dir / f"gpu{i}" for i in range(self.site.gpus)]
        try:
            for path in made:
                os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:  # an ordinary user borrows the machine's terminals
            made = [Path(f"/dev/tty{i}") for i in range(self.site.gpus)]
        if not all(path.exists() for path in made):
            return f"Name=gpu Count={self.site.gpus}\n"  # they are counted, and no variable names them
        return "".join(f"Name=gpu File={path}\n" for path in made)


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SBIN}")


def _is_array(options: Collection[str]) -> bool:
    return any(re.match(r"(--array|-a)\b", option) for option in options)


def _tail(path: Path, lines: int) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-lines:]


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel gives to outgoing connections."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < count:
            port = random.SystemRandom().randrange(15_000, 32_000)
            trial = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                trial.bind(("127.0.0.1", port))
                found.append(port)
    return found
