"""Several processes that train one cohort: the result of one, one stop for all, and no survivor of a dead one."""

from __future__ import annotations

import json
import math
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxablate import distributed
from jaxablate.errors import UserError
from jaxablate.places import ProcessPlace, place_in_env, place_in_slurm, place_of
from jaxablate.schedule.retries import outlook
from tests.several import DEVICES, MEMBERS, Cohort

# --------------------------------------------------------------------------------------------- places

STEP = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NODELIST": "n[003-004]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def test_a_task_of_a_step_finds_its_place() -> None:
    place = place_in_slurm(STEP)
    assert (place.process, place.processes, place.devices) == (3, 4, None)
    host, port = place.coordinator.split(":")
    assert host == "127.0.0.1"  # a step on one node does not leave it
    assert 61440 <= int(port) < 65536
    assert place_in_slurm({**STEP, "SLURM_STEP_ID": "1"}).coordinator != place.coordinator
    assert place_of("slurm", STEP) == place
    assert place_of("one", STEP) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n5", "n5"),
        ("n[003-007,9],m1", "n003"),
        ("r[1-2]n[00-03]", "r1n00"),
        ("a-b[8,9]", "a-b8"),
        ("x,y", "x"),
    ],
)
def test_process_0_listens_on_the_first_node(nodes: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "10.0.0.5")
    step = {**STEP, "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": nodes}
    assert place_in_slurm(step).coordinator.startswith(f"{first}:6")


def test_a_node_that_others_cannot_reach_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {**STEP, "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[3-4]"}
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "127.0.1.1")
    with pytest.raises(UserError, match=r"n3 is 127.0.1.1 here.*JAX_COORDINATOR_ADDRESS"):
        place_in_slurm(step)
    assert place_in_slurm({**step, "JAX_COORDINATOR_ADDRESS": "10.0.0.5"}).coordinator.startswith(
        "10.0.0.5:6"
    )
    assert place_in_slurm({**step, "JAX_COORDINATOR_ADDRESS": "h:9"}).coordinator == "h:9"


@pytest.mark.parametrize(
    ("gpus", "own"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "2"}, (1,)),  # both tasks see both
        ({"CUDA_VISIBLE_DEVICES": "1", "SLURM_GPUS_ON_NODE": "2"}, (0,)),  # each sees its own
        ({"SLURM_GPUS_ON_NODE": "8"}, (4, 5, 6, 7)),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}, (0, 1, 2, 3)),
    ],
)  # fmt: skip
def test_the_gpus_of_a_node_are_shared_out(gpus: Mapping[str, str], own: tuple[int, ...] | None) -> None:
    assert place_in_slurm({**STEP, **gpus}).devices == own


def test_gpus_that_cannot_be_shared_evenly_are_refused() -> None:
    with pytest.raises(UserError, match="2 tasks cannot share 3 GPUs"):
        place_in_slurm({**STEP, "CUDA_VISIBLE_DEVICES": "0,1,2"})


@pytest.mark.parametrize(
    ("environment", "word"),
    [
        ({}, "JAXABLATE_COORDINATOR"),
        ({"JAXABLATE_COORDINATOR": "here"}, "host:port"),
        ({"JAXABLATE_COORDINATOR": "h:1", "JAXABLATE_PROCESS": "x"}, "JAXABLATE_PROCESS"),
        ({"JAXABLATE_COORDINATOR": "h:1", "JAXABLATE_PROCESS": "2", "JAXABLATE_PROCESSES": "2"}, "below"),
    ],
)
def test_a_place_that_cannot_be_told_is_refused(environment: Mapping[str, str], word: str) -> None:
    with pytest.raises(UserError, match=word) as error:
        place_in_env(environment)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="SLURM_JOB_ID"):
        place_in_slurm(environment)
    good = {"JAXABLATE_COORDINATOR": "h:1", "JAXABLATE_PROCESS": "1", "JAXABLATE_PROCESSES": "2"}
    assert place_in_env(good) == ProcessPlace("h:1", 1, 2)


