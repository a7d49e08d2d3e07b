"""lminf tokenize SOURCES --tokenizer MODEL --out STORE: texts into a token store.

SOURCES are files, folders and patterns: JSON (lines, an array, objects), parquet and plain text;
all but parquet also as .gz, .zst, .bz2 and .xz. Other formats, such as .csv, are refused by name.
STORE is a folder, gs://bucket/path or s3://bucket/path. A run that was killed goes on where it was
when the same command is given again.
"""

import argparse
import contextlib
import typing
from pathlib import Path

from lminf import checkpoints
from lminf.data import documents, tokenizing
from lminf.data.tokenizers import ByteTokenizer, Special, Tokenizer
from lminf.errors import InputError
from lminf.run import lock
from lminf.run.progress import Progress

BYTES = "bytes"  # the name of the tokenizer of models trained from scratch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("sources", nargs="+", metavar="SOURCES")
    parser.add_argument("--tokenizer", required=True, help=f"a model's name or folder, or {BYTES}")
    parser.add_argument("--out", required=True, help="where the token store will lie")
    parser.add_argument(
        "--field", default="text", help="of JSON and parquet that holds the text (text)"
    )
    parser.add_argument("--split", default="file", choices=typing.get_args(documents.Split),
                        help="where documents of plain text end")  # fmt: skip
    parser.add_argument("--end", help="the token after each document, if the model names none")
    parser.add_argument("--special", default="plain", choices=typing.get_args(Special),
                        help="special tokens written out in texts: plain characters, or parsed as "
                        "tokens (plain)")  # fmt: skip
    parser.add_argument("--workers", type=int, help="processes (default: one a core)")


def run(args: argparse.Namespace) -> None:
    if args.workers is not None and args.workers < 0:
        raise InputError(f"--workers={args.workers}: give 0 (this process alone) or more")
    folder = None if "://" in args.out else Path(args.out).expanduser()
    documents.check(args.sources, out=folder)
    tokenizer = named_tokenizer(args.tokenizer)
    # A bucket has no locks: there, the older of two processes ends.
    alone = contextlib.nullcontext() if folder is None else lock.held(folder)
    with alone, Progress(0, label="tokenize", unit="bytes") as progress:
        facts = tokenizing.tokenize(
            args.sources, tokenizer, args.out, name=args.tokenizer,
            end=args.end, field=args.field, split=args.split, special=args.special,
            workers=args.workers, progress=progress.show,
        )  # fmt: skip
    empty = f"; {facts.empty_documents:,} without text left out" if facts.empty_documents else ""
    print(
        f"{args.out}: {facts.tokens:,} tokens ({facts.dtype}) in {facts.documents:,} documents, "
        f"{facts.text_bytes / facts.tokens:.2f} bytes a token{empty}"
    )


def named_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a model, or of bytes."""
    return ByteTokenizer() if name == BYTES else checkpoints.read_tokenizer(name)
