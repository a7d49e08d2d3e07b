"""lminf data PATHS: what token stores or texts hold, and what data plans make of them.

PATHS are separated by commas, as in --config.data.path of train_lm; --plan may be given many times.
"""

import argparse
import dataclasses
import json
import sys
from typing import Any

import numpy as np
from rich.console import Console

from lminf.commands.tokenize import BYTES, named_tokenizer
from lminf.data import corpus
from lminf.data.loader import Loader, parse_plan
from lminf.data.statistics import statistics
from lminf.data.store import TokenStore
from lminf.errors import InputError
from lminf.ranges import Range
from lminf.run import tables

PLANS = ("concat", "concat:documents=apart", "best_fit", "decomposition")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("paths", metavar="PATHS", help="stores and text files")
    parser.add_argument("--plan", action="append", help=f"default: {', '.join(PLANS)}")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row (2048)")
    parser.add_argument("--batch", type=int, default=64, help="rows of a step (64)")
    parser.add_argument("--tokenizer", help=f"for text files: a model's name or folder, or {BYTES}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


SIZES = {"length": Range(min=2, max=2**31 - 1), "batch": Range(min=1, max=2**31 - 1)}


def run(args: argparse.Namespace) -> None:
    for name, stated in SIZES.items():
        if problem := stated.problem(getattr(args, name), whole=True):
            raise InputError(f"--{name}={getattr(args, name)}: give {problem}")
    plans = {text: parse_plan(text) for text in args.plan or PLANS}
    tokenizer = named_tokenizer(args.tokenizer) if args.tokenizer else None
    corpora = corpus.open_corpora(args.paths, tokenizer)
    first = np.cumsum([0, *(summary.tokens for summary in corpora)])
    ends = np.concatenate(
        [summary.ends + start for summary, start in zip(corpora, first, strict=False)]
    )
    facts = [
        {"tokens": summary.tokens, "documents": len(summary.ends), **_facts(summary)}
        for summary in corpora
    ]
    rows = []
    for name, plan in plans.items():
        made = Loader(corpora, plan, length=args.length, rows=args.batch, seed=0).schedule
        summary = statistics(made.taken, ends=ends)
        rows.append({"plan": name, "steps": made.steps, **dataclasses.asdict(summary)})
    if args.json:
        print(json.dumps({"corpora": facts, "plans": rows}))
        return
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(tables.rich_table(facts, title="corpora"))
    console.print(tables.rich_table(
        rows, title=f"one epoch in steps of {args.batch} x {args.length} tokens"
    ))  # fmt: skip


def _facts(tokens: TokenStore) -> dict[str, Any]:
    facts = tokens.facts
    if facts is None:
        return {}
    return {
        "tokenizer": facts.tokenizer, "vocab_size": facts.vocab_size, "dtype": facts.dtype,
        "bytes_per_token": facts.text_bytes / facts.tokens, "text": facts.text_digest[:16],
    }  # fmt: skip
