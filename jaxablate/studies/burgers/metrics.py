"""Scores of predicted fields and tokens (specification §5), in float64 on the host.

The physical ones are those of PDEBench (Takamoto et al. 2022, arXiv 2210.07182) as its
`models/metrics.py` computes them: of each time by itself, then the mean over times. The latent ones are upstream's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

PREDICTIONS = ("operator", "corrected", "conditioned")  # the last one that a run has is its own best claim
BANDS = {"low": (0, 4), "middle": (4, 12), "high": (12, None)}  # wave numbers, as PDEBench cuts them
PHYSICAL = ("rmse", "nrmse", "crmse", "maximum", "brmse", *(f"frmse_{band}" for band in BANDS))
LATENT = ("mse", "mae", "rmse", "nrmse")
LAWS = ("conservation_gap", "boundary_violation")
KNOWN = (
    "persistence",
    "reconstruction",
)  # what stands beside: doing nothing, and the floor of encoder and decoder
ROLLOUT = tuple(f"rollout_{name}" for name in PHYSICAL)
# Not `negativity`: a field of Burgers has a sign, and less of it is not better.
LOWER_IS_BETTER = (
    *PHYSICAL,
    *ROLLOUT,
    *LAWS,
    *(f"{name}_{of}" for name in ("nrmse", "mse") for of in PREDICTIONS),
    *(f"{name}_reconstruction" for name in ("mse", *PHYSICAL, *LAWS)),
    *(f"latent_{name}" for name in (*LATENT, *LAWS)),
    *(f"latent_{name}_{of}" for name in ("nrmse", "mse") for of in PREDICTIONS[1:]),
)
# Score -> what doing nothing scores there.
BESIDE = {
    **{name: f"{name}_persistence" for name in (*PHYSICAL, *ROLLOUT, *LAWS)},
    **{f"latent_{name}": f"latent_{name}_persistence" for name in (*LATENT, *LAWS)},
    **{f"{name}_{of}": f"{name}_persistence" for name in ("nrmse", "mse") for of in PREDICTIONS},
}
_TINY = 1e-8  # upstream's, in the denominator of its latent nrmse
_NOTHING = 1e-6  # of the fields' size: what single precision leaves of a field of zeros


def _pair(prediction: ArrayLike, truth: ArrayLike) -> tuple[Floats, Floats]:
    p, u = np.asarray(prediction, np.float64), np.asarray(truth, np.float64)
    if p.shape != u.shape or not p.size:
        raise ValueError(f"prediction {p.shape}, truth {u.shape}: expected two alike, with something in them")
    return p, u


# ---------------------------------------------------------------------------------------- physical


def pdebench(prediction: ArrayLike, truth: ArrayLike, *, zero: float = 0.0) -> dict[str, float]:
    """PDEBench's errors of fields (samples, cells), or (samples, times, cells), in the fields' own unit.

    With e = prediction - truth, n cells, and a mean over times of each:
      rmse: mean over samples of sqrt(mean_x e^2).
      nrmse: mean over samples of sqrt(mean_x e^2) / sqrt(mean_x truth^2), without those whose truth is zero.
      crmse: sqrt(mean over samples of (sum_x e)^2) / n, of what Burgers conserves.
      maximum: the largest |e|.
      brmse: mean over samples of sqrt((e_0^2 + e_{n-1}^2) / 2), at the boundary.
      frmse_low, _middle, _high: means over the wave numbers of `BANDS` of `spectral_error`; a grid too coarse
        for a band has no such error.
      zero_norm: how many fields were left out of nrmse; if all were, that is NaN.

    Args:
      zero: root mean square up to which a true field counts as zero.
    """
    p, u = _pair(prediction, truth)
    if p.ndim == 2:
        p, u = p[:, None], u[:, None]
    if p.ndim != 3:
        raise ValueError(f"fields {p.shape}: expected (samples, cells) or (samples, times, cells)")
    e = p - u
    rmse, norm = _root_mean_square(e), _root_mean_square(u)  # (samples, times)
    spectrum = spectral_error(p, u).mean(axis=0)
    found = {
        "rmse": rmse.mean(),
        "nrmse": _mean_of_ratios(rmse, norm, norm > zero),
        "crmse": np.sqrt(np.mean(e.sum(axis=-1) ** 2, axis=0)).mean() / e.shape[-1],
        "maximum": np.abs(e).max(axis=(0, 2)).mean(),
        "brmse": np.sqrt((e[..., 0] ** 2 + e[..., -1] ** 2) / 2).mean(),
        **{f"frmse_{band}": part.mean() for band, part in in_bands(spectrum).items()},
        "zero_norm": np.sum(norm <= zero),
    }
    return {name: float(value) for name, value in found.items()}


def spectral_error(prediction: ArrayLike, truth: ArrayLike) -> Floats:
    """sqrt(mean over samples of |rfft(e)_k|^2) / n for each wave number k: (…, n // 2 + 1) of (samples, …, n)."""
    p, u = _pair(prediction, truth)
    return np.sqrt(np.mean(np.abs(np.fft.rfft(p - u)) ** 2, axis=0)) / p.shape[-1]


def in_bands(spectrum: Floats) -> dict[str, Floats]:
    """The parts of (wave numbers,) that lie in each of `BANDS`; none for a band that it does not reach."""
    parts = {band: spectrum[first:end] for band, (first, end) in BANDS.items()}
    return {band: part for band, part in parts.items() if part.size}


def _root_mean_square(x: Floats) -> Floats:
    return np.sqrt(np.mean(x**2, axis=-1))


def _mean_of_ratios(error: Floats, norm: Floats, counts: NDArray[np.bool_]) -> np.floating[Any]:
    """Mean over the samples that count, then over the times at which any does; NaN if there are none."""
    if not counts.any():
        return np.float64(np.nan)
    ratio = np.where(counts, error / np.where(counts, norm, 1.0), 0.0)
    there = counts.any(axis=0)
    return (ratio.sum(axis=0)[there] / counts.sum(axis=0)[there]).mean()


# ------------------------------------------------------------------------------ latent, as published


def latent(prediction: ArrayLike, truth: ArrayLike) -> dict[str, float]:
    """Upstream's errors over all elements: mse, mae, rmse, and nrmse = rmse / (sqrt(mean truth^2) + 1e-8).

    Its rel_l2 is the same number as its nrmse. A truth of zeros makes nrmse huge, and finite.
    """
    p, z = _pair(prediction, truth)
    mse = float(np.mean((p - z) ** 2))
    rmse = mse**0.5
    nrmse = rmse / (float(np.mean(z**2)) ** 0.5 + _TINY)
    return {"mse": mse, "mae": float(np.mean(np.abs(p - z))), "rmse": rmse, "nrmse": nrmse}


def conservation_gap(prediction: ArrayLike, reference: ArrayLike) -> float:
    """Mean over samples of |sum of a prediction - sum of its reference|: gaps of two signs do not cancel."""
    p, r = _pair(prediction, reference)
    inner = tuple(range(1, p.ndim))
    return float(np.mean(np.abs(p.sum(axis=inner) - r.sum(axis=inner))))


def boundary_violation(prediction: ArrayLike, truth: ArrayLike) -> float:
    """Half of mean |e| at the first cell or token plus mean |e| at the last; (samples, length, …)."""
    p, u = _pair(prediction, truth)
    return float(np.abs(p - u)[:, [0, -1]].mean())


def negativity(prediction: ArrayLike) -> float:
    """Mean of max(-prediction, 0)."""
    return float(np.mean(np.maximum(-np.asarray(prediction, np.float64), 0)))


# ---------------------------------------------------------------------------------- of an evaluation


def evaluate(
    outputs: Sequence[Mapping[str, Any]], windows: Sequence[Mapping[str, Any]], mean: float, std: float
) -> dict[str, float]:
    """All scores of one member from what `predict` gave for each evaluation batch.

    `nrmse` and the other names of PHYSICAL and LAWS are of the last of PREDICTIONS that there is, and `nrmse` of the
    tokens where nothing decodes them; `_operator`, `_corrected` and `_conditioned` say them apart. `rollout_…` are of
    the operator alone, which goes on from its own tokens. Each stands beside what doing nothing scores on the same
    windows (`_persistence`), and those of one step beside the floor that encoder and decoder set (`_reconstruction`).
    `nrmse…_nu_…` and `rollout_nrmse…_nu_…` are of the windows of one viscosity.

    Args:
      outputs: per batch, as `BurgersTask.predict` gives them; what a stage or an arm does not have is not there.
      windows: per batch `u` (B, 1 + roll-out, cells), `viscosity` (B,), both in standardised units.
      mean, std: of the training fields, to bring all fields back to their own unit.
    """
    if not windows or len(outputs) != len(windows):
        raise ValueError(f"{len(outputs)} outputs for {len(windows)} evaluation batches")

    def physical(name: str) -> Floats:
        return mean + std * _joined(outputs, name)

    u = mean + std * _joined(windows, "u")
    viscosity = np.concatenate([np.asarray(batch["viscosity"]) for batch in windows])
    before, after, zero = u[:, 0], u[:, 1], _NOTHING * (abs(mean) + std)
    with np.errstate(invalid="ignore", over="ignore"):  # of a model that is lost: its scores are NaN
        of = {name: physical(name) for name in (*PREDICTIONS, "reconstruction") if name in outputs[0]}
        fields = {"persistence": before, **of} if of else {}  # of none where nothing decodes the tokens
        known = {f"_{name}": fields[name] for name in KNOWN if name in fields}
        there = [name for name in PREDICTIONS if name in of]
        scores: dict[str, float] = {"samples": float(len(u))}
        for name in there:
            scores[f"nrmse_{name}"] = pdebench(of[name], after, zero=zero)["nrmse"]
            scores[f"mse_{name}"] = latent(of[name], after)["mse"]
        for suffix, field in known.items():
            scores[f"mse{suffix}"] = latent(field, after)["mse"]
        for suffix, field in (({"": of[there[-1]]} if there else {}) | known).items():
            scores |= _of_fields("", suffix, field, after, viscosity, zero)
            scores |= {f"{name}{suffix}": value for name, value in _laws(field, before, after).items()}
        if there:
            scores["negativity"], scores["negativity_truth"] = negativity(of[there[-1]]), negativity(after)
        if "rollout" in outputs[0]:
            waiting = np.broadcast_to(before[:, None], u[:, 1:].shape)
            for suffix, field in {"": physical("rollout"), "_persistence": waiting}.items():
                scores |= _of_fields("rollout_", suffix, field, u[:, 1:], viscosity, zero)
        scores |= _latent_scores(outputs)
        if not there and "latent_nrmse" in scores:  # nothing decodes the tokens
            names = ("latent_nrmse", *(f"latent_nrmse_{name}" for name in PREDICTIONS[1:]))
            scores["nrmse"] = [scores[name] for name in names if name in scores][-1]
            scores["nrmse_persistence"] = scores["latent_nrmse_persistence"]
    return scores


def _of_fields(
    prefix: str, suffix: str, fields: Floats, truth: Floats, viscosity: NDArray[Any], zero: float
) -> dict[str, float]:
    """PDEBench's errors of fields, as `<prefix><name><suffix>`, and nrmse for each viscosity."""
    found = pdebench(fields, truth, zero=zero)
    names = [name for name in found if name in PHYSICAL or not (prefix or suffix)]
    scores = {f"{prefix}{name}{suffix}": found[name] for name in names}
    for nu in np.unique(viscosity):
        own = pdebench(fields[viscosity == nu], truth[viscosity == nu], zero=zero)
        scores[f"{prefix}nrmse{suffix}_nu_{slug(float(nu))}"] = own["nrmse"]
    return scores


def _laws(fields: Floats, before: Floats, after: Floats) -> dict[str, float]:
    """Mass on the unit interval against that of the step's start, and what is wrong at the boundary."""
    return {
        "conservation_gap": conservation_gap(fields, before) / fields.shape[-1],
        "boundary_violation": boundary_violation(fields, after),
    }


def _latent_scores(outputs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """As published, of tokens against those of the step's end; sums and signs of the last of PREDICTIONS there is."""
    tokens = [output["latent"] for output in outputs if "latent" in output]
    if not tokens:
        return {}
    after = _joined(tokens, "after")
    scores = {f"latent_{k}": v for k, v in latent(_joined(tokens, "operator"), after).items()}
    still = latent(_joined(tokens, "before"), after)
    scores |= {f"latent_{k}_persistence": v for k, v in still.items()}
    for name in PREDICTIONS[1:]:
        if name in tokens[0]:
            own = latent(_joined(tokens, name), after)
            scores |= {f"latent_{k}_{name}": own[k] for k in ("mse", "nrmse")}
    best = _joined(tokens, [name for name in PREDICTIONS if name in tokens[0]][-1])
    for suffix, given in {"": best, "_persistence": _joined(tokens, "before")}.items():
        scores[f"latent_conservation_gap{suffix}"] = conservation_gap(given, after)
        scores[f"latent_boundary_violation{suffix}"] = boundary_violation(given, after)
        scores[f"latent_negativity{suffix}"] = negativity(given)
    return scores


def _joined(batches: Sequence[Mapping[str, Any]], name: str) -> Floats:
    return np.concatenate([np.asarray(batch[name], np.float64) for batch in batches])


def slug(viscosity: float) -> str:
    """`0p001` for 0.001: a viscosity as a part of a metric's name."""
    return f"{viscosity:g}".replace(".", "p").replace("-", "m")


def kept(
    outputs: Sequence[Mapping[str, Any]],
    windows: Sequence[Mapping[str, Any]],
    mean: float,
    std: float,
    *,
    of_each: int = 2,
) -> dict[str, NDArray[Any]]:
    """What is kept of a run beside its parameters.

    Returns `mean` and `std` () of the training fields, without which its encoder and decoder mean nothing; and where
    there is a roll-out a few to be drawn, the first windows of each viscosity, the same ones for every arm: `truth`
    and `prediction` (examples, 1 + roll-out, cells) float32 in the fields' own unit, `x` (cells,) on the unit
    interval, `t` (examples, 1 + roll-out) and `viscosity` (examples,).
    """
    units: dict[str, NDArray[Any]] = {"mean": np.array(mean), "std": np.array(std)}
    if not outputs or "rollout" not in outputs[0]:
        return units
    u, rollout = _joined(windows, "u"), _joined(outputs, "rollout")
    viscosity, dt = _joined(windows, "viscosity"), _joined(windows, "dt")
    chosen = np.concatenate([np.flatnonzero(viscosity == nu)[:of_each] for nu in np.unique(viscosity)])
    truth, cells = u[chosen], u.shape[-1]
    prediction = np.concatenate([truth[:, :1], rollout[chosen]], axis=1)
    return {
        **units,
        "truth": (mean + std * truth).astype(np.float32),
        "prediction": (mean + std * prediction).astype(np.float32),
        "x": (np.arange(cells) + 0.5) / cells,
        "t": dt[chosen, None] * np.arange(u.shape[1]),
        "viscosity": viscosity[chosen],
    }
