"""Batches from token stores by a plan: `batch(step)`, on any number of processes.

Transforms change the rows of a plan, each by its number among all rows that are ever read.

No iterator and no state: a resumed run needs its step and nothing else. Grain's MapDataset, a pure
map from index to element too, was left out: it would bring JAX and five packages into a layer that
needs none of them, for the prefetching that `Prefetched` does in one thread.
"""

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int

from lminf.config import parse_choice, split_choices
from lminf.data import packing
from lminf.data.decomposition import Decomposition
from lminf.data.packing import Documents, Spans
from lminf.data.plans import BestFit, Concat, Mixture, Plan, Schedule, Windows
from lminf.data.store import TokenStore
from lminf.data.transforms import Example, PerSequence, RowTransform, transform_row
from lminf.data.untie_the_knots import UntieTheKnots
from lminf.errors import InputError

PLANS = {
    "windows": Windows,
    "concat": Concat,
    "best_fit": BestFit,
    "decomposition": Decomposition,
    "mixture": Mixture,
}
TRANSFORMS = {"untie_the_knots": UntieTheKnots, "per_sequence": PerSequence}


def parse_plan(text: str) -> Plan:
    """The plan that `concat`, `decomposition:shortest=6,cycles=4` and the like describe."""
    return parse_choice(text, PLANS, what="data plan")


def parse_transforms(text: str, *, vocab_size: int) -> tuple[RowTransform, ...]:
    """The transforms of rows that `untie_the_knots:…,per_sequence` describes, in that order, for a
    model of so many tokens.
    """
    parsed = [parse_choice(each, TRANSFORMS, what="transform") for each in split_choices(text)]
    for transform in parsed:
        beyond = [token for token in transform.token_ids if token >= vocab_size]
        if beyond:
            raise InputError(
                f"{text!r} writes the token {beyond[0]}, which the vocabulary of {vocab_size:,} "
                f"tokens lacks; reserve tokens below {vocab_size} that no text holds"
            )
    return tuple(parsed)


