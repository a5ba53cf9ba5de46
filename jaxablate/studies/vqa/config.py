"""The VQA sections of a run's config. Defaults are those of the document's 8B model.

Imports no jax, so that a study can be declared, listed and reported without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Size = Literal["tiny", "2b", "8b"]
STAGES = (1, 2, 3)  # initial assessment, findings, clinical context


@dataclass(frozen=True)
class VqaModel:
    """A frozen vision-language model, the adapters that are trained beside its decoder, and how they are.

    Attributes:
      size: of Qwen3-VL as published, or `tiny`: the same layers for pictures of 48 x 48 and single characters.
      base: where the frozen parameters come from. `pretrained` (tiny alone) trains the whole model on captions
        first; `folder` reads a Hugging Face checkpoint; `random` draws them, to measure time and memory.
      base_path: of the checkpoint's folder.
      base_steps, base_batch_size, base_learning_rate, base_seed: of the pre-training on captions.
      storage: how the frozen kernels are kept: as numbers, or quantised in blocks. It covers every projection of the
        decoder and of the vision tower but that of the patches, a convolution in the checkpoint; embeddings, head,
        norms and biases are numbers.
      lora_targets: glob patterns over the paths of the decoder's projections.
      inference: an answer at once; or in `three_pass` refined in two further passes, each shown those before.
      answer_tokens: most tokens of an answer, in each pass.
      loop: `scan` compiles one layer of each stack.
    """

    size: Size = "8b"
    base: Literal["pretrained", "folder", "random"] = "folder"
    base_path: str = ""
    base_steps: int = 300
    base_batch_size: int = 32
    base_learning_rate: float = 3e-3
    base_seed: int = 0
    storage: Literal["float", "nf4", "int8"] = "nf4"
    lora_rank: int = 4
    lora_alpha: float = 8.0
    lora_dropout: float = 0.05
    lora_targets: tuple[str, ...] = (
        "decoder/*/attention/q",
        "decoder/*/attention/k",
        "decoder/*/attention/v",
        "decoder/*/attention/out",
    )
    inference: Literal["single", "three_pass"] = "single"
    answer_tokens: int = 20
    attention_impl: str = "flash"
    norm_impl: str = "reference"
    ffn_impl: str = "reference"
    loss_impl: str = "chunked"
    loop: Literal["unrolled", "scan"] = "scan"


@dataclass(frozen=True)
class StageQuestions:
    """Training questions of each stage; the lengths of all schedules follow."""

    stage_1: int = 1341
    stage_2: int = 4023
    stage_3: int = 0

    def of(self, stage: int) -> int:
        """Those of one stage."""
        return (self.stage_1, self.stage_2, self.stage_3)[stage - 1]

    @property
    def total(self) -> int:
        """Those of all stages."""
        return self.stage_1 + self.stage_2 + self.stage_3


@dataclass(frozen=True)
class VqaData:
    """Questions about pictures, the lengths that they are cut to, and which of them train what.

    Attributes:
      source: `synthetic` scenes are drawn; a `folder` holds train, validation and test .jsonl.
      path: of the folder.
      image_root: of the pictures that its lines name; empty: the folder itself.
      scenes, sequences: of synthetic data: scenes of a sequence, and sequences.
      seed: of synthetic data.
      questions: for training, of each stage. Checked when the data is opened.
      epochs: over those questions, in each stage of the training.
      evaluations: of the validation questions, in each epoch.
      regimen: `single` trains one adapter on all questions; `experts` one for each stage, on its questions alone,
        and asks the one of the question's stage; `curriculum` one that goes on from stage to stage.
      stages: those that `experts` and `curriculum` train; one of them alone is a job of its own.
      optimizer_state: of a curriculum's adapter when the next stage begins: Adam's moments anew, or kept.
      warmup_ratio: share of a stage's updates in which its rate rises.
      wording: of the instructions; `short` ones fit into `tiny`.
      max_text: most tokens of a question with its answer, beside the picture's; longer ones are dropped and counted.
      image_tokens: most tokens of a picture, which is shrunk to that.
      buckets: lengths of text that training batches are padded to, in rising order; the last is `max_text`.
      stage_rule: of questions that do not say their stage: by the category first, or in the document's order.
      answers: whether an answer that is not among its candidates is refused, or let pass.
      max_samples: test questions that are asked, the first of the file; 0 for all.
    """

    source: Literal["synthetic", "folder"] = "folder"
    path: str = ""
    image_root: str = ""
    scenes: int = 60
    sequences: int = 15
    seed: int = 2025
    questions: StageQuestions = field(default_factory=StageQuestions)
    epochs: int = 5
    evaluations: int = 1
    regimen: Literal["single", "experts", "curriculum"] = "single"
    stages: tuple[int, ...] = STAGES
    optimizer_state: Literal["fresh", "kept"] = "fresh"
    warmup_ratio: float = 0.03
    wording: Literal["short", "full"] = "full"
    max_text: int = 1024
    image_tokens: int = 1280
    buckets: tuple[int, ...] = (256, 384, 512, 768, 1024)
    stage_rule: Literal["category_first", "faithful"] = "category_first"
    answers: Literal["candidates", "any"] = "candidates"
    max_samples: int = 0


def trained_stages(data: VqaData) -> tuple[int, ...]:
    """The stages that `experts` and `curriculum` train: those asked for that have questions."""
    return tuple(stage for stage in data.stages if data.questions.of(stage))


def epoch_steps(questions: int, batch_size: int) -> int:
    """Updates that it takes to see every question. The batch that ends an epoch may begin the next one.

    The document's ceil(ceil(n / micro-batch) / accumulation) is the same number, whatever the split.
    """
    return math.ceil(questions / batch_size)


def warmup_steps(steps: int, ratio: float) -> int:
    """ceil(ratio * steps), of the number that the ratio is written as."""
    return math.ceil(round(ratio * steps, 6))
