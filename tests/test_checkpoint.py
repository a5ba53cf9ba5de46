"""Checkpoints: whatever happens to a file is noticed, and what was good before is still there."""

from __future__ import annotations

import errno
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxablate.checkpoint import Checkpoints
from jaxablate.errors import UserError


def arrays(step: int) -> dict[str, jax.Array]:
    key = jax.random.key(step)
    return {
        "params/w": jax.random.normal(key, (64, 32)),
        "opt/count": jnp.int32(step),
        "alive": jnp.array(True),
    }


def target(**changes: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
    own = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in arrays(0).items()}
    return own | {name.replace("__", "/"): value for name, value in changes.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 10, 20, 30; to be copied before it is damaged."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    writer = Checkpoints(directory, "run-a", keep_last=3)
    for step in (10, 20, 30):
        writer.save(step, arrays(step), regular=True)
    writer.close()
    return directory


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def open_(directory: Path, identity: str = "run-a") -> Checkpoints:
    return Checkpoints(directory, identity, keep_last=3)


def test_what_is_restored_is_bit_equal(saved: Path) -> None:
    reader = open_(saved)
    assert reader.sound_regular_steps() == [10, 20, 30]
    for step in (10, 30):
        for name, value in reader.restore(step, target()).items():
            np.testing.assert_array_equal(value, arrays(step)[name])
    assert reader.notes == []


def test_some_arrays_are_restored_by_their_names_alone(saved: Path) -> None:
    reader = open_(saved)
    assert reader.names(20) == arrays(20).keys()
    wanted = {"params/w": target()["params/w"]}
    found = reader.restore(20, wanted, which="named")
    assert found.keys() == wanted.keys()
    np.testing.assert_array_equal(found["params/w"], arrays(20)["params/w"])
    with pytest.raises(UserError, match="first alive: saved bool"):
        reader.restore(20, wanted)
    with pytest.raises(UserError, match="params/v: saved absent"):
        reader.restore(20, wanted | {"params/v": wanted["params/w"]}, which="named")


def files_of(directory: Path, step: int) -> list[Path]:
    inside = [p for p in (directory / f"{step:09d}").rglob("*") if p.is_file()]
    return sorted([*inside, directory / f"{step:09d}.json"])


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_to_any_file_is_found_and_the_step_before_is_used(
    damage: str, saved: Path, tmp_path: Path
) -> None:
    rng = random.Random(0)
    found = 0
    names = [p.relative_to(saved) for p in files_of(saved, 30)]
    for number, name in enumerate(names * (3 if damage == "flip" else 1)):
        directory = Path(shutil.copytree(saved, tmp_path / str(number)))
        path = directory / name
        content = bytearray(path.read_bytes())
        if damage == "delete" and name.suffix == ".json" and name.parent == Path("."):
            continue  # a step without a manifest was never promised; see below
        if damage == "delete" or not content:
            path.unlink()
        elif damage == "truncate":
            path.write_bytes(content[: rng.randrange(len(content))])
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
        reader = open_(directory)
        assert reader.sound_regular_steps() == [10, 20], name
        assert "checkpoint of step 30 is damaged" in reader.notes[0]
        assert list(directory.glob("damaged-000000030*")) or damage != "flip"
        np.testing.assert_array_equal(reader.restore(20, target())["params/w"], arrays(20)["params/w"])
        found += 1
    print(f"{damage}: {found} of {found} found")
    assert found >= 8


def test_orbax_alone_does_not_notice_a_flipped_bit(damaged: Path) -> None:
    """The control: without the manifest at least one flip in the array data would be restored."""
    largest = max(files_of(damaged, 30), key=lambda p: p.stat().st_size)
    content = largest.read_bytes()
    unnoticed = 0
    for place in range(len(content) // 4, len(content), max(len(content) // 12, 1)):
        flipped = bytearray(content)
        flipped[place] ^= 1
        largest.write_bytes(flipped)
        try:
            restored = open_(damaged).restore(30, target())
        except ValueError:
            continue
        unnoticed += any((np.asarray(restored[n]) != np.asarray(v)).any() for n, v in arrays(30).items())
    assert unnoticed > 0


def test_a_save_that_was_killed_before_its_manifest_does_not_count(damaged: Path) -> None:
    (damaged / "000000030.json").unlink()
    reader = open_(damaged)
    assert reader.sound_regular_steps() == [10, 20]
    assert not (damaged / "000000030").exists()
    assert "has no manifest" in reader.notes[0]
    reader.save(30, arrays(30), regular=True)
    reader.close()
    assert open_(damaged).sound_regular_steps() == [10, 20, 30]


def test_an_added_file_is_found(damaged: Path) -> None:
    (damaged / "000000030" / "d" / "zzz").write_bytes(b"x")
    reader = open_(damaged)
    assert reader.sound_regular_steps() == [10, 20]
    assert "was added" in reader.notes[0]


@pytest.mark.parametrize(
    "change,words",
    [
        (
            {"params__w": jax.ShapeDtypeStruct((64, 33), jnp.float32)},
            ["params/w", "float32[64, 32]", "float32[64, 33]"],
        ),
        (
            {"params__w": jax.ShapeDtypeStruct((64, 32), jnp.bfloat16)},
            ["float32[64, 32]", "bfloat16[64, 32]"],
        ),
        ({"extra": jax.ShapeDtypeStruct((), jnp.float32)}, ["extra", "saved absent"]),
    ],
)
def test_another_shape_dtype_or_tree_is_refused(
    change: dict[str, Any], words: list[str], saved: Path
) -> None:
    with pytest.raises(UserError) as error:
        open_(saved).restore(30, target(**change))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_checkpoint_of_another_run_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match="of run run-a, not of run-b"):
        open_(saved, "run-b").restore(30, target())


def test_a_checkpoint_under_the_name_of_another_step_is_put_aside(damaged: Path) -> None:
    """Every byte of it is sound, and another stage of the run may have the same arrays."""
    shutil.rmtree(damaged / "000000030")
    (damaged / "000000020").rename(damaged / "000000030")
    (damaged / "000000020.json").rename(damaged / "000000030.json")
    reader = open_(damaged)
    assert reader.sound_regular_steps() == [10]
    assert "it is the checkpoint of step 20" in " ".join(reader.notes)


def test_the_last_ones_and_the_best_one_stay(tmp_path: Path) -> None:
    writer = Checkpoints(tmp_path / "c", "run-a", keep_last=2)
    for step, best in ((10, 10), (15, 15), (20, 15), (30, 15), (40, 15)):
        writer.save(step, arrays(step), regular=step % 10 == 0)
        writer.wait()
        writer.prune(best)
    assert writer.steps() == [15, 30, 40]
    writer.save(45, arrays(45), regular=False)
    writer.wait()
    writer.prune(45)
    writer.close()
    assert writer.steps() == [30, 40, 45]
    assert open_(tmp_path / "c").sound_regular_steps() == [
        30,
        40,
    ]  # the best alone is no place to resume from


def test_a_failed_save_is_an_error_and_leaves_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Checkpoints(tmp_path / "c", "run-a", keep_last=3)
    writer.save(10, arrays(10), regular=True)
    writer.wait()

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("jaxablate.disk.write_json", full)
        writer.save(20, arrays(20), regular=True)
        with pytest.raises(OSError, match="No space left"):
            writer.wait()
    writer.close()
    assert open_(tmp_path / "c").sound_regular_steps() == [10]
