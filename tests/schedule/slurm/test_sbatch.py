"""The command lines for sbatch, to the letter."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxablate.schedule.slurm.sbatch import finish_argv, output, sbatch_argv
from jaxablate.schedule.slurm.site import Site
from jaxablate.schedule.slurm.submission import Array

STUDY, ID, SCRIPT = "/work/runs/ctclip", "20250102T030405-0a1b2c", "/opt/launch/array.sbatch"
ENVIRONMENT = ("HOME", "PATH")


def test_the_command_of_an_array_on_a_plain_site() -> None:
    found = sbatch_argv(Site(environment=ENVIRONMENT), STUDY, ID, Array(None, 0, 8), 0, (), SCRIPT)
    assert found == [
        "sbatch",
        "--parsable",
        "--job-name=jaxablate-ctclip",
        "--comment=jaxablate 20250102T030405-0a1b2c 0",
        "--chdir=/work/runs/ctclip",
        "--output=/work/runs/ctclip/slurm/20250102T030405-0a1b2c/%A_%a.log",
        "--open-mode=append",
        "--requeue",
        "--export=JAXABLATE_PYTHON,JAXABLATE_MODULES,HOME,PATH",
        "--array=0-7",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--signal=B:USR2@120",
        "/opt/launch/array.sbatch",
        "/work/runs/ctclip",
        "20250102T030405-0a1b2c",
        "--first=0",
    ]


def test_the_command_of_a_later_array_on_a_site_that_says_everything() -> None:
    site = Site(
        "gpu",
        "lab",
        "long",
        "a100",
        "gpu:4",
        2,
        1,
        32,
        "200G",
        "12:00:00",
        "USR1@300",
        ("cuda",),
        ENVIRONMENT,
    )
    found = sbatch_argv(site, STUDY, ID, Array(None, 1001, 5, (0, 1)), 2, (17, 18), SCRIPT)
    assert found[9:] == [
        "--array=0-4%2",
        "--dependency=afterany:17:18",
        "--kill-on-invalid-dep=yes",
        "--partition=gpu",
        "--account=lab",
        "--qos=long",
        "--constraint=a100",
        "--gres=gpu:4",
        "--mem=200G",
        "--time=12:00:00",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=32",
        "--signal=B:USR1@300",
        "/opt/launch/array.sbatch",
        "/work/runs/ctclip",
        "20250102T030405-0a1b2c",
        "--first=1001",
    ]


def test_the_command_of_the_last_job() -> None:
    site = Site(partition="gpu", gres="gpu:4", nodes=2, environment=ENVIRONMENT)
    found = finish_argv(site, STUDY, ID, (17, 18), SCRIPT)
    assert found[1:4] == [
        "--parsable",
        "--job-name=jaxablate-ctclip",
        "--comment=jaxablate 20250102T030405-0a1b2c finish",
    ]
    assert found[9:] == [
        "--dependency=afterany:17:18",
        "--kill-on-invalid-dep=yes",
        "--partition=gpu",
        "--nodes=1",
        "--ntasks=1",
        "--time=10",
        "/opt/launch/array.sbatch",
        "/work/runs/ctclip",
        "20250102T030405-0a1b2c",
        "--finish",
    ]


def test_a_throttle_that_does_not_bind_is_left_out() -> None:
    def array(limit: int) -> str:
        found = sbatch_argv(Site(), STUDY, ID, Array(None, 0, 4), limit, (), SCRIPT)
        return next(word for word in found if word.startswith("--array"))

    assert [array(limit) for limit in (0, 1, 4, 9)] == [
        "--array=0-3",
        "--array=0-3%1",
        "--array=0-3",
        "--array=0-3",
    ]


def slurm_reads(pattern: str, replaced: dict[str, str]) -> str:
    r"""What SLURM 22.05 makes of a file name, as observed: with a backslash in it, only `\\` -> `\`."""
    if "\\" in pattern:
        return pattern.replace("\\\\", "\\")
    found, rest = "", pattern
    while rest:
        word = rest[:2]
        if word[0] == "%" and (word == "%%" or word[1:] in replaced):
            found, rest = found + replaced.get(word[1:], "%"), rest[2:]
        else:
            found, rest = found + rest[0], rest[1:]
    return found


@pytest.mark.parametrize(
    "name", ["plain", "a b", "50%", "%j%A%a", "%%", "a\nb", "q'\"$(x)", "é✓", "back\\slash", "\\%j"]
)
def test_the_log_lies_in_the_submissions_folder_whatever_its_path(name: str) -> None:
    study = f"/work/{name}/toy"
    found = slurm_reads(output(study, ID, "0", "%A_%a"), {"A": "12", "a": "3", "j": "15"})
    assert Path(found).parent == Path(study) / "slurm" / ID
    assert Path(found).name == ("array-0.log" if "\\" in name else "12_3.log")


def test_the_path_as_it_is_would_not() -> None:
    plain = f"/work/%j/toy/slurm/{ID}/%A_%a.log"
    assert not slurm_reads(plain, {"A": "12", "a": "3", "j": "15"}).startswith("/work/%j/")
