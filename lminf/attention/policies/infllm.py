"""InfLLM: a window, the first tokens, and blocks of the past that each group of tokens looks up.

Source: Xiao et al. 2024, arXiv:2402.04617; docs/policies.md has the mathematics. A block is formed
after the group that pushed the last of it out of the window; where topk = 0 nothing waits for a
block. The `repr_topk` tokens of a block that attracted most attention in the window stand for it.
"""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lminf.attention import cache as caches
from lminf.attention import sparse
from lminf.attention.policy import Count, CountOrNone, Tokens, register
from lminf.errors import InputError


@register("infllm")
@dataclass(frozen=True)
class InfLLM(sparse.SparsePolicy):
    """Window, sinks and looked-up blocks. Source: Xiao et al. 2024, arXiv:2402.04617."""

    window: Tokens  # tokens, the query's own included
    sinks: CountOrNone = 128  # tokens at the start that stay visible
    topk: CountOrNone = 16  # blocks that a group of tokens looks up
    block: Count = 128  # tokens
    repr_topk: Count = 4  # tokens that stand for a block
    exec_block: Tokens = 512  # tokens that look up the same blocks, where they are read together

    needs_rotary = True
    group = property(attrgetter("exec_block"))

    def __post_init__(self):
        super().__post_init__()
        if self.window % self.block:
            raise InputError(
                f"block={self.block} does not divide window={self.window}; "
                f"give a divisor of the window"
            )
        if self.repr_topk > self.block:
            raise InputError(
                f"repr_topk={self.repr_topk} of block={self.block} tokens; give 1 to {self.block}"
            )

    @property
    def max_selected(self) -> int:
        return self.topk * self.block

    @property
    def selected_distance(self) -> int:
        return self.window - 1

    def cache_layout(self, capacity: int) -> caches.LinearCache:
        room = capacity // self.block
        if capacity > self.window and self.topk > room:
            raise InputError(
                f"topk={self.topk} blocks of {self.block} tokens, but a text of {capacity} tokens "
                f"holds {room}; give topk<={room} or smaller blocks"
            )
        return caches.LinearCache(capacity)

    def _max_blocks(self, slots: int) -> int:
        """Blocks that a text of so many tokens can ever have."""
        return max(slots - self.window - self.sinks, 0) // self.block

    def _num_blocks(self, first):
        """Blocks that exist for a group whose first query is there."""
        # With nothing to look up the past is gone as soon as it leaves the window: LMInfinite.
        left = first - self.window - self.sinks + int(self.topk == 0)
        return jnp.maximum(left, 0) // self.block

    def init_state(self, shape: caches.CacheShape) -> Any:
        blocks = self._max_blocks(shape.slots)
        if not blocks:
            return ()
        return {
            "summary": jnp.zeros((shape.batch, blocks, shape.heads, shape.head_dim), shape.dtype),
            "received": jnp.zeros((shape.batch, shape.slots, shape.heads)),
        }

    def select(self, state: Any, query: sparse.Query) -> tuple[sparse.Selected, Any]:
        """The blocks that the group looks up, then what has left the window and fills no block."""
        start, length = query.window(self.window)
        batch, rows = query.group.pos.shape
        if query.slots <= self.window:
            return sparse.Selected(jnp.zeros((batch, 1, 0), jnp.int32), start, length), state
        existing = self._num_blocks(query.group.first)
        block_ids = jnp.zeros((batch, 0), jnp.int32)
        if state and self.topk:
            block_ids = self._look_up(query, state["summary"][query.layer], existing)
        most = block_ids.shape[1]  # where fewer exist they stand first, and the rest moves up
        count = jnp.minimum(existing, most)[:, None]
        row = jnp.arange(max((most + 1) * self.block + rows - 1, 1), dtype=jnp.int32)[None]
        pos = self.sinks + row + (existing[:, None] - count) * self.block
        if most:
            number = jnp.broadcast_to(jnp.minimum(row // self.block, most - 1), pos.shape)
            first = self.sinks + jnp.take_along_axis(block_ids, number, 1) * self.block
            pos = jnp.where(row < count * self.block, first + row % self.block, pos)
        return sparse.Selected(pos[:, None], start, length), state

    def _look_up(self, query, summary, existing) -> Int[Array, "B k"]:
        """Numbers of the best blocks, rising; where fewer exist, they stand first."""
        away = query.placement.away(query.q, self.window - 1)
        counted = (query.group.pos >= 0)[..., None, None]
        mean = jnp.where(counted, away, 0).astype(jnp.float32).sum(1)  # up to a positive factor
        block_scores = jnp.einsum("bnh,bmnh->bm", mean, summary.astype(jnp.float32))
        numbers = jnp.arange(summary.shape[1], dtype=jnp.int32)[None]
        block_scores = jnp.where(numbers < existing[:, None], block_scores, -jnp.inf)
        return jnp.sort(jax.lax.top_k(block_scores, min(self.topk, summary.shape[1]))[1], axis=-1)

    def observe(self, state: Any, query: sparse.Query, selected: Any, received: Any) -> Any:
        """What the window's tokens received, and the summaries of blocks that now exist."""
        if not state:
            return state
        group, layer, slots = query.group, query.layer, query.slots
        batch, rows = group.pos.shape
        every = jnp.arange(batch, dtype=jnp.int32)[:, None]
        near_pos = selected.window_positions
        positions = jnp.where((near_pos >= 0) & (near_pos < group.end[:, None]), near_pos, slots)
        total = state["received"]
        total = total.at[layer, every, positions].add(received().swapaxes(1, 2), mode="drop")
        # The blocks that this group's tokens push out of the window.
        most = -(-rows // self.block)
        number = self._num_blocks(group.first)[:, None] + jnp.arange(most, dtype=jnp.int32)[None]
        pos = self.sinks + number[..., None] * self.block
        pos = (pos + jnp.arange(self.block, dtype=jnp.int32)[None, None]).reshape(batch, -1)
        heads = total.shape[3]
        attention = total[layer, every, jnp.clip(pos, 0, slots - 1)]
        attention = attention.reshape(batch, most, self.block, heads).swapaxes(2, 3)
        _, best = jax.lax.top_k(attention, self.repr_topk)  # [B, blocks, N, tokens]
        k = query.rows(query.kv.k, pos)
        k = k.reshape(batch, most, self.block, *k.shape[2:]).transpose(0, 1, 3, 2, 4)
        k = jnp.repeat(k, heads // k.shape[2], axis=2)  # [B, blocks, N, tokens, H]
        mean = jnp.take_along_axis(k, best[..., None], 3).astype(jnp.float32).mean(3)
        summary = state["summary"]
        exists = number < self._num_blocks(group.end)[:, None]
        row = jnp.where(exists, number, summary.shape[2])
        summary = summary.at[layer, every, row].set(mean.astype(summary.dtype), mode="drop")
        return {"summary": summary, "received": total}
