"""Scores of fields and tokens: the specification's golden values, and what each of them must tell apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxablate.studies.burgers import metrics

P = np.array([[1, 2, 3, 4], [0, -1, 1, 0.5]])
U = np.array([[1.5, 2, 2, 4], [0.5, -1, 0.5, 1]])


def fields(samples: int = 6, cells: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((samples, cells))


# ------------------------------------------------------------------------------------- golden values


def test_golden_physical_errors():
    found = metrics.pdebench(P, U)
    assert found["nrmse"] == pytest.approx(0.382970, rel=1e-5)
    assert found["crmse"] == pytest.approx(0.125)
    assert found["brmse"] == pytest.approx(0.426777, rel=1e-5)
    assert found["rmse"] == pytest.approx((math.sqrt(1.25 / 4) + math.sqrt(0.75 / 4)) / 2)
    assert found["maximum"] == 1.0
    assert metrics.spectral_error(P, U) == pytest.approx([0.125, 0.330719, 0.125], rel=1e-5)


def test_golden_latent_errors():
    found = metrics.latent(P, U)
    assert found["mse"] == 0.25
    assert found["mae"] == 0.375
    assert found["nrmse"] == pytest.approx(0.263752, rel=1e-5)
    assert metrics.conservation_gap(P, U) == 0.5
    assert metrics.boundary_violation(P, U) == 0.375
    assert metrics.negativity(P) == 0.125


def test_the_two_relative_errors_are_not_the_same():
    """Upstream's is of all elements together, PDEBench's of each sample: arms cannot be compared across them."""
    assert metrics.latent(P, U)["nrmse"] != pytest.approx(metrics.pdebench(P, U)["nrmse"], rel=0.1)


# ---------------------------------------------------------------------------------------- properties


def test_errors_are_of_each_time_then_averaged():
    p, u = np.stack([P, 3 * P], axis=1), np.stack([U, U], axis=1)
    together = metrics.pdebench(p, u)
    apart = [metrics.pdebench(p[:, t], u[:, t]) for t in range(2)]
    for name in metrics.PHYSICAL:
        if name in together:
            assert together[name] == pytest.approx(np.mean([one[name] for one in apart])), name
    assert together["crmse"] != pytest.approx(metrics.pdebench(p.reshape(4, 4), u.reshape(4, 4))["crmse"])


def test_bands_cover_the_spectrum_once():
    spectrum = np.arange(33.0)
    assert np.concatenate(list(metrics.in_bands(spectrum).values())).tolist() == spectrum.tolist()


@given(st.integers(3, 40), st.integers(0, 100))
@settings(max_examples=20)
def test_the_spectral_error_holds_the_whole_error(cells, seed):
    """Parseval: with each wave number but the outer ones twice, squares add up to the mean squared error."""
    p, u = fields(3, cells, seed), fields(3, cells, seed + 1000)
    squares = metrics.spectral_error(p, u) ** 2
    twice = np.full(len(squares), 2.0)
    twice[0] = 1
    if cells % 2 == 0:
        twice[-1] = 1
    assert np.sum(twice * squares) == pytest.approx(np.mean((p - u) ** 2))
    assert np.sum(squares) < 0.999 * np.mean((p - u) ** 2)  # the negative wave numbers count


@pytest.mark.parametrize(
    ("wave", "band"), [(0, "low"), (3, "low"), (4, "middle"), (11, "middle"), (12, "high")]
)
def test_an_error_of_one_wave_number_is_in_its_band_alone(wave, band):
    u = fields()
    error = np.cos(2 * np.pi * wave * np.arange(64) / 64)
    found = metrics.pdebench(u + error, u)
    bands = {name: found[f"frmse_{name}"] for name in metrics.BANDS}
    assert bands.pop(band) > 1e-3
    assert max(bands.values()) < 1e-12


def test_a_coarse_grid_has_no_error_in_bands_that_it_cannot_hold():
    found = metrics.pdebench(fields(cells=8), fields(cells=8, seed=1))
    assert "frmse_middle" in found
    assert "frmse_high" not in found


def test_fields_of_zeros_are_left_out_of_nrmse_and_counted():
    u = U.copy()
    u[1] = 0
    found = metrics.pdebench(P, u)
    assert found["zero_norm"] == 1
    assert found["nrmse"] == pytest.approx(metrics.pdebench(P[:1], U[:1])["nrmse"])
    assert metrics.pdebench(P, U)["zero_norm"] == 0
    assert math.isnan(metrics.pdebench(P, 0 * U)["nrmse"])


def test_a_latent_truth_of_zeros_gives_a_huge_finite_value():
    assert 1e7 < metrics.latent(P, 0 * U)["nrmse"] < math.inf


def test_gaps_of_two_signs_do_not_cancel():
    u = fields()
    shift = np.array([1.0, -1.0] * 3)[:, None] / 64
    assert metrics.conservation_gap(u + shift, u) == pytest.approx(1.0)
    assert abs(np.sum((u + shift) - u)) < 1e-9
    assert metrics.conservation_gap(np.roll(u, 5, axis=1), u) == pytest.approx(0, abs=1e-12)


def test_a_wrong_cell_in_the_middle_is_no_boundary_error():
    u = fields()
    wrong = u.copy()
    wrong[:, 30] += 1
    assert metrics.boundary_violation(wrong, u) == metrics.pdebench(wrong, u)["brmse"] == 0
    wrong[:, -1] += 1
    assert metrics.boundary_violation(wrong, u) == pytest.approx(0.5)
    assert metrics.pdebench(wrong, u)["brmse"] == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("score", [metrics.pdebench, metrics.latent, metrics.conservation_gap])
def test_an_empty_or_mismatched_set_is_an_error(score):
    with pytest.raises(ValueError, match="expected two alike"):
        score(np.zeros((0, 4)), np.zeros((0, 4)))
    with pytest.raises(ValueError, match="expected two alike"):
        score(P, U[:1])


# ------------------------------------------------------------------------------- a whole evaluation

MEAN, STD = 0.5, 2.0
STEPS = 3


def windows(sizes=(4, 2), cells: int = 32, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Fields that drift, standardised, half of each viscosity."""
    rng = np.random.default_rng(seed)
    made = []
    for size in sizes:
        start = rng.standard_normal((size, 1, cells))
        drift = 0.3 * rng.standard_normal((size, 1, cells)) * np.arange(1 + STEPS)[None, :, None]
        made.append(
            {
                "u": (start + drift).astype(np.float32),
                "viscosity": np.resize([0.001, 0.1], size).astype(np.float32),
                "dt": np.full(size, 0.1, np.float32),
            }
        )
    return made


