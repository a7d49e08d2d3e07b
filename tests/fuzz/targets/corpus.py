"""Texts of every format, through the reader of `lminf tokenize` and of `lminf nll --text`."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import tensorstore as ts
import zstandard

from lminf.data import sources, tokenizing
from lminf.data.tokenizers import ByteTokenizer
from lminf.errors import InputError

ROWS = [{"text": f"text {i} é", "id": i, "more": {"a": [1, None]}} for i in range(5)]


def seeds(folder: Path) -> None:
    """One file of each format and compression."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    array = json.dumps(ROWS, indent=1).encode()
    talk = json.dumps(
        [{"messages": [{"role": "user", "content": "x"}], "text": None}, ROWS[0]]
    ).encode()
    for name, data in {
        "a.jsonl": lines, "b.json": array, "c.txt": b"\xef\xbb\xbfplain text\n\nof two\n",
        "d": lines, "e.jsonl.gz": gzip.compress(lines, mtime=0), "f.json.bz2": bz2.compress(array),
        "g.txt.xz": lzma.compress(b"plain text " * 99), "h.jsonl.zst": zstandard.compress(lines),
        "i.json": talk,
    }.items():  # fmt: skip
        (folder / name).write_bytes(data)
    table = pyarrow.table({"text": [row["text"] for row in ROWS], "id": list(range(5))})
    pyarrow.parquet.write_table(table, folder / "j.parquet")


def read(path: Path) -> None:
    """Both readers, so that a file that one refuses is given to the other too."""
    refused = []
    for reader in (_tokenize, sources.read_text):
        try:
            reader(path)
        except InputError as error:
            refused.append(error)
    if refused:
        raise refused[0]


def _tokenize(path: Path) -> None:
    tokenizing.tokenize(
        [str(path)], ByteTokenizer(), "memory://text", name="bytes", split="blank_line",
        workers=0, memory=ts.Context(),
    )  # fmt: skip
