"""Opens what a config names: drawn scenes or a folder of questions, checked and in tokens; and captions."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxablate import cache
from jaxablate.errors import UserError
from jaxablate.studies.vqa import metrics
from jaxablate.studies.vqa.config import STAGES, VqaData, trained_stages
from jaxablate.studies.vqa.data import synthetic
from jaxablate.studies.vqa.data.jsonl import read_questions
from jaxablate.studies.vqa.data.language import Language
from jaxablate.studies.vqa.data.pictures import Pictures, PictureSpec, Survey, survey
from jaxablate.studies.vqa.data.prompts import PASSES
from jaxablate.studies.vqa.data.questions import Question
from jaxablate.studies.vqa.data.rows import Rows
from jaxablate.studies.vqa.data.source import CaptionSource, VqaSource, content_fingerprint
from jaxablate.studies.vqa.data.stages import SEQUENCES, Split, arranged

log = logging.getLogger(__name__)

CAPTIONS_HELD_OUT = 20  # one scene in so many has its captions held out
_WORKERS = 8  # threads that look through the pictures


def open_vqa(
    data: VqaData,
    language: Language,
    spec: PictureSpec,
    cache_dir: Path,
    *,
    eval_batch_size: int,
    answer_tokens: int,
    passes: int = 1,
) -> VqaSource:
    """Find, check and prepare everything `data` names; what it returns can be trained on and asked.

    Args:
      language, spec: what the model makes of texts and pictures.
      cache_dir: below it stay drawn scenes and what is known of pictures, and are used again.
      answer_tokens: most tokens of an answer in each pass; a test prompt must leave room for them.
      passes: of the inference, 1 or 3.

    Raises:
      UserError: one line, for any fault of config or data.
    """
    cache_dir = Path(cache_dir).absolute()
    folder, root = _places(data, cache_dir)
    files: dict[Split, Path] = {split: folder / f"{split}.jsonl" for split in SEQUENCES}
    return open_files(
        files, root, data, language, spec, cache_dir, eval_batch_size=eval_batch_size, answer_tokens=answer_tokens,
        passes=passes,
    )  # fmt: skip


def open_files(
    files: Mapping[Split, Path],
    root: Path,
    data: VqaData,
    language: Language,
    spec: PictureSpec,
    cache_dir: Path,
    *,
    eval_batch_size: int,
    answer_tokens: int,
    passes: int = 1,
) -> VqaSource:
    """As `open_vqa`, of these files instead of those that `data` names: all splits, or the test alone.

    Args:
      root: of the pictures that their lines name.
    """
    questions: dict[Split, tuple[Question, ...]] = {
        split: read_questions(
            file, root, stage_rule=data.stage_rule, answers=data.answers, wording=data.wording
        )
        for split, file in files.items()
    }
    if "train" in questions:
        order = arranged([question.stage for question in questions["train"]])
        questions["train"] = tuple(questions["train"][i] for i in order)
    if data.max_samples:
        questions["test"] = questions["test"][: data.max_samples]

    every = [question.image_filename for each in questions.values() for question in each]
    album = _Album.of(every, root, spec, cache_dir)
    room = answer_tokens  # that a test prompt must leave
    if passes > 1:
        room += language.added_by(PASSES[data.wording], answer_tokens)
    rows: dict[Split, Rows] = {}
    unfit: dict[Split, tuple[int, ...]] = {}
    for split, each in questions.items():
        whole = _rows(
            album,
            language,
            filenames=[question.image_filename for question in each],
            instructions=[question.instruction for question in each],
            answers=[question.answer for question in each],
            stages=[question.stage for question in each],
            max_text=data.max_text,
        )
        needed = whole.text_lengths("prompt") + room if split == "test" else whole.text_lengths("answered")
        fits = needed <= data.max_text
        rows[split], unfit[split] = whole.taken(np.flatnonzero(fits)), tuple(np.flatnonzero(~fits).tolist())
    if "train" in questions:
        _check_counts(data, rows["train"], unfit["train"])
        _check_evaluation(data, rows, files)
    source = VqaSource(
        questions=questions,
        rows=rows,
        unfit=unfit,
        language=language,
        fingerprint=content_fingerprint(
            questions, album.digests, language.fingerprint, spec.fingerprint, data.max_text
        ),
        eval_batch_size=eval_batch_size,
        remarks=tuple(_remarks(questions, unfit, album.digests)),
    )
    for remark in source.remarks:
        log.warning("%s", remark)
    return source


def open_captions(
    data: VqaData, language: Language, spec: PictureSpec, cache_dir: Path, *, eval_batch_size: int
) -> CaptionSource:
    """The captions of the drawn training scenes, those of the last scenes held out.

    Raises UserError for data that has no captions, and for what `open_vqa` does.
    """
    if data.source != "synthetic":
        raise UserError(
            f"data.source={data.source}: has no captions to train a base on; use data.source=synthetic, or another "
            f"model.base"
        )
    cache_dir = Path(cache_dir).absolute()
    folder, root = _places(data, cache_dir)
    captions = synthetic.read_captions(folder)
    filenames = [caption.image_filename for caption in captions]
    album = _Album.of(filenames, root, spec, cache_dir)
    rows = _rows(
        album,
        language,
        filenames=filenames,
        instructions=None,
        answers=[caption.text for caption in captions],
        stages=[0] * len(captions),
        max_text=data.max_text,
    )
    if (longest := rows.text_lengths("answered").max()) > data.max_text:
        raise UserError(
            f"data.max_text={data.max_text}: the longest caption takes {longest} tokens; set it to that or more"
        )
    kept = len(album.number) - max(1, len(album.number) // CAPTIONS_HELD_OUT)
    return CaptionSource(
        rows=rows,
        held_out=int(np.sum(rows.picture >= kept)),
        language=language,
        fingerprint=cache.fingerprint(
            captions, album.digests, language.fingerprint, spec.fingerprint, data.max_text
        ),
        eval_batch_size=eval_batch_size,
    )


def synthetic_questions(data: VqaData) -> tuple[int, int, int]:
    """How many training questions of each stage drawn scenes have, from arithmetic alone."""
    return synthetic.counts(data.scenes, data.sequences)["train"]


def _places(data: VqaData, cache_dir: Path) -> tuple[Path, Path]:
    """The folders of the questions and of the pictures."""
    if data.source == "synthetic":
        try:
            folder = synthetic.written(
                cache_dir / "scenes", scenes_each=data.scenes, sequences=data.sequences, seed=data.seed,
                wording=data.wording, stage_rule=data.stage_rule,
            )  # fmt: skip
        except ValueError as error:
            raise UserError(f"data.sequences={data.sequences}: {error}; use one of them") from None
        return folder, folder
    if not data.path:
        raise UserError(
            "data.path is empty: data.source=folder needs the folder of train.jsonl; give its path"
        )
    return Path(data.path), Path(data.image_root or data.path)


@dataclass(frozen=True)
class _Album:
    """All pictures that some questions are about, looked through.

    Attributes:
      number: of each picture, by its file's name, in the order of the names.
    """

    pictures: Pictures
    survey: Survey
    number: Mapping[str, int]

    @classmethod
    def of(cls, filenames: Iterable[str], root: Path, spec: PictureSpec, cache_dir: Path) -> _Album:
        """Raises UserError, one line, for the first picture that cannot be read."""
        names = sorted(set(filenames))
        paths = tuple(root / name for name in names)
        found = survey(paths, spec, cache_dir / "pictures", workers=_WORKERS)
        return cls(Pictures(paths, spec), found, {name: i for i, name in enumerate(names)})

    @property
    def digests(self) -> dict[str, str]:
        """Of each picture, by its file's name."""
        return dict(zip(self.number, self.survey.digests, strict=True))


