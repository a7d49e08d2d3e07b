"""Binary search over suffixes in their order, for many queries at once."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int64, Shaped

from lminf.ngram.encoding import WORD_BYTES, Queries, masks, words

NARROWEST, AT_ONCE = 8, 1 << 20  # symbols: of a pair at first, and of all pairs


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
        first = self._first_words(queries)
        while (open_rows := low < high).any():
            middle = (low + high) >> 1
            before, begins = self._compare(np.minimum(middle, self.slots - 1), queries, first)
            right = ((before | begins) if after else before) & open_rows
            low, high = np.where(right, middle + 1, low), np.where(right, high, middle)
        return low

    def begins(self, queries: Queries, ranks: Int64[np.ndarray, " B"]) -> Bool[np.ndarray, " B"]:
        """Whether the suffix at each rank begins with its query; False at the rank `slots`."""
        clipped = np.minimum(ranks, self.slots - 1)
        begins = self._compare(clipped, queries, self._first_words(queries))[1]
        return begins & (ranks < self.slots)

    def shared(self, queries: Queries, ranks: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
        """Symbols at the beginning of each query that are also those of the suffix at its rank."""
        starts = self.starts_of(ranks)
        limits = np.minimum(queries.lengths, len(self.symbols) - starts)
        return agreeing(self.symbols, starts, queries.symbols, queries.starts, limits)

    def _first_words(self, queries: Queries):
        """The first word of each query, without what is beyond its end, and the mask for that."""
        mask = self._masks[np.minimum(queries.lengths, self._per_word)]
        return words(queries.symbols, queries.starts) & mask, mask

    def _compare(self, ranks, queries: Queries, first):
        """(the suffix at the rank is before the query, it begins with it) for every query."""
        starts, (query, mask) = self.starts_of(ranks), first
        suffix = words(self.symbols, starts) & mask
        before, begins = suffix < query, suffix == query
        rows = np.flatnonzero(begins & (queries.lengths > self._per_word))
        if len(rows):
            shared = self.shared(queries.take(rows), ranks[rows])
            begins[rows] = shared == queries.lengths[rows]
            symbols = self.symbols.take(starts[rows] + shared, mode="clip")
            others = queries.symbols.take(queries.starts[rows] + shared, mode="clip")
            ended = starts[rows] + shared == len(self.symbols)
            before[rows] = (ended | (symbols < others)) & ~begins[rows]
        # Beyond the end stand zeros, which a query may hold: a suffix that ends is before it.
        ends = starts + queries.lengths > len(self.symbols)
        return before | (begins & ends), begins & ~ends


def agreeing(
    first: Shaped[np.ndarray, " S"],
    starts: Int64[np.ndarray, " B"],
    second: Shaped[np.ndarray, " Z"],
    others: Int64[np.ndarray, " B"],
    limits: Int64[np.ndarray, " B"],
) -> Int64[np.ndarray, " B"]:
    """Symbols from each start of the first array, and of the second, that are the same; at most the
    limit. Few agree for long, so ever more symbols of ever fewer pairs are looked at.
    """
    agreed, offset, width = np.zeros(len(starts), np.int64), 0, NARROWEST
    rows = np.flatnonzero(limits > 0)
    while len(rows):
        columns = np.arange(offset, offset + width)
        differ = first.take(starts[rows, None] + columns, mode="clip")
        differ = differ != second.take(others[rows, None] + columns, mode="clip")
        somewhere = differ.any(1)
        agreed[rows] = offset + np.where(somewhere, differ.argmax(1), width)
        offset += width
        rows = rows[~somewhere & (limits[rows] > offset)]
        width = min(4 * width, max(NARROWEST, AT_ONCE // max(len(rows), 1)))
    return np.minimum(agreed, limits)
