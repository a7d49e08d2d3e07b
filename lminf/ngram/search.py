"""Binary search over suffixes in their order, for many queries at once."""

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int64, Shaped

from lminf.ngram.encoding import WORD_BYTES, Encoding, Queries

SAMPLED = 4096  # suffixes whose first words are kept
NARROWEST, AT_ONCE = 16, 1 << 20  # tokens that are compared: of a pair at first, and of all pairs


class SortedSuffixes:
    """Suffixes of an array of tokens; `starts_of` gives those at ranks."""

    def __init__(
        self,
        encoding: Encoding,
        tokens: Shaped[np.ndarray, " S"],
        starts_of: Callable[[Int64[np.ndarray, " B"]], Int64[np.ndarray, " B"]],
        slots: int,
    ):
        self.encoding, self.tokens = encoding, tokens
        self.starts_of, self.slots = starts_of, slots
        self._per_word, self._masks = WORD_BYTES // encoding.width, encoding.masks()

    def bound(
        self,
        queries: Queries,
        low: Int64[np.ndarray, " B"],
        high: Int64[np.ndarray, " B"],
        *,
        after: bool = False,
    ) -> tuple[Int64[np.ndarray, " B"], Int64[np.ndarray, " B"]]:
        """(the first rank in [low, high) whose suffix is not before its query, one from which on no
        suffix begins with it); with `after`, the first is also none of those. `high` where there
        is none.
        """
        first = self._first_words(queries)
        low, high = self._bracket(first, low, high)
        beyond, rows = high.copy(), np.flatnonzero(low < high)
        active, words = queries.take(rows), [column[rows] for column in first]
        while len(rows):
            middle = (low[rows] + high[rows]) >> 1
            smaller, begins = self._compare(middle, active, words)
            # The search for the end of a range begins at the last place that is known beyond it.
            beyond[rows] = np.where(smaller | begins, beyond[rows], middle)
            right = (smaller | begins) if after else smaller
            low[rows] = np.where(right, middle + 1, low[rows])
            high[rows] = np.where(right, high[rows], middle)
            unknown = low[rows] < high[rows]
            if not unknown.all():
                rows, active = rows[unknown], active.take(unknown)
                words = [column[unknown] for column in words]
        return low, beyond

    def _bracket(self, first, low, high):
        """Narrower ranges of ranks, copied, by the first words of suffixes at even distances: the
        first half of the steps of every search looks at the same few thousand.
        """
        ranks, words = self._sampled
        word, mask, _ = first
        below = np.append(0, ranks + 1)[np.searchsorted(words, word)]
        above = np.append(ranks, self.slots)[np.searchsorted(words, word | ~mask, side="right")]
        low = np.minimum(np.maximum(low, below), high)
        return low, np.maximum(np.minimum(high, above), low)

    @functools.cached_property
    def _sampled(self):
        """(ranks, the first words of their suffixes)."""
        ranks = np.arange(0, self.slots, max(1, self.slots // SAMPLED))
        return ranks, self.encoding.words(self.tokens, self.starts_of(ranks))

    def begins(self, queries: Queries, ranks: Int64[np.ndarray, " B"]) -> Bool[np.ndarray, " B"]:
        """Whether the suffix at each rank begins with its query; False at the rank `slots`."""
        clipped = np.minimum(ranks, self.slots - 1)
        begins = self._compare(clipped, queries, self._first_words(queries))[1]
        return begins & (ranks < self.slots)

    def lcp(
        self, queries: Queries, starts: Int64[np.ndarray, " B"], *, known: int = 0
    ) -> Int64[np.ndarray, " B"]:
        """Length (tokens) of the longest common prefix of each query and the suffix at a start, of
        which `known` tokens are known to agree.

        Few agree for long, so ever more tokens of ever fewer pairs are looked at.
        """
        limits = np.minimum(queries.lengths, len(self.tokens) - starts)
        lcp, offset, width = np.full(len(starts), known), known, NARROWEST
        rows = np.flatnonzero(limits > known)
        while len(rows):
            columns = np.arange(offset, offset + width)
            differ = self.tokens.take(starts[rows, None] + columns, mode="clip")
            query_columns = queries.starts[rows, None] + columns
            differ = differ != queries.tokens.take(query_columns, mode="clip")
            somewhere = differ.any(1)
            lcp[rows] = offset + np.where(somewhere, differ.argmax(1), width)
            offset += width
            rows = rows[~somewhere & (limits[rows] > offset)]
            width = min(4 * width, max(NARROWEST, AT_ONCE // max(len(rows), 1)))
        return np.minimum(lcp, limits)

    def _first_words(self, queries: Queries):
        """The first word of each query without what is beyond its end, the mask for that, and
        whether a query is longer.
        """
        mask = self._masks[np.minimum(queries.lengths, self._per_word)]
        first = self.encoding.words(queries.tokens, queries.starts) & mask
        return first, mask, queries.lengths > self._per_word

    def _compare(self, ranks, queries: Queries, first):
        """(the suffix at the rank is before the query, it begins with it) for every query."""
        starts, (query, mask, longer) = self.starts_of(ranks), first
        suffix = self.encoding.words(self.tokens, starts) & mask
        smaller, begins = suffix < query, suffix == query
        if len(rows := np.flatnonzero(begins & longer)):
            # Most suffixes that agree in the first word differ in the second.
            rest, known = queries.take(rows), self._per_word
            rest = rest._replace(starts=rest.starts + known, lengths=rest.lengths - known)
            query, mask, longer = self._first_words(rest)
            suffix = self.encoding.words(self.tokens, starts[rows] + known) & mask
            smaller[rows], begins[rows] = suffix < query, suffix == query
            rows = rows[begins[rows] & longer]
        if len(rows):
            lcp = self.lcp(queries.take(rows), starts[rows], known=2 * self._per_word)
            begins[rows] = lcp == queries.lengths[rows]
            kind = self.encoding.ordered
            token = self.tokens.take(starts[rows] + lcp, mode="clip").view(kind)
            query_token = queries.tokens.take(queries.starts[rows] + lcp, mode="clip").view(kind)
            ended = starts[rows] + lcp == len(self.tokens)
            smaller[rows] = (ended | (token < query_token)) & ~begins[rows]
        # Beyond the end stand zeros, which a query may hold: a suffix that ends is before it.
        ends = begins & (starts + queries.lengths > len(self.tokens))
        return smaller | ends, begins & ~ends