def outputs_of(batches, error: float = 0.1, seed: int = 1, **parts) -> list[dict[str, object]]:
    """A model that is off by `error` times noise; `parts` of `operator=factor` and so on."""
    rng = np.random.default_rng(seed)
    found = []
    for batch in batches:
        u = batch["u"]
        noise = rng.standard_normal(u[:, 1].shape)
        fields = {name: u[:, 1] + error * factor * noise for name, factor in parts.items()}
        before, after = (np.stack([u[:, i], -u[:, i]], axis=-1) for i in (0, 1))
        found.append(
            {
                **fields,
                "reconstruction": u[:, 1] + 0.01 * noise,
                "rollout": u[:, 1:] + error * rng.standard_normal(u[:, 1:].shape),
                "latent": {"before": before, "after": after, "operator": after + error},
            }
        )
    return found


def test_scores_are_in_the_fields_own_unit():
    batches = windows()
    found = metrics.evaluate(outputs_of(batches, operator=1.0), batches, MEAN, STD)
    truth = MEAN + STD * np.concatenate([batch["u"] for batch in batches]).astype(np.float64)
    outputs = outputs_of(batches, operator=1.0)
    own = MEAN + STD * np.concatenate([output["operator"] for output in outputs])
    by_hand = metrics.pdebench(own, truth[:, 1])
    assert {name: found[name] for name in by_hand} == pytest.approx(by_hand)
    standardised = metrics.evaluate(outputs, batches, 0.0, 1.0)
    assert found["rmse"] == pytest.approx(STD * standardised["rmse"])
    assert found["nrmse"] != pytest.approx(standardised["nrmse"], rel=1e-3)


