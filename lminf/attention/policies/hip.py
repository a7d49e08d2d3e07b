"""HiP: the best keys of every block of queries, found by a search over a tree of key ranges.

Source: Lee et al. 2024, arXiv:2406.09827; docs/policies.md has the mathematics. The search asks for
O(log) of the blocks, and the query heads of a key head share it. Decoding keeps what it found for
`refresh` tokens. Positions are the model's: this saves work, and does not reach past the trained
length.
"""

import functools
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lminf.attention import cache as caches
from lminf.attention import scores, sparse
from lminf.attention.policy import Count, CountOrNone, Layers, Tokens, register
from lminf.errors import InputError


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

    def kept(self, stage: int, slots: int) -> int:
        """Blocks that a stage keeps of a text of so many tokens."""
        raise NotImplementedError

    def window_start(self, first: Int[Array, " B"]) -> Int[Array, " B"]:
        """Where the window of a block of queries begins."""
        raise NotImplementedError

    def search(
        self, stage: int, query: sparse.Query, start: Array, before: Array | None
    ) -> Int[Array, "B K kept"]:
        """Numbers of the blocks that a stage keeps of those `before`, in order; first -1 for none.
        The first stage has `before` None, and everything from sinks to `start`.
        """
        raise NotImplementedError

    def tokens(
        self, block_ids: Int[Array, "B K X"], start: Int[Array, " B"]
    ) -> Int[Array, "B K Y"]:
        """Positions of the tokens of the last stage's blocks before the window; -1 for none."""
        pos = sparse.block_positions(block_ids, self.block, first=self.sinks)
        return jnp.where(pos < start[:, None, None], pos, -1)

    def init_state(self, shape: caches.CacheShape) -> dict[str, Any]:
        stages = range(len(self.refreshes))
        kept = [(shape.batch, shape.kv_heads, self.kept(s, shape.slots)) for s in stages]
        return {  # what decoding found last: blocks, -1 for none, and where its window began
            "block_ids": tuple(jnp.full(size, -1, jnp.int32) for size in kept),
            "start": jnp.full((shape.batch,), -1, jnp.int32),
        }

    def select(self, state: Any, query: sparse.Query) -> tuple[sparse.Selected, Any]:
        block_ids, start, state = self._block_ids(state, query)
        waited = self.refreshes[0] if query.q.shape[1] == 1 else 0
        length = self.window + query.q.shape[1] + self.window_slack + waited
        return sparse.Selected(self.tokens(block_ids, start), start, length), state

    def _block_ids(self, state, query):
        """What the last stage keeps, where the window begins, and what is remembered of it, which
        is something where the token is read alone.
        """
        first, layer = query.group.first, query.layer
        block_ids: Any = None
        start = self.window_start(first)
        if not query.alone:
            for stage in range(len(self.refreshes)):
                block_ids = self.search(stage, query, start, block_ids)
            return block_ids, start, {**state, "start": state["start"].at[layer].set(-1)}
        before, known = state["start"][layer], []
        stale = (before < 0) | (first % self.refreshes[0] == 0)
        start = jnp.where(stale, start, before)
        for stage, last in enumerate(state["block_ids"]):
            stale |= first % self.refreshes[stage] == 0
            search = functools.partial(self.search, stage, query, start, block_ids)
            block_ids = jax.lax.cond(stale.any(), search, lambda last=last: last[layer])
            block_ids = jnp.where(stale[:, None, None], block_ids, last[layer])
            known.append(last.at[layer].set(block_ids))
        state = {"block_ids": tuple(known), "start": state["start"].at[layer].set(start)}
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
    max_selected = property(attrgetter("topk"))
    window_slack = property(attrgetter("block"))

    def __post_init__(self):
        super().__post_init__()
        if self.topk % self.block or self.topk < self.block:
            raise InputError(
                f"topk={self.topk} tokens is no whole number of blocks of block={self.block}; "
                f"give a multiple"
            )

    @property
    def refreshes(self) -> tuple[int]:
        return (self.refresh,)

    def kept(self, stage: int, slots: int) -> int:
        return min(self.topk // self.block, max(slots - self.window - self.sinks, 0) // self.block)

    def window_start(self, first: Int[Array, " B"]) -> Int[Array, " B"]:
        """After the last whole block before it."""
        blocks = jnp.maximum(first - self.window + 1 - self.sinks, 0) // self.block
        return self.sinks + blocks * self.block

    def search(
        self, stage: int, query: sparse.Query, start: Array, before: Array | None
    ) -> Int[Array, "B K kept"]:
        del before  # there is one stage
        group, q, kv_heads = query.group, query.q, query.kv_heads
        most = max(query.slots - self.window - self.sinks, 0) // self.block
        kept = self.kept(stage, query.slots)
        if not kept:
            return jnp.zeros((len(q), kv_heads, 0), jnp.int32)
        blocks = (start - self.sinks) // self.block
        # The last of every `query_stride` asks, so that the last of a block does; where fewer are
        # read, the last of them.
        ask = -(group.first % self.query_block + 1) % self.query_stride
        ask = jnp.minimum(group.first + ask, group.end - 1) - group.base
        row = jnp.arange(0, q.shape[1], self.query_stride, dtype=jnp.int32)[None] + ask[:, None]
        columns = jnp.minimum(row, q.shape[1] - 1)
        batch_row = jnp.arange(len(q))[:, None]
        is_asking = (row < q.shape[1]) & (group.pos[batch_row, columns] >= 0)
        asking_q = query.placement.at(
            q[batch_row, columns], jnp.maximum(group.base[:, None] + row, 0)
        )
        asking_q = scores.rows_of_key_heads(asking_q, kv_heads)
        flat = asking_q.reshape(*asking_q.shape[:2], -1, asking_q.shape[4])

        def score(first_block, size):
            """Of ranges of so many blocks that begin at `first_block`, [B, K, X]."""
            pos = sparse.block_positions(first_block, self.block, first=self.sinks)
            k = query.placed(query.by_head(query.kv.k, pos), pos)
            products = jnp.einsum("bkrh,bksh->bkrs", flat, k, preferred_element_type=jnp.float32)
            products = products.reshape(*asking_q.shape[:4], -1)
            products = jnp.where(is_asking[:, None, None, :, None], products, -jnp.inf).max((2, 3))
            return jnp.where(
                size > 0, products.reshape(*first_block.shape, self.block).max(-1), -jnp.inf
            )

        ends = jnp.arange(kept + 1, dtype=jnp.int32)[None] * blocks[:, None] // kept
        first_block = jnp.broadcast_to(ends[:, None, :-1], (len(q), kv_heads, kept))
        size = jnp.broadcast_to(jnp.diff(ends)[:, None], first_block.shape)

        def halve(_, ranges):
            first_block, size = ranges
            left = size // 2
            first_block = jnp.concatenate([first_block, first_block + left], -1)
            size = jnp.concatenate([left, size - left], -1)
            _, best = jax.lax.top_k(score(first_block, size), kept)
            return jnp.take_along_axis(first_block, best, 2), jnp.take_along_axis(size, best, 2)

        rounds = (-(-most // kept) - 1).bit_length()
        first_block, size = jax.lax.fori_loop(0, rounds, halve, (first_block, size))
        return jnp.sort(jnp.where(size > 0, first_block, -1), axis=-1)
