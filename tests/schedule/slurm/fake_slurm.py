"""SLURM's tools as small programs on PATH that say what a test wants: refusals, silence, answers that get lost.

What they are told is kept, and an array that was accepted stays in the queue until the test ends it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

Answer = Literal["ok", "silent", "lost"] | str  # else: the words of a refusal

SILENT = "Unable to contact slurm controller (connect failure)"
PROGRAM = """#!{python} -S
import json, os, sys
from pathlib import Path

home, (name, *words) = Path({home!r}), [os.path.basename(sys.argv[0]), *sys.argv[1:]]
state = json.loads((home / "state.json").read_text())
log = (home / "calls.jsonl").open("a")
log.write(json.dumps([name, *words]) + "\\n")
log.close()
answers = state["answers"].get(name, [])
answer = answers.pop(0) if answers else "ok"


def leave(code, out="", err=""):
    (home / "state.json").write_text(json.dumps(state))
    print(out, end="")
    print(err, end="", file=sys.stderr)
    sys.exit(code)


if answer == "silent":
    leave(1, "", f"{{name}}: error: {silent}\\n")
if answer not in ("ok", "lost"):
    leave(1, "", f"{{name}}: error: {{answer}}\\n")
jobs = state["jobs"]
if name == "sbatch":
    option = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
    low, _, high = option.get("--array", "0-0").partition("%")[0].partition("-")
    number = 100 + len(jobs)
    jobs.append({{"job": number, "comment": option["--comment"], "count": int(high) + 1, "state": "PENDING",
                 "environment": sorted(os.environ)}})
    if answer == "lost":
        leave(1, "", "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation\\n")
    leave(0, f"{{number}}\\n")
if name == "scontrol" and words[:1] == ["show"] and words[1] == "config":
    leave(0, f"Configuration data\\nMaxArraySize            = {{state['max_array_size']}}\\n")
if name == "scontrol" and "job" in words:
    leave(0, state["shown"])
if name == "squeue":
    form = next(word for word in words if word.startswith("--format")).partition("=")[2]
    live = [job for job in jobs if job["state"] in ("PENDING", "RUNNING") or "--states=all" in words]
    if "%k" in form:
        leave(0, "".join(f"{{job['job']}}|{{job['comment']}}\\n" for job in live))
    rows = [(f"{{job['job']}}_{{n}}", f"{{job['state']}}||{{job.get('reason', 'None')}}")
            for job in live for n in range(job["count"])]
    leave(0, "".join(f"{{task}}\\n" if form == "%i" else f"{{task}}|{{rest}}\\n" for task, rest in rows))
if name == "scancel":
    for job in jobs:
        if str(job["job"]) in words:
            job["state"] = "CANCELLED"
leave(0)
"""


class FakeSlurm:
    """The tools in a folder, and what they know."""

    def __init__(self, home: Path):
        self.home = home
        self.bin = home / "bin"
        self.bin.mkdir(parents=True)
        text = PROGRAM.format(python=sys.executable, home=str(home), silent=SILENT)
        for name in ("sbatch", "squeue", "scontrol", "scancel"):
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        self.write(answers={}, jobs=[], max_array_size=1001, shown="JobState=RUNNING Reason=None Restarts=0")

    def write(self, **changes: Any) -> None:
        """Changes what they know."""
        path = self.home / "state.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | changes))

    def answer(self, name: str, *answers: Answer) -> None:
        """What the next calls of a tool are answered."""
        state = json.loads((self.home / "state.json").read_text())
        self.write(answers={**state["answers"], name: list(answers)})

    @property
    def jobs(self) -> list[dict[str, Any]]:
        """The arrays that were accepted, in order."""
        return json.loads((self.home / "state.json").read_text())["jobs"]

    @property
    def states(self) -> list[str]:
        """Theirs."""
        return [job["state"] for job in self.jobs]

    def hold(self, job: int, reason: str) -> None:
        """Lets a job wait for that reason."""
        self.write(jobs=[{**one, "reason": reason} if one["job"] == job else one for one in self.jobs])

    def add(self, name: str, script: str) -> None:
        """One more tool, in the shell's words."""
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)

    def end(self, state: str = "COMPLETED") -> None:
        """Ends all that is queued."""
        self.write(jobs=[{**job, "state": state} for job in self.jobs])

    def calls(self, name: str) -> list[list[str]]:
        """What a tool was called with."""
        path = self.home / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [words for own, *words in map(json.loads, lines) if own == name]

    @property
    def path(self) -> str:
        """PATH with these tools first."""
        return f"{self.bin}{os.pathsep}{os.environ['PATH']}"