@pytest.mark.parametrize(
    ("parts", "primary"),
    [
        ({"operator": 1.0}, "operator"),
        ({"operator": 1.0, "corrected": 2.0}, "corrected"),
        ({"operator": 1.0, "corrected": 2.0, "conditioned": 3.0}, "conditioned"),
    ],
)
def test_the_primary_is_the_last_prediction_that_there_is(parts, primary):
    """Also where it is the worse one: a run answers for what it declares, not for what came out best."""
    found = metrics.evaluate(outputs_of(windows(), **parts), windows(), MEAN, STD)
    assert found["nrmse"] == found[f"nrmse_{primary}"]
    assert len({found[f"nrmse_{name}"] for name in parts}) == len(parts)
    assert {name for name in metrics.PREDICTIONS if f"nrmse_{name}" in found} == set(parts)


def test_persistence_and_the_floor_stand_beside_every_score():
    batches = windows()
    found = metrics.evaluate(outputs_of(batches, operator=1.0), batches, MEAN, STD)
    truth = MEAN + STD * np.concatenate([batch["u"] for batch in batches]).astype(np.float64)
    assert found["nrmse_persistence"] == pytest.approx(
        metrics.pdebench(truth[:, 0], truth[:, 1])["nrmse"], rel=1e-9
    )
    assert found["nrmse_reconstruction"] < found["nrmse"] < found["nrmse_persistence"]
    assert found["rollout_nrmse"] < found["rollout_nrmse_persistence"]
    assert found["latent_nrmse"] < found["latent_nrmse_persistence"]


def test_every_score_of_fields_stands_beside_doing_nothing_and_the_floor():
    """Of one step, of a roll-out and of each viscosity; and what stands there is the score of just that."""
    batches = windows()
    found = metrics.evaluate(outputs_of(batches, operator=1.0), batches, MEAN, STD)
    truth = MEAN + STD * np.concatenate([batch["u"] for batch in batches]).astype(np.float64)
    before, after, later = truth[:, 0], truth[:, 1], truth[:, 1:]
    outputs = outputs_of(batches, operator=1.0)
    floor, rollout = (
        MEAN + STD * np.concatenate([output[name] for output in outputs])
        for name in ("reconstruction", "rollout")
    )
    thin = np.concatenate([batch["viscosity"] for batch in batches]) < 0.01
    wanted = {
        **{f"{k}_persistence": v for k, v in metrics.pdebench(before, after).items()},
        **{f"{k}_reconstruction": v for k, v in metrics.pdebench(floor, after).items()},
        **{f"rollout_{k}": v for k, v in metrics.pdebench(rollout, later).items()},
        **{
            f"rollout_{k}_persistence": v
            for k, v in metrics.pdebench(before[:, None] + 0 * later, later).items()
        },
        "nrmse_reconstruction_nu_0p001": metrics.pdebench(floor[thin], after[thin])["nrmse"],
        "rollout_nrmse_nu_0p001": metrics.pdebench(rollout[thin], later[thin])["nrmse"],
        "boundary_violation_persistence": metrics.boundary_violation(before, after),
        "conservation_gap_reconstruction": metrics.conservation_gap(floor, before) / 32,
    }
    wanted = {name: value for name, value in wanted.items() if "zero_norm" not in name}
    assert {name: found.get(name) for name in wanted} == pytest.approx(wanted)
    assert found["conservation_gap_persistence"] == 0  # what does not move keeps its mass
    assert set(metrics.BESIDE.values()) <= set(found)
    assert found["rollout_nrmse_nu_0p001"] != found["rollout_nrmse_nu_0p1"]