class Loader:
    """The batches of a plan. `length` and `rows` give the tokens of a step.

    Each row, with the target of its last token, is an example of the transforms, which must leave
    it as long as it is.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        plan: Plan,
        *,
        length: int,
        rows: int,
        seed: int,
        transforms: Sequence[RowTransform] = (),
    ):
        _same_tokenizer(stores)
        self._stores = stores
        self._first = np.cumsum([0, *(store.tokens for store in stores)])  # token of each store
        corpora = [
            Documents(*(part + first for part in packing.documents(store.ends)))
            for store, first in zip(stores, self._first[:-1].tolist(), strict=True)
        ]
        self._ends = np.concatenate([corpus.ends for corpus in corpora])
        self.schedule: Schedule = plan.schedule(corpora, length=length, rows=rows, seed=seed)
        self._transforms, self._seed = tuple(transforms), seed
        self._most_rows = max(count for count, _ in self.schedule.shapes)
        if transforms:
            self.batch(0)  # what cannot be transformed is refused now

    def batch(self, step: int, *, process: int = 0, processes: int = 1) -> dict[str, np.ndarray]:
        """The batch of a step, or that process's equal share of its rows, [rows, length] each.

        tokens and targets; weights (0 for padding) where rows may be short or are transformed;
        where several documents stand in a row, positions in each document and segments, of which
        padding is the last.
        """
        pieces = self.schedule.at(step)
        if processes != 1:
            pieces = _host_rows(pieces, process, processes)
        return self._filled(pieces, first_row=step * self._most_rows + process * pieces.rows)

    def documents(self, step: int) -> list[int]:
        """Numbers of the documents whose tokens are in the batch, counted over all stores."""
        pieces = self.schedule.at(step)
        last = pieces.start + pieces.size - 1
        first, last = (np.searchsorted(self._ends, x, side="right") for x in (pieces.start, last))
        owner, place = packing.ragged(last - first + 1)
        return np.unique(first[owner] + place).tolist()

    def _filled(self, pieces: Spans, *, first_row: int) -> dict[str, np.ndarray]:
        shape = (pieces.rows, pieces.length)
        read = np.concatenate([np.empty(0, np.int32), *self._read(pieces.start, pieces.size + 1)])
        read, weights = self._transformed(read, pieces, first_row)
        owner, place = packing.ragged(pieces.size)
        source = place + (np.cumsum(pieces.size + 1) - pieces.size - 1)[owner]
        # Where a piece begins in its row: what stands before it there.
        offsets = np.cumsum(pieces.size) - pieces.size
        new_row = np.diff(pieces.row, prepend=-1) != 0
        in_row = offsets - np.maximum.accumulate(np.where(new_row, offsets, 0))
        slots = (pieces.row * pieces.length + in_row)[owner] + place

        def arranged(values: np.ndarray, dtype: type) -> np.ndarray:
            array = np.zeros(shape, dtype)
            array.reshape(-1)[slots] = values
            return array

        batch = {
            "tokens": arranged(read[source], np.int32),
            "targets": arranged(read[source + 1], np.int32),
        }
        if self.schedule.padded or self._transforms:
            batch["weights"] = arranged(weights[source + 1], np.float32)
        if self.schedule.document_mask:
            number = np.arange(len(pieces.row))
            in_order = number - np.maximum.accumulate(np.where(new_row, number, 0)) + 1
            batch["positions"] = arranged(place, np.int32)
            batch["segments"] = arranged(in_order[owner], np.int32)
            # Padding is one more segment, with positions that rise as the decoder wants them.
            filled = np.bincount(pieces.row, pieces.size, pieces.rows).astype(np.int32)
            count = np.bincount(pieces.row, minlength=pieces.rows).astype(np.int32)
            beyond = np.arange(pieces.length, dtype=np.int32) - filled[:, None]
            batch["positions"] = np.where(beyond >= 0, beyond, batch["positions"])
            batch["segments"] = np.where(beyond >= 0, count[:, None] + 1, batch["segments"])
        return batch

    def _transformed(
        self, read: Int[np.ndarray, " K"], pieces: Spans, first_row: int
    ) -> tuple[Int[np.ndarray, " K"], Float[np.ndarray, " K"]]:
        """(tokens, weights as targets) of all pieces, with the token after each."""
        weights = np.ones(len(read), np.float32)
        if not self._transforms:
            return read, weights
        of_piece = np.repeat(np.arange(len(pieces.row)), pieces.size + 1)
        edges = np.searchsorted(pieces.row[of_piece], np.arange(pieces.rows + 1))
        read = read.astype(np.int32)
        for row, (start, stop) in enumerate(itertools.pairwise(edges.tolist())):
            example: Example = {"tokens": read[start:stop]}
            if self.schedule.document_mask:
                example = {**example, "segments": of_piece[start:stop]}
            if start < stop:  # a row of padding holds nothing to transform
                index = (self._seed, first_row + row)
                made = transform_row(self._transforms, example, index)
                read[start:stop] = made["tokens"]
                weights[start:stop] = made.get("weights", 1)
        return read, weights

    def _read(
        self, starts: Int[np.ndarray, " P"], sizes: Int[np.ndarray, " P"]
    ) -> list[Int[np.ndarray, " _"]]:
        """The tokens of every piece, in order; a piece may go on from one store into the next."""
        parts: list[list[Any]] = [[] for _ in range(len(starts))]
        for store, (first, last) in zip(
            self._stores, itertools.pairwise(self._first.tolist()), strict=True
        ):
            begin, end = np.maximum(starts, first), np.minimum(starts + sizes, last)
            inside = np.flatnonzero(begin < end)
            spans = store.read((begin - first)[inside].tolist(), (end - begin)[inside].tolist())
            for index, part in zip(inside.tolist(), spans, strict=True):
                parts[index].append(part)
        return [part for of_piece in parts for part in of_piece]


def _host_rows(pieces: Spans, process: int, processes: int) -> Spans:
    rows, left = divmod(pieces.rows, processes)
    if left:
        raise InputError(
            f"a batch of {pieces.rows} rows of {pieces.length} tokens does not divide among "
            f"{processes} processes; make the rows a multiple of that"
        )
    is_local = pieces.row // rows == process
    row, start, size = (part[is_local] for part in (pieces.row, pieces.start, pieces.size))
    return Spans(rows, pieces.length, row - process * rows, start, size)


def _same_tokenizer(stores: Sequence[TokenStore]) -> None:
    facts = [store.facts for store in stores if store.facts is not None]
    for first, second in itertools.pairwise(facts):
        if first.tokenizer_digest != second.tokenizer_digest:
            raise InputError(
                f"the stores were written with different tokenizers, {first.tokenizer} and "
                f"{second.tokenizer}; tokenize both texts with one of them"
            )


class Source(Protocol):
    def batch(self, step: int, *, process: int, processes: int) -> Any: ...

    def documents(self, step: int) -> Sequence[int]: ...


class Prefetched:
    """One process's share of the same batches, the next ones being made while a step runs."""

    def __init__(self, source: Source, *, ahead: int = 2, process: int = 0, processes: int = 1):
        self._source, self._ahead = source, ahead
        self._share = {"process": process, "processes": processes}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._made: dict[int, Future] = {}
        self._lock = threading.Lock()

    def batch(self, step: int) -> Any:
        with self._lock:
            upcoming = range(step, step + 1 + self._ahead)
            for stale in self._made.keys() - set(upcoming):
                self._made.pop(stale).cancel()
            for number in upcoming:
                if number not in self._made:
                    self._made[number] = self._pool.submit(
                        self._source.batch, number, **self._share
                    )
            future = self._made[step]
        return future.result()

    def documents(self, step: int) -> Sequence[int]:
        return self._source.documents(step)
