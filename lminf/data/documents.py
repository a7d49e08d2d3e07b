"""Text files -> documents, read in pieces so that no document has to fit into memory.

A document is a record of JSON (lines, an array, objects), a row of parquet, or any other file as a
whole (or what stands between its blank lines). All but parquet may be compressed.
"""

import functools
import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from lminf.atomic import check_regular
from lminf.data import byte_streams, formats, records
from lminf.errors import InputError

PIECE_CHARS = 1 << 20  # a document longer than this comes in several pieces
CUT_ANYWAY_CHARS = 1 << 24  # a piece without a good place to end is ended here
BLOCK_CHARS = 1 << 20

# Between a letter and a space: a word ends there for every byte-level BPE, so tokens do not change
# (Tokenizer._divisible says when that holds).
CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")

Split = Literal["file", "blank_line"]


@dataclass(frozen=True)
class Source:
    """A text file."""

    path: Path
    bytes: int
    modified: int  # nanoseconds


class Piece(NamedTuple):
    """A part of a document; `first` and `last` say where the document begins and ends."""

    text: str
    first: bool
    last: bool
    bytes_read: int  # of the file so far, as it lies on the disk


def find(patterns: Sequence[str], *, out: Path | None = None) -> list[Source]:
    """The files that are named, those in the folders and those that match, in that order.

    What lies in `out`, the folder that is written, is none of a folder's files around it; named
    itself, it is refused.
    """
    sources: dict[Path, Source] = {}
    written = None if out is None else Path(os.path.realpath(out))  # of a loop of links too
    for pattern in patterns:
        for path in _matching(pattern):
            key = path.resolve()
            if written is not None and key.is_relative_to(written):
                folder = Path(pattern).resolve()
                if folder != written and written.is_relative_to(folder):
                    continue
                raise InputError(
                    f"{path} would be read and lies in {out}, which is to be written; name another "
                    f"folder to write"
                )
            if key in sources:
                raise InputError(f"{path} is named twice among {', '.join(patterns)}; "
                                 f"name each file once")  # fmt: skip
            sources[key] = source_of(path)
    if not sources:
        raise InputError(f"{', '.join(patterns)} hold no files beside {out}; name one that does")
    return list(sources.values())


def check(patterns: Sequence[str], *, out: Path | None = None) -> None:
    """Refuses files that are no texts, by their names and first bytes: before hours of reading."""
    for source in find(patterns, out=out):
        formats.format_of(source.path)


def source_of(path: Path) -> Source:
    """A regular file that is not empty."""
    try:
        size = check_regular(path)
        modified = path.stat().st_mtime_ns
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; leave it out") from error
    if not size:
        raise InputError(f"{path} is empty; remove it or leave it out")
    return Source(path, size, modified)


def _matching(pattern: str) -> list[Path]:
    path = Path(pattern)
    if os.path.isdir(path):  # unlike pathlib's, False for names that are too long
        inside = (p.relative_to(path) for p in sorted(path.rglob("*")) if os.path.isfile(p))
        files = [path / p for p in inside if not any(part.startswith(".") for part in p.parts)]
        if not files:
            raise InputError(f"the folder {path} holds no files; name one that holds texts")
        return files
    if os.path.exists(path):
        return [path]
    files = [p for p in map(Path, sorted(glob.glob(pattern, recursive=True))) if os.path.isfile(p)]
    if not files:
        raise InputError(f"there is no file, folder or match of {pattern!r}; name a text to read")
    return files


def read(source: Source, *, field: str = "text", split: Split = "file") -> Iterator[Piece]:
    """The documents of a file in pieces. `field` names the text in records of JSON and parquet.

    A document without text comes as one empty piece, so that it can be counted.
    """
    kind = formats.format_of(source.path).kind
    if kind == "parquet":
        for text, share in records.parquet_texts(source.path, field):
            done = int(source.bytes * share)
            yield from pieces([text], bytes_read=functools.partial(int, done))
        return
    with byte_streams.opened(source.path) as stream:
        if kind == "json":
            for text in records.json_texts(stream, field):
                yield from pieces([text], bytes_read=stream.tell)
        elif split == "file":
            yield from pieces(byte_streams.decoded(stream), bytes_read=stream.tell)
        else:
            yield from _paragraphs(byte_streams.decoded(stream), stream.tell)


def pieces(blocks: Iterable[str], *, bytes_read: Callable[[], int]) -> Iterator[Piece]:
    """One document, given in blocks, cut where no token notices."""
    buffer, first, searched = "", True, PIECE_CHARS
    for number, block in enumerate(blocks):
        # Concatenated files and rows have marks of their own.
        buffer += block if number else block.removeprefix("\ufeff")
        while len(buffer) > PIECE_CHARS:
            cut = CUT.search(buffer, searched)
            # The last character of a block may be the letter before a cut: look there again.
            searched = max(PIECE_CHARS, len(buffer) - 2)
            if cut is None and len(buffer) < CUT_ANYWAY_CHARS:
                break
            end = cut.start() if cut else CUT_ANYWAY_CHARS
            yield Piece(buffer[:end], first, False, bytes_read())
            buffer, first, searched = buffer[end:], False, PIECE_CHARS
    if first and not buffer.strip():
        buffer = ""
    yield Piece(buffer, first, True, bytes_read())


def _paragraphs(blocks: Iterator[str], bytes_read: Callable[[], int]) -> Iterator[Piece]:
    """The documents between blank lines."""
    breaks = re.compile(r"\n[ \t\r]*\n\s*")

    def until_blank() -> Iterator[str]:
        nonlocal buffer, done
        while True:
            match = breaks.search(buffer)
            # White space at the end of what is held may go on in the next block.
            if match and match.end() < len(buffer):
                text, buffer = buffer[: match.start()], buffer[match.end() :]
                yield text
                return
            keep = len(buffer) - len(buffer.rstrip())
            if match is None and len(buffer) - keep > BLOCK_CHARS:
                yield buffer[: len(buffer) - keep]
                buffer = buffer[len(buffer) - keep :]
            more = next(blocks, None)
            if more is None:
                yield buffer.rstrip()
                buffer, done = "", True
                return
            buffer += more

    buffer, done = "", False
    while not done:
        buffer = buffer.lstrip("\r\n")
        for piece in pieces(until_blank(), bytes_read=bytes_read):
            if piece.text or not piece.first:  # nothing stands between two blank lines
                yield piece
