"""A small cohort of the toy task, slow enough to be struck, in one process or several."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxablate.manifest import Manifest
from jaxablate.places import Processes
from jaxablate.runstore import RunDir
from jaxablate.study import Run, Study
from tests.frozen import freeze, toy_study

REPO = Path(__file__).resolve().parents[1]
MEMBERS = DEVICES = 4  # on one mesh, whatever the number of processes


def declared(workdir: Path, members: int = MEMBERS, task: str = "tests.toy:ToyTask") -> Study:
    """Its study, of which it trains the baseline."""
    study = toy_study(workdir, seeds=tuple(range(members)))
    study.base.task, study.base.model.noise = task, 0.1
    study.base.training.steps, study.base.data.seconds = (60, 0.006) if members > 1 else (20, 0.0)
    study.base.host.checkpoint_every, study.base.host.log_every = 10, 2
    return study


class Cohort:
    """Workers on this machine, and what they leave in a study's directory."""

    def __init__(
        self,
        workdir: Path,
        env: Mapping[str, str],
        members: int = MEMBERS,
        task: str = "tests.toy:ToyTask",
    ):
        self.manifest: Manifest = freeze(declared(workdir, members, task))
        self.runs = [run for run in self.manifest.runs if run.arm == "baseline"]
        self.env, self.logs = env, workdir
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, processes: int) -> list[subprocess.Popen[bytes]]:
        """One cohort in several processes of this machine, with equally many devices each."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = self.command("env" if processes > 1 else "one")
        children = []
        for process in range(processes):
            place = {"COORDINATOR": f"127.0.0.1:{port}", "PROCESS": str(process), "PROCESSES": str(processes)}
            env = {
                **self.env,
                **{f"JAXABLATE_{name}": value for name, value in place.items()},
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes}",
            }
            children.append(self.launch(command, env))
        return children

    def command(self, processes: Processes) -> list[str]:
        """The worker's command line."""
        return [
            sys.executable, "-m", "jaxablate.worker", str(self.manifest.path), "--arm=baseline",
            f"--runs={','.join(run.id for run in self.runs)}", f"--processes={processes}",
        ]  # fmt: skip

    def launch(self, command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """A child with its output in a file of its own."""
        with (self.logs / f"log-{len(self.started)}").open("wb") as log:
            child = subprocess.Popen(command, cwd=REPO, env=env, stdout=log, stderr=log)
        self.started.append(child)
        return child

    def train(self, processes: int) -> Cohort:
        """To the end."""
        codes = [child.wait(240) for child in self.start(processes)]
        assert codes == [0] * processes, self.words()
        return self

    def until_step(self, step: int) -> None:
        """Waits until a step of the first run is logged."""
        deadline = time.monotonic() + 120
        path = self.dir(0).metrics
        while not path.exists() or f'"step": {step},' not in path.read_text():
            assert time.monotonic() < deadline, self.words()
            assert all(child.poll() is None for child in self.started[-1:]), self.words()
            time.sleep(0.05)

    def dir(self, m: int) -> RunDir:
        """Of member `m`."""
        return self.manifest.run_dir(self.runs[m])

    def results(self) -> list[tuple[str, bytes]]:
        """Digest of the parameters and metrics of each member."""
        return results(self.manifest, self.runs)

    def words(self) -> str:
        """What the processes said."""
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self.logs.glob("log-*")))

    def end(self) -> None:
        """Kills what still runs."""
        for child in self.started:
            if child.poll() is None:
                child.kill()
                child.wait()


def results(manifest: Manifest, runs: Sequence[Run]) -> list[tuple[str, bytes]]:
    """Digest of the parameters and metrics of each run."""
    dirs = [manifest.run_dir(run) for run in runs]
    return [
        (json.loads(where.summary.read_text())["params_digest"], where.metrics.read_bytes()) for where in dirs
    ]