def test_doing_nothing_scores_exactly_as_persistence():
    batches = windows()
    still = [
        {
            "operator": batch["u"][:, 0],
            "rollout": np.repeat(batch["u"][:, :1], STEPS, axis=1),
            "latent": {name: batch["u"][:, i] for name, i in (("before", 0), ("after", 1), ("operator", 0))},
        }
        for batch in batches
    ]
    found = metrics.evaluate(still, batches, MEAN, STD)
    there = {name: beside for name, beside in metrics.BESIDE.items() if name in found}
    there |= {"latent_nrmse": "latent_nrmse_persistence", "nrmse_nu_0p001": "nrmse_persistence_nu_0p001"}
    assert {"nrmse", "crmse", "frmse_high", "rollout_nrmse", "nrmse_operator", "boundary_violation"} <= set(
        there
    )
    assert {name: found[name] for name in there} == {name: found[beside] for name, beside in there.items()}
    assert found["conservation_gap"] == 0


def test_each_viscosity_has_its_own_score():
    batches = windows()
    outputs = outputs_of(batches, operator=0.0)
    for batch, output in zip(batches, outputs, strict=True):
        output["operator"] = output["operator"] + (batch["viscosity"] > 0.01)[:, None]
    found = metrics.evaluate(outputs, batches, MEAN, STD)
    assert found["nrmse_nu_0p001"] < 1e-6 < found["nrmse_nu_0p1"]
    assert found["nrmse_persistence_nu_0p001"] > 0.01


def test_samples_are_pairs_not_numbers():
    assert metrics.evaluate(outputs_of(windows(), operator=1.0), windows(), MEAN, STD)["samples"] == 6


def test_scores_do_not_depend_on_how_windows_are_batched():
    one = windows((6,))
    two = [{key: value[part] for key, value in one[0].items()} for part in (slice(4), slice(4, 6))]
    whole = outputs_of(one, operator=1.0)

    def cut(value, part):
        return {k: cut(v, part) for k, v in value.items()} if isinstance(value, dict) else value[part]

    apart = [cut(whole[0], part) for part in (slice(4), slice(4, 6))]
    found = metrics.evaluate(apart, two, MEAN, STD)
    assert found == pytest.approx(metrics.evaluate(whole, one, MEAN, STD), rel=1e-12)


def test_a_stage_without_predictions_has_no_primary():
    batches = windows()
    outputs = [{"reconstruction": batch["u"][:, 1]} for batch in batches]
    found = metrics.evaluate(outputs, batches, MEAN, STD)
    assert "nrmse" not in found
    assert found["nrmse_reconstruction"] == pytest.approx(0, abs=1e-12)


def test_where_nothing_decodes_the_tokens_the_scores_are_theirs():
    batches = windows()
    outputs = [{"latent": output["latent"]} for output in outputs_of(batches)]
    found = metrics.evaluate(outputs, batches, MEAN, STD)
    assert found["nrmse"] == found["latent_nrmse"]
    assert found["nrmse_persistence"] == found["latent_nrmse_persistence"]
    assert not {"rmse", "rmse_persistence", "mse_persistence"} & set(
        found
    )  # of fields, which cannot be compared
    for output in outputs:
        output["latent"]["corrected"] = 2 * output["latent"]["operator"]
    found = metrics.evaluate(outputs, batches, MEAN, STD)
    assert found["nrmse"] == found["latent_nrmse_corrected"] != found["latent_nrmse"]


