"""Generated stories in which every ablated part of a language model has something to do.

Simple English from templates. A story is about one animal with a name; between two mentions of the name lie
fifty words or more, made of sentences and games of these kinds:

* order: who has the thing that one gave to, or got from, another; who was first if one acted before, or
  after, another. The same words in another order have another answer (positions);
* copy: "Tom plays skip 7: hop nod hop …", where each word repeats the one 7 before. There are but two
  words in a game, so what surrounds a place says little about it; counting says all (positions);
* recall: the name of the animal, last seen `RECALL_WORDS` words ago or more (attention over a distance);
* pair: what a box holds follows from its colour and its shape together, and from neither alone (gating);
* rare: long made-up terms of which a few are frequent and most are hardly ever seen (heavy-tailed
  activations, hence norms);
* plain sentences of short common words, so that a vocabulary of 512 has each of them as one token.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import NamedTuple, TypeVar

import numpy as np

from jaxablate.studies.tinystories.metrics import COPY, OTHER, RECALL

GENERATOR = 1  # part of the cache key: raise it when a story of the same seed changes

RECALL_WORDS = 50  # at least so many words from one mention of the animal's name to the next
SKIPS = (5, 6, 7, 8)
GAME_WORDS = 24  # of a game, the first `skip` of them drawn

PEOPLE = ("Tom", "Sam", "Ann", "Ben", "Meg", "Max")
THINGS = ("cup", "hat", "bed", "book")
DEEDS = ("sang", "ran", "ate", "sat")
MOVES = ("hop", "nod", "run", "sit", "dip", "bow")
COLOURS = ("red", "blue", "pink", "gray")
SHAPES = ("flat", "round", "tall", "small")
CONTENTS = ("key", "pin", "nut", "bun")  # of COLOURS[i] and SHAPES[j]: number (i + j) mod 4
ANIMALS = ("hen", "cat", "dog", "pig", "fox", "ant")
NAMES = (
    *("Abo", "Bim", "Cato", "Dax", "Elo", "Fip", "Gus", "Hux", "Ivo", "Jeb", "Kip", "Lulu", "Mops", "Nix"),
    *("Ozzy", "Pip", "Quin", "Rex", "Suki", "Tiff", "Umi", "Vic", "Wim", "Xena", "Yuri", "Zeb", "Bo", "Coco"),
    *("Didi", "Fay", "Gogo", "Hal"),
)
PLAIN = (
    "The sun was hot and the sea was {colour}.",
    "The {animal} sat in the sun and was hot.",
    "It was in the sun and it was {colour}.",
    "The {animal} ran to the sea and the {animal} sat in the sun.",
    "And it was hot in the sea.",
)

_PREFIXES = ("electro", "hydro", "photo", "thermo", "micro", "macro", "poly", "mono", "hyper", "ultra")
_ROOTS = ("graph", "meter", "scop", "phon", "morph", "chrom", "crat", "phil", "trop", "lith", "path", "derm")
_SUFFIXES = ("ology", "ometry", "ically", "istic", "ization", "osophy", "ography", "oscopic")
TERMS = tuple(p + r + s for s in _SUFFIXES for r in _ROOTS for p in _PREFIXES)  # the n-th has weight 1 / n
_TERMS_UP_TO = list(accumulate(1 / rank for rank in range(1, len(TERMS) + 1)))

T = TypeVar("T")


class Story(NamedTuple):
    """A text and, for each of its characters, its kind: uint8 of OTHER, COPY or RECALL."""

    text: str
    kinds: np.ndarray


def stories(characters: int, seed: int) -> list[Story]:
    """As many stories as it takes to have `characters` characters or more.

    Story i depends on (seed, i) alone, so fewer characters give the first of the same stories.
    """
    found: list[Story] = []
    length = 0
    while length < characters:
        found.append(story(seed, len(found)))
        length += len(found[-1].text)
    return found


def story(seed: int, index: int) -> Story:
    """Story `index` of a seed."""
    page = _Page(seed, index)
    animal, name = page.one_of(ANIMALS), page.one_of(NAMES)
    page.write(f"Once there was a {animal} named ").write(name)
    ending = f" So the {animal} was named "
    for _ in range(1 + page.below(3)):
        enough = page.words + RECALL_WORDS - ending.count(" ")
        page.write(".")
        while (missing := enough - page.words) > 0:
            page.one_of(_ANY if missing > GAME_WORDS else _SHORT if missing > _SHORT_WORDS else _FILL)(page)
        page.write(ending).write(name, RECALL)
    return page.write(".").story()


class _Page:
    """A story while it is written, with its random numbers. `words` counts the spaces so far."""

    def __init__(self, seed: int, index: int):
        self._rng = np.random.Generator(np.random.Philox(key=[seed, index]))
        self._drawn: list[float] = []
        self._parts: list[str] = []
        self._kinds: list[int] = []
        self.words = 0

    def uniform(self) -> float:
        """A number in [0, 1)."""
        if not self._drawn:  # many at once: a call of numpy costs as much as a sentence
            self._drawn = self._rng.random(256).tolist()
        return self._drawn.pop()

    def below(self, n: int) -> int:
        """A whole number from 0 to n - 1."""
        return int(self.uniform() * n)

    def one_of(self, choices: tuple[T, ...]) -> T:
        """Any of the choices, all alike."""
        return choices[self.below(len(choices))]

    def two_of(self, choices: tuple[T, ...]) -> tuple[T, T]:
        """Two different choices, in either order."""
        first = self.below(len(choices))
        return choices[first], choices[(first + 1 + self.below(len(choices) - 1)) % len(choices)]

    def write(self, text: str, kind: int = OTHER) -> _Page:
        """Appends characters of one kind."""
        self._parts.append(text)
        self._kinds.append(kind)
        self.words += text.count(" ")
        return self

    def story(self) -> Story:
        """What has been written."""
        lengths = [len(part) for part in self._parts]
        return Story("".join(self._parts), np.repeat(np.array(self._kinds, np.uint8), lengths))


def _give(page: _Page) -> None:
    (one, other), thing = page.two_of(PEOPLE), page.one_of(THINGS)
    if page.below(2):
        page.write(f" {one} gave the {thing} to {other}. So {other} has the {thing}.")
    else:
        page.write(f" {one} got the {thing} from {other}. So {one} has the {thing}.")


def _sooner(page: _Page) -> None:
    (one, other), (did, too) = page.two_of(PEOPLE), page.two_of(DEEDS)
    when, first = ("before", one) if page.below(2) else ("after", other)
    page.write(f" {one} {did} {when} {other} {too}. So {first} was first.")


def _game(page: _Page) -> None:
    person, moves, skip = page.one_of(PEOPLE), page.two_of(MOVES), page.one_of(SKIPS)
    page.write(f" {person} plays skip {skip}:")
    # Both moves are among the drawn ones, or the game would be one word over and over.
    at = page.below(skip)
    drawn = [page.one_of(moves) for _ in range(skip)]
    drawn[at] = moves[drawn[at - 1] == moves[0]]
    for number in range(GAME_WORDS):
        page.write(" ").write(drawn[number % skip], COPY if number >= skip else OTHER)
    page.write(".")


def _pair(page: _Page) -> None:
    colour, shape = page.below(len(COLOURS)), page.below(len(SHAPES))
    content = CONTENTS[(colour + shape) % len(CONTENTS)]
    page.write(f" The {COLOURS[colour]} and {SHAPES[shape]} box has a {content} in it.")


def _rare(page: _Page) -> None:
    term = TERMS[bisect_right(_TERMS_UP_TO, page.uniform() * _TERMS_UP_TO[-1])]
    page.write(f" {page.one_of(PEOPLE)} said the word {term} to the {page.one_of(ANIMALS)}.")


def _plain(page: _Page) -> None:
    page.write(" " + page.one_of(PLAIN).format(colour=page.one_of(COLOURS), animal=page.one_of(ANIMALS)))


_FILL = (_plain,)
_SHORT = (_give, _sooner, _pair, _plain, _plain, _rare)
_ANY = (*_SHORT, _game, _game, _game, _game)
_SHORT_WORDS = 6  # with fewer to go, a plain sentence does
