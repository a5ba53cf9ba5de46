"""Trajectories of u_t + (u^2/2)_x = (epsilon / pi) u_xx on the ring 0 <= x < 1, by finite volumes.

Second order in space (limited slopes) and in time (midpoint rule). Every sample takes steps of its own length,
so what becomes of it does not depend on its neighbours in the array. Axes: N samples, X cells.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax
from jaxtyping import Array, Float

GENERATOR = 1  # part of the cache key: raise it when a trajectory of the same seed changes

MODES, PICKS = 4, 2  # waves of an initial state, and how many wavenumbers are drawn for them
# The benchmark divides by the distance of its outer cell centres, of 1024, and so do we on every grid: a
# trajectory is the same field at all resolutions, whose waves miss their own start by a thousandth.
SPAN = 1023 / 1024
COURANT, DIFFUSIVE = (
    0.25,
    0.125,
)  # of the longest stable steps, in units of dx / max|u| and dx^2 / (epsilon / pi)


def centres(cells: int) -> np.ndarray:
    """The middles of the cells of the ring: float32 (cells,)."""
    return ((np.arange(cells) + 0.5) / cells).astype(np.float32)


def generate(
    trajectories: Sequence[int] | npt.NDArray[np.integer],
    *,
    viscosity: float | Sequence[float],
    cells: int,
    frames: int,
    interval: float,
    seed: int,
) -> np.ndarray:
    """Trajectories by their numbers: float32 (N, frames + 1, cells), the initial states first.

    A trajectory follows from (seed, its number, viscosity) up to rounding; its initial state from the first two.

    Args:
      trajectories: whole numbers from 0 to 2^32 - 1, (N,).
      viscosity: epsilon, above 0, of all or of each.
      interval: time between frames.
      seed: from 0 to 2^31 - 1.
    """
    numbers = jnp.asarray(trajectories, jnp.uint32)
    epsilon = jnp.broadcast_to(jnp.asarray(viscosity, jnp.float32), numbers.shape)
    start = initial_states(jax.random.key(seed, impl="threefry2x32"), numbers, jnp.asarray(centres(cells)))
    later = evolve(start, epsilon, jnp.float32(interval), frames=frames)
    return np.concatenate([np.asarray(start)[:, None], np.asarray(later)], axis=1)


@jax.jit
def initial_states(key: Array, numbers: Array, x: Float[Array, " X"]) -> Float[Array, "N X"]:
    """Sums of sines, some of them rectified, some confined to a window, each from the key and its number.

    A drawn mode k that comes up n times is a wave of number k n; one that does not is a constant.
    """
    return jax.vmap(lambda number: _initial_state(jax.random.fold_in(key, number), x))(numbers)


def _initial_state(key: Array, x: Float[Array, " X"]) -> Float[Array, " X"]:
    picking, amplitudes, phases, folding, flipping, windowing, edges = jax.random.split(key, 7)
    modes = jnp.arange(MODES)
    picked = jax.random.randint(picking, (PICKS,), 0, MODES)
    times = jnp.sum(picked[:, None] == modes[None], axis=0)
    waves = 2 * math.pi / SPAN * ((modes + 1) * times).astype(x.dtype)
    amplitude = jax.random.uniform(amplitudes, (MODES,))
    phase = 2 * math.pi * jax.random.uniform(phases, (MODES,))
    u = jnp.sum(amplitude[:, None] * jnp.sin(waves[:, None] * x[None] + phase[:, None]), axis=0)
    u = jnp.where(jax.random.bernoulli(folding, 0.1), jnp.abs(u), u)
    u = jnp.where(jax.random.bernoulli(flipping), -u, u)
    low, high = jnp.array([0.1, 0.55]), jnp.array([0.45, 0.9])
    a, b = jax.random.uniform(edges, (2,), minval=low, maxval=high)
    window = (jnp.tanh((x - a) / 0.01) - jnp.tanh((x - b) / 0.01)) / 2
    return jnp.where(jax.random.bernoulli(windowing, 0.1), u * window, u)


def tendency(u: Float[Array, "N X"], viscosity: Float[Array, " N"]) -> Float[Array, "N X"]:
    """du/dt of the cells' means: what flows in through the faces less what flows out.

    Slopes are limited (monotonised central differences); at a face the two sides meet in an upwinded flux.
    """
    cells = u.shape[1]
    ring = jnp.concatenate([u[:, -2:], u, u[:, :2]], axis=1)
    step = jnp.diff(ring, axis=1)
    left, right = step[:, :-1], step[:, 1:]
    central = (left + right) / 2
    steepest = jnp.minimum(2 * jnp.minimum(jnp.abs(left), jnp.abs(right)), jnp.abs(central))
    half_slope = jnp.where(left * right > 0, jnp.sign(central) * steepest, 0) / 2
    inner = ring[:, 1:-1]  # one ghost cell on each side is left, and cells + 1 faces
    before, after = (inner + half_slope)[:, :-1], (inner - half_slope)[:, 1:]
    carried = (before**2 + after**2) / 4 - jnp.abs(before + after) * (after - before) / 4
    flux = carried - (viscosity * (cells / math.pi))[:, None] * step[:, 1:-1]
    return (flux[:, :-1] - flux[:, 1:]) * cells


@functools.partial(jax.jit, static_argnames="frames")
def evolve(
    u: Float[Array, "N X"], viscosity: Float[Array, " N"], interval: Float[Array, ""], *, frames: int
) -> Float[Array, "N frames X"]:
    """The states after one, two, … `frames` intervals."""
    dx = 1 / u.shape[1]
    diffusive = DIFFUSIVE * dx**2 * math.pi / viscosity

    def substep(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        u, rounding, left = state
        courant = COURANT * dx / jnp.max(jnp.abs(u), axis=1)
        still = left - jnp.minimum(jnp.minimum(courant, diffusive), left)
        dt = left - still  # as the clock has it, to the last bit; 0 for a sample that waits for the others
        middle = u + dt[:, None] / 2 * tendency(u, viscosity)
        # Kahan's sum: of steps of a millionth, a twentieth would be rounded away, and the mean would drift.
        change = dt[:, None] * tendency(middle, viscosity) - rounding
        after = u + change
        return after, (after - u) - change, still

    def frame(state: tuple[Array, Array], none: None) -> tuple[tuple[Array, Array], Array]:
        del none
        start = *state, jnp.broadcast_to(interval, viscosity.shape)
        u, rounding, _ = lax.while_loop(lambda state: jnp.any(state[2] > 0), substep, start)
        return (u, rounding), u

    _, found = lax.scan(frame, (u, jnp.zeros_like(u)), length=frames)
    return found.swapaxes(0, 1)
