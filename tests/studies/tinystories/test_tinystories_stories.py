"""Generated stories hold what they promise: each ablated part of a model has something to do in them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable

import numpy as np
import pytest

from jaxablate.studies.tinystories.data.stories import (
    COLOURS,
    GAME_WORDS,
    MOVES,
    NAMES,
    RECALL_WORDS,
    SHAPES,
    SKIPS,
    TERMS,
    Story,
    stories,
)
from jaxablate.studies.tinystories.metrics import COPY, OTHER, RECALL
from jaxablate.text.tokenizer import Vocabulary

GAME = re.compile(r"plays skip (\d): ([a-z ]+)\.")
GAVE = re.compile(r"(\w+) (gave|got) the (\w+) (to|from) (\w+)\. So (\w+) has the (\w+)\.")
ACTED = re.compile(r"(\w+) (\w+) (before|after) (\w+) (\w+)\. So (\w+) was first\.")
BOX = re.compile(r"The (\w+) and (\w+) box has a (\w+) in it\.")
TERM = re.compile(r"said the word (\w+) to")
NAMED = re.compile(r"named (\w+)")


@pytest.fixture(scope="module")
def made() -> list[Story]:
    return stories(600_000, seed=3)


@pytest.fixture(scope="module")
def text(made) -> str:
    return "\n".join(story.text for story in made)


def guessed(cases: Iterable[tuple[Hashable, str]]) -> float:
    """How often the most frequent answer to what a predictor sees is right: counted on one half, tried on the other."""
    seen, cases = defaultdict(Counter), list(cases)
    half = len(cases) // 2
    for view, answer in cases[:half]:
        seen[view][answer] += 1
    right = [seen[view].most_common(1)[0][0] == answer for view, answer in cases[half:] if seen[view]]
    assert len(right) > 100
    return float(np.mean(right))


# ------------------------------------------------------------------------------------- (a) word order


def wrong_orders(text: str) -> list[str]:
    """Sentences whose answer is not what their word order says."""
    wrong = []
    for match in GAVE.finditer(text):
        one, verb, thing, _, other, owner, same = match.groups()
        if (owner, same) != (other if verb == "gave" else one, thing):
            wrong.append(match[0])
    for match in ACTED.finditer(text):
        one, _, when, other, _, first = match.groups()
        if first != (one if when == "before" else other):
            wrong.append(match[0])
    return wrong


def test_word_order_decides_who_has_the_thing_and_who_was_first(text):
    assert wrong_orders(text) == []
    for pattern, answer in ((GAVE, 6), (ACTED, 6)):
        cases = [(match[0].split(". So ")[0].split(), match[answer]) for match in pattern.finditer(text)]
        assert guessed((frozenset(Counter(words).items()), name) for words, name in cases) < 0.6
        assert guessed((tuple(words), name) for words, name in cases) == 1.0


@pytest.mark.parametrize(
    "sentence",
    [
        "Tom gave the cup to Ann. So Tom has the cup.",
        "Tom got the cup from Ann. So Ann has the cup.",
        "Tom gave the cup to Ann. So Ann has the hat.",
        "Tom sang after Ann ran. So Tom was first.",
    ],
)
def test_a_wrong_answer_is_reported(sentence):
    assert wrong_orders(sentence) == [sentence]


# ------------------------------------------------------------------------------------------ (b) games


def games(text: str) -> list[tuple[int, list[str]]]:
    return [(int(skip), moves.split()) for skip, moves in GAME.findall(text)]


def contexts(played: list[tuple[int, list[str]]], order: int) -> Iterable[tuple[tuple[str, ...], str]]:
    """(the `order` words before, the word) of each copied word."""
    for skip, words in played:
        for t in range(skip, len(words)):
            yield tuple(words[t - order : t]), words[t]


def found_again(played: list[tuple[int, list[str]]], order: int) -> float:
    """How often the word that last followed the same `order` words in the same game is right."""
    right = []
    for skip, words in played:
        for t in range(skip, len(words)):
            before = words[t - order : t]
            earlier = [u for u in range(order, t) if words[u - order : u] == before]
            right.append(bool(earlier) and words[earlier[-1]] == words[t])
    return float(np.mean(right))


def test_each_word_of_a_game_copies_the_one_skip_places_before(text):
    played = games(text)
    assert {skip for skip, _ in played} == set(SKIPS)
    for skip, words in played:
        assert len(words) == GAME_WORDS
        assert len(set(words[:skip])) == 2 and set(words) <= set(MOVES)
        assert words[skip:] == words[:-skip]


def test_what_surrounds_a_place_does_not_say_which_word_is_copied(text):
    """Counting says it always (above); n-grams of the language, and the last match in the game, do not."""
    played = games(text)
    assert max(guessed(contexts(played, order)) for order in (1, 2, 3, 4)) < 0.75
    assert max(found_again(played, order) for order in (1, 2, 3, 4)) < 0.8


def test_a_game_that_content_explains_is_told_apart():
    played = [(2, ["hop", "nod"] * 12)] * 50
    assert guessed(contexts(played, 1)) == 1.0 and found_again(played, 1) > 0.9


def test_the_copied_words_are_marked_and_no_others(made):
    for story in made[:300]:
        expected = np.full(len(story.text), OTHER, np.uint8)
        for match in GAME.finditer(story.text):
            words = list(re.finditer(r"\w+", match[2]))
            for word in words[int(match[1]) :]:
                expected[match.start(2) + word.start() : match.start(2) + word.end()] = COPY
        assert np.array_equal(story.kinds == COPY, expected == COPY)


# ----------------------------------------------------------------------------------------- (c) recall


def recalls(text: str) -> list[tuple[int, list[str]]]:
    """Per mention of the animal's name but the first: words since the mention before, and those in between."""
    words, found, last = text.replace(".", "").split(), [], None
    for place in range(1, len(words)):
        if words[place - 1] == "named":
            if last is not None:
                assert words[place] == words[last]
                found.append((place - last, words[last + 1 : place]))
            last = place
    return found