def test_the_published_sums_and_signs_are_of_tokens_against_those_of_the_steps_end():
    """The document's worked example, as the last prediction of two tokens of two channels, beside doing nothing."""
    p, z = P.reshape(2, 2, 2), U.reshape(2, 2, 2)
    outputs = [{"latent": {"before": z + 1, "after": z, "operator": z - 9, "corrected": p}}]
    found = metrics.evaluate(outputs, windows((2,)), MEAN, STD)
    assert found["latent_conservation_gap"] == 0.5
    assert found["latent_boundary_violation"] == 0.375
    assert found["latent_negativity"] == 0.125
    assert found["latent_conservation_gap_persistence"] == 4.0
    assert found["latent_boundary_violation_persistence"] == 1.0


def test_a_field_that_is_zero_in_its_own_unit_is_left_out():
    """Standardising and back leaves single precision's dust on it, which must not become a huge ratio."""
    batches = windows((4,))
    batches[0]["u"][0] = np.float32(-MEAN / STD)
    batches[0]["u"][0, 0] += 1
    found = metrics.evaluate(outputs_of(batches, operator=1.0), batches, MEAN, STD)
    assert found["zero_norm"] == 1
    assert found["nrmse"] < 1


def test_a_lost_model_scores_nan_and_not_well():
    batches = windows()
    outputs = outputs_of(batches, operator=1.0)
    outputs[0]["operator"] = np.full_like(outputs[0]["operator"], np.nan)
    found = metrics.evaluate(outputs, batches, MEAN, STD)
    assert math.isnan(found["nrmse"])
    assert found["nrmse_persistence"] > 0


def test_every_score_with_a_direction_is_an_error():
    batches = windows()
    outputs = outputs_of(batches, operator=1.0, corrected=1.0, conditioned=1.0)
    for output in outputs:
        output["latent"] |= dict.fromkeys(("corrected", "conditioned"), output["latent"]["operator"])
    found = metrics.evaluate(outputs, batches, MEAN, STD)
    assert set(metrics.LOWER_IS_BETTER) <= set(found)
    perfect = [
        {
            **dict.fromkeys((*metrics.PREDICTIONS, "reconstruction"), batch["u"][:, 1]),
            "rollout": batch["u"][:, 1:],
            "latent": dict.fromkeys(("before", "after", *metrics.PREDICTIONS), batch["u"][:, 1]),
        }
        for batch in batches
    ]
    best = metrics.evaluate(perfect, batches, MEAN, STD)
    gaps = {"conservation_gap", "conservation_gap_reconstruction"}  # these fields have gaps of their own
    zero = set(metrics.LOWER_IS_BETTER) - gaps
    assert {best[name] for name in zero} == {0.0}
    assert "negativity" not in metrics.LOWER_IS_BETTER


def test_outputs_must_be_of_all_batches():
    with pytest.raises(ValueError, match="1 outputs for 2"):
        metrics.evaluate(outputs_of(windows())[:1], windows(), MEAN, STD)


def test_examples_are_the_first_of_each_viscosity():
    batches = windows((4, 2))
    found = metrics.kept(outputs_of(batches, operator=1.0), batches, MEAN, STD, of_each=1)
    assert found["viscosity"] == pytest.approx([0.001, 0.1])
    assert found["truth"].shape == found["prediction"].shape == (2, 1 + STEPS, 32)
    assert found["truth"] == pytest.approx(MEAN + STD * batches[0]["u"][:2], rel=1e-5)
    assert np.array_equal(found["truth"][:, 0], found["prediction"][:, 0])
    assert not np.array_equal(found["truth"][:, 1], found["prediction"][:, 1])
    assert found["t"][0] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert found["x"][[0, -1]] == pytest.approx([0.5 / 32, 1 - 0.5 / 32])
    assert (found["mean"], found["std"]) == (MEAN, STD)
    assert metrics.kept([{"latent": {}}], batches[:1], MEAN, STD) == {"mean": MEAN, "std": STD}


def test_viscosities_in_names():
    assert [metrics.slug(x) for x in (0.001, float(np.float32(0.1)), 4.0, 1e-5)] == [
        "0p001",
        "0p1",
        "4",
        "1em05",
    ]
