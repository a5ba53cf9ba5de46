"""Asks an adapter the questions of a file, and writes what it answered as the document's result file.

    python -m jaxablate.studies.vqa.evaluate --model_path=adapters/exp2 --base_model=models/Qwen3-VL-8B-Instruct \\
        --test_data=data/test.jsonl --image_dir=data/images --output=results_exp2.json --max_samples=100

Adapters are folders that `export` or peft wrote. Three experts are given as --model_stage1, --model_stage2 and
--model_stage3, and each question goes to the one of its stage. A run asks its own test questions when it ends, in
the same way; this is for other questions, and for adapters from elsewhere.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxablate.errors import UserError
from jaxablate.studies.vqa import command
from jaxablate.studies.vqa.config import STAGES, VqaData, VqaModel

if TYPE_CHECKING:  # --help waits for none of these
    from jaxablate.config import RunConfig
    from jaxablate.studies.vqa.results import Answers

logger = logging.getLogger(__name__)

EPILOG = "--config.PATH=VALUE overrides a field of the config: --config.model.lora_rank=8\n"
SINGLE = 0  # the key of an adapter that is asked about every stage


@dataclass(frozen=True)
class Asked:
    """What to evaluate.

    Attributes:
      adapters: folders, by the stage whose questions each is asked; one alone, as `SINGLE`, is asked all.
      test_data: a file of questions.
      image_dir: of the pictures that its lines name.
    """

    adapters: Mapping[int, Path]
    test_data: Path
    image_dir: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, evaluates, writes the result file; returns the exit code."""
    parser = command.parser("evaluate", "Ask an adapter the questions of a file.", EPILOG)
    add = parser.add_argument
    add("--model_path", type=Path, metavar="DIR", help="the adapter's folder")
    for stage in STAGES:
        add(f"--model_stage{stage}", type=Path, metavar="DIR", help=f"instead: the expert of stage {stage}")
    add(
        "--test_data",
        type=Path,
        required=True,
        metavar="FILE",
        help="questions, one JSON object on each line",
    )
    add("--image_dir", type=Path, metavar="DIR", help="of their pictures (default: where the questions lie)")
    add("--output", type=Path, required=True, metavar="FILE", help="the result file to write")
    add(
        "--base_model",
        default="",
        metavar="DIR",
        help="folder of the base's checkpoint (default: tiny's own base)",
    )
    add(
        "--max_samples",
        type=int,
        default=0,
        metavar="N",
        help="the first questions of the file (default: all)",
    )
    add(
        "--config", default="", metavar="FILE.py[:ARG]",
        help="of the model and how it is asked (default: configs/vqa.py of the base's size; an arm such as "
        "exp5_sequential_cot asks in three passes)",
    )  # fmt: skip
    args, rest = parser.parse_known_args(argv)
    valid = [flag for action in parser._actions for flag in action.option_strings]
    return command.carried_out(lambda: _evaluate(args, rest, valid))


def _evaluate(args: argparse.Namespace, rest: Sequence[str], valid: Sequence[str]) -> str:
    from jaxablate import config, disk
    from jaxablate.studies.vqa.report.runs import Evaluation, Finished
    from jaxablate.studies.vqa.report.schema import encoded

    overrides = config.read_overrides(rest, valid)
    asked = Asked(_adapters(args), args.test_data, args.image_dir or args.test_data.parent)
    own = {"data.max_samples": str(args.max_samples)}
    if args.base_model:
        own |= {"model.base": "folder", "model.base_path": args.base_model}
    single = SINGLE in asked.adapters
    own["data.regimen"] = "single" if single else "experts"
    own["data.stages"] = str(STAGES if single else tuple(asked.adapters))
    spec = args.config or f"configs/vqa.py:exp1_random,scale={_size(args.base_model)}"
    run = config.load(spec, [*own.items(), *overrides]).base
    if not args.output.parent.is_dir():  # said now, and not when everything has been asked
        raise UserError(f"--output={args.output}: there is no folder {args.output.parent}; make it first")
    answers = evaluate(run, asked)
    done = Finished(args.output.stem, run.seed, answers, run.to_dict())
    text = encoded(done, Evaluation(answers.questions, (), ()))
    disk.write_bytes(args.output, text.encode())
    found = json.loads(text)
    return f"{found['correct']} of {found['total']} right, {found['accuracy']:.2f} %: {args.output}"


def _adapters(args: argparse.Namespace) -> Mapping[int, Path]:
    given: dict[int, Path | None] = {stage: getattr(args, f"model_stage{stage}") for stage in STAGES}
    experts = {stage: path for stage, path in given.items() if path is not None}
    single: Path | None = args.model_path
    if single is None:
        if not experts:
            raise UserError("--model_path: missing; give an adapter's folder, or --model_stage1, 2 and 3")
        return experts
    if experts:
        raise UserError(
            f"--model_path={single}: not allowed with --model_stage{min(experts)}; drop one of them"
        )
    return {SINGLE: single}


def _size(base_model: str) -> str:
    """The name of a checkpoint's size; `tiny` of none."""
    if not base_model:
        return "tiny"
    from jaxablate.studies.vqa.qwen3vl.config import SIZES, read_config

    found = read_config(base_model)
    for name, sizes in SIZES.items():
        if (sizes.text.dim, sizes.text.depth) == (found.text.dim, found.text.depth):
            return name
    raise UserError(
        f"--base_model={base_model}: is of none of the sizes {', '.join(SIZES)}; give a published checkpoint"
    )


def evaluate(run: RunConfig[VqaModel, VqaData], asked: Asked) -> Answers:
    """The answers to every question of a file, as a run keeps those to its test questions.

    Args:
      run: its model and its wording; of its data nothing else is used, but for a base that is trained here.

    Raises:
      UserError: an adapter, the base, a question or a picture is missing, damaged or of something else.
    """
    import flax.linen as nn
    import jax

    from jaxablate import config, xla
    from jaxablate.inputs import load_base
    from jaxablate.studies.vqa import adapters
    from jaxablate.studies.vqa.examination import Examination
    from jaxablate.studies.vqa.results import Answers
    from jaxablate.studies.vqa.task import VqaTask

    task = VqaTask(run, jax.default_backend())
    cache = config.cache_dir(run.host)
    xla.keep_compiled(cache)
    # First what is quickly read, and most often wrong.
    read = {stage: adapters.read(path, run.model, run.data) for stage, path in asked.adapters.items()}
    source = task.open_test(asked.test_data, asked.image_dir, cache)
    experts = SINGLE not in read
    exam = Examination(source, tuple(read) if experts else STAGES, run.model.answer_tokens)
    if unasked := len(source.questions_of("test")) - len(exam.numbers):
        absent = {question.stage for question in source.questions_of("test")} - set(read)
        flags = ", ".join(f"--model_stage{stage}" for stage in sorted(absent))
        raise UserError(f"{flags}: missing; {asked.test_data} has {unasked} questions of it")
    if not exam.batches:
        raise UserError(
            f"{asked.test_data}: no question fits into data.max_text={run.data.max_text}; raise that"
        )
    params = {f"expert_{stage}": adapter for stage, adapter in read.items()} if experts else read[SINGLE]
    variables = jax.device_put({"params": nn.unbox(params), **load_base(task, cache)})
    conclude, outputs = jax.jit(task.conclude), []
    for done, batch in enumerate(exam.batches):
        outputs.append(jax.device_get(conclude(variables, batch)))
        logger.info("%d of %d batches", done + 1, len(exam.batches))
    return Answers.of(exam.keep(outputs))


if __name__ == "__main__":
    sys.exit(main())
