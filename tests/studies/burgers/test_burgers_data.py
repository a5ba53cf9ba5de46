"""Windows of trajectories: what is in them, in which units, of which files, and what is refused."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from jaxablate.errors import UserError
from jaxablate.studies.burgers.config import BurgersData
from jaxablate.studies.burgers.data import Fields, open_fields, write_pdebench
from jaxablate.task import Source

N, FRAMES, CELLS = 20, 13, 16
GENERATED = BurgersData(
    cells=32, time_stride=3, frames=12, interval=0.02, trajectories=6, held_out=4, rollout=2, eval_windows=8
)
FILES = replace(GENERATED, cells=CELLS, viscosities=(0.01,), eval_windows=6)


def some(seed: int, count: int = N, frames: int = FRAMES, cells: int = CELLS) -> np.ndarray:
    """Smooth fields that know their trajectory, frame and cell."""
    rng = np.random.default_rng(seed)
    x, t = np.arange(cells) / cells, np.arange(frames)[:, None]
    phase = rng.uniform(0, 6, (count, 1, 1))
    return (0.3 + rng.uniform(0.5, 1, (count, 1, 1)) * np.sin(2 * np.pi * x - 0.1 * t + phase)).astype("f4")


def benchmark_file(
    path: Path, tensor: np.ndarray, nu: float | None = 0.01, dt: float = 0.05, **storage
) -> Path:
    """As the document describes a PDEBench file: one time more than there are frames."""
    with h5py.File(path, "w") as file:
        file.create_dataset("tensor", data=tensor, **storage)
        cells = tensor.shape[-1]
        file["x-coordinate"] = ((np.arange(cells) + 0.5) / cells).astype("f4")
        file["t-coordinate"] = (dt * np.arange(tensor.shape[1] + 1)).astype("f4")
        if nu is not None:
            file.attrs["Nu"] = nu
    return path


def converted_file(path: Path, data: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        file["data"] = data[..., None]
    return path


def operator_file(path: Path, x: np.ndarray, y: np.ndarray, visc: float = 0.02) -> Path:
    with h5py.File(path, "w") as file:
        file["x"], file["y"], file["visc"] = x, y, visc
    return path


def opened(data: BurgersData, cache: Path, steps: int = 1) -> Fields:
    return open_fields(data, cache, steps=steps, eval_batch_size=4)


def raw(fields: Fields, index: int) -> np.ndarray:
    """A training window in its own units."""
    return fields.train[index]["u"] * fields.std + fields.mean


def of_benchmark(folder: Path, **changed) -> BurgersData:
    path = benchmark_file(folder / "1D_Burgers_Sols_Nu0.01.hdf5", some(0))
    return replace(FILES, **{"source": "pdebench", "train": str(path), **changed})


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> Fields:
    return opened(GENERATED, tmp_path_factory.mktemp("cache"), steps=2)


# ------------------------------------------------------------------------------------------- windows


def test_a_window_has_its_frames_the_true_time_between_them_and_the_viscosity(generated):
    assert isinstance(generated, Source)
    item = generated.train[0]
    assert item["u"].shape == (3, 32)
    assert {value.dtype for value in item.values()} == {np.dtype(np.float32)}
    assert item["dt"] == np.float32(0.06)
    # 13 frames, every third: 5, of which three make a window that starts at the first, second or third.
    assert len(generated.train) == 2 * 6 * 3
    assert {float(generated.train[i]["viscosity"]) for i in range(36)} == {
        np.float32(0.001), np.float32(0.1)
    }  # fmt: skip
    with pytest.raises(IndexError):
        generated.train[36]


def test_a_hundred_pairs_of_each_trajectory_of_the_benchmark(tmp_path):
    path = benchmark_file(tmp_path / "a_Nu0.01.hdf5", some(0, count=10, frames=201))
    data = replace(FILES, source="pdebench", train=str(path), time_stride=2)
    assert len(opened(data, tmp_path).train) == 9 * 100
    assert len(opened(replace(data, starts="every_frame"), tmp_path).train) == 9 * 199


def test_windows_are_the_frames_of_the_file(tmp_path):
    tensor, data = some(0), of_benchmark(tmp_path)
    fields = opened(data, tmp_path, steps=2)
    np.testing.assert_allclose(raw(fields, 0), tensor[2, [0, 3, 6]], atol=1e-6)  # two of 20 are held out
    np.testing.assert_allclose(raw(fields, 4), tensor[3, [3, 6, 9]], atol=1e-6)
    every = opened(replace(data, starts="every_frame"), tmp_path, steps=2)
    np.testing.assert_allclose(raw(every, 1), tensor[2, [1, 4, 7]], atol=1e-6)


def test_training_fields_and_no_others_have_mean_0_and_deviation_1(tmp_path):
    tensor = some(0)
    tensor[:2] += 5  # those held out
    path = benchmark_file(tmp_path / "a_Nu0.01.hdf5", tensor)
    fields = opened(replace(FILES, source="pdebench", train=str(path)), tmp_path)
    np.testing.assert_allclose([fields.mean, fields.std], [tensor[2:].mean(), tensor[2:].std()], rtol=1e-5)
    shown = np.concatenate([batch["u"] for batch in fields.evaluation])
    assert shown.mean() > 3


def test_strides_take_every_so_many_cells(tmp_path):
    data = of_benchmark(tmp_path, cells=CELLS // 4, space_stride=4)
    fields = opened(data, tmp_path)
    np.testing.assert_allclose(raw(fields, 0), some(0)[2, [0, 3], ::4], atol=1e-6)


def test_windows_open_files_anew_in_other_processes(tmp_path):
    fields = opened(of_benchmark(tmp_path), tmp_path)
    before = fields.train[5]
    packed = pickle.dumps(fields.train)
    assert len(packed) < 2000  # no values travel
    np.testing.assert_array_equal(pickle.loads(packed)[5]["u"], before["u"])


# ---------------------------------------------------------------------------------------- evaluation


def test_the_evaluation_is_fixed_and_has_all_viscosities_alike(generated, tmp_path):
    u, viscosity = (np.concatenate([b[key] for b in generated.evaluation]) for key in ("u", "viscosity"))
    assert u.shape == (8, 3, 32)
    assert [batch["u"].shape[0] for batch in generated.evaluation] == [4, 4]
    assert np.unique(viscosity, return_counts=True)[1].tolist() == [4, 4]
    again = opened(GENERATED, tmp_path, steps=1)
    np.testing.assert_array_equal(u, np.concatenate([b["u"] for b in again.evaluation]))
    assert len(np.unique(u[:, 0], axis=0)) == 8  # without replacement


def test_what_is_held_out_is_not_trained_on(generated):
    seen = {generated.train[i]["u"].tobytes() for i in range(len(generated.train))}
    assert not any(row.tobytes() in seen for batch in generated.evaluation for row in batch["u"])


def test_the_last_batch_may_be_smaller(tmp_path):
    fields = opened(of_benchmark(tmp_path), tmp_path)
    assert [len(batch["u"]) for batch in fields.evaluation] == [4, 2]


def predicted(fields: Fields, **noise: float) -> list[dict]:
    """What a model would give that is off by so much, in standardised units."""
    rng = np.random.default_rng(0)
    rows = []
    for batch in fields.evaluation:
        u = batch["u"]
        row = {name: u[:, 1] + rng.normal(0, off, u[:, 1].shape) for name, off in noise.items()}
        z = u[:, :2].reshape(len(u), 2, 8, -1)
        rows.append({
            **row, "reconstruction": u[:, 1], "rollout": u[:, 1:],
            "latent": {"before": z[:, 0], "after": z[:, 1], "operator": z[:, 1]},
        })  # fmt: skip
    return rows


def test_scores_are_of_fields_in_their_own_units(generated):
    scores = generated.score(predicted(generated, operator=0.0))
    assert scores["nrmse"] == pytest.approx(0, abs=1e-6)
    assert scores["nrmse_reconstruction"] == pytest.approx(0, abs=1e-6)
    assert scores["rollout_nrmse"] == pytest.approx(0, abs=1e-6)
    off = generated.score(predicted(generated, operator=0.1))
    assert off["rmse"] == pytest.approx(0.1 * generated.std, rel=0.1)
    u = (
        np.concatenate([b["u"] for b in generated.evaluation]).astype(np.float64) * generated.std
        + generated.mean
    )
    still = np.linalg.norm(u[:, 1] - u[:, 0], axis=1) / np.linalg.norm(u[:, 1], axis=1)
    assert off["nrmse_persistence"] == pytest.approx(still.mean(), rel=1e-5)


def test_knowing_nothing_scores_as_it_should(generated):
    outputs = predicted(generated, operator=0.0, corrected=0.0)
    knows = generated.score(outputs)
    scores = {name: generated.score(given) for name, given in generated.trivial(outputs).items()}
    assert scores["persistence"]["nrmse"] == pytest.approx(knows["nrmse_persistence"])
    assert scores["persistence"]["rollout_nrmse"] == pytest.approx(knows["rollout_nrmse_persistence"])
    assert scores["zero"]["nrmse"] == pytest.approx(1, rel=1e-5)
    assert scores["mean"]["nrmse"] > 0.3
    assert scores["persistence"]["nrmse"] > 100 * knows["nrmse"]
    assert scores["mean"]["latent_nrmse"] == pytest.approx(1, rel=1e-5)


# ------------------------------------------------------------------------------------- generated data


def test_generated_data_is_made_once(generated, tmp_path, monkeypatch):
    from jaxablate.studies.burgers.data import generator

    first = opened(GENERATED, tmp_path)
    monkeypatch.setattr(generator, "generate", None)
    again = opened(GENERATED, tmp_path)
    assert again.fingerprint == first.fingerprint == generated.fingerprint
    with pytest.raises(TypeError, match="not callable"):  # other data is made anew
        opened(replace(GENERATED, seed=1), tmp_path)


def test_other_data_has_another_fingerprint(generated, tmp_path):
    for changed in ({"seed": 1}, {"interval": 0.03}, {"viscosities": (0.001, 0.2)}):
        assert opened(replace(GENERATED, **changed), tmp_path, steps=2).fingerprint != generated.fingerprint


def test_a_damaged_file_of_the_cache_is_made_again(tmp_path):
    first = opened(GENERATED, tmp_path)
    path = first.train.parts[0].path
    path.write_bytes(path.read_bytes()[:-100])
    again = opened(GENERATED, tmp_path)
    assert again.fingerprint == first.fingerprint


def test_a_generated_file_is_one_of_the_benchmark(generated):
    with h5py.File(generated.train.parts[1].path) as file:
        assert file["tensor"].shape == (6, 13, 32)
        assert file["tensor"].dtype == np.float32
        assert file["x-coordinate"].shape == (32,)
        assert file["t-coordinate"].shape == (14,)
        assert file.attrs["Nu"] == 0.1
        np.testing.assert_allclose(file["t-coordinate"][1], 0.02)


def test_a_coarse_field_is_every_so_many_cells_of_a_fine_one(tmp_path):
    data = replace(GENERATED, viscosities=(0.1,))
    fine = opened(data, tmp_path)
    coarse = opened(replace(data, cells=8, space_stride=4), tmp_path)
    np.testing.assert_allclose(raw(coarse, 3), raw(fine, 3)[:, ::4], atol=1e-5)


# --------------------------------------------------------------------------------------------- layouts


def test_what_is_written_is_read_back(tmp_path):
    tensor, x, t = some(0), np.arange(CELLS) / CELLS, 0.25 * np.arange(FRAMES)
    write_pdebench(
        tmp_path / "own.hdf5", [tensor[:7], tensor[7:]], shape=tensor.shape, x=x, t=t, viscosity=0.4
    )
    fields = opened(replace(FILES, source="pdebench", train=str(tmp_path / "own.hdf5")), tmp_path)
    np.testing.assert_allclose(raw(fields, 0), tensor[2, [0, 3]], atol=1e-6)
    assert fields.train[0]["viscosity"] == np.float32(0.4)
    assert fields.train[0]["dt"] == np.float32(0.75)


@pytest.mark.parametrize(
    "storage", [{}, {"chunks": (1, 5, CELLS)}, {"compression": "gzip"}, {"dtype": ">f4"}, {"dtype": "f8"}]
)
def test_a_file_may_store_its_tensor_in_any_way(tmp_path, storage):
    path = benchmark_file(tmp_path / "a_Nu0.01.hdf5", some(0), **storage)
    fields = opened(replace(FILES, source="pdebench", train=str(path)), tmp_path)
    np.testing.assert_allclose(raw(fields, 4), some(0)[3, [0, 3]], atol=1e-6)
    np.testing.assert_allclose(pickle.loads(pickle.dumps(fields.train))[4]["u"], fields.train[4]["u"])


def test_several_files_may_differ_in_viscosity_and_in_time(tmp_path):
    thin = benchmark_file(tmp_path / "1D_Burgers_Sols_Nu0.001.hdf5", some(0), nu=None)
    thick = benchmark_file(tmp_path / "1D_Burgers_Sols_Nu4.0.hdf5", some(1), nu=4.0, dt=0.01)
    for named in (f"{thin}, {thick}", str(tmp_path)):
        fields = opened(replace(FILES, source="pdebench", train=named), tmp_path / "cache")
        assert fields.viscosities == (0.001, 4.0)
        assert {(float(w["viscosity"]), float(w["dt"])) for w in map(fields.train.__getitem__, (0, -1 + 144))} == {
            (np.float32(0.001), np.float32(0.15)), (4.0, np.float32(0.03))
        }  # fmt: skip


def test_the_converted_layout_whole_or_in_shards(tmp_path):
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    for folder in (whole, sharded):
        folder.mkdir()
        converted_file(folder / "burgers1d_val.h5", some(1))
        converted_file(folder / "burgers1d_test.h5", some(2))  # is nobody's business
    converted_file(whole / "burgers1d_train.h5", some(0))
    for number in range(4):
        converted_file(sharded / f"burgers1d_train_{number:03}.h5", some(0)[5 * number : 5 * number + 5])
    data = replace(FILES, source="converted")
    one, many = (
        opened(replace(data, train=str(folder), val=str(folder)), tmp_path / "cache")
        for folder in (whole, sharded)
    )
    assert len(one.train) == len(many.train) == N * 4
    assert (one.mean, one.std) == pytest.approx((many.mean, many.std))
    for index in (0, 23, 79):
        np.testing.assert_allclose(raw(one, index), raw(many, index), atol=1e-6)
        np.testing.assert_allclose(
            raw(one, index), some(0)[index // 4, [index % 4 * 3, index % 4 * 3 + 3]], atol=1e-6
        )
    assert one.train[0]["viscosity"] == np.float32(0.01)
    assert one.train[0]["dt"] == np.float32(0.06)  # data.interval, as the files do not say
    by_name = replace(data, train=str(whole / "burgers1d_train.h5"), val=str(whole / "burgers1d_val.h5"))
    assert opened(by_name, tmp_path / "cache").fingerprint == one.fingerprint


@pytest.mark.parametrize("begins_with_input", ["with", "without"])
def test_the_small_operator_layout(tmp_path, begins_with_input):
    train, val = some(0, frames=18), some(1, count=10, frames=18)
    first = 0 if begins_with_input == "with" else 1
    paths = [
        operator_file(tmp_path / f"{name}.h5", rows[:, 0], rows[:, first : first + 17])
        for name, rows in (("train", train), ("test", val))
    ]
    data = replace(
        FILES, source="operator", train=str(paths[0]), val=str(paths[1]), time_stride=1, interval=1 / 16
    )
    fields = opened(data, tmp_path)
    assert len(fields.train) == N * (16 if begins_with_input == "with" else 17)
    np.testing.assert_allclose(raw(fields, 1), train[0, 1:3], atol=1e-6)
    assert fields.train[0]["viscosity"] == np.float32(0.02)
    assert fields.train[0]["dt"] == np.float32(1 / 16)


def test_a_huge_file_is_not_read_to_open_a_window(tmp_path):
    """Of a sparse file with a terabyte of zeros only the headers and the frames of a window are looked at."""
    from jaxablate.studies.burgers.data.pdebench import contents
    from jaxablate.studies.burgers.data.trajectories import Trajectories

    path = tmp_path / "1D_Burgers_Sols_Nu0.01.hdf5"
    with h5py.File(path, "w") as file:
        tensor = file.create_dataset("tensor", (1_200_000, 201, 1024), "f4")
        tensor[-1, -1] = 7.0
        file["x-coordinate"], file["t-coordinate"] = np.arange(1024.0), 0.01 * np.arange(202)
    found = contents(path, "pdebench", "data.train")
    assert found.shape == (1_200_000, 201, 1024)
    part = Trajectories(path, "pdebench", 0, found.shape[0], 201, 4, 0.01, 0.01)
    np.testing.assert_array_equal(part.read(1_199_999, slice(190, 201, 10))[:, 0], [0.0, 7.0])


# ------------------------------------------------------------------------------------------- bad input


def broken(folder: Path, change) -> BurgersData:
    path = benchmark_file(folder / "1D_Burgers_Sols_Nu0.01.hdf5", some(0))
    with h5py.File(path, "a") as file:
        change(file)
    return replace(FILES, source="pdebench", train=str(path))


def renamed(file: h5py.File) -> None:
    file.move("tensor", "u")


def with_rank_4(file: h5py.File) -> None:
    del file["tensor"]
    file["tensor"] = some(0)[..., None]


def with_nan(file: h5py.File) -> None:
    file["tensor"][13, 7, 5] = np.nan


def of_integers(file: h5py.File) -> None:
    del file["tensor"]
    file["tensor"] = np.ones((N, FRAMES, CELLS), int)


def with_short_x(file: h5py.File) -> None:
    del file["x-coordinate"]
    file["x-coordinate"] = np.arange(CELLS - 1.0)


def with_uneven_t(file: h5py.File) -> None:
    file["t-coordinate"][3] += 0.02


def with_another_nu(file: h5py.File) -> None:
    file.attrs["Nu"] = 0.1


def with_no_number(file: h5py.File) -> None:
    file.attrs["Nu"] = "thin"


def with_constant_fields(file: h5py.File) -> None:
    file["tensor"][2:] = 3.0


def with_the_same_twice(file: h5py.File) -> None:
    file["tensor"][1] = file["tensor"][9]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (renamed, r"has no dataset `tensor`, only t-coordinate, u, x-coordinate"),
        (with_rank_4, r"`tensor` has shape \(20, 13, 16, 1\), and data.source=pdebench needs \(N, T, X\)"),
        (with_nan, r"Nu0.01.hdf5: trajectory 13 is nan in frame 7, cell 5"),
        (of_integers, r"`tensor` has type int64"),
        (with_short_x, r"`x-coordinate` has 15 entries and not 16"),
        (with_uneven_t, r"`t-coordinate` does not rise in equal steps"),
        (with_another_nu, r"attribute `Nu` says 0.1 and file name says 0.01"),
        (with_no_number, r"attribute `Nu` is 'thin'; write one number"),
        (with_constant_fields, r"all fields are 3 everywhere"),
        (with_the_same_twice, r"trajectory 1 \(1 in all\) is in data.train too"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, change, says):
    with pytest.raises(UserError, match=says) as error:
        opened(broken(tmp_path, change), tmp_path)
    assert "\n" not in str(error.value)


def test_a_good_file_is_not_refused(tmp_path):
    assert opened(broken(tmp_path, lambda file: None), tmp_path).train


def test_a_file_whose_viscosity_nobody_says_is_refused(tmp_path):
    path = benchmark_file(tmp_path / "fields.hdf5", some(0), nu=None)
    data = replace(FILES, source="pdebench", train=str(path), viscosities=(0.001, 0.1))
    with pytest.raises(UserError, match=r"does not say its viscosity, and data.viscosities=\(0.001, 0.1\)"):
        opened(data, tmp_path)
    assert opened(replace(data, viscosities=(0.1,)), tmp_path).viscosities == (0.1,)


@pytest.mark.parametrize("damage", ["missing", "torn", "text", "torn inside"])
def test_a_missing_or_torn_file_is_refused(tmp_path, damage):
    data = of_benchmark(tmp_path)
    path = Path(data.train)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        path.write_text("no numbers")
    else:
        benchmark_file(path, some(0), compression="gzip", chunks=(1, FRAMES, CELLS))
        with h5py.File(path) as file:
            place = file["tensor"].id.get_chunk_info(11).byte_offset
        content = path.read_bytes()
        path.write_bytes(content[:place] + bytes(64) + content[place + 64 :])
    with pytest.raises(UserError, match=r"no such file|is no whole HDF5 file|cannot be read"):
        opened(data, tmp_path)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"cells": 8}, r"data.cells=8: .*set data.cells=16"),
        ({"space_stride": 4}, r"set data.cells=4"),
        ({"space_stride": 3, "cells": 5}, r"use a data.space_stride that divides them"),
        ({"rollout": 5}, r"data.time_stride=3: 5 steps need 16 frames, and .* has 13"),
        ({"train": ""}, r"data.train is empty"),
        ({"source": "converted"}, r"data.val is empty"),
        (
            {"eval_windows": 7},
            r"data.eval_windows=7: makes 7 of viscosity 0.01, of which data.val has 6; use 6",
        ),
        ({"time_stride": 0}, r"data.time_stride=0: must be 1 or more"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, changed, says):
    with pytest.raises(UserError, match=says):
        opened(of_benchmark(tmp_path, **changed), tmp_path)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"train": "some.hdf5"}, r"data.train='some.hdf5': is not read by data.source=generated"),
        ({"rollout": 5}, r"data.frames=12: must be 15 or more"),
        ({"viscosities": (0.1, float("inf"))}, r"data.viscosities"),
        ({"interval": float("inf")}, r"data.interval"),
        ({"viscosities": (1e6,)}, r"data.viscosities=\(1000000.0,\): 1e\+06 takes .* steps a frame"),
        ({"eval_windows": 7}, r"data.eval_windows=7: must be a multiple of 2"),
    ],
)
def test_data_that_cannot_be_generated_is_refused(tmp_path, changed, says):
    with pytest.raises(UserError, match=says):
        opened(replace(GENERATED, **changed), tmp_path)


def test_of_several_viscosities_in_files_equally_many_windows_are_evaluated(tmp_path):
    for number, nu in enumerate((0.01, 0.1)):
        benchmark_file(tmp_path / f"a_Nu{nu}.hdf5", some(number), nu=nu)
    data = replace(FILES, source="pdebench", train=str(tmp_path))
    assert opened(data, tmp_path / "cache").viscosities == (0.01, 0.1)
    with pytest.raises(UserError, match=r"data.eval_windows=7: is no multiple of the 2 viscosities"):
        opened(replace(data, eval_windows=7), tmp_path / "cache")


def test_training_data_may_not_be_held_out_too(tmp_path):
    data = of_benchmark(tmp_path)
    copy = benchmark_file(tmp_path / "copy_Nu0.01.hdf5", some(0))
    for val in (data.train, str(copy)):
        with pytest.raises(UserError, match=r"is in data.train too"):
            opened(replace(data, val=val), tmp_path)
    other = benchmark_file(tmp_path / "other_Nu0.01.hdf5", some(1))
    assert opened(replace(data, val=str(other)), tmp_path).val
    with pytest.raises(UserError, match=r"names .* twice"):
        opened(replace(data, train=f"{data.train},{data.train}"), tmp_path)


def test_too_few_trajectories_to_hold_one_out(tmp_path):
    path = benchmark_file(tmp_path / "a_Nu0.01.hdf5", some(0, count=9))
    with pytest.raises(UserError, match="has 9 trajectories, of which one in 10 is held out"):
        opened(replace(FILES, source="pdebench", train=str(path)), tmp_path)


def test_shards_must_be_whole_and_one_thing(tmp_path):
    converted_file(tmp_path / "burgers1d_val.h5", some(1))
    for number in (0, 1, 3):
        converted_file(tmp_path / f"burgers1d_train_{number:03}.h5", some(number))
    data = replace(FILES, source="converted", train=str(tmp_path), val=str(tmp_path))
    with pytest.raises(UserError, match="shard 2 of 3 is missing"):
        opened(data, tmp_path / "cache")
    converted_file(tmp_path / "burgers1d_train.h5", some(0))
    with pytest.raises(UserError, match=r"has both burgers1d_train.h5 and burgers1d_train_000.h5"):
        opened(data, tmp_path / "cache")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"the folder has no burgers1d_train.h5"):
        opened(replace(data, train=str(empty)), tmp_path / "cache")


def test_an_operator_file_must_fit_together(tmp_path):
    path = operator_file(tmp_path / "a.h5", some(0)[:, 0, :-1], some(0))
    with pytest.raises(UserError, match=r"`x` \(20, 15\) does not fit `y` \(20, 13, 16\)"):
        opened(replace(FILES, source="operator", train=str(path), val=str(path)), tmp_path)


def test_a_file_that_changes_is_looked_through_again(tmp_path):
    data = of_benchmark(tmp_path)
    first = opened(data, tmp_path)
    benchmark_file(Path(data.train), some(5))
    assert opened(data, tmp_path).fingerprint != first.fingerprint
