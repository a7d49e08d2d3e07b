"""Dataset Decomposition: rows of powers of two, each from one document, lengths by a curriculum.

Every document is cut into pieces of 2^k + 1 tokens, longest first; a step takes rows of one length,
more of them where they are shorter, so that every step has the same number of tokens.
Source: Pouransari et al. 2024, "Dataset Decomposition", arXiv:2405.13226.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import numpy as np
from jaxtyping import Int

from lminf import ranges
from lminf.data import packing
from lminf.data.packing import Documents, Sequences, Spans
from lminf.data.permutation import uniform
from lminf.data.plans import Selection, epochs, joined
from lminf.errors import InputError
from lminf.ranges import Range

# Odds of n lengths, from the shortest to the longest.
CURRICULA = {
    "uniform": lambda n: [1.0] * n,
    "grow_linear": lambda n: [float(n - i) for i in range(n)],
    "grow_p2": lambda n: [2.0 ** (n - 1 - i) for i in range(n)],
    "grow_p100": lambda n: [100.0 ** (n - 1 - i) for i in range(n)],
    "shrink_linear": lambda n: [float(i + 1) for i in range(n)],
    "shrink_p2": lambda n: [2.0**i for i in range(n)],
    "shrink_p100": lambda n: [100.0**i for i in range(n)],
}
Curriculum = Literal[
    "uniform", "grow_linear", "grow_p2", "grow_p100", "shrink_linear", "shrink_p2", "shrink_p100"
]  # fmt: skip

Log2: TypeAlias = Annotated[int, Range(min=1, max=30)]  # of a length in tokens


@dataclass(frozen=True)
class Decomposition:
    """Rows of 2^shortest … 2^longest tokens, one document each; shorter ends are left out."""

    shortest: Log2 = 8
    longest: Log2 | None = None  # None: the length that the run asks for
    # Of a document longer than the longest row: take that row, or draw its length so that every
    # length gives as many tokens.
    beyond: Literal["take", "draw"] = "take"
    # Tokens of each length in an epoch: all there are, or as many as the scarcest has.
    tokens: Literal["all", "equal"] | tuple[Annotated[int, Range(min=0)], ...] = "all"
    # Or odds, from the shortest on.
    curriculum: Curriculum | tuple[Annotated[float, Range(above=0)], ...] = "grow_p2"
    # The paper draws a length by its odds; its released trainer, by odds x batches of that length.
    by: Literal["odds", "odds_and_batches"] = "odds"
    cycles: Annotated[int, Range(min=1, max=2**20)] = 8  # of the curriculum in an epoch

    def __post_init__(self):
        ranges.check(self)

    def schedule(
        self, corpora: Sequence[Documents], *, length: int, rows: int, seed: int
    ) -> "Curricular":
        longest = self.longest
        if longest is None:
            longest = int(length).bit_length() - 1
        if longest < self.shortest:
            raise InputError(f"decomposition from 2^{self.shortest} to 2^{longest} tokens holds no "
                             f"length; lower shortest or raise the length")  # fmt: skip
        if rows * length % (1 << longest):
            raise InputError(
                f"{rows} rows of {length} tokens do not divide into rows of {1 << longest}; make "
                f"rows x length a multiple of that"
            )
        pieces = cut(joined(corpora), shortest=self.shortest, longest=longest, beyond=self.beyond,
                    seed=seed)  # fmt: skip
        buckets = [Sequences(pieces[k], length=1 << k) for k in range(self.shortest, longest + 1)]
        taken = self._rows(buckets, of_step=rows * length)
        return Curricular(
            buckets, [Selection(b, n) for b, n in zip(buckets, taken, strict=True)],
            odds=self._odds(len(buckets)), by_batches=self.by == "odds_and_batches",
            cycles=self.cycles, tokens=rows * length, seed=seed,
        )  # fmt: skip

    def _rows(self, buckets: Sequence[Sequences], *, of_step: int) -> list[int]:
        """Of each length, in an epoch."""
        bucket_tokens = {bucket.length: bucket.count * bucket.length for bucket in buckets}
        if self.tokens == "all":
            return [bucket.count for bucket in buckets]
        if self.tokens == "equal":
            least = min(bucket_tokens.values())
            least -= least % of_step if least > of_step else 0  # whole batches of every length
            bucket_shares = [least] * len(buckets)
        else:
            bucket_shares = list(self.tokens)
        if len(bucket_shares) != len(buckets):
            lengths = ", ".join(map(str, bucket_tokens))
            raise InputError(
                f"{len(bucket_shares)} numbers of tokens for {len(buckets)} lengths ({lengths}); "
                f"give one for each"
            )
        for bucket, tokens in zip(buckets, bucket_shares, strict=True):
            if tokens > bucket_tokens[bucket.length]:
                raise InputError(
                    f"{tokens:,} tokens in rows of {bucket.length} were asked for, but the corpus "
                    f"gives {bucket_tokens[bucket.length]:,}; ask for fewer"
                )
        return [
            tokens // bucket.length for bucket, tokens in zip(buckets, bucket_shares, strict=True)
        ]

    def _odds(self, lengths: int) -> list[float]:
        if isinstance(self.curriculum, str):
            return CURRICULA[self.curriculum](lengths)
        odds = list(self.curriculum)
        if len(odds) != lengths or not min(odds) > 0:
            raise InputError(f"the odds {self.curriculum} are not {lengths} numbers above 0, one "
                             f"for each length from the shortest on")  # fmt: skip
        return odds


def cut(
    corpus: Documents, *, shortest: int, longest: int, beyond: str, seed: int
) -> dict[int, Int[np.ndarray, " N"]]:
    """k -> where pieces of 2^k + 1 tokens begin, in the order of the corpus.

    Pieces of a document are disjoint and follow one another from its beginning; fewer than
    2^shortest + 1 tokens of its end are left out.
    """
    start, left = corpus.starts.copy(), corpus.ends - corpus.starts
    starts: dict[int, list[np.ndarray]] = {k: [] for k in range(shortest, longest + 1)}
    if beyond == "draw":
        lengths = np.arange(shortest, longest + 1)
        cumulative = np.cumsum(2.0 ** (shortest - lengths))
        active, turn = np.flatnonzero(left - 1 >= 2 << longest), 0
        while active.size:
            # By document and turn, so that no document's cuts depend on the others.
            number = active.astype(np.uint64) << np.uint64(24) | np.uint64(turn)
            u = uniform(number, seed=(seed, 3)) * cumulative[-1]
            drawn = lengths[np.searchsorted(cumulative, u, side="right")]
            for k in lengths.tolist():
                starts[k].append(start[active[drawn == k]])
            start[active] += (1 << drawn) + 1
            left[active] -= (1 << drawn) + 1
            active, turn = active[left[active] - 1 >= 2 << longest], turn + 1
    for k in range(longest, shortest - 1, -1):
        size = (1 << k) + 1
        count = np.maximum(left, 0) // size  # 0 or 1, save for the longest
        owner, place = packing.ragged(count)
        starts[k].append(start[owner] + place * size)
        start += count * size
        left -= count * size
    return {k: np.sort(np.concatenate(parts)) for k, parts in starts.items()}


class Curricular:
    """Steps of one length each, drawn without replacement by the odds of a curriculum."""

    document_mask = False
    padded = True  # the last rows of a length in an epoch may be too few for a step

    def __init__(
        self,
        buckets: Sequence[Sequences],
        taken: Sequence[Selection],
        *,
        odds: Sequence[float],
        by_batches: bool,
        cycles: int,
        tokens: int,
        seed: int,
    ):
        self._buckets, self.taken = buckets, tuple(taken)
        self._odds, self._by_batches, self._cycles = list(odds), by_batches, cycles
        self._seed = seed
        self._rows = [tokens // bucket.length for bucket in buckets]
        self.batches = [-(-t.rows // rows) for t, rows in zip(taken, self._rows, strict=True)]
        self.shapes = tuple(
            (rows, bucket.length)
            for rows, bucket, batches in zip(self._rows, buckets, self.batches, strict=True)
            if batches
        )
        self._steps = sum(self.batches)
        if not self._steps:
            raise InputError(
                f"no document has {buckets[0].length + 1} tokens, the shortest that decomposition "
                f"keeps; lower shortest or give longer documents"
            )
        self.steps = float(self._steps)
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)

    def at(self, step: int) -> Spans:
        epoch, place = divmod(step, self._steps)
        bucket_of, ordinal_of = self.epoch(epoch)
        number = int(bucket_of[place])
        bucket, rows = self._buckets[number], self._rows[number]
        index = int(ordinal_of[place]) * rows + np.arange(rows)
        taken = self.taken[number].rows
        # Where an epoch takes only a part of the bucket, the next ones go on with the others.
        stream = epoch * taken + index
        chosen = epochs(stream, bucket.count, seed=(self._seed, 4, number))
        return bucket.spans(np.where(index < taken, chosen, -1))

    def _epoch(self, epoch: int) -> tuple[Int[np.ndarray, " steps"], Int[np.ndarray, " steps"]]:
        """(bucket, which of its batches) of every step of an epoch."""
        u = uniform(np.arange(self._steps, dtype=np.uint64), seed=(self._seed, 5, epoch))
        order: list[int] = []
        for cycle in range(self._cycles):
            left = [n * (cycle + 1) // self._cycles - n * cycle // self._cycles
                    for n in self.batches]  # fmt: skip
            for _ in range(sum(left)):
                odds = [
                    0.0 if not n else o * m if self._by_batches else o
                    for n, o, m in zip(left, self._odds, self.batches, strict=True)
                ]
                chosen = _choose(odds, float(u[len(order)]))
                left[chosen] -= 1
                order.append(chosen)
        bucket_of = np.array(order, np.int16)
        ordinal_of = np.zeros(self._steps, np.int64)
        for number in range(len(self._buckets)):
            in_bucket = bucket_of == number
            ordinal_of[in_bucket] = np.arange(in_bucket.sum())
        return bucket_of, ordinal_of


def _choose(odds: Sequence[float], u: float) -> int:
    """The index where `u` in [0, 1) falls."""
    point = u * sum(odds)
    last = 0
    for index, odd in enumerate(odds):
        if odd > 0:
            last = index
            if point < odd:
                break
        point -= odd
    return last
