"""The fault table at length: `make faults`, or `python -m tests.faults.long --scale=0.05 --rows=1,6,14`.

Repeats what the tests of this folder do once, with hundreds of faults from a stated seed: two loops of kills
side by side, a study under a storm on a real SLURM, and the other rows one after the other. Progress goes to
stderr; at the end the table, in Markdown, to stdout, and the raw counts to a file. Exits with 1 if anything
was not as it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# Before anything imports jax: eight devices to restore on, none of this process's programs on a GPU.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("NPROC", "32")

from tests import slurm_lab
from tests.faults import (
    several,
    storm,
    test_crashing_arm,
    test_damage,
    test_disks,
    test_identity,
    test_kills,
    test_malformed,
    test_members,
    test_two_launchers,
)
from tests.faults.harness import REPO, TOY, Counts, Nursery, environment, finish, interrupted

SEED = 2025
KILLS, PAIR_KILLS, STORM = 150, 60, 110  # at scale 1; two loops share the kills of one process


@dataclass(frozen=True)
class Setting:
    """What every experiment gets: a nursery and a folder of its own, the scale, the seed."""

    nursery: Nursery
    scratch: Path
    whole: Path  # the undisturbed toy
    scale: float
    seed: int

    def times(self, number: int) -> int:
        """`number` at this scale, once at least."""
        return max(1, round(number * self.scale))

    def folder(self, name: str) -> Path:
        """A new folder."""
        path = self.scratch / name
        path.mkdir(parents=True)
        return path

    def killed(self, rows: int = 36) -> Path:
        """A toy that was killed when its members had so many rows."""
        path = self.scratch / f"killed{rows}"
        return path if path.exists() else interrupted(self.nursery, path, rows)


Experiment = Callable[[Setting], list[Counts]]


def kills(at: Setting) -> list[Counts]:
    """Rows 1, 13 and 3 with one process."""
    done = test_kills.kill(at.nursery, at.whole, at.folder("kills"), at.times(KILLS // 2), at.seed)
    return [*done, test_kills.stop(at.nursery, at.whole, at.folder("stops"), at.times(10), at.seed)]


def pairs(at: Setting) -> list[Counts]:
    """Rows 1, 8 and 3 with two processes."""
    whole = several.undisturbed(at.nursery, at.scratch / "whole pair")
    done = several.kill(at.nursery, whole, at.folder("pairs"), at.times(PAIR_KILLS), at.seed)
    return [*done, several.stop(at.nursery, whole, at.folder("pair stops"), at.times(10), at.seed)]


def slurm(at: Setting) -> list[Counts]:
    """Rows 2 and 4, on a cluster of this machine; new studies until there were faults enough."""
    found: list[Counts] = []
    whole = storm.undisturbed(at.nursery, at.scratch / "whole storm")
    wanted = at.times(STORM)
    with slurm_lab.Lab(nodes=4, cpus=2, gpus=0) as lab:  # two elements on a node, so that they lie apart
        while (had := sum(counts.faults for counts in found if counts.row == 2)) < wanted:
            where = at.scratch / f"storm{len(found)}"
            one = storm.storm(lab, at.nursery, whole, where, wanted - had, at.seed + len(found))
            say(f"{one.counts}; {listed(one.counts.kinds)}; by hand: {listed(one.counts.operator)}")
            found += [one.counts, one.control]
            lab.reset()
    return found


def launchers(at: Setting) -> list[Counts]:
    """Row 5."""
    where = at.folder("launchers")
    return [
        test_two_launchers.compete(at.nursery, at.whole, where, at.times(6), at.seed),
        test_two_launchers.race(at.nursery, at.whole, where, at.times(6)),
    ]


def damage(at: Setting) -> list[Counts]:
    """Row 6."""
    where, kinds = at.folder("damage"), list(test_damage.KINDS) * at.times(4)
    return [
        test_damage.every_file(at.killed(), where, at.times(20), at.seed),
        test_damage.to_the_end(at.nursery, at.killed(), at.whole, where / "on", kinds, at.seed),
    ]


def disks(at: Setting) -> list[Counts]:
    """Row 7."""
    where, killed = at.folder("disks"), at.killed()
    sizes = [2500 + 500 * n for n in range(at.times(6))]  # the output is a file too
    found = [
        test_disks.small_files(at.nursery, killed, at.whole, where / "small", sizes),
        test_disks.broken(at.nursery, killed, at.whole, where / "broken", at.times(12), at.seed),
    ]
    if test_disks.may_mount(where):
        found.append(test_disks.full(at.nursery, killed, at.whole, where / "full", at.times(10), at.seed))
        found.append(test_disks.only_to_be_read(at.nursery, killed, at.whole, where / "closed"))
    return found


def members(at: Setting) -> list[Counts]:
    """Row 9."""
    return [test_members.strike(at.nursery, at.folder("members"), at.times(10), at.seed)]


def crashing(at: Setting) -> list[Counts]:
    """Row 10."""
    return [test_crashing_arm.crash(at.nursery, at.folder("crashing"), retries=at.times(3))]


def identity(at: Setting) -> list[Counts]:
    """Rows 11 and 12."""
    where, killed = at.folder("identity"), at.killed(20)
    return [
        test_identity.restore_everywhere(killed),
        test_identity.move(at.nursery, killed, at.whole, where, [2, 4, 8][: at.times(3)]),
        test_identity.edit(at.nursery, killed, where, at.times(60), at.seed),
        test_identity.retype(killed),
    ]


def malformed(at: Setting) -> list[Counts]:
    """Row 14."""
    found = [test_malformed.overrides(at.times(3000), at.seed)]
    for name, number in (("files", 1000), ("frozen_studies", 500), ("data_files", 300)):
        experiment = getattr(test_malformed, name)
        found.append(experiment(at.folder(name), at.times(number), at.seed))
    return found


# Side by side: each list is one after the other, with a nursery of its own.
LANES: tuple[tuple[tuple[str, Experiment, tuple[int, ...]], ...], ...] = (
    (
        ("kills", kills, (1, 3, 13)),
        ("disks", disks, (7,)),
        ("members", members, (9,)),
        ("SLURM", slurm, (2, 4)),
    ),
    (
        ("kills of pairs", pairs, (1, 3, 8)),
        ("more kills", kills, (1, 3, 13)),
        ("launchers", launchers, (5,)),
        ("damage", damage, (6,)),
        ("identity", identity, (11, 12)),
        ("crashing arm", crashing, (10,)),
        ("malformed input", malformed, (14,)),
    ),
)


def run_lane(number: int, rows: set[int], scratch: Path, scale: float, seed: int) -> list[Counts]:
    """The experiments of a lane that are about any of `rows`; one that breaks is counted as wrong."""
    chosen = [(name, experiment, own) for name, experiment, own in LANES[number] if rows & set(own)]
    if not chosen:
        return []
    found: list[Counts] = []
    with Nursery(environment(scratch / f"cache{number}")) as nursery:
        whole = finish(nursery, TOY, scratch / f"whole{number}")
        for place, (name, experiment, own) in enumerate(chosen):
            began = time.monotonic()
            at = Setting(nursery, scratch / f"{number}.{place}", whole, scale, seed + 100 * number)
            say(f"{name} …")
            try:
                done = experiment(at)
            except Exception as error:  # the other rows are to be heard all the same
                done = [
                    Counts(own[0], name, "faults", wrong=[f"{error!r}: {traceback.format_exc()[-3000:]}"])
                ]
            found += done
            say(f"{name}: {time.monotonic() - began:.0f} s")
            for counts in done:
                say(f"  {counts}")
                for wrong in counts.wrong[:3]:
                    say(f"    {wrong[:1000]}")
    return found


def say(text: str) -> None:
    """Progress."""
    print(
        f"{time.strftime('%H:%M:%S')} {text}", file=sys.__stderr__, flush=True
    )  # which no experiment catches


def listed(count: Counter[str]) -> str:
    """Such as "3 requeue, 2 preempt"."""
    return ", ".join(f"{n} {what}" for what, n in count.items() if n) or "nothing"


def table(found: Sequence[Counts]) -> str:
    """Markdown: a line for each experiment, in the order of the rows."""
    lines = ["| row | fault | faults | what held | wrong |", "|---|---|---|---|---|"]
    for counts in sorted(found, key=lambda one: (one.row, one.fault)):
        held = [f"{what}: {n}" for what, n in counts.held.items()]
        held += [f"{what}: {value:g}" for what, value in counts.measured.items()]
        kinds = f" ({listed(counts.kinds)})" if counts.kinds else ""
        cells = (
            counts.row,
            counts.fault,
            f"{counts.faults} {counts.unit}{kinds}",
            "; ".join(held),
            len(counts.wrong),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def merged(found: Sequence[Counts]) -> list[Counts]:
    """Counts of the same fault, added up."""
    by_fault: dict[tuple[int, str], Counts] = {}
    for counts in found:
        key = (counts.row, counts.fault)
        by_fault[key] = by_fault[key] + counts if key in by_fault else counts
    return list(by_fault.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, runs the lanes, prints the table; returns the exit code."""
    parser = argparse.ArgumentParser("python -m tests.faults.long", None, "The fault table at length.")
    parser.add_argument("--scale", type=float, default=1.0, help="times the number of faults")
    parser.add_argument("--rows", default=",".join(map(str, range(1, 15))), help="such as 1,2,6")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=Path("faults.json"), help="the raw counts")
    args = parser.parse_args(argv)
    rows, began, out = {int(row) for row in args.rows.split(",")}, time.monotonic(), args.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    os.chdir(REPO)
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch, ThreadPoolExecutor(len(LANES)) as pool:
        os.environ.update(environment(Path(scratch) / "cache0"))  # what SLURM's jobs are given
        others = [
            pool.submit(run_lane, n, rows, Path(scratch), args.scale, args.seed) for n in range(1, len(LANES))
        ]
        first = run_lane(
            0, rows, Path(scratch), args.scale, args.seed
        )  # here: its daemons end with this thread
        found = merged([*first, *(counts for lane in others for counts in lane.result())])
    took = time.monotonic() - began
    wrong = sum(len(counts.wrong) for counts in found)
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}"
    about = {"seed": args.seed, "scale": args.scale, "seconds": round(took), "machine": machine}
    out.write_text(json.dumps({**about, "counts": [counts.to_dict() for counts in found]}, indent=2) + "\n")
    print(table(found))
    for counts in found:
        if counts.kinds:
            print(f"\nrow {counts.row}, {counts.fault}, done by hand: {listed(counts.operator)}")
        if counts.goodput.attempts:
            seconds = sum(counts.goodput.seconds.values())
            rate = f"a fault every {seconds / counts.faults:.1f} s of a process or of waiting for one"
            print(f"\nrow {counts.row}, {counts.fault}: {rate}; {counts.goodput.text()}")
    total = sum(counts.faults for counts in found)
    print(f"\n{total} faults, {wrong} wrong; seed {args.seed}, {took / 60:.0f} minutes, {machine}")
    return 1 if wrong or not found else 0


if __name__ == "__main__":
    sys.exit(main())
