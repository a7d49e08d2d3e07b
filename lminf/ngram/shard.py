"""One shard of an index: its published files, mapped into memory.

tokenized.i  token ids, little-endian; the separator before each document and, in ours, after
             the last
table.i      the suffix array: byte offsets in tokenized.i, packed little-endian
offset.i     unsigned 64-bit byte offset of every document, its separator included
metadata.i   a JSON line a document, and metaoff.i the byte offset of each line; may be absent
"""

import bisect
import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int, Int64, Shaped

from lminf.atomic import check_regular
from lminf.errors import InputError, refusing
from lminf.ngram.encoding import Encoding
from lminf.ngram.search import SortedSuffixes

TOKENS, TABLE, OFFSETS = "tokenized", "table", "offset"
METADATA, METADATA_OFFSETS = "metadata", "metaoff"
MOST_POINTER_BYTES = 8
VIEWS: dict[int, Literal["B", "H", "I"]] = {1: "B", 2: "H", 4: "I"}  # unsigned, by width


class Document(NamedTuple):
    """A document, or an excerpt of it."""

    shard: int
    number: int  # in its shard
    tokens: Int[np.ndarray, " T"]
    start: int  # tokens of the document before these
    length: int  # tokens of the whole document
    metadata: Any  # what its JSON line holds; None where there is none


