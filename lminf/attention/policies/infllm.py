"""InfLLM: a window, the first tokens, and blocks of the past that each group of tokens looks up.

Source: Xiao et al. 2024, arXiv:2402.04617; docs/policies.md has the mathematics. A block is formed
after the group that pushed the last of it out of the window; where topk = 0 nothing waits for a
block. The `repr_topk` tokens of a block that attracted most attention in the window stand for it.
"""

import dataclasses
from collections.abc import Iterator
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
    last_alone = True  # in the release too: what is written first is looked up for the prompt's end
    group = property(attrgetter("exec_block"))
    one_by_one = property(lambda self: dataclasses.replace(self, exec_block=1))
    accumulates = True
    max_selected = property(lambda self: self.topk * self.block)
    selected_distance = property(lambda self: self.window - 1)

    def problems(self) -> Iterator[str]:
        block, window = self.block, self.window
        if window % block:
            yield f"block={block} does not divide window={window}; give a divisor of the window"
        if self.repr_topk > block:
            yield f"repr_topk={self.repr_topk} of block={block} tokens; give 1 to {block}"

    def cache_layout(self, capacity: int) -> None:
        room = capacity // self.block
        if capacity > self.window and self.topk > room:
            raise InputError(
                f"topk={self.topk} blocks of {self.block} tokens, but a text of {capacity} tokens "
                f"holds {room}; give topk<={room} or smaller blocks"
            )

    def _num_blocks(self, first):
        """Blocks that exist for a group whose first query is there."""
        # With nothing to look up the past is gone as soon as it leaves the window: LMInfinite.
        left = first - self.window - self.sinks + int(self.topk == 0)
        return jnp.maximum(left, 0) // self.block

    def init_state(self, shape: caches.CacheShape) -> dict[str, Array]:
        blocks = max(shape.slots - self.window - self.sinks, 0) // self.block
        return {
            "summary": jnp.zeros((shape.batch, blocks, shape.heads, shape.head_dim), shape.dtype),
            "received": jnp.zeros((shape.batch, shape.slots if blocks else 0, shape.heads)),
        }

    def select(self, state: Any, query: sparse.Query) -> tuple[Int[Array, "B 1 X"], Any]:
        """The blocks that the group looks up, and what has left the window and fills no block."""
        existing = self._num_blocks(query.first)[:, None]
        summary = state["summary"][query.layer].astype(jnp.float32)
        away = query.placement.away(query.q, self.window - 1)
        counted = (query.pos >= 0)[..., None, None]
        mean = jnp.where(counted, away, 0).astype(jnp.float32).sum(1)  # up to a positive factor
        block_scores = jnp.einsum("bnh,bmnh->bm", mean, summary)
        exists = jnp.arange(summary.shape[1], dtype=jnp.int32)[None] < existing
        block_scores = jnp.where(exists, block_scores, -jnp.inf)
        best = sparse.best_of(block_scores, min(self.topk, summary.shape[1]))
        best = sparse.block_positions(best[:, None], self.block, first=self.sinks)
        rest = self.block + query.q.shape[1] - 1 if query.slots > self.window else 0
        rest = self.sinks + existing * self.block + jnp.arange(rest, dtype=jnp.int32)[None]
        return jnp.concatenate([best, rest[:, None]], 2), state

    def observe(self, state: Any, query: sparse.Query, received: Any) -> dict[str, Array]:
        """What the window's tokens received, and the summaries of blocks that now exist."""
        summary, total = state["summary"], state["received"]
        if not total.size:
            return state
        layer, (batch, rows) = query.layer, query.pos.shape
        row = jnp.arange(batch, dtype=jnp.int32)[:, None]
        near = query.window(self.window)
        near = jnp.where((near >= 0) & (near < query.end[:, None]), near, query.slots)
        total = total.at[layer, row, near].add(received().swapaxes(1, 2), mode="drop")
        # The blocks that this group's tokens push out of the window.
        number = jnp.arange(-(-rows // self.block), dtype=jnp.int32)
        number = self._num_blocks(query.first)[:, None] + number[None]
        pos = sparse.block_positions(number[:, None], self.block, first=self.sinks)[:, 0]

        def by_block(x):  # [B, tokens, heads, ...] as [B, blocks, heads, tokens, ...]
            return x.reshape(*number.shape, self.block, *x.shape[2:]).swapaxes(2, 3)

        attention = by_block(total[layer, row, jnp.minimum(pos, query.slots - 1)])
        _, best = jax.lax.top_k(attention, self.repr_topk)  # [B, blocks, N, tokens]
        k = by_block(query.rows(query.kv.k, pos))
        k = jnp.repeat(k, best.shape[2] // k.shape[2], axis=2)  # [B, blocks, N, tokens, H]
        mean = jnp.take_along_axis(k, best[..., None], 3).astype(jnp.float32).mean(3)
        exists = number < self._num_blocks(query.end)[:, None]
        number = jnp.where(exists, number, summary.shape[2])
        summary = summary.at[layer, row, number].set(mean.astype(summary.dtype), mode="drop")
        return {"summary": summary, "received": total}
