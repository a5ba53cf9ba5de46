"""The command lines for sbatch: pure functions. The script is constant; whatever varies is an argument.

Nothing here passes a shell. What SLURM itself interprets is the file name of `--output` (see `output`); all else it
takes as it is. `--export` names variables; their values never stand on a command line.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from jaxablate.schedule.slurm.site import Site
from jaxablate.schedule.slurm.submission import FOLDER, Array, comment

OWN_VARIABLES = ("JAXABLATE_PYTHON", "JAXABLATE_MODULES")  # what the scripts read


def sbatch_argv(
    site: Site,
    study: str | os.PathLike[str],
    submission: str,
    array: Array,
    throttle: int,
    dependency_jobs: Sequence[int | str],
    script: str | os.PathLike[str],
) -> list[str]:
    """The command that submits an array.

    Args:
      site: partition, resources, limits.
      study: absolute path of the study's directory.
      submission: its id.
      array: which elements it carries; task n is element `array.first + n`.
      throttle: elements that run at a time; 0 for any number.
      dependency_jobs: it starts when all of these have ended, however they did.
      script: launch/array.sbatch or launch/multinode.sbatch.
    """
    limit = f"%{throttle}" if 0 < throttle < array.count else ""
    return [
        *_common(site, study, submission, str(array.first), "%A_%a"),
        f"--array=0-{array.count - 1}{limit}",
        *_after(dependency_jobs),
        *_resources(site),
        f"--signal=B:{site.signal}",
        str(script), str(study), submission, f"--first={array.first}",
    ]  # fmt: skip


def finish_argv(
    site: Site,
    study: str | os.PathLike[str],
    submission: str,
    dependency_jobs: Sequence[int | str],
    script: str | os.PathLike[str],
) -> list[str]:
    """The command that submits the last job, which calls `on_finish`; one core is enough for it."""
    where = [
        f"--{name}={value}" for name in ("partition", "account", "qos") if (value := getattr(site, name))
    ]
    return [
        *_common(site, study, submission, "finish", "finish-%j"),
        *_after(dependency_jobs),
        *where, "--nodes=1", "--ntasks=1", "--time=10",
        str(script), str(study), submission, "--finish",
    ]  # fmt: skip


def output(study: str | os.PathLike[str], submission: str, part: str, pattern: str) -> str:
    """The log file, absolute, such that SLURM puts job and task for `pattern` and leaves the path as it is.

    `%%` is a percent sign to it. Of a path with backslashes it replaces nothing and removes one of each two
    (measured with SLURM 22.05), so there all tasks of an array write to one file.
    """
    folder = str(Path(study) / FOLDER / submission)
    if "\\" in folder:
        return f"{folder.replace(chr(92), chr(92) * 2)}/array-{part}.log"
    return f"{folder.replace('%', '%%')}/{pattern}.log"


def exported(site: Site) -> list[str]:
    """The names of the variables that a job gets of the environment it is submitted from."""
    return list(dict.fromkeys([*OWN_VARIABLES, *site.environment]))


def _common(site: Site, study: str | os.PathLike[str], submission: str, part: str, log: str) -> list[str]:
    return [
        "sbatch",
        "--parsable",
        f"--job-name=jaxablate-{Path(study).name}",
        f"--comment={comment(submission, part)}",
        f"--chdir={study}",
        f"--output={output(study, submission, part, log)}",
        "--open-mode=append",
        "--requeue",
        f"--export={','.join(exported(site))}",
    ]


def _after(jobs: Sequence[int | str]) -> list[str]:
    """`afterany` is satisfied some time, whatever comes; one that never could be ends the job."""
    if not jobs:
        return []
    return [f"--dependency=afterany:{':'.join(map(str, jobs))}", "--kill-on-invalid-dep=yes"]


def _resources(site: Site) -> list[str]:
    named = {
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "gres": site.gres,
        "mem": site.memory,
        "time": site.time,
    }
    tasks = [f"--nodes={site.nodes}", f"--ntasks-per-node={site.tasks_per_node}"]
    cpus = [f"--cpus-per-task={site.cpus}"] if site.cpus else []
    return [*(f"--{name}={value}" for name, value in named.items() if value), *tasks, *cpus]
