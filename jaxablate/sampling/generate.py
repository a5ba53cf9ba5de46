"""Text from the checkpoints of a study's finished runs: one compiled program for the seeds and prompts of an arm."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxablate import config, decoding, trained, xla
from jaxablate.config import Cohort, import_task
from jaxablate.decoding import Continued, continue_prompts
from jaxablate.errors import UserError
from jaxablate.inputs import Inputs, load_base
from jaxablate.manifest import Manifest
from jaxablate.sampling.page import Page, Sample
from jaxablate.sampling.verbs import Options
from jaxablate.study import Run
from jaxablate.task import Source, TextTask, Variables
from jaxablate.text.tokenizer import Vocabulary
from jaxablate.worker import rebuild

logger = logging.getLogger(__name__)

Ids = Sequence[int] | np.ndarray
ENDED = {decoding.LIMIT: "limit", decoding.END: "end of text", decoding.FULL: "context full"}


@dataclass(frozen=True)
class Chosen:
    """Finished runs by their arm, in the study's order, and what had to be left out."""

    runs: Mapping[str, Sequence[Run]]
    notes: tuple[str, ...]


def choose(manifest: Manifest, options: Options) -> Chosen:
    """The runs to sample from: those of the asked seeds, or the first of each arm that has finished.

    Raises:
      UserError: no such arm or seed, or nothing has finished.
    """
    study = manifest.study
    for seed in options.seeds:
        if seed not in study.seeds:
            valid = ", ".join(map(str, study.seeds))
            raise UserError(f"--seeds={seed}: is no seed of study {study.name}'s results; valid: {valid}")
    chosen: dict[str, list[Run]] = {}
    notes: list[str] = []
    for arm in study.select(arms=options.arms):
        states = {
            run: manifest.run_dir(run).state()
            for run in manifest.runs
            if run.arm == arm.name and run.phase == "confirm" and run.seed in (options.seeds or study.seeds)
        }
        done = [run for run, state in states.items() if state == "done"]
        if done:
            chosen[arm.name] = done if options.seeds else done[:1]
        if not states:
            notes.append(f"{arm.name}: left out, since no learning rate has been chosen for it")
        elif options.seeds or not done:
            notes += _left_out(arm.name, states)
    if not chosen:
        raise UserError(
            f"{manifest.path}: no finished run to sample from ({'; '.join(notes)}); run the study first"
        )
    return Chosen(chosen, tuple(notes))


def _left_out(arm: str, states: Mapping[Run, str]) -> list[str]:
    """Which seeds are not done, by their state."""
    by_state: dict[str, list[int]] = {}
    for run, state in states.items():
        if state != "done":
            by_state.setdefault(state, []).append(run.seed)
    return [
        f"{arm}: left out, {state}: seed {', '.join(map(str, seeds))}" for state, seeds in by_state.items()
    ]


def generate(manifest: Manifest, options: Options) -> Page:
    """Continues every prompt with every chosen run.

    Raises:
      UserError: there are none (see `choose`), the study's task gives no text, a checkpoint or the data is not
        what it was, or a prompt cannot be written in its ids.
    """
    chosen = choose(manifest, options)
    notes, samples = list(chosen.notes), []
    sources: dict[str, Source] = {}
    for runs in chosen.runs.values():
        cohort = rebuild(manifest, runs, {})
        base = cohort.base
        make = import_task(base.task)
        if not issubclass(make, TextTask):
            raise UserError(f"study {manifest.study.name}: its task gives no text; sample a language model's")
        cache = config.cache_dir(base.host)
        xla.keep_compiled(cache)
        task = make(base, jax.default_backend())
        key = config.canonical([base.task, base.to_dict()["data"]])
        if key not in sources:
            sources[key] = task.open(cache)
        found = _Arm(task, Inputs(sources[key], load_base(task, cache)), options)
        notes += found.notes
        samples += found.generate(manifest, runs, cohort)
    return Page(
        study=manifest.study.name,
        path=manifest.path,
        options=options,
        samples=tuple(samples),
        notes=tuple(dict.fromkeys(notes)),
    )


