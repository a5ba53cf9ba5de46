"""Test-time conditioning: a choice per sample, draws per sample, a cap that holds, rewards that know the physics."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxablate.config import OptimConfig
from jaxablate.optim import schedule
from jaxablate.studies.burgers.budget import draws, evaluations
from jaxablate.studies.burgers.conditioning import conditioned, faithful_reward, mass_reward
from jaxablate.studies.burgers.config import ConditioningConfig

B, T, D = 3, 4, 2
Z = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, D)), jnp.float32)
KEYS = jax.random.split(jax.random.key(7), B)
AHEAD = ConditioningConfig(candidates=8, beam=3, horizon=2)


def step(z: jax.Array) -> jax.Array:
    return 0.9 * z


def no_correction(z: jax.Array, tau: jax.Array) -> jax.Array:
    return jnp.zeros_like(z) + 0 * tau[:, None, None]


def by_tau(z: jax.Array, tau: jax.Array) -> jax.Array:
    """A drift that shows its tau: 100 tau in every number, which noise does not hide."""
    return jnp.zeros_like(z) + 100 * tau[:, None, None]


def small(before: jax.Array, after: jax.Array) -> jax.Array:
    return -jnp.square(after).sum((1, 2)) + 0 * before.sum((1, 2))


def run(
    config: ConditioningConfig, corrector: Callable, z=Z, keys=KEYS, reward: Callable = small
) -> np.ndarray:
    """What is chosen of `step`'s corrected predictions; compiled, as in `predict`."""
    return np.asarray(
        jax.jit(lambda z, keys: conditioned(z, step, corrector, reward, config, keys)[0])(z, keys)
    )


def counting(reward: Callable) -> tuple[Callable, list[int]]:
    """The reward, and how often it was evaluated for a sample: every call is seen, also one under vmap."""
    calls: list[int] = []

    def counted(before: jax.Array, after: jax.Array) -> jax.Array:
        value = reward(before, after)
        jax.debug.callback(lambda row: calls.append(1), value)
        return value

    return counted, calls


# ------------------------------------------------------------------------------------- golden values


def test_golden_numbers_of_candidates():
    assert [evaluations(replace(AHEAD, horizon=h)) for h in (1, 2, 3)] == [8, 32, 104]
    assert draws(replace(AHEAD, horizon=3)) == (8, 8, 8)


def test_golden_rewards_are_chosen_per_sample():
    """One mean over the batch would take candidate 1 for both; each by itself takes 0 and 1."""
    rewards = jnp.asarray([[-1.0, -9], [-4, -2], [-6, -3]])  # candidate x sample
    assert int(jnp.argmax(rewards.mean(1))) == 1
    config = ConditioningConfig(candidates=3, tau=(0.0, 1.0), noise=())
    z, keys = jnp.zeros((2, 1, 1)), jax.random.split(jax.random.key(0), 2)
    drawn = jax.jit(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0), (3,))))(keys)

    def reward(before: jax.Array, after: jax.Array) -> jax.Array:
        which = jnp.argmin(jnp.abs(drawn - after[:, :, 0]), axis=1)  # the candidate, by its tau
        return rewards[which, jnp.arange(2)] + 0 * before[:, 0, 0]

    drift = lambda z, tau: jnp.zeros_like(z) + tau[:, None, None]
    best = run(config, drift, z, keys, reward)[:, 0, 0]
    drawn = np.asarray(drawn)
    assert best == pytest.approx([drawn[0, 0], drawn[1, 1]])
    assert best[0] != pytest.approx(drawn[0, 1])  # what a choice for the whole batch gives


def test_golden_faithful_reward():
    """Of one sample on a grid of 2 x 2 cells."""
    before, after = jnp.asarray([[[1.0, -1], [2, 0]]]), jnp.asarray([[[1.5, -0.5], [1, -0.25]]])
    both = [jnp.concatenate([x, 2 * x]) for x in (before, after)]
    found = np.asarray(faithful_reward(*both))  # of each sample by itself
    assert found == pytest.approx([-3.0625, -(0.5 + 4 * 2.4375 + 0.75)])


def test_golden_cosine_of_the_correctors_stage():
    """Per epoch of eight, from 3e-4 to 1.5e-5: what `optim` makes of a stage's end_fraction of 0.05."""
    share = schedule(OptimConfig(schedule="cosine", warmup_steps=0, end_fraction=0.05), 8)
    rates = [3e-4 * float(share(epoch)) for epoch in range(4)]
    assert rates == pytest.approx([3e-4, 2.891528e-4, 2.582627e-4, 2.120324e-4], rel=1e-5)
    longer = optax.cosine_decay_schedule(3e-4, 9, alpha=0.05)
    assert float(longer(1)) != pytest.approx(2.891528e-4, rel=1e-3)


# ---------------------------------------------------------------------------------- what is conserved


