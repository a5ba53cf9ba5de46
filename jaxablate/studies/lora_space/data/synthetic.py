"""Made-up adapters with a different weak cue for each way of describing them.

An adapter is what DreamBooth training leaves: `down` close to its random start, `up` small. Beside a gain of its own,
and one of each tensor, which say nothing, it carries cues of its category. In a third of its (block, attention,
module) pairs, drawn for each category and cue apart,

* `norm`: `up` is larger (norms, spectra, spreads);
* `tails`: the values of `up` are skewed and heavy-tailed, at the same mean and spread (moments, quantiles);
* `frequency`: a wave of the category's frequency and a random phase runs along the channels of `up`;
* `histogram`: the values of `up` clump at a lattice, which leaves moments and quantiles about as they were;
* `direction`: `up` and `down` lean towards a fixed pattern (their values one by one);
* `decay`: of two and more, the columns of `up` fall off in size, after which a random turn hides which (spectra).

The pairs of cross-attention have 60 % of a cue's energy. The last of three or more categories has no cue of its own:
each of its adapters carries those of another, drawn at random, so nothing can tell it from them.

An adapter follows from (seed, its number), whichever others are made with it. Imports no jax.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from jaxablate import cache
from jaxablate.studies.lora_space.config import LoraSpaceData
from jaxablate.studies.lora_space.data.names import Shape, direction, kind, pair, unet_shapes
from jaxablate.studies.lora_space.data.reader import Weights, room

GENERATOR = 1  # part of the digest: raise it when an adapter of the same seed changes

CATEGORIES = ("airplane", "bird", "car", "cat", "dog", "fish", "fruit", "ship", "snake", "vegetable")
Cue = Literal["norm", "tails", "frequency", "histogram", "direction", "decay"]
CUES: tuple[Cue, ...] = get_args(Cue)

LEARNED = 0.02  # typical change of a weight
ADAPTER_GAIN, TENSOR_GAIN = 0.15, 0.1  # deviations of the logarithm
SHARE = 1 / 3  # of the pairs have a cue
TEXT_ENERGY = 0.6
STRENGTH: Mapping[
    Cue, tuple[float, float]
] = {  # in tensors of REFERENCE channels in all, and how it falls with more
    "norm": (0.1, 0.15),  # of the logarithm of the size
    "tails": (0.1, 0.5),  # amplitude of the second and third Hermite polynomial, of the values' deviation
    "frequency": (0.45, 0.3),  # amplitude of the wave, likewise
    "histogram": (0.3, 0.45),  # share of the way to the lattice
    "direction": (0.24, 0.3),  # amplitude of the pattern, of the values' deviation
    "decay": (0.25, 0.5),  # of the logarithm of the size, from one column to the next
}
REFERENCE = 640  # channels: 16 pairs of 40. More of them show a cue more clearly, so it is made the weaker
LATTICE = 0.4  # spacing in deviations of the values
WAVES = 3  # of the first category along the channels; every further one has so many more
_DESIGN = 1 << 32  # the stream of the cues; those of adapters have their numbers, which are below

Floats = npt.NDArray[np.floating]  # single precision wherever there are many


@dataclass(frozen=True)
class Synthetic:
    """`samples` adapters, the categories one after another in turn (a `Reader`)."""

    shapes: Mapping[str, Shape]
    samples: int
    classes: int
    seed: int
    cues: frozenset[Cue]

    @classmethod
    def of(cls, data: LoraSpaceData, cues: Collection[Cue] = CUES) -> Synthetic:
        """Those of a config; with some of the cues alone, to see who finds them."""
        shapes = unet_shapes(data.architecture, data.rank)
        return cls(shapes, data.samples, data.classes, data.seed, frozenset(cues))

    @property
    def categories(self) -> tuple[str, ...]:
        return CATEGORIES[: self.classes]

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        return (np.arange(self.samples) % self.classes).astype(np.int32)

    @property
    def parts(self) -> None:
        return None

    def digest(self) -> str:
        made_of = (
            GENERATOR,
            sorted(self.shapes.items()),
            self.samples,
            self.classes,
            self.seed,
            sorted(self.cues),
        )
        return cache.fingerprint("lora_space", *made_of)

    def where(self, row: int) -> str:
        return f"synthetic adapter {row}"

    def read(self, start: int, stop: int, names: Sequence[str], workers: int) -> Weights:
        made = room(self.shapes, names, stop - start)

        design = self._design  # drawn once, before the threads

        def make(row: int) -> None:
            for name, values in self._adapter(row, design).items():
                if name in made:
                    made[name][row - start] = values

        with ThreadPoolExecutor(max(1, workers)) as threads:
            for done in [threads.submit(make, row) for row in range(start, stop)]:
                done.result()
        return made

    # ------------------------------------------------------------------------------------- one adapter

    @cached_property
    def _design(self) -> _Design:
        return _Design.draw(self)

    def _adapter(self, row: int, design: _Design) -> Mapping[str, Floats]:
        """All tensors of one adapter. The ups are made as one long vector, in the order of their names."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, row]))
        label = row % self.classes
        if self.classes > 2 and label == self.classes - 1:
            label = int(rng.integers(self.classes - 1))
        strong = design.strength[label]
        gain = np.exp(
            ADAPTER_GAIN * rng.standard_normal() + TENSOR_GAIN * rng.standard_normal(len(design.ups))
        )
        phase = rng.uniform(0, 2 * math.pi, len(design.ups))
        along = design.along

        z = rng.standard_normal(along.total, np.float32)
        z = _clumped(_tailed(z, along(strong["tails"])), along(strong["histogram"]))
        wave = along(strong["frequency"])
        running = 2 * math.pi * WAVES * (label + 1) * design.channel + along(phase)
        z = np.sqrt(1 - wave**2) * z + math.sqrt(2) * wave * np.sin(running, dtype=np.float32)
        lean = along(strong["direction"])
        z = np.sqrt(1 - lean**2) * z + lean * design.pattern[label]["up"]
        z *= along(LEARNED * gain * np.exp(strong["norm"]))

        made: dict[str, Floats] = {}
        for i, name in enumerate(design.ups):
            values = z[along.ends[i] : along.ends[i + 1]].reshape(self.shapes[name])
            made[name] = _decaying(values, strong["decay"][i], rng)
        start = rng.standard_normal(design.across.total, np.float32)
        change = (
            LEARNED
            * design.across((strong["direction"] > 0).astype(np.float32))
            * design.pattern[label]["down"]
        )
        for i, name in enumerate(design.downs):
            rank = self.shapes[name][0]
            own = slice(design.across.ends[i], design.across.ends[i + 1])
            made[name] = (start[own] / rank + change[own]).reshape(self.shapes[name])
        return made


