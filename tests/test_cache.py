"""A folder of the cache is built by one process while the others wait, and by the next one if that is killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxablate import cache

# Builds a folder: says so in a file, and is done as soon as it may. PATCH makes it a machine without locks.
BUILDER = """
import contextlib, logging, sys, time
from pathlib import Path
from jaxablate import cache

folder, begun, done = map(Path, sys.argv[1:])
logging.basicConfig(level=logging.INFO, format="%(message)s")

def build(scratch):
    with begun.open("a") as file:
        file.write("begun\\n")
    while not done.exists():
        time.sleep(0.005)
    (scratch / "made").write_text("whole")

PATCH
cache.built_folder(folder, build)
"""
NO_LOCKS = "cache.locked = lambda fd, how=0: contextlib.nullcontext(False)"


class Builders:
    """Processes that build the same folder."""

    def __init__(self, tmp_path: Path, env: dict[str, str], patch: str = ""):
        self.folder, self.begun, self.done = (tmp_path / name for name in ("folder", "begun", "done"))
        places = map(str, (self.folder, self.begun, self.done))
        self._command, self._env = [sys.executable, "-c", BUILDER.replace("PATCH", patch), *places], env

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(self._command, env=self._env, stderr=subprocess.PIPE, text=True)

    def builds(self) -> int:
        return self.begun.read_text().count("begun") if self.begun.exists() else 0

    def wait_for(self, builds: int) -> None:
        until = time.monotonic() + 120
        while self.builds() < builds:
            assert time.monotonic() < until
            time.sleep(0.005)

    def finish(self, *processes: subprocess.Popen[str]) -> None:
        self.done.touch()
        for process in processes:
            _, said = process.communicate(timeout=120)
            assert process.returncode == 0, said
        assert (self.folder / "made").read_text() == "whole"
        names = {path.name for path in self.folder.parent.iterdir()}
        assert names >= {"folder", "begun", "done"} and not {n for n in names if n.endswith(".lock")}


def test_one_process_builds_and_the_others_use_what_it_made(tmp_path, child_env):
    builders = Builders(tmp_path, child_env)
    first = builders.start()
    builders.wait_for(1)
    others = [builders.start() for _ in range(2)]
    for other in others:
        assert other.stderr is not None
        assert "waiting for the process that builds" in other.stderr.readline()
    builders.finish(first, *others)
    assert builders.builds() == 1


def test_without_locks_all_of_them_would_build_and_one_result_stays(tmp_path, child_env):
    builders = Builders(tmp_path, child_env, NO_LOCKS)
    processes = [builders.start() for _ in range(3)]
    builders.wait_for(3)
    builders.finish(*processes)


def test_who_is_killed_does_not_block_the_others(tmp_path, child_env):
    builders = Builders(tmp_path, child_env)
    killed = builders.start()
    builders.wait_for(1)
    other = builders.start()
    assert other.stderr is not None and "waiting" in other.stderr.readline()
    killed.kill()
    killed.communicate()
    builders.wait_for(2)
    builders.finish(other)


def test_what_a_builder_raises_comes_out_and_the_next_one_builds(tmp_path):
    def fails(scratch: Path) -> None:
        (scratch / "half").touch()
        raise FileNotFoundError("the input")

    with pytest.raises(FileNotFoundError, match="the input"):
        cache.built_folder(tmp_path / "folder", fails)
    assert list(tmp_path.iterdir()) == []
    assert cache.built_folder(tmp_path / "folder", lambda scratch: (scratch / "made").touch()).keys() == {
        "made"
    }
