"""Made-up adapters: what they are, that a cue is seen by the features made for it, and that nothing else tells."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jaxablate.studies.lora_space.config import LoraSpaceData
from jaxablate.studies.lora_space.data import describe, names
from jaxablate.studies.lora_space.data.synthetic import CUES, Synthetic
from jaxablate.studies.lora_space.features import features

TINY = LoraSpaceData(architecture="tiny", samples=600, classes=5)
SHOWN = ("simple_stats", "stats", "spectral", "frequency", "info_theoretic", "ensemble", "flat_vec")
CHANCE = 0.2

pytestmark = pytest.mark.slow


def accuracy(x: np.ndarray, labels: np.ndarray, classes: int) -> tuple[float, np.ndarray]:
    """Of a linear classifier (ridge regression to one-hot labels) on 30 % held out, and its recall of each class."""
    order = np.random.default_rng(0).permutation(len(x))
    x, labels, count = x[order].astype(np.float64), labels[order], int(0.7 * len(x))
    mean, std = x[:count].mean(0), x[:count].std(0)
    kept = std > 1e-6 * np.abs(mean)
    x = np.clip((x[:, kept] - mean[kept]) / std[kept], -6, 6)
    gram = x @ x[:count].T
    weights = np.linalg.solve(
        gram[:count] + 0.3 * x.shape[1] * np.eye(count), np.eye(classes)[labels[:count]]
    )
    right = (gram[count:] @ weights).argmax(1) == labels[count:]
    return float(right.mean()), np.array([right[labels[count:] == c].mean() for c in range(classes)])


def all_of(adapters: Synthetic) -> dict[str, np.ndarray]:
    return adapters.read(0, adapters.samples, sorted(adapters.shapes), 2)


@pytest.fixture(scope="module")
def scores() -> dict[str, dict[str, float]]:
    """By the one cue that adapters have, and by representation, how well categories are told apart."""
    found = {}
    for cue in (*CUES, "none"):
        adapters = Synthetic.of(TINY, [cue] if cue != "none" else [])
        x = features(all_of(adapters), SHOWN, workers=2)
        found[cue] = {name: accuracy(x[name], adapters.labels, 5)[0] for name in SHOWN}
    return found


WINNERS = {
    "norm": {"simple_stats", "spectral", "frequency", "stats", "ensemble"},
    "tails": {"stats", "ensemble"},
    "frequency": {"frequency", "ensemble"},
    "histogram": {"info_theoretic"},
    "direction": {"flat_vec"},
}


@pytest.mark.parametrize("cue", WINNERS)
def test_the_features_made_for_a_cue_see_it_best(scores, cue):
    own = scores[cue]
    assert max(own, key=own.get) in WINNERS[cue], own
    assert max(own.values()) > CHANCE + 0.15, own


def test_some_do_not_see_what_others_see(scores):
    """A wave of random phase has no fixed direction, a size no shape, and a direction no size."""
    unseen = {
        "frequency": ("flat_vec", "spectral"),
        "norm": ("info_theoretic",),
        "direction": ("spectral", "stats"),
    }
    for cue, blind in unseen.items():
        for name in blind:
            assert scores[cue][name] < CHANCE + 0.12, (cue, name, scores[cue])


def test_without_cues_there_is_nothing_to_learn(scores):
    """Negative control: neither gains nor the order of the adapters tell."""
    assert all(score < CHANCE + 0.1 for score in scores["none"].values()), scores["none"]


def test_cross_attention_has_more_of_the_cues_and_one_category_has_none():
    adapters = Synthetic.of(replace(TINY, samples=1200))
    weights = all_of(adapters)
    visual = {name: values for name, values in weights.items() if ".attn1." in name}
    both, recall = accuracy(features(weights, ["ensemble"], workers=2)["ensemble"], adapters.labels, 5)
    seen, _ = accuracy(features(visual, ["ensemble"], workers=2)["ensemble"], adapters.labels, 5)
    assert both > seen + 0.05 and seen > CHANCE + 0.1
    assert recall[4] <= CHANCE and recall[:4].min() > 2 * CHANCE


def test_the_spectrum_of_a_higher_rank_decays_by_category():
    adapters = Synthetic.of(replace(TINY, rank=4, samples=400), ["decay"])
    found = features(all_of(adapters), ["spectral", "flat_vec"], workers=2)
    assert accuracy(found["spectral"], adapters.labels, 5)[0] > CHANCE + 0.15
    assert accuracy(found["flat_vec"], adapters.labels, 5)[0] < CHANCE + 0.12


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("architecture", ["tiny", "sd15"])
def test_names_shapes_and_sizes(architecture, rank):
    data = LoraSpaceData(architecture=architecture, rank=rank, samples=4, classes=2)
    weights = Synthetic.of(data).read(0, 4, sorted(describe(data).tensors), 1)
    assert {name: values.shape[1:] for name, values in weights.items()} == describe(data).tensors
    down, up = (
        np.concatenate([v.ravel() for n, v in weights.items() if names.direction(n) == one])
        for one in ("down", "up")
    )
    assert down.std() == pytest.approx(1 / rank, rel=0.05)
    assert 0.015 < up.std() < 0.03 and abs(up.mean()) < 0.001
    if architecture == "sd15":
        assert len(weights) == 128 and sum(v[0].size for v in weights.values()) == 99_648 * rank
        visual = describe(replace(data, tensors="visual_only")).tensors
        assert len(visual) == 64 and sum(np.prod(shape) for shape in visual.values()) == 49_920 * rank
    else:
        assert len(weights) == 32


def test_an_adapter_depends_on_its_number_and_seed_alone():
    adapters = Synthetic.of(TINY)
    name = sorted(adapters.shapes)[:3]
    together = adapters.read(0, 9, name, 3)
    alone = adapters.read(5, 6, name[1:2], 1)
    np.testing.assert_array_equal(together[name[1]][5:6], alone[name[1]])
    other = Synthetic.of(replace(TINY, seed=1))
    assert not np.allclose(other.read(5, 6, name, 1)[name[1]], alone[name[1]])
    assert other.digest() != adapters.digest() == Synthetic.of(replace(TINY)).digest()
    fewer = Synthetic.of(replace(TINY, samples=10))
    np.testing.assert_array_equal(fewer.read(5, 6, name[1:2], 1)[name[1]], alone[name[1]])
