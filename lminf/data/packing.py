"""Documents -> rows of tokens: which consecutive tokens of the corpus each row of a plan holds.

A document of n tokens gives n - 1 inputs; the target of each is the token after it. Its last token
(the end marker) is a target only. Every layout uses each input exactly once, unless it says so.
"""

import bisect
import collections
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

from lminf.errors import InputError


class Documents(NamedTuple):
    """The tokens from `starts[i]` up to, and without, `ends[i]`."""

    starts: Int[np.ndarray, " D"]
    ends: Int[np.ndarray, " D"]


class Spans(NamedTuple):
    """What the rows of a batch hold, ordered by row; what they do not fill is padding."""

    rows: int
    length: int  # tokens of a row
    row: Int[np.ndarray, " P"]
    start: Int[np.ndarray, " P"]  # of the inputs, in the corpus
    size: Int[np.ndarray, " P"]  # inputs; the last one's target is the token after them


class Layout(Protocol):
    """All rows of one length that a corpus gives."""

    count: int
    length: int

    def spans(self, rows: Int[np.ndarray, " R"]) -> Spans:
        """The contents of those rows, of which the first is row 0 of the answer; none for -1."""
        ...


def documents(ends: Int[np.ndarray, " D"]) -> Documents:
    """All documents of a corpus, from the ends that a store knows."""
    return Documents(np.concatenate([[0], ends[:-1]]).astype(np.int64), np.asarray(ends, np.int64))


def ragged(counts: Int[np.ndarray, " N"]) -> tuple[np.ndarray, np.ndarray]:
    """(owner, place) of every element of lists with so many elements, one after another."""
    owner = np.repeat(np.arange(len(counts)), counts)
    first = np.cumsum(counts) - counts
    return owner, np.arange(len(owner)) - first[owner]


