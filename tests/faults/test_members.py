"""Row 9: a loss that is not finite ends one member, at that step, and touches no other."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from jaxablate.disk import read_jsonl
from tests.faults.harness import TOY, Counts, Nursery, finish, runs, summaries

pytestmark = pytest.mark.slow
MEMBERS = TOY.but(seeds="0,1,2,3", training__steps=20, host__checkpoint_every=10)


def strike(nursery: Nursery, scratch: Path, times: int, seed: int) -> Counts:
    """Makes the loss of a random member NaN or infinite at a random step."""
    rng, counts = random.Random(seed), Counts(9, "NaN or Inf in one member", "members struck")
    calm = finish(nursery, MEMBERS, scratch / "calm")
    for number in range(times):
        struck, after, value = rng.randrange(4), rng.randrange(1, 20), rng.choice(("nan", "inf"))
        toy = MEMBERS.but(data__nan_at_seed=struck, data__nan_after=after, data__lost=value)
        _judge(counts, calm, finish(nursery, toy, scratch / str(number)), struck, after + 1)
    return counts


def _judge(counts: Counts, calm: Path, wild: Path, struck: int, step: int) -> None:
    counts.faults += 1
    ends = {s["seed"]: s for s in summaries(wild)}
    counts.expect("diverged at that step", (ends[struck]["diverged"] or {}).get("step") == step, ends[struck])
    last = [run.history()[-1] for run in runs(wild)][struck]
    counts.expect(
        "said in its attempt", last["state"] == "diverged" and f"at step {step}" in last["reason"], last
    )
    for seed, (one, other) in enumerate(zip(runs(calm), runs(wild), strict=True)):
        a, b = (json.loads(run.summary.read_bytes()) for run in (one, other))
        rows = [read_jsonl(run.metrics)[0] for run in (one, other)]
        if seed == struck:
            before = [[row for row in each if row["step"] < step] for each in rows]
            counts.expect("its rows before are those of an undisturbed run", before[0] == before[1], wild)
        else:
            same = a["params_digest"] == b["params_digest"] and rows[0] == rows[1]
            counts.expect("other members bit-unchanged", same and b["state"] == "done", (wild, seed))


def test_a_member_that_is_lost_leaves_the_others_bit_unchanged(nursery: Nursery, tmp_path: Path) -> None:
    strike(nursery, tmp_path, 1, seed=0).check()
