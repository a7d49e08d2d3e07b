"""Text files -> documents, read in pieces so that no document has to fit into memory.

A document is a line of .jsonl, a row of .parquet, or any other file as a whole (or what stands
between its blank lines). All but parquet may be compressed: .gz, .zst.
"""

import codecs
import glob
import gzip
import importlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from lminf.config import closest
from lminf.errors import InputError

PIECE_CHARS = 1 << 20  # a document longer than this comes in several pieces
CUT_ANYWAY_CHARS = 1 << 24  # a piece without a good place to end is ended here
BLOCK_BYTES = 1 << 20
LINE_BYTES = 1 << 30  # a line of JSON is parsed whole
PARQUET_ROWS = 64  # held at a time

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


def find(patterns: Sequence[str]) -> list[Source]:
    """The files that are named, those in the folders and those that match, in that order."""
    found: dict[Path, Source] = {}
    for pattern in patterns:
        for path in _matching(pattern):
            key = path.resolve()
            if key in found:
                raise InputError(f"{path} is named twice among {', '.join(patterns)}; "
                                 f"name each file once")  # fmt: skip
            try:
                facts = path.stat()
            except OSError as error:
                raise InputError(f"cannot read {path}: {error.strerror}; leave it out") from error
            if not facts.st_size:
                raise InputError(f"{path} is empty; remove it or leave it out")
            found[key] = Source(path, facts.st_size, facts.st_mtime_ns)
    return list(found.values())


def _matching(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        inside = (p.relative_to(path) for p in sorted(path.rglob("*")) if p.is_file())
        files = [path / p for p in inside if not any(part.startswith(".") for part in p.parts)]
        if not files:
            raise InputError(f"the folder {path} holds no files; name one that holds texts")
        return files
    if path.is_file():
        return [path]
    files = [p for p in map(Path, sorted(glob.glob(pattern, recursive=True))) if p.is_file()]
    if not files:
        raise InputError(f"there is no file, folder or match of {pattern!r}; name a text to read")
    return files


def read(source: Source, *, field: str = "text", split: Split = "file") -> Iterator[Piece]:
    """The documents of a file in pieces. `field` names the text in JSON lines and parquet rows.

    A document without text comes as one empty piece, so that it can be counted.
    """
    name = source.path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".parquet"):
        yield from _parquet(source, field)
        return
    try:
        raw = source.path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read {source.path}: {error.strerror}") from error
    with raw:
        stream = _Errors(_decompressed(raw, source.path), source.path)
        if name.endswith((".jsonl", ".ndjson")):
            for text in _json_lines(stream, source.path, field):
                yield from pieces([text], bytes_read=raw.tell)
        elif split == "file":
            yield from pieces(_decoded(stream, source.path), bytes_read=raw.tell)
        else:
            yield from _paragraphs(_decoded(stream, source.path), raw.tell)


def pieces(blocks: Iterable[str], *, bytes_read) -> Iterator[Piece]:
    """One document, given in blocks, cut where no token notices."""
    held, first, searched = "", True, PIECE_CHARS
    for block in blocks:
        held += block
        while len(held) > PIECE_CHARS:
            cut = CUT.search(held, searched)
            # The last character of a block may be the letter before a cut: look there again.
            searched = max(PIECE_CHARS, len(held) - 2)
            if cut is None and len(held) < CUT_ANYWAY_CHARS:
                break
            end = cut.start() if cut else CUT_ANYWAY_CHARS
            yield Piece(held[:end], first, False, bytes_read())
            held, first, searched = held[end:], False, PIECE_CHARS
    if first and not held.strip():
        held = ""
    yield Piece(held, first, True, bytes_read())


def _paragraphs(blocks: Iterator[str], bytes_read) -> Iterator[Piece]:
    """The documents between blank lines."""
    breaks = re.compile(r"\n[ \t\r]*\n\s*")

    def until_blank() -> Iterator[str]:
        nonlocal held, done
        while True:
            found = breaks.search(held)
            # White space at the end of what is held may go on in the next block.
            if found and found.end() < len(held):
                text, held = held[: found.start()], held[found.end() :]
                yield text
                return
            keep = len(held) - len(held.rstrip())
            if found is None and len(held) - keep > BLOCK_BYTES:
                yield held[: len(held) - keep]
                held = held[len(held) - keep :]
            more = next(blocks, None)
            if more is None:
                yield held.rstrip()
                held, done = "", True
                return
            held += more

    held, done = "", False
    while not done:
        held = held.lstrip("\r\n")
        for piece in pieces(until_blank(), bytes_read=bytes_read):
            if piece.text or not piece.first:  # nothing stands between two blank lines
                yield piece


# --- Bytes ----------------------------------------------------------------------------------------


def _decompressed(raw: BinaryIO, path: Path) -> io.BufferedIOBase | BinaryIO:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix == ".zst":
        return io.BufferedReader(_Zstandard(raw, path), BLOCK_BYTES)
    return raw


