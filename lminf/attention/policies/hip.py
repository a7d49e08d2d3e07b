"""HiP and InfiniteHiP: the best keys of every block of queries, found by a hierarchical search.

Source: Lee et al. 2024, arXiv:2406.09827, and 2025, arXiv:2502.08910; docs/policies.md has the
mathematics. The query heads of a key head share a search. HiP's asks for O(log) of the blocks, at
the model's own positions: it saves work, and does not reach past the trained length. InfiniteHiP's
first stage looks at all of the text, O(text / chunk) for a block of queries, and what is seen is
packed. Its source leaves open, and here: each list starts with the first token after the sinks, and
its last chunk may be short; a half that ends up no better goes left; the token that stands for a
chunk is scored once more as a right half, so stages of single tokens rank all at one distance.
"""

import abc
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lminf.attention import cache as caches
from lminf.attention import sparse
from lminf.attention.policy import Count, CountOrNone, Layers, Tokens, register


class HierarchicalSelect(sparse.SparsePolicy):
    """Sinks, a window, and what a search in stages finds between them for a block of queries.

    Subclasses say how a stage searches. Decoding keeps what a stage found until it or a stage
    before it searches again, and the window where it then began.
    """

    sinks: Any  # int: tokens at the start that stay visible
    block: Any  # int: tokens of a block of the last stage
    query_block: Any  # int: tokens that see the same, where they are read together
    # tuple[int, ...]: of every stage, the tokens that are decoded before it searches again
    refreshes: Any

    ranks_by_products = True
    window_slack = 0  # tokens that a window may have beyond its width
    group = property(attrgetter("query_block"))
    accumulates = True  # what a token that is taken back found is not what served before it
    searches_one_by_one = False  # whether tokens that are read together search as in decoding

    @abc.abstractmethod
    def kept(self, stage: int, slots: int) -> int:
        """Blocks that a stage keeps of a text of so many tokens."""

    @abc.abstractmethod
    def window_start(self, first: Int[Array, " B"]) -> Int[Array, " B"]:
        """Where the window of a block of queries begins."""

    @abc.abstractmethod
    def search(
        self, stage: int, query: sparse.Query, start: Array, parent_ids: Array | None
    ) -> Int[Array, "B K kept"]:
        """Ids of the blocks that a stage keeps, in order; first -1 for none. It searches in the
        blocks `parent_ids` of the stage before; the first (None) in all from sinks to `start`.
        """

    def init_state(self, shape: caches.CacheShape) -> dict[str, Any]:
        stages = range(len(self.refreshes))
        kept = [(shape.batch, shape.kv_heads, self.kept(s, shape.slots)) for s in stages]
        return {  # what decoding found last: blocks, -1 for none, and where its window began
            "block_ids": tuple(jnp.full(size, -1, jnp.int32) for size in kept),
            "start": jnp.full((shape.batch,), -1, jnp.int32),
        }

    def select(self, state: Any, query: sparse.Query) -> tuple[Int[Array, "B K X"], Any]:
        """Sinks, the tokens of the last stage's blocks before the window, and the window."""
        block_ids, start, state = self._block_ids(state, query)
        pos = sparse.block_positions(block_ids, self.block, first=self.sinks)
        pos = jnp.where(pos < start[:, None, None], pos, -1)
        rows = query.q.shape[1]
        length = self.window + rows + self.window_slack + (self.refreshes[0] if rows == 1 else 0)
        near = start[:, None, None] + jnp.arange(length, dtype=jnp.int32)[None, None]
        near = jnp.broadcast_to(near, (*pos.shape[:2], length))
        return jnp.concatenate([sparse.sinks(self, pos), pos, near], 2), state

    def _block_ids(self, state, query):
        """What the last stage keeps, where the window begins, and what is remembered of it, which
        is something where tokens are read alone, or as if they were.
        """
        first, layer = query.first, query.layer
        block_ids: Any = None
        start = self.window_start(first)
        if not (query.alone or self.searches_one_by_one):
            for stage in range(len(self.refreshes)):
                block_ids = self.search(stage, query, start, block_ids)
            return block_ids, start, {**state, "start": state["start"].at[layer].set(-1)}
        stored_start, refreshed = state["start"][layer], []
        reads = query.pos[:, 0] >= 0  # rows of padding search for nothing
        stale = ((stored_start < 0) | (first % self.refreshes[0] == 0)) & reads
        start = jnp.where(stale, start, stored_start)
        for stage, last in enumerate(state["block_ids"]):
            stale |= (first % self.refreshes[stage] == 0) & reads
            search = functools.partial(self.search, stage, query, start, block_ids)
            block_ids = jax.lax.cond(stale.any(), search, lambda last=last: last[layer])
            block_ids = jnp.where(stale[:, None, None], block_ids, last[layer])
            refreshed.append(last.at[layer].set(block_ids))
        state = {"block_ids": tuple(refreshed), "start": state["start"].at[layer].set(start)}
        return block_ids, start, state


