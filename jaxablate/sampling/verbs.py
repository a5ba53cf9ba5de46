"""`jaxablate sample`: its arguments, known before anything heavy is imported."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxablate.errors import UserError

if TYPE_CHECKING:
    from jaxablate.manifest import Manifest
    from jaxablate.sampling.page import Page


@dataclass(frozen=True)
class Options:
    """What to sample from, and how.

    Attributes:
      arms: names; empty for all.
      seeds: of the runs; empty for the first of each arm that has finished.
      prompts: texts to continue; an empty one begins a text.
      temperature: what the logits are divided by; 0 takes the likeliest token.
      top_p: share of the probability among which is drawn.
      tokens: to draw at most.
      sampling_seed: of the draws. They depend on it and on the prompt: they are the same for every arm and seed.
      checkpoint: of each run.
      tokenizer: a tokenizer's JSON file, for data that came without one.
    """

    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    prompts: tuple[str, ...] = ("",)
    temperature: float = 0.8
    top_p: float = 0.95
    tokens: int = 100
    sampling_seed: int = 0
    checkpoint: Literal["best", "final"] = "best"
    tokenizer: str = ""

    def __post_init__(self) -> None:
        t = self.temperature
        if t != 0 and not 1e-6 <= t <= 1e6:
            raise UserError(
                f"--temperature={t}: must be 0 (the likeliest token) or more, between 1e-6 and 1e6"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p={self.top_p}: is a share, above 0 and up to 1 (all tokens)")
        if self.tokens < 1:
            raise UserError(f"--tokens={self.tokens}: must be 1 or more")
        if not 0 <= self.sampling_seed < 2**31:
            raise UserError(f"--sampling-seed={self.sampling_seed}: must be in [0, 2**31)")


def sample_arguments(parser: argparse.ArgumentParser) -> None:
    """What `sample` takes besides a study, arms and seeds."""
    add = parser.add_argument
    what = "text to continue; again for more (default: begin a text)"
    add("--prompt", action="append", default=[], metavar="TEXT", help=what)
    add("--prompt-file", default="", metavar="FILE", help="UTF-8 file with a prompt on each line, instead")
    add("--temperature", type=float, default=Options.temperature, help="0: the likeliest token (default 0.8)")
    what = "draw among the likeliest tokens that have this probability together (default 0.95)"
    add("--top-p", type=float, default=Options.top_p, help=what)
    add("--tokens", type=int, default=Options.tokens, metavar="N", help="to draw at most (default 100)")
    what = "of the draws, which are the same for every arm and seed (default 0)"
    add("--sampling-seed", type=int, default=Options.sampling_seed, metavar="N", help=what)
    add(
        "--checkpoint",
        choices=("best", "final"),
        default=Options.checkpoint,
        help="of each run (default best)",
    )
    add("--tokenizer", default="", metavar="FILE", help="a tokenizer's JSON, for data that came without one")


def sample(args: argparse.Namespace, manifest: Manifest) -> Page:
    """Samples from the finished runs of a frozen study."""
    options = Options(
        arms=tuple(args.arm),
        seeds=tuple(args.seeds),
        prompts=_prompts(args),
        temperature=args.temperature,
        top_p=args.top_p,
        tokens=args.tokens,
        sampling_seed=args.sampling_seed,
        checkpoint=args.checkpoint,
        tokenizer=args.tokenizer,
    )
    from jaxablate.sampling.generate import generate

    return generate(manifest, options)


def _prompts(args: argparse.Namespace) -> tuple[str, ...]:
    if not args.prompt_file:
        return tuple(args.prompt) or Options.prompts
    if args.prompt:
        raise UserError(f"--prompt-file={args.prompt_file}: not allowed with --prompt; drop one of them")
    try:
        text = Path(args.prompt_file).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--prompt-file={args.prompt_file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        what = f"byte {error.start} is not UTF-8; give a text file"
        raise UserError(f"--prompt-file={args.prompt_file}: {what}") from None
    lines = tuple(line for line in text.splitlines() if line.strip())
    if not lines:
        raise UserError(f"--prompt-file={args.prompt_file}: has no prompt; write one on each line")
    return lines
