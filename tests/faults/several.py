"""Rows 1, 3 and 8 with two processes that train one cohort: kill -9 of one or both, a signal to one of them.

The short tests of the same are in tests/test_distributed.py; this is for `make faults`.
"""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import socket
import time
from pathlib import Path

from jaxablate.analysis.goodput import goodput
from jaxablate.manifest import Manifest
from tests.faults.harness import (
    Child,
    Counts,
    Nursery,
    attempts,
    begun,
    common_step,
    differences,
    progress,
    runs,
    wait_for,
)
from tests.frozen import freeze, toy_study

PATIENCE_S = 30  # in which the other process must have ended too


class Pair:
    """Two processes, one cohort of two members, in a frozen study."""

    def __init__(self, nursery: Nursery, workdir: Path):
        workdir.mkdir(parents=True)
        study = toy_study(workdir, seeds=(0, 1))
        study.base.training.update(steps=40, batch_size=8, eval_every=20)
        study.base.host.update(log_every=1, checkpoint_every=2)
        study.base.model.noise = 0.1
        self.nursery, self.workdir = nursery, workdir
        self.manifest: Manifest = freeze(study)
        self.ids = ",".join(run.id for run in self.manifest.runs if run.arm == "baseline")

    def start(self) -> list[Child]:
        """Both of them, which meet at a free port."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = f"127.0.0.1:{free.getsockname()[1]}"
        argv = [str(self.manifest.path), "--arm=baseline", f"--runs={self.ids}", "--processes=env"]
        children = []
        for number in (0, 1):
            env = {
                "JAXABLATE_COORDINATOR": where,
                "JAXABLATE_PROCESS": str(number),
                "JAXABLATE_PROCESSES": "2",
            }
            output = self.workdir / f"output{number}.txt"
            children.append(self.nursery.start("jaxablate.worker", argv, output, env=env))
        return children

    def finish(self) -> Path:
        """Trains to the end."""
        pair = self.start()
        codes = [child.wait() for child in pair]
        assert codes == [0, 0], pair[0].words()[-3000:]
        return self.workdir


def undisturbed(nursery: Nursery, workdir: Path) -> Path:
    """What the disturbed ones are compared with."""
    return Pair(nursery, workdir).finish()


def kill(nursery: Nursery, whole: Path, scratch: Path, kills: int, seed: int) -> list[Counts]:
    """Kills both processes, as the loss of a node does, or one in eight times only one of them."""
    rng = random.Random(seed)
    counts = Counts(1, "kill -9 at random instants, two processes", "kills")
    alone = Counts(8, "one of two processes killed", "kills")
    numbers = itertools.count()
    while counts.faults < kills:
        pair = Pair(nursery, scratch / str(next(numbers)))
        while counts.faults < kills:
            committed, begins = common_step(pair.workdir), [len(begun(run)) for run in runs(pair.workdir)]
            children = pair.start()
            _strike_instant(pair.workdir, children[0], rng)
            struck = [rng.choice(children)] if not rng.randrange(8) else children
            for child in struck:
                child.send(signal.SIGKILL)
            before = time.monotonic()
            codes = [child.wait() for child in children]
            for run, had in zip(runs(pair.workdir), begins, strict=False):
                for row in begun(run)[had:]:
                    counts.expect(
                        "went on from the newest commit", row["step"] >= committed, (row, committed)
                    )
            if codes == [0, 0]:
                break
            counts.faults += 1
            if len(struck) == 1:
                took = round(time.monotonic() - before, 1)
                alone.faults += 1
                alone.expect(f"the other ended in under {PATIENCE_S} s", took < PATIENCE_S, took)
                alone.measured["slowest, s"] = max(took, alone.measured.get("slowest, s", 0))
        pair.finish()
        wrong = differences(whole, pair.workdir)
        counts.expect("ended as if undisturbed", not wrong, wrong)
        counts.goodput += goodput(pair.manifest)
        if not wrong:
            shutil.rmtree(pair.workdir)
    return [counts, alone] if alone.faults else [counts]


def stop(nursery: Nursery, whole: Path, scratch: Path, stops: int, seed: int) -> Counts:
    """Asks one of the two to stop; both must, at one step, which is saved."""
    rng, counts = random.Random(seed), Counts(3, "a signal to stop to one of two processes", "signals")
    numbers = itertools.count()
    while counts.faults < stops:
        pair = Pair(nursery, scratch / str(next(numbers)))
        while counts.faults < stops:
            children = pair.start()
            _strike_instant(pair.workdir, children[0], rng)
            rng.choice(children).send(rng.choice((signal.SIGUSR2, signal.SIGTERM)))
            codes = [child.wait() for child in children]
            if codes == [0, 0]:
                break
            counts.faults += 1
            counts.expect("all ended with 75", codes == [75, 75], (codes, children[0].words()[-1500:]))
            said = [child.words().strip().splitlines()[-1] for child in children]
            counts.expect("all at the same step", len(set(said)) == 1 and " at step " in said[0], said)
            ends = [run.history()[-1] for run in runs(pair.workdir) if run.history()]
            saved = common_step(pair.workdir)
            counts.expect("which is committed", all(row["step"] == saved for row in ends), (ends, saved))
        pair.finish()
        wrong = differences(whole, pair.workdir)
        counts.expect("ended as if undisturbed", not wrong, wrong)
    return counts


def _strike_instant(workdir: Path, first: Child, rng: random.Random) -> None:
    before = attempts(workdir)
    wait_for(lambda: attempts(workdir) >= before + 2, first)
    enough = progress(workdir) + rng.randrange(12)
    wait_for(lambda: progress(workdir) >= enough, first)
    time.sleep(rng.uniform(0, 0.05))