class _Spread:
    """Repeats a number of each tensor for all its values, which lie one tensor after another."""

    def __init__(self, sizes: Sequence[int]):
        self._sizes = np.asarray(sizes)
        self.ends = np.concatenate([[0], np.cumsum(self._sizes)])
        self.total = int(self.ends[-1])

    def __call__(self, of_tensor: Floats) -> Floats:
        return np.repeat(of_tensor.astype(np.float32), self._sizes)


@dataclass(frozen=True)
class _Design:
    """What the adapters of a seed have in common.

    Attributes:
      ups, downs: names of the tensors, pair by pair.
      along, across: from a number for each up, and for each down, to one for each value.
      channel: of each value of the ups, where along its tensor's channels it stands: [0, 1).
      strength: of each category and cue, how strong it is in each pair; 0 in most.
      pattern: of each category, the fixed values that ups and downs lean to.
    """

    ups: tuple[str, ...]
    downs: tuple[str, ...]
    along: _Spread
    across: _Spread
    channel: Floats
    strength: tuple[Mapping[Cue, Floats], ...]
    pattern: tuple[Mapping[str, Floats], ...]

    @classmethod
    def draw(cls, adapters: Synthetic) -> _Design:
        by_pair = sorted(adapters.shapes, key=lambda name: (pair(name), name))
        ups = tuple(name for name in by_pair if direction(name) == "up")
        downs = tuple(name for name in by_pair if direction(name) == "down")
        along, across = (
            _Spread([math.prod(adapters.shapes[name]) for name in names]) for names in (ups, downs)
        )
        rng = np.random.Generator(np.random.Philox(key=[adapters.seed, _DESIGN]))
        energy = {"text": 2 * TEXT_ENERGY, "visual": 2 * (1 - TEXT_ENERGY)}
        amplitude = np.array([math.sqrt(energy[kind(name)]) for name in ups])
        channels = np.array([len(ups) * adapters.shapes[name][0] for name in ups])
        strength, pattern = [], []
        for _ in range(adapters.classes):
            drawn: dict[Cue, Floats] = {}
            for cue in CUES:  # drawn in any case, so that the others stay when one is left out
                chosen = rng.random(len(ups)) < SHARE
                strong, falls = STRENGTH[cue]
                drawn[cue] = (
                    chosen * amplitude * strong * (REFERENCE / channels) ** falls * (cue in adapters.cues)
                )
            strength.append(drawn)
            pattern.append(
                {
                    "up": rng.standard_normal(along.total, np.float32),
                    "down": rng.standard_normal(across.total, np.float32),
                }
            )
        rows = [np.arange(adapters.shapes[name][0]) / adapters.shapes[name][0] for name in ups]
        wide = [np.repeat(row, adapters.shapes[name][1]) for row, name in zip(rows, ups, strict=True)]
        channel = np.concatenate(wide).astype(np.float32)
        return cls(ups, downs, along, across, channel, tuple(strength), tuple(pattern))


def _tailed(z: Floats, share: Floats) -> Floats:
    """Normal values made skewed and heavy-tailed, mean 0 and variance 1 as before, where `share` is not 0.

    By the Hermite polynomials He2 and He3, which are orthogonal to z and to each other under a normal distribution.
    """
    squares = z * z
    bent = z + share * ((squares - 1) / math.sqrt(2) + (squares - 3) * z / math.sqrt(6))
    return bent / np.sqrt(1 + 2 * share**2)


def _clumped(z: Floats, share: Floats) -> Floats:
    """Values moved towards the nearest point of a lattice by `share` of the way."""
    return z + share * (LATTICE * np.round(z / LATTICE) - z)


def _decaying(up: Floats, decay: float, rng: np.random.Generator) -> Floats:
    """Columns of `up` that fall off by exp(-decay), the energy as before, turned at random among themselves."""
    rank = up.shape[1]
    if rank == 1:
        return up
    turn = np.linalg.qr(rng.standard_normal((rank, rank)))[0]
    size = np.exp(-decay * np.arange(rank))
    return up @ (size[:, None] / math.sqrt(np.mean(size**2)) * turn).astype(np.float32)
