"""Claims that several processes race for, and those that the dead leave behind."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from jaxablate import claims, leases
from jaxablate.claims import Claim, Claimed, Holder, claim_alive, claim_holder
from jaxablate.leases import LEASE_S
from jaxablate.stopping import EXIT_TAKEN
from tests.lines import one_line

SPAWN = multiprocessing.get_context("spawn")
ROOT = Path(claims.__file__).parents[1]
DEAD_PID = 2**22 - 1  # above the kernel's default pid_max


def write_claim(path: Path, **changes: Any) -> None:
    """The claim of a process on this host that has ended, or what `changes` make of it."""
    with Claim(path):
        row = json.loads(path.read_text())
    path.write_text(json.dumps({**row, "pid": DEAD_PID, "token": "0" * 16, **changes}) + "\n")


def test_a_claim_is_held_and_released(tmp_path: Path) -> None:
    path = tmp_path / "claim.json"
    with Claim(path) as claim:
        assert claim.held
        assert claim.note is None
        holder = claim_holder(path)
        assert holder is not None
        assert holder.pid == os.getpid()
        assert not holder.dead()
        with pytest.raises(Claimed) as error:
            Claim(path).acquire()
        text = one_line(error)
        assert str(os.getpid()) in text
        assert socket.gethostname() in text
        assert "delete this file" in text
        assert claim.held
    assert os.listdir(tmp_path) == []
    assert not claim.held
    with Claim(path) as claim:
        assert claim.note is None


def test_the_claim_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "claim.json"
    write_claim(path)
    with Claim(path) as claim:
        assert claim.note is not None
        assert str(DEAD_PID) in claim.note
        assert "\n" not in claim.note
        assert claim.held
    assert os.listdir(tmp_path) == []


HOLD = """
import sys, time
from jaxablate.claims import Claim
Claim(sys.argv[1]).acquire()
print("ok", flush=True)
time.sleep(60)
"""


def test_a_killed_holder_is_dead_even_before_it_is_reaped(tmp_path: Path) -> None:
    path = tmp_path / "claim.json"
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ok\n"
    with pytest.raises(Claimed, match=f"process {child.pid} "):
        Claim(path).acquire()
    child.kill()
    deadline = time.monotonic() + 10  # until it is a zombie: killed, and not waited for
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with Claim(path) as claim:
        assert claim.note is not None
    child.wait()
    child.stdout.close()


def test_a_reused_pid_is_another_process(tmp_path: Path) -> None:
    path = tmp_path / "claim.json"
    write_claim(path, pid=os.getpid(), ticks=1)  # this process lives, and started at another time
    with Claim(path) as claim:
        assert claim.note is not None


def test_a_claim_from_before_a_reboot_is_dead(tmp_path: Path) -> None:
    path = tmp_path / "claim.json"
    write_claim(path, pid=os.getpid(), boot="another boot")
    with Claim(path) as claim:
        assert claim.note is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "elsewhere", "pid": DEAD_PID},
        {"host": "elsewhere", "boot": "another boot"},
        {"namespace": "pid:[1]"},  # another container with our host name: its pids mean nothing here
        {"pid": os.getppid(), "ticks": None},
    ],
)
def test_what_may_be_alive_is_not_taken_over(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "claim.json"
    write_claim(path, **changes)
    before = path.read_bytes()
    start = time.monotonic()
    with pytest.raises(Claimed) as error:
        Claim(path).acquire()
    one_line(error)
    assert time.monotonic() - start < 1.0
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["claim.json"]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"pid": 3}', b"\xff" * 9])
def test_a_claim_that_names_nobody_is_kept(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    path = tmp_path / "claim.json"
    path.write_bytes(data)
    with pytest.raises(Claimed) as error:
        Claim(path).acquire()
    assert "delete this file" in one_line(error)
    assert path.read_bytes() == data


def test_a_forked_child_does_not_release(tmp_path: Path) -> None:
    path = tmp_path / "claim.json"
    claim = Claim(path)
    claim.acquire()
    mine = claim._mine
    assert mine is not None
    claim._mine = Holder(**{**mine.__dict__, "pid": mine.pid + 1})  # as the child sees it
    claim.release()
    assert path.exists()


def test_release_keeps_the_claim_of_another(tmp_path: Path) -> None:
    path = tmp_path / "claim.json"
    with Claim(path) as claim:
        path.unlink()  # by hand
        other = Claim(path)
        other.acquire()
        assert not claim.held
    assert other.held
    other.release()


@pytest.mark.parametrize("stale", [False, True])
def test_a_file_system_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stale: bool
) -> None:
    def no_link(*_: object) -> None:
        raise FileExistsError if path.exists() else OSError(errno.ENOTSUP, "not supported")

    path = tmp_path / "claim.json"
    if stale:
        write_claim(path)
    monkeypatch.setattr(os, "link", no_link)
    with Claim(path) as claim:
        assert claim.held
        assert (claim.note is not None) == stale
        with pytest.raises(Claimed):
            Claim(path).acquire()
    assert os.listdir(tmp_path) == []


def race(path: Path, rounds: int, barrier: Barrier, results: Any) -> None:
    """Take part in each round; say who won. A winner holds its claim until the round is over."""
    for number in range(rounds):
        target = path / str(number) / "claim.json"
        claim = Claim(target)
        barrier.wait(60)
        try:
            claim.acquire()
            results.put((number, os.getpid(), claim.note))
        except Claimed:
            results.put((number, None, None))
        barrier.wait(60)
        assert claim.held == (claim_holder(target) == claim._mine)


@pytest.mark.parametrize("stale", [False, True])
def test_of_racing_processes_exactly_one_wins(tmp_path: Path, stale: bool) -> None:
    rounds, takers = 20, 3
    for number in range(rounds):
        (tmp_path / str(number)).mkdir()
        if stale:
            write_claim(tmp_path / str(number) / "claim.json")
    barrier, results = SPAWN.Barrier(takers), SPAWN.Queue()
    workers = [SPAWN.Process(target=race, args=(tmp_path, rounds, barrier, results)) for _ in range(takers)]
    for worker in workers:
        worker.start()
    answers = [results.get(timeout=60) for _ in range(rounds * takers)]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    for number in range(rounds):
        winners = [(pid, note) for n, pid, note in answers if n == number and pid is not None]
        assert len(winners) == 1
        assert (winners[0][1] is not None) == stale
        holder = claim_holder(tmp_path / str(number) / "claim.json")
        assert holder is not None
        assert holder.pid == winners[0][0]


def test_the_second_of_two_takers_finds_the_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that breaks a plain `unlink, then create`: both judge the claim stale, then one acts."""
    path = tmp_path / "claim.json"
    write_claim(path)
    first, second = Claim(path), Claim(path)
    judge = Holder.dead

    def dead(holder: Holder) -> bool:
        stale = judge(holder)
        if stale:
            monkeypatch.setattr(Holder, "dead", judge)
            first.acquire()
        return stale

    monkeypatch.setattr(Holder, "dead", dead)
    with pytest.raises(Claimed, match=f"process {os.getpid()} "):
        second.acquire()
    assert first.held
    assert first.note is not None
    assert not second.held
    first.release()


