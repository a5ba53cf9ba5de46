"""`jaxablate data tokenize`: its arguments, known before anything heavy is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxablate.errors import UserError

if TYPE_CHECKING:
    from jaxablate.text.tokenize import Tokenized

LEVELS = ("bpe", "char")
_VOCAB_SIZE = 10_000


def tokenize_arguments(parser: argparse.ArgumentParser) -> None:
    """What `data tokenize` takes."""
    add = parser.add_argument
    add("texts", metavar="TEXT", nargs="+", help="UTF-8 files; documents are separated by <|endoftext|>")
    add("--out", required=True, metavar="FILE.npy", help="the ids; FILE.tokenizer.json is written beside it")
    add(
        "--tokenizer", default="", metavar="FILE", help="a tokenizer's JSON (default: train one on the texts)"
    )
    help = f"ids of a tokenizer to be trained, at most (default {_VOCAB_SIZE})"
    add("--vocab-size", type=int, metavar="N", help=help)
    add("--level", choices=LEVELS, help="of a tokenizer to be trained (default bpe: byte pairs)")


def tokenize(args: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> Tokenized:
    """Tokenizes texts, with a tokenizer that it is given or trains."""
    if overrides:
        raise UserError("--workdir, --config.PATH: text belongs to no study; leave them out")
    if args.tokenizer and (args.vocab_size is not None or args.level):
        raise UserError(
            f"--tokenizer={args.tokenizer}: has its own size and level; leave out --vocab-size and --level"
        )
    from jaxablate.text.tokenize import Options, tokenize

    options = Options(
        texts=tuple(Path(text) for text in args.texts),
        out=Path(args.out),
        tokenizer=Path(args.tokenizer) if args.tokenizer else None,
        vocab_size=_VOCAB_SIZE if args.vocab_size is None else args.vocab_size,
        level=args.level or "bpe",
    )
    return tokenize(options)