class _Texts:
    """The ids of different texts, each once: instructions are few, and questions many."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}
        self.ids: list[np.ndarray] = []

    def numbers(self, texts: Iterable[str], encode: Callable[[str], np.ndarray]) -> np.ndarray:
        """Which of `ids` each of the texts is, int32 (texts,). A text has the same ids in every call."""
        found = []
        for text in texts:
            if text not in self._number:
                self._number[text] = len(self.ids)
                self.ids.append(encode(text))
            found.append(self._number[text])
        return np.array(found, np.int32)


def _rows(
    album: _Album,
    language: Language,
    *,
    filenames: Sequence[str],
    instructions: Sequence[str] | None,
    answers: Sequence[str],
    stages: Sequence[int],
    max_text: int,
) -> Rows:
    """Rows in the order given. Without instructions nothing stands between a picture and its text."""
    prompts, endings = _Texts(), _Texts()
    if instructions is None:
        asked = prompts.numbers([""] * len(answers), lambda _: language.caption())
    else:
        asked = prompts.numbers(instructions, language.prompt)
    answered = endings.numbers(answers, language.answer) + np.int32(len(prompts.ids))
    spec, where = album.pictures.spec, np.array([album.number[name] for name in filenames], np.int32)
    visual = album.survey.grids.prod(axis=1) // spec.vision.merge**2
    return Rows(
        pictures=album.pictures,
        texts=(*prompts.ids, *endings.ids),
        prompt=asked,
        answer=answered,
        picture=where,
        visual=visual[where].astype(np.int32),
        stage=np.array(stages, np.int32),
        row=np.arange(len(where), dtype=np.int32),
        image_token=language.image_token,
        width=spec.image_tokens + max_text,
    )


def _check_counts(data: VqaData, train: Rows, unfit: Sequence[int]) -> None:
    """Raises UserError if the training questions are not as many as the config says, which its schedules follow."""
    there = Counter(train.stage.tolist())
    for stage in STAGES:
        if (said := data.questions.of(stage)) != there[stage]:
            dropped = f" after {len(unfit)} too long ones were dropped" if unfit else ""
            raise UserError(
                f"data.questions.stage_{stage}={said}: there are {there[stage]} training questions of stage {stage}"
                f"{dropped}; set data.questions.stage_{stage}={there[stage]}"
            )


def _check_evaluation(data: VqaData, rows: Mapping[Split, Rows], files: Mapping[Split, Path]) -> None:
    """Raises UserError if a stage that is trained on its own has no validation question, or nothing is left to ask."""
    trained = trained_stages(data)
    alone = [STAGES] if data.regimen == "single" else [(stage,) for stage in trained]
    for stages in alone:
        if not np.isin(rows["validation"].stage, stages).any():
            what = f"of stage {stages[0]} " if stages is not STAGES else ""
            raise UserError(
                f"{files['validation']}: has no question {what}that fits data.max_text={data.max_text}, to choose the "
                f"best checkpoint by; add some, or train on other data.stages"
            )
    asked = trained if data.regimen == "experts" else STAGES
    if trained and not np.isin(rows["test"].stage, asked).any():
        first = (
            f"the first data.max_samples={data.max_samples} questions"
            if data.max_samples
            else "the questions"
        )
        raise UserError(
            f"{files['test']}: none of {first} that fit data.max_text={data.max_text} is of stage "
            f"{', '.join(map(str, asked))}, which the run answers; give it others"
        )


def _remarks(
    questions: Mapping[Split, Sequence[Question]],
    unfit: Mapping[Split, Sequence[int]],
    digests: Mapping[str, str],
) -> Iterator[str]:
    for name, truths in sorted(metrics.spreads(questions["test"]).items()):
        if len(truths) == 1:
            ((constant, count),) = truths
            yield f"all {count} test answers of question type '{name}' are '{constant}': nothing is measured on it"
    seen = {
        split: {digests[question.image_filename] for question in each} for split, each in questions.items()
    }
    for split in ("validation", "test"):
        if "train" in seen and (shared := seen[split] & seen["train"]):
            yield f"{len(shared)} of the {len(seen[split])} pictures of {split} are trained on too"
    for split, rows in unfit.items():
        if rows:
            fate = "not asked, and count as wrong" if split == "test" else "left out"
            yield f"{len(rows)} questions of {split} are too long for data.max_text and are {fate}"