class _Arm:
    """The prompts as an arm's model is given them."""

    def __init__(self, task: TextTask[Any, Any], given: Inputs, options: Options):
        self.task, self.given, self.options = task, given, options
        self.vocabulary = _vocabulary(task, given.source, options.tokenizer)
        self.notes: list[str] = []
        self.prompts = [
            np.array(self._encode(number, text), np.int32)
            for number, text in enumerate(options.prompts, start=1)
        ]

    def _encode(self, number: int, prompt: str) -> Ids:
        try:
            if not prompt:
                return self.task.opening(self.given.source, self.vocabulary)
            ids = self.vocabulary.encode([prompt])[0]
        except UserError as error:
            raise UserError(f"--prompt='{prompt}': {error}") from None
        context, limit = self.task.context, self.options.tokens
        if not len(ids):
            raise UserError(f"--prompt='{prompt}': the tokenizer makes no token of it; give another")
        # Room for the tokens that are asked for, but never at the cost of more than half of the context.
        # The last of them needs none: nothing is drawn behind it.
        kept = max(context + 1 - limit, context // 2)
        if len(ids) <= kept:
            return ids
        self.notes.append(
            f"prompt {number}: its last {kept} of {len(ids)} tokens are used, to leave room in the context of {context}"
        )
        return ids[-kept:]

    def generate(self, manifest: Manifest, runs: Sequence[Run], cohort: Cohort) -> list[Sample]:
        """Every prompt continued by every run."""
        members = []
        for run, own in zip(runs, cohort.runs, strict=True):
            where = manifest.run_dir(run)
            members.append(trained.restore(self.task, own, where, self.options.checkpoint))
            if members[-1].data != self.given.fingerprint:
                raise UserError(
                    f"{where.path}: was trained on other data than its config now names, or on another base, "
                    f"whose ids may mean other text; restore them"
                )
        seeds = ", ".join(str(run.seed) for run in runs)
        logger.info("%s: %d prompts, seed %s", runs[0].arm, len(self.prompts), seeds)
        found = continue_with_members(
            self.task,
            [member.variables for member in members],
            self.prompts,
            row_keys(self.options),
            base=self.given.base,
            vocabulary=self.vocabulary,
            options=self.options,
        )
        texts = [
            self.vocabulary.decode(tokens[:length])
            for tokens, length in zip(found.tokens, found.lengths, strict=True)
        ]
        return [
            Sample(
                prompt=row % len(self.prompts),
                arm=run.arm,
                seed=run.seed,
                learning_rate=run.learning_rate,
                run=run.id,
                step=members[m].step,
                text=texts[row],
                tokens=int(found.lengths[row]),
                ended=ENDED[int(found.ended[row])],
            )
            for m, run in enumerate(runs)
            for row in range(m * len(self.prompts), (m + 1) * len(self.prompts))
        ]


def _vocabulary(task: TextTask[Any, Any], source: Source, file: str) -> Vocabulary:
    own = task.vocabulary(source)
    if own is not None:
        if file:
            raise UserError(f"--tokenizer={file}: the study's data has its own tokenizer; leave that out")
        return own
    if not file:
        raise UserError(
            "config.data.tokenizer is empty, and tokens alone say nothing of their text; give --tokenizer=FILE"
        )
    return Vocabulary.load(file)


def row_keys(options: Options) -> jax.Array:
    """A random key for each prompt: of the sampling seed and of what it says, so that its place does not matter.

    A prompt that is given again gets other draws.
    """
    keys, before = [], dict.fromkeys(options.prompts, 0)
    for prompt in options.prompts:
        own = jax.random.fold_in(
            jax.random.key(options.sampling_seed), np.uint32(zlib.crc32(prompt.encode()))
        )
        keys.append(jax.random.fold_in(own, before[prompt]))
        before[prompt] += 1
    return jnp.stack(keys)


def continue_with_members(
    task: TextTask[Any, Any],
    members: Sequence[Variables],
    prompts: Sequence[Ids],
    keys: jax.Array,
    *,
    base: Variables,
    vocabulary: Vocabulary,
    options: Options,
) -> Continued:
    """Every prompt continued by every member's variables, and the base that they share.

    Rows are in order of the members, then of the prompts.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    padded = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt

    def by_member(rows: jax.Array) -> jax.Array:
        return rows.reshape(len(members), len(prompts), *rows.shape[1:])

    def all_rows(of_members: jax.Array) -> jax.Array:
        return of_members.reshape(-1, *of_members.shape[2:])

    def program(
        own: Variables, base: Variables, rows: jax.Array, lengths: jax.Array, keys: jax.Array
    ) -> Continued:
        def of_each(method: Callable[..., Any], *rest: Any) -> Any:
            return jax.vmap(lambda own, *rest: method({**own, **base}, *rest))(own, *rest)

        def fill(tokens: jax.Array, last: jax.Array) -> tuple[jax.Array, Any]:
            logits, cache = of_each(task.fill, by_member(tokens), by_member(last))
            if vocabulary.size > logits.shape[-1]:
                raise UserError(
                    f"--tokenizer={options.tokenizer}: has {vocabulary.size} ids, and the model {logits.shape[-1]}; "
                    f"give the tokenizer that made the study's tokens"
                )
            return all_rows(logits), cache

        def extend(cache: Any, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any]:
            logits, cache = of_each(task.extend, cache, by_member(tokens), by_member(positions))
            return all_rows(logits), cache

        return continue_prompts(
            fill,
            extend,
            jnp.tile(rows, (len(members), 1)),
            jnp.tile(lengths, len(members)),
            jnp.tile(keys, len(members)),
            limit=options.tokens,
            context=task.context,
            size=vocabulary.size,
            ends=() if vocabulary.end_of_text is None else (vocabulary.end_of_text,),
            temperature=options.temperature,
            top_p=options.top_p,
        )

    variables = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    return jax.device_get(jax.jit(program)(variables, base, padded, lengths, keys))
