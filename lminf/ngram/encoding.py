"""How an index stores tokens and orders suffixes, and suffixes read eight bytes at a time.

Published indexes order suffixes by the raw bytes of their little-endian tokens (order "bytes"),
ours by token id (order "id"). A suffix that is the beginning of another is first in both.
"""

import itertools
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int, Int64, Shaped, UInt64

from lminf.config import closest
from lminf.errors import InputError

Order = Literal["id", "bytes"]
Tokens: TypeAlias = Sequence[int] | Int[np.ndarray, " T"]  # ids
WIDTHS = (1, 2, 4)  # bytes of a token
WORD_BYTES = 8


@dataclass(frozen=True)
class Encoding:
    """How an index stores tokens and orders suffixes."""

    width: int  # bytes of a token
    order: Order

    def __str__(self) -> str:
        return f"--width={self.width} --order={self.order}"

    def __post_init__(self):
        if self.width not in WIDTHS:
            raise InputError(f"tokens of {self.width} bytes are not stored; give 1, 2 or 4")
        if self.order not in typing.get_args(Order):
            raise InputError(
                f"there is no order {self.order!r}; {closest(self.order, typing.get_args(Order))}"
            )

    @property
    def separator(self) -> int:
        """The token before each document and after the last: the all-ones value."""
        return (1 << 8 * self.width) - 1

    @property
    def tokens(self) -> np.dtype:
        """The dtype of tokens in a file."""
        return np.dtype(f"<u{self.width}")

    @property
    def ordered(self) -> np.dtype:
        """The dtype under which a token's bytes compare in the index's order."""
        return self.tokens if self.order == "id" else self.tokens.newbyteorder(">")

    @property
    def sortable(self) -> np.dtype:
        """The dtype of tokens whose bytes, as written, compare in the index's order."""
        return self.tokens.newbyteorder(">") if self.order == "id" else self.tokens

    def encode(self, ids: Tokens) -> Shaped[np.ndarray, " T"]:
        """Token ids as they are stored; the separator is allowed, what does not fit is refused."""
        tokens = np.asarray(ids)
        if not len(tokens):
            return np.empty(0, self.tokens)
        least, most = int(tokens.min()), int(tokens.max())
        if tokens.dtype.kind not in "iu" or least < 0 or most > self.separator:
            outside = least if least < 0 else most
            raise InputError(
                f"token id {outside} is outside the {self.width}-byte tokens of this index, which "
                f"hold 0 to {self.separator}; give ids of its tokenizer"
            )
        return tokens.astype(self.tokens)

    def words(
        self, tokens: Shaped[np.ndarray, " S"], starts: Int64[np.ndarray, " B"]
    ) -> UInt64[np.ndarray, " B"]:
        """The eight bytes from each start on as a whole number, the first token in its highest
        bits; zeros stand beyond the end. Numbers are ordered as suffixes are.
        """
        if not len(tokens):
            return np.zeros(len(starts), np.uint64)
        per_word = WORD_BYTES // self.width
        lanes = np.arange(per_word)
        positions = starts[:, None] + (lanes[::-1] if self.order == "id" else lanes)
        gathered = tokens.take(positions, mode="clip")
        if (starts > len(tokens) - per_word).any():
            gathered[positions >= len(tokens)] = 0
        packed = gathered.view("<u8" if self.order == "id" else ">u8")[:, 0]
        return packed.astype("<u8", copy=False)

    def masks(self) -> UInt64[np.ndarray, " _"]:
        """For every n, the mask of the first n tokens of a word."""
        kept = range(0, 64 + 1, 8 * self.width)
        return np.array([(1 << 64) - (1 << 64 - bits) for bits in kept], np.uint64)


class Queries(NamedTuple):
    """Slices of one array of tokens: query i is `lengths[i]` tokens from `starts[i]` on."""

    tokens: Shaped[np.ndarray, " S"]
    starts: Int64[np.ndarray, " B"]
    lengths: Int64[np.ndarray, " B"]

    @classmethod
    def of(
        cls, encoding: Encoding, queries: Sequence[Tokens] | Int[np.ndarray, "B T"]
    ) -> "Queries":
        """The queries of lists of token ids, or of the rows of an array."""
        if isinstance(queries, np.ndarray) and queries.ndim == 2:
            lengths = np.full(len(queries), queries.shape[1], np.int64)
            ids = queries.ravel()
        else:
            lengths = np.array([len(query) for query in queries], np.int64)
            ids = _joined(queries, int(lengths.sum()))
        return cls(encoding.encode(ids), np.cumsum(lengths) - lengths, lengths)

    def take(self, rows: Shaped[np.ndarray, " R"]) -> "Queries":
        """The queries at these rows, given by index or by a boolean mask."""
        return Queries(self.tokens, self.starts[rows], self.lengths[rows])

    def last(self, lengths: Int64[np.ndarray, " B"]) -> "Queries":
        """The last `lengths` tokens of each query."""
        return Queries(self.tokens, self.starts + self.lengths - lengths, lengths)


def _joined(
    queries: Sequence[Tokens] | Int[np.ndarray, "B T"], total: int
) -> Shaped[np.ndarray, " S"]:
    if any(isinstance(query, np.ndarray) for query in queries):
        parts = [np.asarray(query) for query in queries if len(query)]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)
    chained = itertools.chain.from_iterable(queries)
    try:  # of short lists, three times as fast as an array of each
        return np.fromiter(chained, np.int64, total)
    except OverflowError:
        return np.array(list(itertools.chain.from_iterable(queries)), object)
