"""Plans: which rows of a corpus each step learns from, as a function of (plan, seed, step).

    windows                    rows at random places
    concat                     all documents one after another, cut into rows
    concat:documents=apart     the same, but no token sees another document
    best_fit                   whole documents packed into rows, as few cut as can be
    decomposition:…            one document a row, of several lengths (decomposition.py)
    mixture:plan=…,weights=…   rows of several corpora in fixed shares

An epoch is once through the corpus. Epochs follow one another without a gap, each in an order of
its own, which is a permutation of indices: nothing is remembered from step to step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

from lminf import ranges
from lminf.data import packing
from lminf.data.packing import BestFit as BestFitLayout
from lminf.data.packing import Concatenated, Documents, Layout, Spans
from lminf.data.permutation import Seed, shuffled
from lminf.errors import InputError
from lminf.ranges import Range

MIXED_ROWS = 1 << 14  # in which each corpus has its share exactly


class Selection(NamedTuple):
    """How much of a layout one epoch takes."""

    layout: Layout
    rows: int


class Schedule(Protocol):
    """The steps of a plan."""

    document_mask: bool  # several documents stand in a row and must not see each other
    padded: bool  # rows may be short
    shapes: tuple[tuple[int, int], ...]  # every (rows, length) that a batch may have
    steps: float  # of an epoch
    taken: tuple[Selection, ...]  # in an epoch, for statistics

    def at(self, step: int) -> Spans: ...


class Plan(Protocol):
    def schedule(
        self, corpora: Sequence[Documents], *, length: int, rows: int, seed: int
    ) -> Schedule:
        """Steps of `rows` rows of `length` tokens, or as many tokens in rows of other lengths."""
        ...


@dataclass(frozen=True)
class Windows:
    """Rows at random places of the corpus, some tokens never and some often: no epochs."""

    def schedule(
        self, corpora: Sequence[Documents], *, length: int, rows: int, seed: int
    ) -> "Places":
        return Places(joined(corpora), length=length, rows=rows, seed=seed)


class Places:
    """Rows that begin anywhere."""

    document_mask = padded = False

    def __init__(self, corpus: Documents, *, length: int, rows: int, seed: int):
        self._tokens = int(corpus.ends[-1])
        if self._tokens <= length:
            raise InputError(
                f"{self._tokens} tokens cannot fill a row of {length} and the token after it; "
                f"give a longer text"
            )
        self._length, self._rows, self._seed = length, rows, seed
        self.shapes = ((rows, length),)
        self.steps = self._tokens / (rows * length)  # as many tokens as there are
        layout = Concatenated(Documents(corpus.starts[:1], corpus.ends[-1:]), length=length)
        self.taken = (Selection(layout, layout.count),)

    def at(self, step: int) -> Spans:
        rng = np.random.default_rng((self._seed, step))
        start = rng.integers(0, self._tokens - self._length, self._rows)
        size = np.full(self._rows, self._length)
        return Spans(self._rows, self._length, np.arange(self._rows), start, size)


@dataclass(frozen=True)
class Concat:
    """All documents one after another, cut into rows."""

    documents: Literal["joined", "apart"] = "joined"

    def layout(self, corpus: Documents, length: int) -> Layout:
        if self.documents == "apart":
            return Concatenated(corpus, length=length)
        joined = Documents(corpus.starts[:1], corpus.ends[-1:])  # as if it were one document
        return Concatenated(joined, length=length)

    def schedule(
        self, corpora: Sequence[Documents], *, length: int, rows: int, seed: int
    ) -> "RowSchedule":
        document_mask = self.documents == "apart"
        layout = self.layout(joined(corpora), length)
        return RowSchedule([layout], [1], rows=rows, seed=seed, document_mask=document_mask)


@dataclass(frozen=True)
class BestFit:
    """Whole documents packed into rows; longer ones are cut into rows and a rest."""

    @property
    def documents(self) -> str:
        return "apart"

    def layout(self, corpus: Documents, length: int) -> Layout:
        return BestFitLayout(corpus, length=length)

    def schedule(
        self, corpora: Sequence[Documents], *, length: int, rows: int, seed: int
    ) -> "RowSchedule":
        layout = self.layout(joined(corpora), length)
        return RowSchedule([layout], [1], rows=rows, seed=seed, document_mask=True)


@dataclass(frozen=True)
class Mixture:
    """Rows of several corpora, each laid out by the same plan, in proportion to the weights.

    A corpus with a large weight is read again while a smaller one goes on: each has epochs of its
    own.
    """

    weights: tuple[Annotated[float, Range(above=0)], ...]  # one for each corpus, of any sum
    plan: Concat | BestFit = Concat()

    def __post_init__(self):
        ranges.check(self)

    def schedule(
        self, corpora: Sequence[Documents], *, length: int, rows: int, seed: int
    ) -> "RowSchedule":
        if len(corpora) != len(self.weights):
            raise InputError(
                f"{len(self.weights)} weights for {len(corpora)} corpora; give one weight for each"
            )
        parts = [self.plan.layout(documents, length) for documents in corpora]
        document_mask = self.plan.documents == "apart"
        return RowSchedule(
            parts, shares(self.weights), rows=rows, seed=seed, document_mask=document_mask
        )


def joined(corpora: Sequence[Documents]) -> Documents:
    """All documents as one corpus."""
    return Documents(*map(np.concatenate, zip(*corpora, strict=True)))


def shares(weights: Sequence[float]) -> list[int]:
    """How many of MIXED_ROWS rows each corpus gives: rounded so that the sum is exact."""
    total = sum(weights)
    if not total > 0 or min(weights) < 0:
        raise InputError(f"the weights {tuple(weights)} are not positive; give numbers above 0")
    exact = np.array(weights) / total * MIXED_ROWS
    counts = np.floor(exact).astype(int)
    most = np.argsort(counts - exact, kind="stable")[: MIXED_ROWS - counts.sum()]
    counts[most] += 1
    if not counts.all():
        raise InputError(
            f"the weights {tuple(weights)} give a corpus less than one row of {MIXED_ROWS:,}; "
            f"leave that corpus out, or give it more"
        )
    return counts.tolist()


class RowSchedule:
    """Shuffled rows of one length, of one layout or of several in fixed shares."""

    padded = True

    def __init__(
        self,
        parts: Sequence[Layout],
        of_each: Sequence[int],
        *,
        rows: int,
        seed: int,
        document_mask: bool,
    ):
        for part in parts:
            packing.require_rows(part, "a corpus")
        self._parts, self._rows, self._seed, self.document_mask = parts, rows, seed, document_mask
        self._shares = np.array(of_each)
        self._until = np.cumsum(self._shares)
        self._length = parts[0].length
        self.shapes = ((rows, self._length),)
        # An epoch is over when the corpus that lasts longest has been read once.
        period = int(self._until[-1])
        longest = max(p.count / s for p, s in zip(parts, of_each, strict=True))
        self.steps = longest * period / rows
        self.taken = tuple(
            Selection(p, min(p.count, round(longest * s)))
            for p, s in zip(parts, of_each, strict=True)
        )

    def at(self, step: int) -> Spans:
        part, index = self._places(step * self._rows + np.arange(self._rows))
        spans = []
        for number, layout in enumerate(self._parts):
            of_part = np.flatnonzero(part == number)
            rows = epochs(index[of_part], layout.count, seed=(self._seed, 1, number))
            pieces = layout.spans(rows)
            spans.append(pieces._replace(row=of_part[pieces.row]))
        row, start, size = (
            np.concatenate([getattr(p, name) for p in spans]) for name in ("row", "start", "size")
        )
        order = np.argsort(row, kind="stable")
        return Spans(self._rows, self._length, row[order], start[order], size[order])

    def _places(self, rows: Int[np.ndarray, " R"]) -> tuple[np.ndarray, np.ndarray]:
        """(layout, how many rows of it come before) of the rows of the endless stream.

        Each MIXED_ROWS rows hold every layout's share, in an order drawn anew.
        """
        period = int(self._until[-1])
        if period == 1:
            return np.zeros_like(rows), rows
        slot = epochs(rows, period, seed=(self._seed, 2))
        part = np.searchsorted(self._until, slot, side="right")
        first = self._until[part] - self._shares[part]
        return part, rows // period * self._shares[part] + slot - first


def epochs(
    indices: Int[np.ndarray, " R"], count: int, *, seed: Sequence[int]
) -> Int[np.ndarray, " R"]:
    """Elements of an endless stream of `range(count)`: all once, then all in another order, …"""
    epoch, place = np.divmod(indices, count)
    order = np.empty_like(place)
    for number in np.unique(epoch):
        in_epoch = epoch == number
        key: Seed = (*seed, int(number))
        order[in_epoch] = shuffled(place[in_epoch], count, seed=key)
    return order