# ---------------------------------------------------------------------------------------------- leases

FOREIGN = [{"host": "elsewhere"}, {"namespace": "pid:[1]"}]  # of which no process can be looked up here


def touched(path: Path, seconds_ago: float) -> None:
    os.utime(path, (time.time() - seconds_ago,) * 2)


@pytest.mark.parametrize("changes", FOREIGN)
def test_a_claim_of_another_machine_holds_as_long_as_it_is_renewed(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = tmp_path / "claim.json"
    write_claim(path, **changes)
    touched(path, LEASE_S - 15)
    with pytest.raises(Claimed, match="expires 60 s after its end") as error:
        Claim(path).acquire()
    one_line(error)
    assert claim_alive(path) == claim_holder(path)
    touched(path, LEASE_S + 15)
    assert claim_alive(path) is None
    assert claim_holder(path) is not None
    with Claim(path) as claim:
        assert claim.note is not None
        assert "has not renewed it for 75 s" in claim.note
        assert claim_alive(path) == claim._mine
    assert claim_alive(path) is None
    assert os.listdir(tmp_path) == []


def test_the_age_of_a_lease_is_by_the_clock_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "claim.json"
    write_claim(path, host="elsewhere")
    monkeypatch.setattr(time, "time", lambda: 4e9)  # this machine's clock is years ahead
    with pytest.raises(Claimed):
        Claim(path).acquire()


def test_a_process_of_this_machine_keeps_its_claim_though_it_is_stopped(tmp_path: Path) -> None:
    path = tmp_path / "claim.json"
    with Claim(path):
        touched(path, 10 * LEASE_S)
        with pytest.raises(Claimed):
            Claim(path).acquire()
        assert claim_alive(path) is not None


def test_nobody_takes_a_claim_in_the_middle_of_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "claim.json"
    with Claim(path) as claim:
        touched(path, 10 * LEASE_S)
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
        with claim.fenced(), claim.fenced(), pytest.raises(Claimed, match="middle of a write") as error:
            Claim(path).acquire()
        one_line(error)
        with Claim(path) as other:
            assert other.note is not None
            assert not claim.held


def test_a_holder_renews_its_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.05)
    paths = [tmp_path / f"{n}.json" for n in range(2)]
    with Claim(paths[0]), Claim(paths[1]):
        for path in paths:
            touched(path, 10 * LEASE_S)
        deadline = time.monotonic() + 20
        while not all(claim.stat().st_mtime > time.time() - LEASE_S for claim in paths):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    deadline = time.monotonic() + 20
    while leases.heart._thread is not None:  # nothing is left to renew
        assert time.monotonic() < deadline
        time.sleep(0.02)


