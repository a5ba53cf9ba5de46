"""Three passes: each prompt is the question's with the answers before it, and an answer ends with its line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxablate.decoding import Continued, continue_prompts
from jaxablate.nn.lora import Lora
from jaxablate.studies.vqa.data.language import Language
from jaxablate.studies.vqa.data.prompts import PASSES, filled
from jaxablate.studies.vqa.inference import (
    Ragged,
    TokenPasses,
    answered,
    joined,
    rules_of,
    texts,
)
from jaxablate.studies.vqa.model import Rules, Vlm
from jaxablate.studies.vqa.qwen3vl.config import TINY
from jaxablate.text.tokenizer import Vocabulary

LANGUAGE = Language.characters(127)
ASKED = ["Which tool?\nA:", "How many tools are there?\nA:", "Where?"]


PICTURES = (jnp.zeros((3, 1, 1, 192)), jnp.ones((3, 1, 2), jnp.int32))


def script(ends_with: str = "\n") -> Script:
    return Script(TINY, Lora(("*",)), ends_with=ends_with)


def padded(rows: list[Any], width: int) -> tuple[jax.Array, jax.Array]:
    tokens = np.full((len(rows), width), 9, np.int32)  # what lies behind is not zero, and must not matter
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return jnp.asarray(tokens), jnp.array([len(ids) for ids in rows], jnp.int32)


def test_parts_of_rows_follow_one_another() -> None:
    rng = np.random.default_rng(0)
    lists = [[rng.integers(1, 9, rng.integers(0, 5)).tolist() for _ in range(4)] for _ in range(3)]
    parts = [Ragged(*padded(rows, 6)) for rows in lists]
    found = joined([parts[0], Ragged.same([7, 7], 4), parts[1], Ragged.same([], 4), parts[2]])
    for i in range(4):
        wanted = [*lists[0][i], 7, 7, *lists[1][i], *lists[2][i]]
        assert found.lengths[i] == len(wanted)
        assert found.tokens[i].tolist() == wanted + [0] * (found.tokens.shape[1] - len(wanted))


@dataclass(frozen=True)
class Script(Vlm):
    """A model that writes the letter of its row, twice and three on in each pass, and then what ends a line."""

    ends_with: str = "\n"

    def generate(
        self, variables: Any, prompts: jax.Array, lengths: jax.Array, patches: Any, grids: Any, rules: Rules
    ) -> Continued:
        a, newline = (LANGUAGE.text(text)[0] for text in ("a", self.ends_with))
        so_far = variables["prompts"]
        so_far.append(texts({"": Continued(prompts, lengths, lengths)}, LANGUAGE.vocabulary)[""])
        answers = a + jnp.arange(len(lengths)) + 3 * len(so_far)

        def next_logits(step: jax.Array) -> jax.Array:
            ids = jnp.where(step < 2, answers, newline)
            return jax.nn.one_hot(ids, rules.size)

        return continue_prompts(
            lambda tokens, last: (next_logits(0 * last), 0 * last + 1),
            lambda cache, tokens, at: (next_logits(cache), cache + 1),
            prompts, lengths, jax.random.split(jax.random.key(0), len(lengths)),
            limit=rules.limit, context=500, size=rules.size, ends=rules.ends, temperature=0.0, top_p=1.0,
        )  # fmt: skip


@pytest.mark.parametrize("wording", ["short", "full"])
def test_each_pass_is_shown_those_before_it(wording: Any) -> None:
    shown: dict[str, Any] = {"prompts": []}
    tokens, lengths = padded([LANGUAGE.prompt(text) for text in ASKED], 40)
    passes = TokenPasses.of(PASSES[wording], LANGUAGE)
    found = answered(script(), shown, tokens, lengths, *PICTURES, rules_of(LANGUAGE, 6), passes)
    said = texts(jax.device_get(found), LANGUAGE.vocabulary)
    assert said == {"p1": ["dd", "ee", "ff"], "p2": ["gg", "hh", "ii"], "p3": ["jj", "kk", "ll"]}
    image = LANGUAGE.vocabulary.decode([127])
    for i, text in enumerate(ASKED):
        given = {"p1": said["p1"][i], "p2": said["p2"][i]}
        second, third = (filled(getattr(PASSES[wording], name), given) for name in ("second", "third"))
        assert [rows[i] for rows in shown["prompts"]] == [
            f"{image}{text}{more} " for more in ("", second, third)
        ]


@pytest.mark.parametrize("ends_with, length", [("\n", 2), ("z", 6)])
def test_only_the_first_line_is_kept(ends_with: str, length: int) -> None:
    tokens, lengths = padded([LANGUAGE.prompt(text) for text in ASKED], 40)
    shown: dict[str, Any] = {"prompts": []}
    found = answered(script(ends_with), shown, tokens, lengths, *PICTURES, rules_of(LANGUAGE, 6), None)
    assert found["p1"].lengths.tolist() == [length] * 3


def test_all_tokens_with_the_end_of_a_line_end_an_answer() -> None:
    rules = rules_of(LANGUAGE, 20)
    assert set(rules.ends) == {LANGUAGE.end, *LANGUAGE.text("\n")}
    assert rules.size <= LANGUAGE.image_token  # which is never drawn
    words = Vocabulary.train(["one\n\n"] * 9, size=270, level="bpe")
    found = rules_of(replace(LANGUAGE, vocabulary=words, end=0), 20).ends
    assert {words.decode([i]) for i in found} == {"<|endoftext|>", "\n", "\n\n"}
