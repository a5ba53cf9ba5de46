"""What was sampled, as text for a terminal and as data. Imports no jax."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxablate.analysis.terminal import as_text

if TYPE_CHECKING:
    from jaxablate.sampling.verbs import Options

_WIDTH = 100  # of what goes into a pipe


@dataclass(frozen=True)
class Sample:
    """What a run wrote after a prompt."""

    prompt: int  # its index
    arm: str
    seed: int
    learning_rate: float
    run: str
    step: int  # of the checkpoint
    text: str  # without the prompt and without the end-of-text token
    tokens: int
    ended: str  # why: limit, end of text, context full


@dataclass(frozen=True)
class Page:
    """What all arms of a study wrote; `notes` say what was left out or cut."""

    study: str
    path: Path
    options: Options
    samples: tuple[Sample, ...]
    notes: tuple[str, ...]

    exit_code = 0

    def to_dict(self) -> dict[str, Any]:
        """As data, for `--json`."""
        asked: Mapping[str, Any] = asdict(self.options)
        how = ("temperature", "top_p", "tokens", "sampling_seed", "checkpoint")
        return {
            "study": self.study,
            **{name: asked[name] for name in how},
            "prompts": list(self.options.prompts),
            "samples": [asdict(sample) for sample in self.samples],
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """A table for each prompt, with a row for each run."""
        asked = self.options
        how = "the likeliest tokens" if asked.temperature == 0 else f"temperature {asked.temperature:g}"
        nucleus = f", top-p {asked.top_p:g}" if asked.temperature and asked.top_p < 1 else ""
        draws = f", sampling seed {asked.sampling_seed}" if asked.temperature else ""
        head = f"{self.study}   {self.path}   {how}{nucleus}{draws}, {asked.checkpoint} checkpoints"
        tables = [self._table(number) for number in range(len(asked.prompts))]
        return "\n\n".join([head, *tables, *(["\n".join(self.notes)] if self.notes else [])])

    def _table(self, number: int) -> str:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        prompt = self.options.prompts[number]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True)
        for name in ("arm", "seed", "step"):
            table.add_column(name, no_wrap=True, justify="left" if name == "arm" else "right")
        table.add_column("text", ratio=1)
        table.add_column("ended by", no_wrap=True)
        for sample in self.samples:
            if sample.prompt == number:
                numbers = (str(sample.seed), str(sample.step))
                table.add_row(sample.arm, *numbers, Text(shown(sample.text)), sample.ended)
        width = shutil.get_terminal_size((_WIDTH, 24)).columns
        title = f"prompt {number + 1}: {shown(prompt)}" if prompt else f"prompt {number + 1}: (none)"
        return "\n".join([title, as_text(table, max(width, 60))])


def shown(text: str) -> str:
    """Text with all that a terminal would not print, but line breaks, escaped: a model may write any byte."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