def burgers_step(u: np.ndarray, nu: float = 0.01, steps: int = 500, dt: float = 1e-3) -> np.ndarray:
    """A plain conservative scheme (local Lax-Friedrichs), for a truth that decays and keeps its mass."""
    dx = 1 / u.shape[-1]
    for _ in range(steps):
        right = np.roll(u, -1, -1)
        speed = np.maximum(np.abs(u), np.abs(right))
        flux = (u**2 + right**2) / 4 - speed * (right - u) / 2 - nu * (right - u) / dx
        u = u - dt / dx * (flux - np.roll(flux, 1, -1))
    return u


def test_the_mass_reward_prefers_the_truth_and_upstreams_does_not():
    """Energy decays and the field has a sign, so upstream's sum would rather have nothing happen at all."""
    x = (np.arange(64) + 0.5) / 64
    before = np.stack([np.sin(2 * np.pi * x) - 0.2, 0.5 * np.cos(4 * np.pi * x) + 0.1])
    truth = burgers_step(before)
    energy = [np.sum(u**2, axis=1) for u in (before, truth)]
    assert (energy[1] < 0.7 * energy[0]).all()
    wrong = truth + 0.05
    before, truth, wrong = (jnp.asarray(u, jnp.float32) for u in (before, truth, wrong))
    assert np.asarray(mass_reward(before, truth)) == pytest.approx([0, 0], abs=1e-6)
    assert (mass_reward(before, wrong) < -0.04).all()
    assert (faithful_reward(before, before) > faithful_reward(before, truth) + 1).all()


def test_weights_scale_their_own_term():
    before, after = jnp.zeros((1, 4)), jnp.asarray([[1.0, 1, 0, -1]])
    parts = [
        float(faithful_reward(before, after, weights)[0])
        for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    ]
    assert parts == [-1, -3, -1]
    assert float(mass_reward(before, after, (4.0, 1.0, 1.0))[0]) == -1
    assert float(mass_reward(before, after, (4.0, 9.0, 9.0))[0]) == -1


# ------------------------------------------------------------------------------------------- the cap


@pytest.mark.parametrize("beam", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("candidates", [0, 1, 2, 8])
def test_the_plan_never_exceeds_the_cap(candidates, beam):
    for cap in (*range(40), 103, 104, 150):
        for horizon in (1, 2, 3, 4):
            config = ConditioningConfig(candidates, beam, horizon, max_evaluations=cap)
            assert evaluations(config) <= cap
            assert len(draws(config)) <= horizon
            enough = ConditioningConfig(candidates, beam, horizon, max_evaluations=10**9)
            if evaluations(enough) <= cap:
                assert draws(config) == draws(enough)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ConditioningConfig(max_evaluations=5), 5),
        (AHEAD, 32),
        (replace(AHEAD, max_evaluations=31), 29),
        (replace(AHEAD, horizon=3, candidates=3, beam=2), 3 + 2 * (3 + 2 * 3)),
    ],
)
def test_what_is_counted_is_what_runs(config, expected):
    reward, calls = counting(small)
    _, count = jax.jit(lambda z, keys: conditioned(z, step, by_tau, reward, config, keys))(Z, KEYS)
    jax.effects_barrier()
    assert count == evaluations(config) == len(calls) == expected <= config.max_evaluations


@pytest.mark.parametrize("off", [{"max_evaluations": 0}, {"candidates": 0}])
def test_without_candidates_it_is_the_base_prediction(off):
    best, count = conditioned(Z, step, by_tau, small, replace(AHEAD, **off), KEYS)
    assert count == 0
    assert (best == step(Z)).all()


def test_fewer_candidates_are_the_first_of_more():
    """The one that a cap of n leaves is the best of the first n, so a larger cap never has a worse reward."""
    worths = []
    for cap in (1, 3, 8):
        best = run(ConditioningConfig(max_evaluations=cap, noise=(0.5,)), no_correction)
        worths.append(-np.square(best).sum((1, 2)))
    assert (np.diff(worths, axis=0) >= 0).all()
    assert (worths[-1] > worths[0]).any()


# --------------------------------------------------------------------------------------------- draws


def test_a_sample_is_the_same_in_any_batch():
    """Its key decides: neither the others in the batch nor its place in it, nor another look at them."""
    whole = run(AHEAD, by_tau)
    for order in ([2], [2, 0, 1]):
        at = np.array(order)
        assert run(AHEAD, by_tau, Z[at], KEYS[at]) == pytest.approx(whole[at], rel=1e-6)
    shared = run(AHEAD, by_tau, Z, KEYS[np.array([0, 0, 0])])
    assert shared[1] != pytest.approx(whole[1], rel=1e-3)