# ------------------------------------------------------------------------------------ one process alone


def test_one_process_agrees_with_itself() -> None:
    assert distributed.first(lambda: (1, {2: "x"})) == (1, {2: "x"})  # not through JSON
    assert distributed.gather("word") == ["word"]
    with pytest.raises(ZeroDivisionError):
        distributed.first(lambda: 1 // 0)
    distributed.abandon(ValueError("of one process"))  # which goes on


def test_arrays_come_back_as_they_were_put() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    tree = {"x": np.arange(24.0, dtype=np.float32).reshape(8, 3), "n": np.arange(4)}
    there = distributed.put(tree, NamedSharding(mesh, PartitionSpec("data")))
    assert there["x"].addressable_shards[0].data.shape == (2, 3)
    back = distributed.fetch(there)
    assert all((back[key] == value).all() for key, value in tree.items())


def test_a_process_without_a_device_of_the_mesh_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    assert distributed.check_mesh(mesh) is mesh
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(UserError, match="none of process 1; start fewer processes"):
        distributed.check_mesh(mesh)


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (ValueError("a loose wire"), "bug"),
        (MemoryError(), "oom"),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), "oom"),
        (OSError(28, "No space left on device"), "node_fail"),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), "bug"),  # alone it has none
    ],
)
def test_an_error_has_a_state(error: Exception, state: str) -> None:
    assert distributed.blame(error) == (state, f"{type(error).__name__}: {error}")


@pytest.mark.parametrize(
    ("error", "said", "state", "words"),
    [
        (ValueError("Gloo AllGather failed: Connection closed"), "", "node_fail", "is gone: ValueError: Gloo"),
        (ValueError("Gloo AllGather failed: Connection closed"), '["oom", "process 1: x"]', "oom", "process 1: x"),
        (ValueError("a loose wire"), "", "bug", "ValueError: a loose wire"),
    ],
)  # fmt: skip
def test_of_several_the_one_that_failed_is_blamed(
    error: Exception, said: str, state: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, str] = {"jaxablate/failed/1": said} if said else {}
    store = SimpleNamespace(
        key_value_dir_get=lambda folder: [(k, v) for k, v in told.items() if k.startswith(folder)],
        key_value_set=told.__setitem__,
    )
    monkeypatch.setattr(distributed, "several", lambda: True)
    monkeypatch.setattr(distributed, "_store", lambda: store)
    monkeypatch.setattr(distributed, "PATIENCE_S", 0.2)
    found, reason = distributed.blame(error)
    assert found == state
    assert words in reason
    assert ("jaxablate/failed/0" in told) == (state == "bug")


# -------------------------------------------------------------------------------------- several of them


@pytest.fixture
def cohort(tmp_path: Path, child_env: dict[str, str]) -> Iterator[Cohort]:
    made = Cohort(tmp_path / "cohort", child_env)
    yield made
    made.end()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, bytes]]]:
    return {}


@pytest.fixture
def whole(undisturbed: dict[str, Any], tmp_path: Path, child_env: dict[str, str]) -> list[tuple[str, bytes]]:
    """The results of one process, trained once."""
    if not undisturbed:
        undisturbed["results"] = Cohort(tmp_path / "whole", child_env).train(1).results()
    return undisturbed["results"]


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one(cohort: Cohort, whole: list[tuple[str, bytes]]) -> None:
    cohort.train(2)
    assert cohort.results() == whole
    mesh = json.loads(cohort.dir(0).provenance.read_text())["mesh"]
    assert mesh["member"] == DEVICES
    assert len({digest for digest, _ in whole}) == MEMBERS  # equal is not the same for all
    # Process 0 alone wrote: each of its rows once, one attempt, one summary.
    assert [row["state"] for row in cohort.dir(0).history()] == ["running", "done"]


