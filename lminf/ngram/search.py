"""Binary search over suffixes in their order, for many queries at once."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int64, Shaped

from lminf.ngram.encoding import WORD_BYTES, Queries, masks, words


class SortedSuffixes:
    """Suffixes of an array of symbols; `starts_of` gives those at ranks."""

    def __init__(
        self,
        symbols: Shaped[np.ndarray, " S"],
        starts_of: Callable[[Int64[np.ndarray, " B"]], Int64[np.ndarray, " B"]],
        slots: int,
    ):
        self.symbols, self.starts_of, self.slots = symbols, starts_of, slots
        self._per_word = WORD_BYTES // symbols.itemsize
        self._masks = masks(symbols)

    def bound(
        self,
        queries: Queries,
        low: Int64[np.ndarray, " B"],
        high: Int64[np.ndarray, " B"],
        *,
        after: bool,
    ) -> Int64[np.ndarray, " B"]:
        """The first rank in [low, high) whose suffix is not before its query; with `after`, that is
        also none of those which begin with it. `high` where there is none.
        """
        first = self._masked(queries, 0)
        while (open_rows := low < high).any():
            middle = (low + high) >> 1
            before, begins = self._compare(np.minimum(middle, self.slots - 1), queries, first)
            right = ((before | begins) if after else before) & open_rows
            low, high = np.where(right, middle + 1, low), np.where(right, high, middle)
        return low

    def begins(self, queries: Queries, ranks: Int64[np.ndarray, " B"]) -> Bool[np.ndarray, " B"]:
        """Whether the suffix at each rank begins with its query; False at the rank `slots`."""
        clipped = np.minimum(ranks, self.slots - 1)
        begins = self._compare(clipped, queries, self._masked(queries, 0))[1]
        return begins & (ranks < self.slots)

    def shared(self, queries: Queries, ranks: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
        """Symbols at the beginning of each query that are also those of the suffix at its rank."""
        starts = self.starts_of(ranks)
        limits = np.minimum(queries.lengths, len(self.symbols) - starts)
        shared, rows, offset = np.zeros(len(starts), np.int64), np.arange(len(starts)), 0
        bits = np.uint64(8 * self.symbols.itemsize)
        while len(rows):
            differ = words(self.symbols, starts[rows] + offset)
            differ ^= words(queries.symbols, queries.starts[rows] + offset)
            for n in range(1, self._per_word + 1):
                shared[rows] += differ >> (np.uint64(64) - bits * np.uint64(n)) == 0
            offset += self._per_word
            rows = rows[(differ == 0) & (limits[rows] > offset)]
        return np.minimum(shared, limits)

    def _masked(self, queries: Queries, offset: int):
        """The words of the queries from an offset on, without what is beyond their ends."""
        mask = self._masks[np.clip(queries.lengths - offset, 0, self._per_word)]
        return words(queries.symbols, queries.starts + offset) & mask, mask

    def _compare(self, ranks, queries: Queries, first):
        """(the suffix at the rank is before the query, it begins with it) for every query."""
        starts, (query, mask) = self.starts_of(ranks), first
        suffix = words(self.symbols, starts) & mask
        before, begins = suffix < query, suffix == query
        rows, offset = np.flatnonzero(begins & (queries.lengths > self._per_word)), self._per_word
        while len(rows):
            query, mask = self._masked(queries.take(rows), offset)
            suffix = words(self.symbols, starts[rows] + offset) & mask
            before[rows], begins[rows] = suffix < query, suffix == query
            offset += self._per_word
            rows = rows[(suffix == query) & (queries.lengths[rows] > offset)]
        # Beyond the end stand zeros, which a query may hold: a suffix that ends is before it.
        ends = starts + queries.lengths > len(self.symbols)
        return before | (begins & ends), begins & ~ends