def test_tau_is_uniform_in_its_range_and_the_noise_has_its_deviation():
    rows = 4000
    keys = jax.random.split(jax.random.key(1), rows)
    zeros = jnp.zeros((rows, 1, 1))
    one = ConditioningConfig(candidates=1, noise=())
    tau = run(one, by_tau, zeros, keys) / 100
    assert 0.15 <= tau.min() < 0.16
    assert 0.84 < tau.max() <= 0.85
    assert np.histogram(tau, 7, (0.15, 0.85))[0] == pytest.approx(rows / 7, rel=0.15)
    noisy = replace(one, noise=(0.08, 0.05, 0.02))
    noise = run(noisy, no_correction, zeros, keys)
    assert noise.std() == pytest.approx(0.08, rel=0.05)
    assert abs(noise.mean()) < 0.005
    assert abs(np.corrcoef(noise.ravel(), tau.ravel())[0, 1]) < 0.05


def test_a_candidate_gets_the_correctors_drift():
    exact = lambda z, tau: -z + 0 * tau[:, None, None]
    config = ConditioningConfig(noise=())
    assert not run(config, exact).any()
    assert run(config, no_correction) == pytest.approx(0.9 * np.asarray(Z))


def test_noise_ahead_is_that_of_its_step():
    """With the noise of the second step off, looking ahead adds the same to every leader that stands still."""
    config = replace(AHEAD, noise=(0.5, 0.0))
    direct = run(replace(config, horizon=1), no_correction)
    assert run(config, no_correction) == pytest.approx(direct)  # |0.9 c| orders candidates as |c| does
    assert run(replace(config, noise=(0.5, 20.0)), no_correction) != pytest.approx(direct)


# ---------------------------------------------------------------------------------------- look-ahead


def regret(before: jax.Array, after: jax.Array) -> jax.Array:
    """A first step is worth 1 - |c|; a second one, which goes on from there, ten times its size."""
    first = jnp.abs(before).sum((1, 2)) < 1e-6
    size = jnp.abs(after).sum((1, 2))
    return jnp.where(first, 1 - size, 10 * size)


ALL_LOOK_AHEAD = {"beam": 8, "noise": (), "tau": (0.0, 1.0), "horizon": 2, "discount": 1.0}


@functools.cache
def choose(**changes) -> float:
    """The size of what is chosen, from nothing, where large first steps pay off later only."""
    config = ConditioningConfig(**{**ALL_LOOK_AHEAD, **changes})
    z, keys = jnp.zeros((1, 1, 1)), jax.random.split(jax.random.key(3), 1)
    by_tau_once = lambda z, tau: jnp.where(jnp.abs(z) < 1e-6, tau[:, None, None], 0.0)
    return float(run(config, by_tau_once, z, keys, regret)[0, 0, 0])


def test_looking_ahead_finds_what_pays_off_later():
    assert choose() > 0.8 > 0.3 > choose(horizon=1)
    assert choose(discount=0.0) == choose(horizon=1)
    assert choose(discount=0.05) == choose(horizon=1)  # 0.05 x 10 x 0.9 < 1


def test_a_beam_of_one_has_nothing_to_compare():
    assert choose(beam=1, candidates=8) == choose(horizon=1)
    assert evaluations(replace(AHEAD, beam=1)) == 8


def test_a_clear_leader_is_taken_at_once():
    gap = 1e-3  # the two best first steps are further apart than this, and nearer than 10
    assert choose(early_stop_margin=10.0) == choose()
    assert choose(early_stop_margin=gap) == choose(horizon=1)
    assert choose(early_stop_margin=0.0) == choose()


def test_a_broken_candidate_is_never_the_best():
    sometimes = lambda z, tau: jnp.where(tau[:, None, None] > 0.5, jnp.nan, 0.1) + 0 * z
    assert np.isfinite(run(AHEAD, sometimes)).all()
    always = lambda z, tau: jnp.nan * z
    assert np.isnan(run(ConditioningConfig(), always)).all()


# ------------------------------------------------------------------------------------------ compiled


def test_members_of_a_cohort_choose_by_themselves():
    """Compiled, under vmap over members with parameters of their own, it is what each gives alone."""
    shifts = jnp.asarray([0.0, 0.3])

    def predict(shift: jax.Array, z: jax.Array, keys: jax.Array) -> jax.Array:
        correct = lambda z, tau: shift * tau[:, None, None] + 0 * z
        return conditioned(z, step, correct, small, AHEAD, keys)[0]

    together = jax.jit(jax.vmap(predict, in_axes=(0, None, None)))(shifts, Z, KEYS)
    alone = jax.jit(predict)
    for m, shift in enumerate(shifts):
        assert np.asarray(together[m]) == pytest.approx(np.asarray(alone(shift, Z, KEYS)), rel=1e-5)
    assert np.asarray(together[0]) != pytest.approx(np.asarray(together[1]), rel=1e-2)