def pointer_bytes(tokenized_bytes: int) -> int:
    """Bytes of a pointer: the fewest that hold every byte offset in tokenized.i."""
    return max(1, -(-(tokenized_bytes - 1).bit_length() // 8))


def mapped(path: Path) -> mmap.mmap | bytes:
    """The bytes of a file, memory-mapped."""
    with refusing(str(path), kind="file of an index", advice="build the index again"):
        if not check_regular(path):
            return b""
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class Shard:
    """Read-only; `suffixes` are searched for many queries at once, `find_one` for one."""

    def __init__(self, folder: Path, number: int, encoding: Encoding):
        self.number, self.encoding = number, encoding
        files = {name: folder / f"{name}.{number}" for name in (TOKENS, TABLE, OFFSETS)}
        data = {name: mapped(path) for name, path in files.items()}
        self.slots, over = divmod(len(data[TOKENS]), encoding.width)
        self._pointer, over_table = divmod(len(data[TABLE]), max(self.slots, 1))
        if over or over_table or not self.slots or len(data[OFFSETS]) % 8:
            sizes = ", ".join(f"{files[name]} of {len(data[name]):,} bytes" for name in files)
            raise InputError(
                f"{sizes} are not of one index of {encoding.width}-byte tokens: a file is cut "
                f"short, or tokens have another width; build the index again, or give its --width"
            )
        if not pointer_bytes(len(data[TOKENS])) <= self._pointer <= MOST_POINTER_BYTES:
            raise InputError(f"{files[TABLE]} has pointers of {self._pointer} bytes for "
                             f"{self.slots:,} tokens: it is cut short; build it again")  # fmt: skip
        self.tokens = np.frombuffer(data[TOKENS], encoding.tokens)
        self.offsets = np.frombuffer(data[OFFSETS], "<u8").astype(np.int64) // encoding.width
        self._metadata = self._open_metadata(folder)
        self._table = data[TABLE]
        self.suffixes = SortedSuffixes(encoding, self.tokens, self.positions, self.slots)
        self._view: Any = memoryview(data[TOKENS]).cast(VIEWS[encoding.width])
        typed = self._pointer in (1, 2, 4, 8)
        self._pointers = np.frombuffer(self._table, f"<u{self._pointer}" if typed else "u1")

    def positions(self, ranks: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
        """Start positions (tokens) of the suffixes at these ranks."""
        if self._pointers.itemsize == self._pointer:
            offsets = self._pointers.take(ranks, mode="clip").astype(np.int64)
        else:
            packed = np.zeros((len(ranks), 8), np.uint8)
            columns = ranks[:, None] * self._pointer + np.arange(self._pointer)
            packed[:, : self._pointer] = self._pointers.take(columns, mode="clip")
            offsets = packed.view("<i8")[:, 0]
        return offsets >> (self.encoding.width // 2)  # bytes of tokens of 1, 2 and 4

    def tokens_at(self, positions: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
        """The tokens there; beyond the end, where published shards have none, the separator."""
        ids = self.tokens.take(positions, mode="clip").astype(np.int64)
        return np.where(positions < self.slots, ids, self.encoding.separator)

    # --- One query --------------------------------------------------------------------------------

    # Plain Python: for one query, 10 times as fast as arrays of one element.

    def find_one(self, query: Shaped[np.ndarray, " T"], low: int, high: int) -> tuple[int, int]:
        """The ranks [low, high) of the suffixes that begin with these tokens, of those given."""
        target, beginning = self._beginnings(query)
        first = bisect.bisect_left(range(high), target, low, high, key=beginning)
        if first == high or beginning(first) != target:
            return first, first
        return first, bisect.bisect_right(range(high), target, first, high, key=beginning)

    def contains_one(self, query: Shaped[np.ndarray, " T"]) -> bool:
        """Whether these tokens occur."""
        target, beginning = self._beginnings(query)
        first = bisect.bisect_left(range(self.slots), target, key=beginning)
        return first < self.slots and beginning(first) == target

    def _beginnings(self, query: Shaped[np.ndarray, " T"]) -> tuple[Any, Callable[[int], Any]]:
        """(the tokens, rank -> as many of its suffix), as what Python compares in their order."""
        size, view, token = len(query), self._view, self.encoding.width
        table, width = self._table, self._pointer
        by_id = self.encoding.order == "id"

        def beginning(rank: int) -> Any:
            offset = rank * width
            start = int.from_bytes(table[offset : offset + width], "little") // token
            piece = view[start : start + size]
            return piece.tolist() if by_id else piece.tobytes()

        return query.tolist() if by_id else query.tobytes(), beginning

    # --- Documents --------------------------------------------------------------------------------

    def document_numbers(self, positions: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
        """The document that each token lies in; a separator is of the document that it begins."""
        return np.searchsorted(self.offsets, positions, side="right") - 1

    def span(self, number: int) -> tuple[int, int]:
        """[first, end) tokens of a document, without separators."""
        if number + 1 < len(self.offsets):
            return int(self.offsets[number]) + 1, int(self.offsets[number + 1])
        ended = self.tokens[-1] == self.encoding.separator and self.slots > 1
        return int(self.offsets[number]) + 1, self.slots - int(ended)

    def document(self, number: int, *, around: int, at_most: int) -> Document:
        """At most `at_most` tokens of the document, around a position of the shard."""
        first, end = self.span(number)
        start = max(first, min(around - at_most // 2, end - at_most))
        stop = min(end, start + at_most)
        tokens = self.tokens[start:stop].astype(np.int32 if self.encoding.width < 4 else np.int64)
        metadata = self.metadata(number)
        return Document(self.number, number, tokens, start - first, end - first, metadata)

    def metadata(self, number: int) -> Any:
        """What the document's JSON line holds; None where the index has none."""
        if self._metadata is None:
            return None
        lines, offsets = self._metadata
        end = int(offsets[number + 1]) if number + 1 < len(offsets) else len(lines)
        with refusing(
            f"metadata.{self.number}", kind="file of an index", advice="build the index again"
        ):
            return json.loads(lines[int(offsets[number]) : end])

    def _open_metadata(self, folder: Path) -> tuple[Any, Shaped[np.ndarray, " D"]] | None:
        paths = [folder / f"{name}.{self.number}" for name in (METADATA, METADATA_OFFSETS)]
        if not all(path.exists() for path in paths):
            return None
        lines, offsets = mapped(paths[0]), mapped(paths[1])
        if len(offsets) != 8 * len(self.offsets):
            raise InputError(
                f"{folder} has {len(self.offsets):,} documents by {OFFSETS}.{self.number} and "
                f"{len(offsets) / 8:,g} by {paths[1].name}: one is cut short; build the index again"
            )
        return lines, np.frombuffer(offsets, "<u8")
