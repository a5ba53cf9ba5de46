"""Claims: of several processes that want a run, one wins (design §7).

Standard library only, like `runstore`. A claim is a file in the run directory that names its holder. It counts
as long as the holder lives: on the same machine that is looked up, on others it is a lease (see `leases`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from jaxablate import leases
from jaxablate.disk import encode_row, locked, parse_row, write_row
from jaxablate.errors import UserError
from jaxablate.leases import LEASE_S
from jaxablate.runstore import now

_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)


class Claimed(UserError):
    """The run, or the study, belongs to another process. One line: who, since when, and how to release it."""


def _read_text(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


def _boot() -> str | None:
    """What tells this boot of the machine from an earlier one, under the same host name."""
    text = _read_text("/proc/sys/kernel/random/boot_id")
    return text and text.strip()


def _pid_namespace() -> str | None:
    """What tells containers apart that share a host name: a pid means nothing in another one's namespace."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if unknown, or if it is dead but not reaped.

    Fields 3 (state) and 22 (start time) of /proc/<pid>/stat, see proc_pid_stat(5). The second field is the
    name in parentheses, which may itself hold spaces and parentheses: count from the last one.
    """
    stat = _read_text(f"/proc/{pid}/stat")
    if stat is None:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def _alive(pid: int, ticks: int | None) -> bool:
    """Whether the process that had `pid` and started at `ticks` still runs on this machine."""
    ours = True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        ours = False
    if ticks is None or not os.path.exists("/proc/self/stat"):
        return True  # without /proc a reused pid cannot be told from the old process: the safe answer
    found = _start_ticks(pid)
    if found is None and not ours:
        return True  # /proc mounted with hidepid shows nothing of other users' processes
    return found == ticks


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a claim."""

    host: str
    pid: int
    time: str
    ticks: int | None
    boot: str | None
    namespace: str | None
    token: str

    @classmethod
    def me(cls) -> Holder:
        """This process, with a token of its own for each claim."""
        pid = os.getpid()
        host, token = socket.gethostname(), secrets.token_hex(8)
        return cls(host, pid, now(), _start_ticks(pid), _boot(), _pid_namespace(), token)

    @classmethod
    def parse(cls, data: bytes) -> Holder | None:
        """The holder that a claim names; None if it is not (yet) a whole claim."""
        row = parse_row(data)
        text, number, none = (str,), (int,), (type(None),)
        types = {"host": text, "pid": number, "time": text, "ticks": number + none, "boot": text + none,
                 "namespace": text + none, "token": text}  # fmt: skip
        if row is None or row.keys() != types.keys() or any(type(row[key]) not in types[key] for key in row):
            return None
        return cls(**row) if row["pid"] > 0 else None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.time}"

    def near(self) -> bool:
        """Whether this process can look up if that one lives: same machine, and the same numbers of processes."""
        if self.host != socket.gethostname():
            return False
        rebooted = bool(self.boot) and self.boot != _boot()  # so every process of that boot is gone
        return rebooted or self.namespace == _pid_namespace()

    def dead(self) -> bool:
        """True only if it is certain: the process was near, and is gone. Of others nothing is known."""
        if not self.near():
            return False
        return (bool(self.boot) and self.boot != _boot()) or not _alive(self.pid, self.ticks)

    def why_over(self, age: float) -> str:
        """Why a claim of this holder that was touched `age` seconds ago counts no more; empty if it counts.

        A process that is near is believed alive however long it has not touched its claim: it may be stopped.
        """
        if self.near():
            return "is dead" if self.dead() else ""
        return f"has not renewed it for {age:.0f} s" if age > LEASE_S else ""