@register("hip")
@dataclass(frozen=True)
class HiP(HierarchicalSelect):
    """Keys found by a tree search. Source: Lee et al. 2024, arXiv:2406.09827."""

    topk: Tokens = 512  # tokens found, a multiple of `block`
    window: Tokens = 256  # tokens, the query's own included
    sinks: CountOrNone = 16  # tokens at the start that stay visible
    block: Count = 2  # tokens
    query_block: Tokens = 64  # tokens that see the same, where they are read together
    query_stride: Tokens = 2  # of so many of these the last asks
    refresh: Count = 8  # tokens that are written before the next search
    dense_layers: Layers = 3  # layers at the start, of those with this policy, that see everything

    selected_distance = "true"
    layer_thresholds = property(lambda self: (self.dense_layers,))
    one_by_one = property(lambda self: _OneByOneHiP(**vars(self)))
    max_selected = property(attrgetter("topk"))
    window_slack = property(attrgetter("block"))
    refreshes = property(lambda self: (self.refresh,))

    def problems(self) -> Iterator[str]:
        if self.topk % self.block or self.topk < self.block:
            yield (
                f"topk={self.topk} tokens is no whole number of blocks of block={self.block}; "
                f"give a multiple"
            )

    def _most(self, slots: int) -> int:
        """Blocks between sinks and window, of a text of so many tokens."""
        return max(slots - self.window - self.sinks, 0) // self.block

    def kept(self, stage: int, slots: int) -> int:
        return min(self.topk // self.block, self._most(slots))

    def window_start(self, first: Int[Array, " B"]) -> Int[Array, " B"]:
        """After the last whole block before it."""
        blocks = jnp.maximum(first - self.window + 1 - self.sinks, 0) // self.block
        return self.sinks + blocks * self.block

    def search(
        self, stage: int, query: sparse.Query, start: Array, parent_ids: Array | None
    ) -> Int[Array, "B K kept"]:
        q, kept, lists = query.q, self.kept(stage, query.slots), (len(query.q), query.kv_heads)
        if not kept:
            return jnp.zeros((*lists, 0), jnp.int32)
        blocks = (start - self.sinks)[:, None, None] // self.block
        # The last of every `query_stride` asks, so that the last of a block does; where fewer are
        # read, the last of them.
        ask = -(query.first % self.query_block + 1) % self.query_stride
        ask = jnp.minimum(query.first + ask, query.end - 1) - query.first
        row = jnp.arange(0, q.shape[1], self.query_stride, dtype=jnp.int32)[None] + ask[:, None]
        columns, batch_row = jnp.minimum(row, q.shape[1] - 1), jnp.arange(len(q))[:, None]
        asks = (row < q.shape[1]) & (query.pos[batch_row, columns] >= 0)
        pos = jnp.maximum(query.first[:, None] + row, 0)
        q = query.placement.at(q[batch_row, columns], pos)

        def score(first_block, size):
            """Of ranges of so many blocks that begin at `first_block`, [B, K, X]."""
            pos = sparse.block_positions(first_block, self.block, first=self.sinks)
            largest = sparse.largest_products(query, q, asks, pos, pos)
            largest = largest.reshape(*lists, -1, *first_block.shape[2:], self.block).max((2, 4))
            return jnp.where(size > 0, largest, -jnp.inf)

        ends = jnp.arange(kept + 1, dtype=jnp.int32)[None, None] * blocks // kept
        first_block = jnp.broadcast_to(ends[..., :-1], (*lists, kept))
        size = jnp.broadcast_to(jnp.diff(ends), (*lists, kept))

        def halve(_, ranges):
            first_block, size = ranges
            left = size // 2
            first_block = jnp.concatenate([first_block, first_block + left], 2)
            size = jnp.concatenate([left, size - left], 2)
            _, best = jax.lax.top_k(score(first_block, size), kept)
            return jnp.take_along_axis(first_block, best, 2), jnp.take_along_axis(size, best, 2)

        rounds = (-(-self._most(query.slots) // kept) - 1).bit_length()
        first_block, size = jax.lax.fori_loop(0, rounds, halve, (first_block, size))
        return jnp.sort(jnp.where(size > 0, first_block, -1), axis=2)


@register("infinite_hip")
@dataclass(frozen=True)
class InfiniteHiP(HierarchicalSelect):
    """Keys found in stages, packed. Source: Lee et al. 2025, arXiv:2502.08910."""

    chunk: tuple[Count, ...] = (256, 32, 8)  # tokens of a chunk, by stage
    topk: tuple[Tokens, ...] = (32_768, 8192, 2048)  # tokens that a stage leaves
    refresh: tuple[Count, ...] = (16, 8, 4)  # tokens that are written before it searches again
    window: Tokens = 1024  # tokens, the query's own included
    sinks: CountOrNone = 256  # tokens at the start that stay visible
    query_block: Tokens = 64  # tokens that see the same, where they are read together
    ordered_layers: Layers = 3  # layers at the start whose search tells chunks apart by place
    dense_layers: Layers = 0  # layers at the start that see everything, where it is

    selected_distance = "packed"
    needs_rotary = True
    layer_thresholds = property(attrgetter("dense_layers", "ordered_layers"))
    one_by_one = property(lambda self: _OneByOneInfiniteHiP(**vars(self)))
    block = property(lambda self: self.chunk[-1])
    max_selected = property(lambda self: self.topk[-1])
    refreshes = property(attrgetter("refresh"))

    def problems(self) -> Iterator[str]:
        counts = [len(stages) for stages in (self.chunk, self.topk, self.refresh)]
        if len(set(counts)) > 1 or not counts[0]:
            yield (
                f"chunk, topk and refresh have {counts[0]}, {counts[1]} and {counts[2]} stages; "
                f"give each one number a stage"
            )
        for size, kept in zip(self.chunk, self.topk, strict=True):
            if kept % size:
                yield (
                    f"topk={kept} tokens is no whole number of chunks of chunk={size}; "
                    f"give a multiple"
                )
        for previous, following in itertools.pairwise(self.chunk):
            if previous % following:
                yield (
                    f"chunk={following} tokens does not divide chunk={previous} of the stage "
                    f"before; give a divisor"
                )
        for previous, following in itertools.pairwise(self.topk):
            if following > previous:
                yield (
                    f"topk={following} tokens of the topk={previous} that the stage before leaves; "
                    f"give no more than those"
                )

    def _listed(self, stage: int, slots: int) -> int:
        """Chunks that a stage chooses from, at most."""
        if stage == 0:
            return -(-max(slots - self.window - self.sinks, 0) // self.chunk[0])
        return self.kept(stage - 1, slots) * (self.chunk[stage - 1] // self.chunk[stage])

    def kept(self, stage: int, slots: int) -> int:
        return min(self.topk[stage] // self.chunk[stage], self._listed(stage, slots))

    def window_start(self, first: Int[Array, " B"]) -> Int[Array, " B"]:
        return jnp.maximum(first - self.window + 1, self.sinks)

    def table_size(self, slots: int, rows: int) -> int:
        stages = range(len(self.chunk))
        listed = self.kept(stages[-1], slots) * self.chunk[-1]
        seen = self.sinks + listed + self.window + rows + self.refresh[0]
        return max(slots, seen, *(self._listed(stage, slots) for stage in stages))

    def search(
        self, stage: int, query: sparse.Query, start: Array, parent_ids: Array | None
    ) -> Int[Array, "B K kept"]:
        size, listed = self.chunk[stage], self._listed(stage, query.slots)
        kept, lists = self.kept(stage, query.slots), (len(query.q), query.kv_heads)
        total = (start - self.sinks)[:, None, None]
        if parent_ids is None:  # chunks of all that there is, the last one at the end of the list
            number = -(-total // size) - listed + jnp.arange(listed, dtype=jnp.int32)[None, None]
            number = jnp.broadcast_to(jnp.maximum(number, -1), (*lists, listed))
        else:  # those of the chunks before
            number = sparse.block_positions(parent_ids, self.chunk[stage - 1] // size)
            number = jnp.sort(jnp.where(number * size < total, number, -1), axis=2)
        if kept == listed:
            return number
        tokens = jnp.where(number < 0, 0, jnp.minimum(total - number * size, size))
        shared = query.q.shape[2] // query.kv_heads
        first, left = (jnp.repeat(x, shared, axis=1) for x in (number * size, tokens))

        def largest(sides, key_pos):
            """The largest product [B, K, X] of the token that each chunk comes down to."""

            def score(token):
                """As the first of a left half and as that of a right one."""
                products = sparse.largest_products(
                    query, jnp.concatenate(sides, 1), query.pos >= 0, self.sinks + token, key_pos
                )
                return products[:, :, 0], products[:, :, -1]

            def descend(_, ranges):
                token, left, as_left, as_right = ranges
                half = left // 2
                middle_as_left, middle_as_right = score(token + half)
                right = (middle_as_right > as_left) | (half == 0)
                return (
                    jnp.where(right, token + half, token),
                    jnp.where(right, left - half, half),
                    jnp.where(right, middle_as_left, as_left),
                    jnp.where(right, middle_as_right, as_right),
                )

            ranges = (first, left, *score(first))
            *_, products = jax.lax.fori_loop(0, (size - 1).bit_length(), descend, ranges)
            return products.reshape(*lists, -1, listed).max(2)

        def ordered():  # chunks by their place in the list, the last one's window + listed - 1 back
            place = jnp.broadcast_to(jnp.arange(listed, dtype=jnp.int32), first.shape)
            last = jnp.full_like(query.pos, self.window + listed - 1)
            return largest([query.placement.at(query.q, last)], place)

        def alike():  # all keys equally far away, one token more on the left: none is rotated
            return largest([query.placement.away(query.q, self.window + n) for n in (1, 0)], None)

        best = jax.lax.cond(query.layer_index < self.ordered_layers, ordered, alike)
        _, best = jax.lax.top_k(jnp.where(tokens > 0, best, -jnp.inf), kept)
        return jnp.sort(jnp.take_along_axis(number, best, 2), axis=2)


@dataclass(frozen=True)
class _OneByOneHiP(HiP):
    """The same where several tokens are read at once as decoding reads them."""

    group = 1
    searches_one_by_one = True


@dataclass(frozen=True)
class _OneByOneInfiniteHiP(InfiniteHiP):
    """The same where several tokens are read at once as decoding reads them."""

    group = 1
    searches_one_by_one = True
