"""lminf expand-vocab MODEL --text FILES --tokens 1000 --out DIR: more tokens for a language.

The texts of a language that a tokenizer splits finely get tokens of their own, whose rows are made
of those of the old ones. DIR is a folder as transformers and `lminf` read it.
"""

import argparse
import typing

import numpy as np

from lminf import checkpoints
from lminf.attention.policy import FULL
from lminf.commands import _model
from lminf.data import documents
from lminf.errors import InputError
from lminf.run.progress import Progress
from lminf.surgery.vocab_map import Rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a table name, a folder, a .gguf file, owner/name")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILES",
                        help="files and folders of text, JSON or parquet")  # fmt: skip
    parser.add_argument("--field", default="text", help="of JSON and parquet that holds the text "
                        "(text)")  # fmt: skip
    parser.add_argument("--tokens", type=int, required=True,
                        help="to add; up to seven more fill tables to a multiple of 8")  # fmt: skip
    parser.add_argument("--rows", choices=typing.get_args(Rows), default="align",
                        help="what new rows are made of: the old tokens that stand in their place "
                        "(align), that they are merged from, that spell them (mean), that are used "
                        "alike (focus), or noise; default: align")  # fmt: skip
    parser.add_argument("--seed", type=_model.seed, default=0, help="of rows that are drawn (0)")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")


def run(args: argparse.Namespace) -> None:
    if args.tokens < 1:
        raise InputError(f"--tokens={args.tokens}: give at least 1")
    checkpoints.check_save(args.out)
    sources = documents.find(args.text)
    documents.check(args.text)
    texts = [
        piece.text for source in sources for piece in documents.read(source, field=args.field)
        if piece.text
    ]  # fmt: skip
    from lminf.lm.expand_vocab import expand_vocab
    from lminf.lm.lm import LM

    with Progress(0, label="reading", unit="tensors") as progress:
        lm = LM.from_pretrained(args.model, progress=progress.show)
    expanded = expand_vocab(lm, texts, tokens=args.tokens, rows=args.rows, seed=args.seed)
    policy = None if expanded.policy == FULL else expanded.policy
    checkpoints.save(
        args.out,
        checkpoints.Checkpoint(
            expanded.spec, expanded.params, expanded.tokenizer, args.model, policy
        ),
    )
    tokens_before, tokens_after = (
        np.mean([len(each.tokenizer.encode(text)) for text in texts]) for each in (lm, expanded)
    )
    added = expanded.tokenizer.vocab_size - lm.tokenizer.vocab_size
    print(
        f"{args.out}: {added:,} tokens more; a text has {tokens_after:,.1f} tokens, "
        f"{tokens_before:,.1f} before"
    )