class Concatenated:
    """The inputs of all documents one after another, cut into rows; the last row may be short."""

    def __init__(self, corpus: Documents, *, length: int):
        self._starts = corpus.starts
        self._until = np.cumsum(np.maximum(corpus.ends - corpus.starts - 1, 0))  # inputs
        self.length = length
        self.inputs = int(self._until[-1]) if len(self._until) else 0
        self.count = -(-self.inputs // length)

    def spans(self, rows: Int[np.ndarray, " R"]) -> Spans:
        filled = np.flatnonzero(rows >= 0)
        begin = rows[filled] * self.length
        end = np.minimum(begin + self.length, self.inputs)
        first = np.searchsorted(self._until, begin, side="right")
        last = np.searchsorted(self._until, end, side="left")
        row, place = ragged(last - first + 1)
        document = first[row] + place
        origin = self._until[document - 1] * (document > 0)
        begin, end = np.maximum(begin[row], origin), np.minimum(end[row], self._until[document])
        filling = end > begin  # documents of one token have no input
        start = self._starts[document] + begin - origin
        return Spans(
            len(rows), self.length, filled[row][filling], start[filling], (end - begin)[filling]
        )


class BestFit:
    """Rows with as few cuts as can be: documents that fill rows, and the rest packed.

    A document longer than a row is cut into whole rows and a rest. Rests and short documents are
    packed, longest first, each into the fullest row that has room.
    Source: Ding et al. 2024, "Fewer truncations improve language modeling", arXiv:2404.10830.
    """

    def __init__(self, corpus: Documents, *, length: int):
        inputs = np.maximum(corpus.ends - corpus.starts - 1, 0)
        self._starts, self.length = corpus.starts, length
        self._whole_until = np.cumsum(inputs // length)
        self._whole = int(self._whole_until[-1]) if len(inputs) else 0
        self._rest = inputs % length
        # Rests by size: `_order[_first_of[s] + i]` is the document of the i-th rest of s inputs.
        order = np.argsort(self._rest, kind="stable")
        histogram = np.bincount(self._rest, minlength=length)
        first_of = np.cumsum(histogram) - histogram
        histogram[0] = 0
        groups = pack(histogram, length)
        used = first_of.copy()
        ranks, steps, counts = [], [], []
        for sizes, bins in groups:
            counts.append(sum(times for _, times in sizes))
            for size, times in sizes:
                ranks += range(used[size], used[size] + times)
                steps += [times] * times
                used[size] += bins * times
        self._order = order
        self._rank, self._step = np.array(ranks, np.int64), np.array(steps, np.int64)
        self._items = np.array(counts, np.int64)  # of a row of each group
        self._item_from = np.cumsum(self._items) - self._items
        self._rows_until = self._whole + np.cumsum([bins for _, bins in groups], dtype=np.int64)
        self.count = int(self._rows_until[-1]) if groups else self._whole

    def spans(self, rows: Int[np.ndarray, " R"]) -> Spans:
        uncut = np.flatnonzero((rows >= 0) & (rows < self._whole))
        document = np.searchsorted(self._whole_until, rows[uncut], side="right")
        origin = self._whole_until[document - 1] * (document > 0)
        starts = self._starts[document] + (rows[uncut] - origin) * self.length

        packed = np.flatnonzero(rows >= self._whole)
        group = np.searchsorted(self._rows_until, rows[packed], side="right")
        begin = np.concatenate([[self._whole], self._rows_until])[group]
        place_in_group = rows[packed] - begin
        row, place = ragged(self._items[group])
        item = self._item_from[group][row] + place
        rest_of = self._order[self._rank[item] + self._step[item] * place_in_group[row]]
        cut = self._whole_until[rest_of] - self._whole_until[rest_of - 1] * (rest_of > 0)
        rest_starts = self._starts[rest_of] + cut * self.length

        row = np.concatenate([uncut, packed[row]])
        start = np.concatenate([starts, rest_starts])
        size = np.concatenate([np.full(len(uncut), self.length), self._rest[rest_of]])
        order = np.argsort(row, kind="stable")
        return Spans(len(rows), self.length, row[order], start[order], size[order])


Group = tuple[tuple[tuple[int, int], ...], int]  # ((size, times), …) in each of so many rows


def pack(histogram: Int[np.ndarray, " _"], room: int) -> list[Group]:
    """Rows of `room` for `histogram[s]` pieces of each size s: best fit, longest first.

    Equal rows are placed together, so the time depends on the number of sizes, hardly on that of
    pieces.
    """
    groups: dict[int, collections.deque[Group]] = collections.defaultdict(collections.deque)
    rooms: list[int] = []  # that some row has left, ascending; empty rows come beside

    def put(free: int, group: Group) -> None:
        if group[1]:
            if not groups[free]:
                bisect.insort(rooms, free)
            groups[free].append(group)

    for size in range(len(histogram) - 1, 0, -1):
        left = int(histogram[size])
        while left:
            slot = bisect.bisect_left(rooms, size)
            if slot < len(rooms):
                free = rooms[slot]
                sizes, rows = groups[free].popleft()
                if not groups[free]:
                    del rooms[slot]
            else:
                free, sizes, rows = room, (), -(-left // (room // size))
            # The fullest row with room stays that until it has none.
            times = free // size
            full = min(rows, left // times)
            put(free - times * size, ((*sizes, (size, times)), full))
            left -= full * times
            rows -= full
            if rows and left:
                put(free - left * size, ((*sizes, (size, left)), 1))
                left, rows = 0, rows - 1
            put(free, (sizes, rows))
    return [group for free in sorted(groups) for group in groups[free]]


class Sequences:
    """Rows that one piece each fills: a bucket of Dataset Decomposition."""

    def __init__(self, starts: Int[np.ndarray, " N"], *, length: int):
        self._starts, self.length, self.count = starts, length, len(starts)

    def spans(self, rows: Int[np.ndarray, " R"]) -> Spans:
        filled = np.flatnonzero(rows >= 0)
        size = np.full(len(filled), self.length)
        return Spans(len(rows), self.length, filled, self._starts[rows[filled]], size)


def require_rows(layout: Layout, what: str) -> None:
    if not layout.count:
        raise InputError(f"{what} has no two tokens in a document, so nothing to predict; give a "
                         f"longer text")  # fmt: skip