def test_a_name_comes_back_after_fifty_words_without_it(made):
    distances = []
    for story in made:
        for distance, between in recalls(story.text):
            distances.append(distance)
            assert not set(NAMES) & set(between)
    assert len(distances) > len(made)
    assert min(distances) == RECALL_WORDS and max(distances) < 64
    assert {NAMED.search(story.text)[1] for story in made} == set(NAMES)


def test_a_name_that_comes_back_sooner_is_seen():
    sooner = "Once there was a hen named Pip. " + "It was hot. " * 10 + "So the hen was named Pip."
    assert [distance for distance, _ in recalls(sooner)] == [36]


def test_the_recalled_names_are_marked_and_no_others(made):
    for story in made[:300]:
        expected = np.zeros(len(story.text), bool)
        for match in list(NAMED.finditer(story.text))[1:]:
            expected[match.start(1) : match.end(1)] = True
        assert np.array_equal(story.kinds == RECALL, expected)


def test_a_short_window_often_reaches_back_to_the_name(made):
    """In tokens of a vocabulary of 512: most names come back within the 64 of the smallest context."""
    kept = [story.text for story in made[:600]]
    vocabulary = Vocabulary.train(kept, 512, "bpe")
    distances = []
    for text, ends in zip(kept, vocabulary.ends(kept), strict=True):
        names = [np.searchsorted(ends, match.start(1), side="right") for match in NAMED.finditer(text)]
        distances += np.diff(names).tolist()
    assert min(distances) >= RECALL_WORDS
    assert np.mean(np.array(distances) < 64) > 0.6


# ---------------------------------------------------------------------------------- (d) pairs, (e) terms


def test_colour_and_shape_together_say_what_a_box_holds_and_neither_does_alone(text):
    boxes = BOX.findall(text)
    assert {colour for colour, _, _ in boxes} == set(COLOURS)
    assert {shape for _, shape, _ in boxes} == set(SHAPES)
    assert guessed((colour, content) for colour, _, content in boxes) < 0.35
    assert guessed((shape, content) for _, shape, content in boxes) < 0.35
    assert guessed(((colour, shape), content) for colour, shape, content in boxes) == 1.0


def slope(counts: Counter[str]) -> float:
    """Of log frequency over log rank, among the 50 most frequent: -1 for Zipf's law, near 0 for a uniform draw."""
    most = np.array([count for _, count in counts.most_common(50)])
    return float(np.polyfit(np.log(np.arange(1, 51)), np.log(most), 1)[0])


def test_long_words_are_mostly_rare_and_a_few_are_frequent(text):
    drawn = TERM.findall(text)
    counts = Counter(drawn)
    assert min(map(len, TERMS)) >= 10 and len(set(TERMS)) == len(TERMS)
    assert -1.2 < slope(counts) < -0.8
    assert sum(count == 1 for count in counts.values()) > len(counts) / 4
    uniform = Counter(np.random.default_rng(0).choice(TERMS, len(drawn)).tolist())
    assert slope(uniform) > -0.4


# ------------------------------------------------------------------------------------------ the stories


def test_stories_are_well_formed_sentences(made):
    for story in made:
        assert story.text.isascii() and "  " not in story.text
        assert re.fullmatch(r"(?:[A-Z][A-Za-z0-9: ]+\.)(?: [A-Z][A-Za-z0-9: ]+\.)*", story.text)
        assert story.kinds.dtype == np.uint8 and len(story.kinds) == len(story.text)


def test_every_kind_has_its_share(made):
    shares = np.bincount(np.concatenate([story.kinds for story in made]), minlength=3)
    shares = shares / shares.sum()
    assert shares[COPY] > 0.1 and shares[RECALL] > 0.01 and shares[OTHER] > 0.5


def test_stories_follow_from_the_seed_and_fewer_are_the_first_of_them():
    many, few = stories(50_000, seed=5), stories(20_000, seed=5)
    assert 0 < len(few) < len(many)
    for one, same in zip(few, many, strict=False):
        assert one.text == same.text and np.array_equal(one.kinds, same.kinds)
    assert sum(len(story.text) for story in few[:-1]) < 20_000 <= sum(len(story.text) for story in few)
    assert not {story.text for story in stories(20_000, seed=6)} & {story.text for story in many}
