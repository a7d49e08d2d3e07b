"""Tokens as symbols whose order is the order of an index, read eight bytes at a time.

Published indexes order suffixes by the raw bytes of their little-endian tokens (order "bytes"),
ours by token id (order "id"). A symbol is one byte in the first order and one token in the second,
so both compare suffixes symbol by symbol, and a suffix that is the beginning of another is first.
"""

import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int, Int64, Shaped, UInt64

from lminf.config import closest
from lminf.errors import InputError

Order = Literal["id", "bytes"]
WIDTHS = (1, 2, 4)  # bytes of a token
WORD_BYTES = 8


@dataclass(frozen=True)
class Encoding:
    """How an index stores tokens and orders suffixes."""

    width: int  # bytes of a token
    order: Order

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
        return np.dtype(f"<u{self.width}")

    @property
    def symbols(self) -> np.dtype:
        return self.tokens if self.order == "id" else np.dtype("u1")

    @property
    def per_token(self) -> int:
        """Symbols of a token."""
        return self.width // self.symbols.itemsize

    def encode(self, ids: Sequence[int] | Int[np.ndarray, " T"]) -> Shaped[np.ndarray, " S"]:
        """The symbols of token ids; the separator is allowed, what does not fit is refused."""
        tokens = np.asarray(ids)
        if not len(tokens):
            return np.empty(0, self.symbols)
        least, most = int(tokens.min()), int(tokens.max())
        if tokens.dtype.kind not in "iu" or least < 0 or most > self.separator:
            found = least if least < 0 else most
            raise InputError(
                f"token id {found} is outside the {self.width}-byte tokens of this index, which "
                f"hold 0 to {self.separator}; give ids of its tokenizer"
            )
        return tokens.astype(self.tokens).view(self.symbols)


class Queries(NamedTuple):
    """Pieces of one array of symbols: query i is `lengths[i]` symbols from `starts[i]` on."""

    symbols: Shaped[np.ndarray, " S"]
    starts: Int64[np.ndarray, " B"]
    lengths: Int64[np.ndarray, " B"]  # symbols

    @classmethod
    def of(
        cls, encoding: Encoding, queries: Sequence[Sequence[int]] | Int[np.ndarray, "B T"]
    ) -> "Queries":
        """Of lists of token ids, or of the rows of an array."""
        if isinstance(queries, np.ndarray) and queries.ndim == 2:
            lengths = np.full(len(queries), queries.shape[1], np.int64)
            ids = queries.ravel()
        else:
            lengths = np.array([len(query) for query in queries], np.int64)
            parts = [np.asarray(query) for query in queries if len(query)]
            ids = np.concatenate(parts) if parts else np.empty(0, np.int64)
        lengths *= encoding.per_token
        return cls(encoding.encode(ids), np.cumsum(lengths) - lengths, lengths)

    def take(self, rows: Int64[np.ndarray, " R"]) -> "Queries":
        return Queries(self.symbols, self.starts[rows], self.lengths[rows])

    def last(self, lengths: Int64[np.ndarray, " B"]) -> "Queries":
        """The last `lengths` symbols of each."""
        return Queries(self.symbols, self.starts + self.lengths - lengths, lengths)


def words(
    symbols: Shaped[np.ndarray, " S"], starts: Int64[np.ndarray, " B"]
) -> UInt64[np.ndarray, " B"]:
    """The eight bytes from each start on as a whole number, the first symbol in its highest bits;
    zeros stand beyond the end. Numbers are ordered as the symbols are.
    """
    if not len(symbols):
        return np.zeros(len(starts), np.uint64)
    per_word = WORD_BYTES // symbols.itemsize
    places = starts[:, None] + np.arange(per_word - 1, -1, -1)
    found = symbols.take(places, mode="clip")
    if len(starts) and int(starts.max()) + per_word > len(symbols):
        found[places >= len(symbols)] = 0
    return found.view("<u8")[:, 0]


def masks(symbols: Shaped[np.ndarray, " S"]) -> UInt64[np.ndarray, " _"]:
    """By n, a word that keeps the first n symbols of another one."""
    bits, per_word = 8 * symbols.itemsize, WORD_BYTES // symbols.itemsize
    kept = [(1 << 64) - (1 << 64 - bits * n) for n in range(per_word + 1)]
    return np.array(kept, np.uint64)
