"""A site's profile: whatever is wrong with it is one line that names the key and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxablate.errors import UserError
from jaxablate.schedule.slurm import site
from jaxablate.schedule.slurm.site import Site


def profile(tmp_path: Path, text: str) -> str:
    path = tmp_path / "site.toml"
    path.write_text(text)
    return str(path)


def test_without_a_profile_everything_is_left_to_slurm() -> None:
    found = site.load("")
    assert found == Site()
    asked = ("partition", "account", "qos", "constraint", "gres", "memory", "time", "cpus", "array_limit")
    assert not any(getattr(found, name) for name in asked)


def test_a_profile_is_read_as_it_says(tmp_path: Path) -> None:
    text = 'partition = "gpu"\ngres = "gpu:2"\nmodules = ["cuda/13.0"]\nmax_attempts = 3\n'
    found = site.load(profile(tmp_path, text))
    assert (found.partition, found.gres, found.modules, found.max_attempts) == (
        "gpu",
        "gpu:2",
        ("cuda/13.0",),
        3,
    )
    assert found.signal == Site().signal


def test_the_profiles_in_launch_are_valid(repo: Path) -> None:
    found = [site.load(str(path)) for path in (repo / "launch" / "sites").glob("*.toml")]
    assert len(set(found)) >= 3
    assert Site() not in found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('partitoin = "gpu"', ["partitoin: no such field", "did you mean 'partition'"]),
        ("nodes = 'two'", ["nodes='two'", "int"]),
        ("nodes = 0", ["nodes=0", "1 or more"]),
        ("array_limit = -1", ["array_limit=-1", "0 or more"]),
        ("cpus = true", ["cpus=True", "int"]),
        ('signal = "KILL@10"', ["signal='KILL@10'", "USR2"]),
        ('signal = "B:USR2@10"', ["signal="]),
        ('time = "soon"', ["time='soon'", "08:00:00"]),
        ('time = "1:00 --wrap=x"', ["time="]),
        ('memory = "lots"', ["memory='lots'", "32G"]),
        ('partition = "-x"', ["partition='-x'", "dash"]),
        ('partition = "a\\nb"', ["partition=", "one line"]),
        ('modules = ["cuda; rm"]', ["modules='cuda; rm'"]),
        ('modules = "cuda"', ["modules='cuda'", "tuple"]),
        ('environment = ["TOKEN=1"]', ["environment='TOKEN=1'", "no values"]),
        ("partition = [", ["not TOML"]),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    path = profile(tmp_path, text)
    with pytest.raises(UserError) as caught:
        site.load(path)
    line = str(caught.value)
    assert line.startswith(f"--site={path}: ")
    assert "\n" not in line
    for word in words:
        assert word in line


def test_a_profile_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    there = profile(tmp_path, "")
    with pytest.raises(UserError, match="No such file") as caught:
        site.load(str(tmp_path / "other.toml"))
    assert there in str(caught.value)
