"""Stories, texts and token files become the same windows everywhere, and bad ones are named in one line."""

from __future__ import annotations

import logging
import math
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxablate.errors import UserError
from jaxablate.studies.tinystories.config import LmData
from jaxablate.studies.tinystories.data import Corpus, open_corpus, prepare
from jaxablate.studies.tinystories.data.stories import MOVES, NAMES, stories
from jaxablate.studies.tinystories.metrics import COPY, OTHER, RECALL
from jaxablate.text import encode
from jaxablate.text.tokenize import Options, tokenize
from jaxablate.text.tokenizer import END_OF_TEXT, Vocabulary

STORIES = LmData(vocab_size=512, context=64, stories_characters=150_000, eval_batches=4)
WORDS = ("the", "hen", "saw", "a", "fox", "and", "ran", "to", "it", "so", "fast", "that", "no", "one", "left")


def opened(data: LmData, cache: Path) -> Corpus:
    return open_corpus(data, cache, eval_batch_size=8)


def salad(count: int, seed: int = 0) -> str:
    """A document of random words."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(cache) -> Corpus:
    return opened(STORIES, cache)


@pytest.fixture
def text(tmp_path) -> LmData:
    """A text of 40 documents."""
    path = tmp_path / "text.txt"
    path.write_text(END_OF_TEXT.join(salad(40, seed) for seed in range(40)))
    return LmData(source="text", train=str(path), vocab_size=300, context=16, eval_batches=3)


def test_the_package_imports_no_jax(repo):
    code = "import sys, jaxablate.studies.tinystories.data; assert 'jax' not in sys.modules"
    path = f"{repo}:{repo / 'kernels'}"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, check=True)


# -------------------------------------------------------------------------------------------- windows


def test_an_item_is_the_window_that_starts_there(corpus):
    ids = corpus.train.ids
    assert len(corpus.train) == len(ids) - 64
    for start in (0, 17, len(corpus.train) - 1):
        tokens = corpus.train[start]["tokens"]
        assert tokens.dtype == np.int32 and np.array_equal(tokens, ids[start : start + 65])
    assert corpus.train[len(corpus.train) - 1]["tokens"][-1] == ids[-1]
    for start in (-1, len(corpus.train)):
        with pytest.raises(IndexError):
            corpus.train[start]


def test_windows_travel_to_reader_processes_without_their_tokens(corpus):
    sent = pickle.dumps(corpus.train)
    assert len(sent) < 1000 < corpus.train.ids.nbytes
    assert np.array_equal(pickle.loads(sent)[5]["tokens"], corpus.train[5]["tokens"])


def test_evaluation_is_fixed_windows_of_the_validation_tokens(corpus, cache):
    batches = corpus.evaluation
    assert len(batches) == 4 and all(batch["tokens"].shape == (8, 65) for batch in batches)
    everywhere = np.lib.stride_tricks.sliding_window_view(corpus.val.ids, 65)
    rows = {row.tobytes() for row in everywhere.astype(np.int32)}
    assert {row.tobytes() for batch in batches for row in batch["tokens"]} <= rows
    again = opened(STORIES, cache).evaluation
    assert all(np.array_equal(a[key], b[key]) for a, b in zip(batches, again, strict=True) for key in a)
    # Another batch size cuts the same draws otherwise.
    other = open_corpus(replace(STORIES, eval_batches=8), cache, eval_batch_size=4).evaluation
    tokens = [np.concatenate([batch["tokens"] for batch in part]) for part in (batches, other)]
    assert np.array_equal(*tokens)


# -------------------------------------------------------------------------------------------- stories


def test_validation_is_the_last_stories_and_training_the_others(corpus):
    made = [story.text for story in stories(STORIES.stories_characters, STORIES.stories_seed)]
    kept = len(made) - len(made) // 20
    assert corpus.vocabulary.decode(corpus.train.ids).split(END_OF_TEXT) == made[:kept]
    assert corpus.vocabulary.decode(corpus.val.ids).split(END_OF_TEXT) == made[kept:]


def misplaced_kinds(corpus: Corpus) -> list[str]:
    """Targets of the evaluation whose kind their text contradicts: games are of moves, what comes back is a name."""
    wrong = []
    for batch in corpus.evaluation:
        for target, kind in zip(batch["tokens"][:, 1:].ravel(), batch["kinds"].ravel(), strict=True):
            word = corpus.vocabulary.decode([target]).strip()
            if kind and not any(word in name for name in {COPY: MOVES, RECALL: NAMES}[kind]):
                wrong.append(word)
    return wrong


def test_kinds_are_those_of_the_target_tokens(corpus):
    seen = np.bincount(np.concatenate([batch["kinds"].ravel() for batch in corpus.evaluation]), minlength=3)
    assert seen[COPY] > 100 and seen[RECALL] > 10
    assert misplaced_kinds(corpus) == []
    assert len(misplaced_kinds(replace(corpus, kinds=np.roll(corpus.kinds, 1)))) > 10


def test_at_the_level_of_characters_kinds_are_those_of_the_stories(cache):
    data = replace(STORIES, level="char", vocab_size=64)
    corpus = opened(data, cache)
    made = stories(data.stories_characters, data.stories_seed)
    held_out = made[len(made) - len(made) // 20 :]
    whole = END_OF_TEXT.join(story.text for story in held_out)
    assert corpus.vocabulary.decode(corpus.val.ids) == whole
    of_stories = [kind for story in held_out for kind in (OTHER, *story.kinds)]
    assert np.array_equal(corpus.kinds, of_stories[1:])
    assert np.count_nonzero(corpus.val.ids == corpus.vocabulary.end_of_text) == len(held_out) - 1


# --------------------------------------------------------------------------------------- text and tokens


def test_the_last_documents_of_a_text_are_held_out(text, tmp_path):
    corpus = opened(text, tmp_path / "cache")
    documents = Path(text.train).read_text().split(END_OF_TEXT)
    assert corpus.vocabulary.decode(corpus.train.ids).split(END_OF_TEXT) == documents[:38]
    assert corpus.vocabulary.decode(corpus.val.ids).split(END_OF_TEXT) == documents[38:]
    assert corpus.kinds is None and "kinds" not in corpus.evaluation[0]


BLANKS = ("", "\n", salad(30), f" {salad(9)}\n", " ", "", salad(50), "\n")


@pytest.mark.parametrize("documents", [3, 24])
def test_the_ids_of_a_text_are_those_that_tokenize_gives(text, tmp_path, documents):
    """Blank documents and all, whether they come from one file or from two, and where they are cut."""
    whole = [*BLANKS[: documents % 7], *(salad(30, seed) for seed in range(documents)), *BLANKS]
    Path(text.train).write_text(END_OF_TEXT.join(whole))
    val = tmp_path / "val.txt"
    val.write_text(END_OF_TEXT.join(BLANKS))
    corpus = opened(replace(text, val=str(val)), tmp_path / "cache")
    beside = tmp_path / "t.tokenizer.json"
    tokenize(Options((Path(text.train),), tmp_path / "t.npy", vocab_size=300))
    tokenize(Options((val,), tmp_path / "v.npy", tokenizer=beside))
    assert np.array_equal(corpus.train.ids, np.load(tmp_path / "t.npy"))
    assert np.array_equal(corpus.val.ids, np.load(tmp_path / "v.npy"))
    assert corpus.vocabulary.fingerprint == Vocabulary.load(beside).fingerprint

    given = replace(text, tokenizer=str(beside), vocab_size=corpus.vocabulary.size, context=8)
    cut = opened(given, tmp_path / "cache")
    if documents < 20:  # between two characters
        assert "".join(cut.vocabulary.decode(side.ids) for side in (cut.train, cut.val)) == END_OF_TEXT.join(
            whole
        )
    else:  # at a separator, before the last document of 27 that are not blank
        ids, separator = corpus.train.ids, cut.train.tokens
        assert np.array_equal(cut.train.ids, ids[:separator]) and np.array_equal(
            cut.val.ids, ids[separator + 1 :]
        )
        assert ids[separator] == cut.vocabulary.end_of_text
        held_out = cut.vocabulary.decode(cut.val.ids).split(END_OF_TEXT)
        assert [document for document in held_out if document.strip()] == [salad(50)]


@pytest.mark.parametrize(("chunk", "flat"), [(1000, True), (1 << 20, False)])
def test_a_text_without_separators_is_not_held_whole(text, monkeypatch, chunk, flat):
    Path(text.train).write_text(salad(10_000))
    monkeypatch.setattr(encode, "CHUNK", chunk)
    longest = [max(len(part.text) for part in side()) for side in prepare.split(text.train)]
    assert (max(longest) <= 2 * chunk < 10_000) is flat


@pytest.mark.parametrize("documents", [1, 7])
def test_a_text_of_few_documents_is_cut_at_95_percent(text, tmp_path, documents):
    whole = [salad(600 // documents, seed) for seed in range(documents)]
    Path(text.train).write_text(END_OF_TEXT.join(whole))
    corpus = opened(replace(text, level="char"), tmp_path / "cache")
    train, val = (corpus.vocabulary.decode(side.ids) for side in (corpus.train, corpus.val))
    assert train + val == END_OF_TEXT.join(whole)
    characters = [len(side.replace(END_OF_TEXT, "")) for side in (train, val)]
    assert characters[1] == sum(characters) // 20


def test_a_validation_text_has_the_tokenizer_of_the_training_text(text, tmp_path):
    val = tmp_path / "val.txt"
    val.write_text("zzyzx xyzzy the hen. " * 20)
    corpus = opened(replace(text, val=str(val)), tmp_path / "cache")
    documents = Path(text.train).read_text().split(END_OF_TEXT)
    expected = Vocabulary.train(documents, 300, "bpe")
    assert corpus.vocabulary.fingerprint == expected.fingerprint
    assert np.array_equal(corpus.val.ids, expected.encode([val.read_text()])[0])


def test_token_files_give_what_their_text_gave(text, tmp_path):
    """As .npy and as raw uint16, with and without the tokenizer."""
    made = opened(text, tmp_path / "cache")
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    raw = {side: tmp_path / f"{side}.bin" for side in ("train", "val")}
    for side, path in raw.items():
        np.load(folder / f"{side}.npy").astype("<u2").tofile(path)
    npy = {side: folder / f"{side}.npy" for side in raw}
    for paths, tokenizer in ((npy, ""), (raw, ""), (raw, folder / "tokenizer.json")):
        vocab_size = made.vocabulary.size
        data = replace(
            text, source="tokens", tokenizer=str(tokenizer), vocab_size=vocab_size,
            **{side: str(path) for side, path in paths.items()},
        )  # fmt: skip
        tokens = opened(data, tmp_path / "unused")
        assert tokens.fingerprint == made.fingerprint
        assert np.array_equal(tokens.train[3]["tokens"], made.train[3]["tokens"])
        for one, same in zip(tokens.evaluation, made.evaluation, strict=True):
            assert np.array_equal(one["tokens"], same["tokens"])
        assert (tokens.vocabulary is None) == (not tokenizer)
        assert pickle.loads(pickle.dumps(tokens.train)).ids[7] == made.train.ids[7]
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(("name", "characters"), [("tinystories_sample", 70), ("tinyshakespeare", 65)])
def test_real_texts_open_at_the_level_of_characters(shared, tmp_path, name, characters):
    path = shared / "data" / "text" / f"{name}.txt"
    if not path.is_file():
        pytest.skip(f"no {path.name} (optional sample data)")
    data = LmData(source="text", train=str(path), level="char", vocab_size=characters + 1, context=64)
    corpus = opened(data, tmp_path)
    assert np.count_nonzero(corpus.counts) == characters
    assert (corpus.vocabulary.decode(corpus.train.ids) + corpus.vocabulary.decode(corpus.val.ids)) == (
        path.read_text(encoding="utf-8")
    )
    too_small = replace(data, vocab_size=characters)
    with pytest.raises(UserError, match=rf"vocab_size={characters}: .*{characters + 1}"):
        opened(too_small, tmp_path)
    assert opened(replace(data, vocab_size=2 * characters), tmp_path).fingerprint == corpus.fingerprint


# ---------------------------------------------------------------------------------------------- scores


def test_predictors_that_know_nothing_score_what_they_must(corpus):
    trivial = corpus.trivial([])
    uniform = corpus.score(trivial["uniform"])
    assert uniform["loss"] == pytest.approx(math.log(512)) and uniform["perplexity"] == pytest.approx(512)
    assert [uniform["copy_loss"], uniform["recall_loss"]] == pytest.approx([math.log(512)] * 2)
    unigram = corpus.score(trivial["unigram"])
    assert unigram["loss"] == unigram["unigram_loss"] == uniform["unigram_loss"]
    ids, targets = corpus.train.ids.tolist(), corpus.evaluation[0]["tokens"][:, 1:]
    target = int(targets[2, 3])
    shares = (ids.count(target) + 1) / (len(ids) + 512)
    assert trivial["unigram"][0]["nll"][2, 3] == pytest.approx(-math.log(shares))
    # Near the entropy of the training tokens, and so well below ln 512.
    shares = corpus.counts[corpus.counts > 0] / len(ids)
    entropy = -float(np.sum(shares * np.log(shares)))
    assert unigram["loss"] == pytest.approx(entropy, rel=0.03) and entropy < 0.8 * math.log(512)


def test_a_model_that_copies_and_cannot_recall_is_scored_by_kind(corpus):
    kinds = [batch["kinds"] for batch in corpus.evaluation]
    nll = [np.choose(kind, [2.0, 0.0, 5.0]).astype(np.float32) for kind in kinds]
    scores = corpus.score([{"nll": batch} for batch in nll])
    assert (scores["copy_loss"], scores["recall_loss"], scores["other_loss"]) == (0.0, 5.0, 2.0)
    assert scores["loss"] == pytest.approx(np.mean([batch.mean() for batch in nll]))


def test_a_diverged_model_is_scored_without_a_word(corpus):
    nll = [np.full((8, 64), value, np.float32) for value in (np.nan, np.inf, 1e9, 1.0)]
    assert math.isnan(corpus.score([{"nll": batch} for batch in nll])["loss"])


# ---------------------------------------------------------------------------------------------- the cache


def test_what_is_prepared_is_used_again_and_what_is_damaged_is_not(text, tmp_path, caplog):
    cache = tmp_path / "cache"
    first = opened(text, cache)
    (folder,) = (cache / "tokens").iterdir()
    made_at = (folder / "train.npy").stat().st_mtime_ns
    caplog.clear()  # whoever has a verb in its process hears of the first time, too
    with caplog.at_level(logging.INFO):
        assert opened(text, cache).fingerprint == first.fingerprint
    assert not caplog.records and (folder / "train.npy").stat().st_mtime_ns == made_at

    whole = (folder / "val.npy").read_bytes()
    (folder / "val.npy").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert opened(text, cache).fingerprint == first.fingerprint
    assert (folder / "val.npy").read_bytes() == whole
    assert any("damaged" in record.message for record in caplog.records)


def test_all_that_makes_other_tokens_is_in_the_key(text, tmp_path):
    cache = tmp_path / "cache"
    base = replace(STORIES, stories_characters=20_000, context=8)
    opened(base, cache)
    for count, change in enumerate(
        [{"stories_seed": 1}, {"stories_characters": 30_000}, {"vocab_size": 300}, {"level": "char"}], start=2
    ):
        opened(replace(base, **change), cache)
        assert len(list((cache / "tokens").iterdir())) == count
    opened(replace(base, context=16, eval_batches=2), cache)
    assert len(list((cache / "tokens").iterdir())) == count
    same_name = opened(text, cache).fingerprint
    Path(text.train).write_text(END_OF_TEXT.join(salad(40, seed) for seed in range(1, 41)))
    assert opened(text, cache).fingerprint != same_name


def test_a_generator_that_changes_is_not_served_from_the_cache(tmp_path, monkeypatch):
    data = replace(STORIES, stories_characters=20_000, context=8)
    opened(data, tmp_path)
    monkeypatch.setattr(prepare, "GENERATOR", prepare.GENERATOR + 1)
    opened(data, tmp_path)
    assert len(list((tmp_path / "tokens").iterdir())) == 2


# --------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def bad(tmp_path) -> Path:
    """A folder of files that are wrong, and good ones to put beside them."""
    ids = np.arange(100, dtype=np.uint16)
    np.save(tmp_path / "good.npy", ids)
    np.save(tmp_path / "same.npy", ids.astype(np.int64))
    np.save(tmp_path / "other.npy", ids[::-1])
    np.save(tmp_path / "short.npy", ids[:16])
    (tmp_path / "torn.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:-50])
    (tmp_path / "good.txt").write_text(salad(600))
    (tmp_path / "copy.txt").write_text(salad(600))
    (tmp_path / "short.txt").write_text("the hen")
    (tmp_path / "new.txt").write_text("the hen né the fox " * 20)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"the hen \xff\xfe")
    Vocabulary.train([salad(600)], 300, "bpe").save(tmp_path / "tokenizer.json")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "given", "message"),
    [
        ("tokens", {"train": "good.npy", "val": "same.npy"}, "val=.*same as data.train"),
        ("tokens", {"train": "good.npy", "val": "short.npy"}, "data.val=.*16 tokens.* 17 "),
        ("tokens", {"train": "torn.npy", "val": "good.npy"}, "data.train=.*torn"),
        ("tokens", {"train": "good.npy", "val": "absent.npy"}, "data.val=.*cannot be read"),
        ("tokens", {"train": "good.npy"}, "data.val is empty: data.source=tokens"),
        ("tokens", {"train": "good.npy", "val": "other.npy", "vocab_size": 60}, "data.train=.*id 60 at position 60"),
        ("text", {}, "data.train is empty: data.source=text"),
        ("text", {"train": "absent.txt"}, "data.train=.*cannot be read: No such file"),
        ("text", {"train": "empty.txt"}, "empty.txt: is empty"),
        ("text", {"train": "binary.txt"}, "binary.txt: byte 8 "),
        ("text", {"train": "good.txt", "val": "copy.txt"}, "val=.*same as data.train"),
        ("text", {"train": "good.txt", "val": "short.txt"}, r"data.val=.*short.txt: makes \d+ tokens for validation"),
        ("text", {"train": "short.txt"}, r"data.train=.*short.txt: makes \d+ tokens for training, .* needs 17"),
        ("text", {"train": "good.txt", "vocab_size": 256}, "vocab_size=256: must be 257 or more at level bpe"),
        ("text", {"train": "good.txt", "level": "char", "vocab_size": 10}, r"vocab_size=10: .*\d+"),
        ("text", {"train": "good.txt", "val": "new.txt", "level": "char"}, "'é'"),
        ("text", {"train": "good.txt", "tokenizer": "tokenizer.json", "vocab_size": 400}, r"=400: .*has \d+ ids"),
        ("text", {"train": "good.txt", "tokenizer": "good.txt"}, "good.txt: is not a tokenizer"),
        ("stories", {"train": "good.txt"}, "data.train=.*is read by data.source=text and tokens, not by stories"),
        ("text", {"train": "good.txt", "stories_seed": 7}, "seed=7: is read by data.source=stories, not by text"),
        ("tokens", {"stories_characters": 7}, "stories_characters=7: .*, or leave it at 3000000"),
        ("tokens", {"train": "good.npy", "val": "other.npy", "level": "char"}, "level='char': .* not by tokens"),
        ("text", {"train": "good.txt", "tokenizer": "tokenizer.json", "level": "char"}, "level='char': is not read"),
        ("stories", {"level": "char", "vocab_size": 1}, "vocab_size=1: must be 2 or more at level char"),
        ("stories", {"stories_characters": 0}, "data.stories_characters=0: must be 1 or more"),
        ("stories", {"stories_characters": 10}, "data.stories_characters=10: is a single story"),
        ("stories", {"stories_characters": 2000, "context": 400}, r"data.stories_characters=2000: makes \d+ tokens"),
        ("stories", {"stories_seed": -1}, "data.stories_seed=-1: must be 0 or more"),
    ],
)  # fmt: skip
def test_bad_data_is_named_in_one_line(bad, source, given, message):
    files = {
        key: str(bad / value) if key in ("train", "val", "tokenizer") else value
        for key, value in given.items()
    }
    data = LmData(**{"source": source, "vocab_size": 300, "context": 16, "eval_batches": 1, **files})
    with pytest.raises(UserError, match=message) as error:
        opened(data, bad / "cache")
    assert "\n" not in str(error.value)
    leftovers = [path for path in (bad / "cache").rglob("*") if path.is_dir() and path.name.startswith(".")]
    assert leftovers == []


def test_good_files_beside_the_bad_ones_open(bad):
    """The control: what the cases above share is not what is wrong with them."""
    tokenizer = {
        "tokenizer": str(bad / "tokenizer.json"),
        "vocab_size": Vocabulary.load(bad / "tokenizer.json").size,
    }
    for data in (
        LmData(
            source="tokens",
            train=str(bad / "good.npy"),
            val=str(bad / "other.npy"),
            vocab_size=300,
            context=16,
        ),
        LmData(source="text", train=str(bad / "good.txt"), vocab_size=300, context=16),
        LmData(source="text", train=str(bad / "good.txt"), context=16, **tokenizer),
        LmData(source="stories", stories_characters=2000, stories_seed=7, vocab_size=300, context=16),
    ):
        assert len(opened(data, bad / "cache").train) > 0


@pytest.mark.parametrize(("vocab_size", "made"), [(256, 0), (257, 1)])
def test_what_cannot_work_is_refused_before_anything_is_generated(tmp_path, monkeypatch, vocab_size, made):
    class Generated(Exception):
        pass

    def generated(characters: int, seed: int) -> None:
        raise Generated

    monkeypatch.setattr(prepare, "stories", generated)
    with pytest.raises(Generated if made else UserError):
        opened(replace(STORIES, vocab_size=vocab_size), tmp_path)