class Claim:
    """The right to work on a run: a lock file that names its holder. A context manager.

    The file appears with its content in one step (a hard link, which fails if the name exists, also on NFS;
    O_EXCL where there are no links). A claim whose holder is dead, or has let its lease expire, is taken over;
    `note` says so. Takers are serialised by a lock on the *stale file's inode*: whoever gets the lock second
    finds that the name belongs to another inode and starts again, so it can never remove the winner's claim.
    That lock ends with its process, so a taker that is killed blocks nobody. A holder commits under the same
    lock, shared (`fenced`), so nobody takes a claim over in the middle of a write. `what` is claimed, in the
    words of messages.
    """

    def __init__(self, path: str | os.PathLike[str], what: str = "the run"):
        self.path, self.what = Path(path), what
        self.note: str | None = None
        self._mine: Holder | None = None

    def acquire(self) -> str | None:
        """Take the claim; returns a note if it was taken over from another process. Raises Claimed."""
        if self._mine is not None:
            raise ValueError(f"{self.path}: this claim is already held")
        mine = Holder.me()
        data = encode_row(dataclasses.asdict(mine))
        temp = self.path.with_name(f".{self.path.name}.{mine.token}.tmp")
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with open(fd, "wb") as file:
                file.write(data)
            while not self._create(temp, data):
                if self._replace_stale(temp):
                    break
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temp)
        self._mine = mine
        leases.heart.keep(self, f"{self.what} of {self.path}")
        return self.note

    def _create(self, temp: Path, data: bytes) -> bool:
        """Bring the claim into being; False if there is one."""
        try:
            os.link(temp, self.path)
            return True
        except FileExistsError:
            return False
        except OSError as err:
            if err.errno not in _NO_LINKS:
                raise
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            return False
        try:
            write_row(fd, data)
        finally:
            os.close(fd)
        return True

    def _replace_stale(self, temp: Path) -> bool:
        """Put `temp` in the place of a dead holder's claim. False: things moved, try again from the start."""
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False  # released in the meantime
        except PermissionError:
            raise Claimed(
                f"{self.path}: {self.what} is claimed by another user; use another workdir, or ask its owner"
            ) from None
        try:
            holder = self._read_holder(fd)
            over = holder.why_over(leases.age(fd, temp))
            if not over:
                raise Claimed(f"{self.path}: {self.what} is claimed by {holder}; {_advice(holder)}")
            with self._exclusive(fd, holder):
                if not self._is_still(fd):
                    return False
                os.replace(temp, self.path)
        finally:
            os.close(fd)
        self.note = f"took over the claim of {holder}, which {over}"
        return True

    @contextlib.contextmanager
    def _exclusive(self, fd: int, holder: Holder) -> Iterator[None]:
        """The lock of those who take over, or `Claimed`."""
        try:
            with locked(fd, fcntl.LOCK_EX | fcntl.LOCK_NB) as safe:
                if not safe:
                    raise Claimed(
                        f"{self.path}: {holder} is gone, but this file system has no locks to take its claim "
                        f"over safely; delete this file"
                    )
                yield
        except BlockingIOError:
            raise Claimed(
                f"{self.path}: {self.what} is being taken over by another process, or {holder} was stopped in "
                f"the middle of a write; try again, or end that process"
            ) from None

    def _read_holder(self, fd: int) -> Holder:
        # Where there are no hard links a claim is created empty and filled an instant later: look again.
        for _ in range(20):
            holder = Holder.parse(os.pread(fd, 65536, 0))
            if holder is not None:
                return holder
            time.sleep(0.05)
        raise Claimed(
            f"{self.path}: {self.what} is claimed, but the claim does not say by whom; "
            f"delete this file if no process works on {self.what}"
        )

    def _is_still(self, fd: int) -> bool:
        """Whether the name still belongs to the file behind `fd`."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(fd))
        except FileNotFoundError:
            return False

    @property
    def held(self) -> bool:
        """Whether the file on disk is this claim."""
        try:
            return self._mine is not None and Holder.parse(self.path.read_bytes()) == self._mine
        except OSError:
            return False

    @contextlib.contextmanager
    def fenced(self) -> Iterator[None]:
        """Put every write that counts inside: nobody takes the claim over in it, and it begins only if held.

        If the claim is lost this process ends at once, with exit code 76, and writes nothing. Without locks
        (see `disk.locked`) a process that is stopped inside may still write when it goes on.
        """
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            leases.end(f"{self.what} of {self.path}")
        try:
            with locked(fd, fcntl.LOCK_SH):
                if not (self._is_mine(fd) and self._is_still(fd)):
                    leases.end(f"{self.what} of {self.path}")
                yield
        finally:
            os.close(fd)

    def renew(self) -> bool:
        """Touches the claim, by its inode, so never another's; False if it is lost."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            mine = self._is_mine(fd)
            if mine:
                os.utime(fd)
            return mine
        finally:
            os.close(fd)

    def _is_mine(self, fd: int) -> bool:
        return self._mine is not None and Holder.parse(os.pread(fd, 65536, 0)) == self._mine

    def release(self) -> None:
        """Give the claim back. A forked child, or one whose claim was removed by hand, removes nothing."""
        with leases.heart.without(self):
            if self._mine is not None and self._mine.pid == os.getpid() and self.held:
                self.path.unlink(missing_ok=True)
            self._mine = None

    def __enter__(self) -> Claim:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _advice(holder: Holder) -> str:
    if holder.near():
        return "wait for it or stop it, or delete this file if that process is gone"
    return f"wait for it or stop it; its claim expires {LEASE_S:.0f} s after its end"


def claim_holder(path: str | os.PathLike[str]) -> Holder | None:
    """Who holds a claim, for `status`; None when nobody does, or the file does not say."""
    try:
        return Holder.parse(Path(path).read_bytes())
    except OSError:
        return None


def claim_alive(path: str | os.PathLike[str]) -> Holder | None:
    """The holder of a claim that counts; None if nobody holds it, or its holder is dead or its lease expired.

    For those who only look: it writes nothing, so that the age of a lease is by the clock of this machine. Who
    takes a claim asks the file system.
    """
    try:
        holder, touched = claim_holder(path), os.stat(path).st_mtime
    except OSError:
        return None
    return holder if holder and not holder.why_over(time.time() - touched) else None