class _Zstandard(io.RawIOBase):
    """The text of frames one after another; unlike the library's reader, it notices a cut file."""

    def __init__(self, raw: BinaryIO, path: Path):
        self._raw, self._path, self._library = raw, path, _optional("zstandard", path)
        self._ready, self._frame = b"", None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            packed = self._frame.unused_data if self._frame and self._frame.eof else b""
            packed = packed or self._raw.read(BLOCK_BYTES >> 3)
            if not packed:
                if self._frame and not self._frame.eof:
                    raise InputError(f"{self._path} ends in the middle of its compressed data; "
                                     f"copy it again")  # fmt: skip
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(packed)
            except self._library.ZstdError as error:
                raise InputError(
                    f"{self._path} is not a whole .zst file ({error}); copy it again"
                ) from error
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


class _Errors:
    """The stream, with the failures of decompression and of the disk in one sentence."""

    def __init__(self, stream, path: Path):
        self._stream, self._path = stream, path

    def read(self, size: int) -> bytes:
        return self._call(self._stream.read, size)

    def readline(self, size: int) -> bytes:
        return self._call(self._stream.readline, size)

    def _call(self, method, size: int) -> bytes:
        try:
            return method(size)
        except (EOFError, zlib.error, OSError) as error:  # BadGzipFile is an OSError
            raise InputError(
                f"{self._path} cannot be read to its end ({error}); copy it again"
            ) from error


def _optional(module: str, path: Path) -> Any:
    """A module of the extra `data`; pyarrow alone is 170 MB, so nobody needs it for the rest."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(
            f"{path} needs the package {module.split('.')[0]}; install it with: "
            f"pip install 'lminf[data]'"
        ) from None


# --- Formats --------------------------------------------------------------------------------------


def _decoded(stream: _Errors, path: Path) -> Iterator[str]:
    """A plain text in blocks of characters."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    before, lines, empty = 0, 0, True
    pending = b""  # bytes of a character that a block cut in two: the decoder holds them
    for number in itertools.count():
        block = stream.read(BLOCK_BYTES)
        if b"\0" in block:
            at = block.index(b"\0")
            raise InputError(
                f"{path} line {lines + block.count(10, 0, at) + 1} holds a zero byte (offset "
                f"{before + at}): it is a binary file; leave it out"
            )
        try:
            text = decode(block, final=not block)
        except UnicodeDecodeError as error:
            at = before - len(pending) + error.start
            line = lines + (pending + block)[: error.start].count(10) + 1
            raise InputError(
                f"{path} line {line} is not UTF-8 text: byte {(pending + block)[error.start]:#04x} "
                f"at offset {at}; convert it to UTF-8 or leave it out"
            ) from None
        if not block:
            break
        before, lines = before + len(block), lines + block.count(10)
        pending = _unfinished(pending + block)
        empty = empty and not text.strip()
        yield text.removeprefix("\ufeff") if number == 0 else text
    if empty:
        raise InputError(f"{path} holds no text ({before} bytes); leave it out")


def _unfinished(data: bytes) -> bytes:
    """The first bytes of a character that the end of valid UTF-8 cuts in two."""
    for size in range(1, min(3, len(data)) + 1):
        lead = data[-size]
        if lead >= 0xC0:
            whole = 2 + (lead >= 0xE0) + (lead >= 0xF0)
            return data[-size:] if size < whole else b""
    return b""


def _json_lines(stream: _Errors, path: Path, field: str) -> Iterator[str]:
    number, found = 0, False
    while line := stream.readline(LINE_BYTES):
        number += 1
        where = f"{path} line {number}"
        if len(line) == LINE_BYTES:
            raise InputError(
                f"{where} is longer than {LINE_BYTES >> 20} MiB; put that document into a plain "
                f"text file of its own, which is read in pieces of any number"
            )
        if not line.strip():
            continue
        yield _field(_parsed(line, where), field, where)
        found = True
    if not found:
        raise InputError(f"{path} holds no line of JSON; leave it out")


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} is not UTF-8 text: byte {line[error.start]:#04x} at its byte {error.start}; "
            f"convert the file to UTF-8 or leave it out"
        ) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}); repair or remove it") from None


def _field(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise InputError(f"{where} holds a {type(row).__name__}, not an object; "
                         f"write {{{json.dumps(field)}: …}}")  # fmt: skip
    if field not in row:
        raise InputError(f"{where} has no field {field!r}; name the text's with --field: "
                         f"{closest(field, row)}")  # fmt: skip
    return _text(row[field], field, where)


def _text(text: Any, field: str, where: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"{where}: the field {field!r} is {json.dumps(text, default=str)[:40]}, "
                         f"not a text; name the text's with --field")  # fmt: skip
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start} of {field!r} is half of a surrogate pair, which is "
            f"no Unicode text; repair or remove it"
        ) from None
    return text


def _parquet(source: Source, field: str) -> Iterator[Piece]:
    path = source.path
    pyarrow, parquet = _optional("pyarrow", path), _optional("pyarrow.parquet", path)
    try:
        with parquet.ParquetFile(path) as file:
            names, rows = file.schema_arrow.names, file.metadata.num_rows
            if field not in names:
                raise InputError(f"{path} has no column {field!r}; name the text's with --field: "
                                 f"{closest(field, names)}")  # fmt: skip
            if not rows:
                raise InputError(f"{path} holds no rows; leave it out")
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[field]):
                for text in batch.column(0):
                    number += 1
                    text = _text(text.as_py(), field, f"{path} row {number}")
                    done = source.bytes * number // rows
                    yield from pieces([text], bytes_read=lambda done=done: done)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{path} is not a readable parquet file ({error}); copy it again"
        ) from error