WRITE = """
import sys, time
from jaxablate import leases
from jaxablate.claims import Claim
path, rows, leases.BEAT_S = sys.argv[1], sys.argv[2], float(sys.argv[3])
claim = Claim(path)
claim.acquire()
print("ok", flush=True)
while True:
    with claim.fenced(), open(rows, "a") as file:
        file.write("row\\n")
    time.sleep(0.001 if len(sys.argv) < 5 else 1000)
"""


@pytest.mark.parametrize("finds_out", ["before a write", "at a beat"])
def test_a_holder_that_was_stopped_for_too_long_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finds_out: str
) -> None:
    path, rows = tmp_path / "claim.json", tmp_path / "rows"
    how = ["1000"] if finds_out == "before a write" else ["0.1", "sleeps"]
    command = [sys.executable, "-c", WRITE, str(path), str(rows), *how]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ok\n"
    while not rows.exists() or not rows.read_bytes():
        time.sleep(0.01)
    child.send_signal(signal.SIGSTOP)
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
    touched(path, LEASE_S + 15)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    other = Claim(path)
    for _ in range(100):  # stopped in the middle of a write it would keep the claim
        try:
            other.acquire()
            break
        except Claimed:
            child.send_signal(signal.SIGCONT)
            time.sleep(0.003)
            child.send_signal(signal.SIGSTOP)
            touched(path, LEASE_S + 15)
    before = rows.read_bytes(), path.read_bytes()
    child.send_signal(signal.SIGCONT)
    _, words = child.communicate(timeout=60)
    assert child.returncode == EXIT_TAKEN
    assert words.decode().count("left alone: the run of") == 1
    assert (rows.read_bytes(), path.read_bytes()) == before
    assert other.held
    other.release()