@pytest.mark.slow
def test_data_over_several_processes_agrees_to_rounding(tmp_path: Path, child_env: dict[str, str]) -> None:
    """Four summands have an order, which a ring of processes chooses otherwise than the threads of one."""
    one = Cohort(tmp_path / "one", child_env, members=1).train(1)
    four = Cohort(tmp_path / "four", child_env, members=1)
    try:
        four.train(4)
    finally:
        four.end()
    assert json.loads(four.dir(0).provenance.read_text())["mesh"]["data"] == 4
    rows = [
        [json.loads(line) for line in made.dir(0).metrics.read_text().splitlines()] for made in (one, four)
    ]
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert math.isclose(value, b[key], rel_tol=2e-5, abs_tol=1e-6), (key, a, b)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step(
    cohort: Cohort, whole: list[tuple[str, bytes]]
) -> None:
    """And twice as many processes go on from there."""
    children = cohort.start(2)
    cohort.until_step(4)
    children[1].send_signal(signal.SIGUSR2)
    assert [child.wait(60) for child in children] == [75, 75], cohort.words()
    ends = [cohort.dir(m).history()[-1] for m in range(MEMBERS)]
    assert {end["state"] for end in ends} == {"preempted"}
    (reason,) = {end["reason"] for end in ends}
    step = int(reason.removeprefix("SIGUSR2 at step "))
    assert 4 <= step < 60
    said = [line for line in cohort.words().splitlines() if line.startswith("stopped: ")]
    assert said == [f"stopped: SIGUSR2 at step {step}"] * 2
    steps = [(cohort.dir(m).checkpoints / f"{step:09d}.json").exists() for m in range(MEMBERS)]
    assert all(steps)
    assert cohort.train(4).results() == whole
    begun = [row["step"] for row in cohort.dir(0).history() if row["state"] == "running"]
    assert begun == [0, step]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "number"),
    [(1, signal.SIGKILL), (0, signal.SIGSTOP)],
)
def test_a_dead_or_hung_process_ends_the_others(
    process: int, number: signal.Signals, cohort: Cohort, whole: list[tuple[str, bytes]]
) -> None:
    children = cohort.start(2)
    cohort.until_step(14)
    began = time.monotonic()
    children[process].send_signal(number)
    code = children[1 - process].wait(60)
    assert time.monotonic() - began < 30  # what the README promises
    assert code != 0
    children[process].kill()
    children[process].wait()
    for m in range(MEMBERS):
        history = cohort.dir(m).history()
        if history[-1]["state"] == "running":  # process 0 had no word left: its launcher says it
            assert process == 0 or code == -signal.SIGABRT
            assert distributed.ABORTED in cohort.words()
        else:
            assert history[-1]["state"] == "node_fail"
            assert outlook(history, 8).next == "train"
    if number == signal.SIGKILL and process == 1:
        assert cohort.train(1).results() == whole


@pytest.mark.slow
def test_what_one_process_lacks_ends_all_with_one_line(tmp_path: Path, child_env: dict[str, str]) -> None:
    cohort = Cohort(tmp_path, child_env, task="tests.torn:UnreadableTask")
    codes = [child.wait(120) for child in cohort.start(2)]
    assert codes == [2, 2], cohort.words()
    assert cohort.words().count("error: toy.csv: is not on this machine (process 1)\n") == 2
    assert not cohort.dir(0).history()


@pytest.mark.slow
def test_an_error_of_another_process_is_recorded_with_its_words(
    tmp_path: Path, child_env: dict[str, str]
) -> None:
    """Process 1 cannot read its data: not that the connection to it breaks is what happened."""
    cohort = Cohort(tmp_path, child_env, task="tests.torn:TornTask")
    codes = [child.wait(120) for child in cohort.start(2)]
    assert codes == [1, 1], cohort.words()
    end = cohort.dir(0).history()[-1]
    assert (end["state"], end["reason"]) == ("bug", "process 1: ValueError: the scan of process 1 is torn")
