"""LongHeads: every head attends to a few chunks of its own choice, as if they stood in one row.

Source: Lu et al. 2024, arXiv:2402.10685; docs/policies.md has the mathematics. A chunk's summary,
of each head, is made of its w tokens alone, at positions 0..w-1, and a query, unrotated, ranks
chunks by <q, c>:

    u = mean over its tokens of non-causal attention inside it
    c = softmax(<u, k> / sqrt(H)) k        over its keys
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
from lminf.attention import scores, sparse
from lminf.attention.policy import Count, Tokens, register


@register("longheads")
@dataclass(frozen=True)
class LongHeads(sparse.SparsePolicy):
    """Chunks chosen by each head, packed. Source: Lu et al. 2024, arXiv:2402.10685."""

    attended: Tokens  # tokens that a head attends to at most: a multiple of `chunk`
    chunk: Count = 256  # tokens

    num_sinks = 0
    selected_distance = "packed"
    needs_rotary = True
    group = property(attrgetter("chunk"))
    one_by_one = property(lambda self: self)  # each query ranks for itself
    window = property(lambda self: self.chunk + 1)  # the chunk before is always seen
    max_selected = property(lambda self: self.attended - self.window)
    chunks = property(lambda self: self.attended // self.chunk)  # that a head attends to at most

    def problems(self) -> Iterator[str]:
        if self.attended % self.chunk or self.attended < 3 * self.chunk:
            yield (
                f"attended={self.attended} is not three or more chunks of chunk={self.chunk} "
                f"tokens; give a multiple"
            )

    def table_size(self, slots: int, rows: int) -> int:
        return -(-slots // self.chunk) * self.chunk

    def init_state(self, shape: caches.CacheShape) -> Any:
        if shape.slots <= self.attended:  # nothing is ever left out
            return ()
        of_head = (shape.heads, shape.head_dim)
        return {
            "summary": jnp.zeros((shape.batch, shape.slots // self.chunk, *of_head), shape.dtype),
            "queries": jnp.zeros((shape.batch, self.chunk, *of_head), shape.dtype),
        }

    def select(self, state: Any, query: sparse.Query) -> tuple[Int[Array, "B N R M"], Any]:
        """The chunks that each query sees, in order; first -1 for none."""
        count = -(-query.slots // self.chunk)
        chunk = jnp.arange(count, dtype=jnp.int32)[None, None, None]
        current = (jnp.maximum(query.end - 1, 0) // self.chunk)[:, None, None, None]
        ranks = jnp.zeros((*query.q.swapaxes(1, 2).shape[:3], count))
        if state:
            summary = state["summary"][query.layer].astype(query.q.dtype)
            ranks = scores.dot(query.q, summary)
            ranks = jnp.pad(ranks, ((0, 0),) * 3 + ((0, count - ranks.shape[3]),))
        ranks = jnp.where((chunk == 0) | (chunk >= current - 1), jnp.inf, ranks)
        ranks = jnp.where(chunk <= current, ranks, -jnp.inf)
        return sparse.best_of(ranks, min(self.chunks, count)), state

    def attend(self, query: sparse.Query, selected: Int[Array, "B N R M"]) -> tuple[Array, None]:
        """Every query of every head has a list of its own: chunks are visited one after another,
        masked where not chosen. Gathering would copy the listed chunks for each query and head;
        sorting pairs by chunk, as MoBA does, takes 1.6 times as long (2,048 tokens, a CPU).
        """
        if query.alone:
            positions = sparse.block_positions(selected[:, :, 0], self.chunk)
            return sparse.attend_list(self, query, positions), None
        inside = jnp.arange(self.chunk, dtype=jnp.int32)[None]
        offset = jnp.maximum(query.pos, 0)[..., None] % self.chunk

        def visit(number, carry):
            pos = jnp.broadcast_to(number * self.chunk + inside, (len(offset), self.chunk))
            k, v = query.rows(query.kv.k, pos), query.rows(query.kv.v, pos)
            k = query.placement.at(k, jnp.broadcast_to(inside, pos.shape))
            between = (selected > number).sum(3, dtype=jnp.int32).swapaxes(1, 2)  # [B, R, N]
            q = query.placement.at(query.q, between * self.chunk + offset)
            causal = (pos[:, None] <= query.pos[:, :, None])[:, None]
            seen = (selected == number).any(3, keepdims=True) & causal
            return scores.merge(carry, scores.attention(query.config, q, k, v, seen)[:2])

        lse = jnp.full(selected.shape[:3], -jnp.inf, jnp.float32)
        last = jnp.maximum(query.end.max() - 1, 0) // self.chunk
        carry = jnp.zeros(query.q.shape, jnp.float32), lse
        return jax.lax.fori_loop(jnp.int32(0), last + 1, visit, carry)[0], None

    def observe(self, state: Any, query: sparse.Query, received: Any) -> Any:
        """The queries of the chunk that is being read, and its summary where that was its end."""
        if not state:
            return state
        end, layer, summary, queries = query.end, query.layer, state["summary"], state["queries"]
        row = jnp.arange(len(end), dtype=jnp.int32)[:, None]
        row_in_chunk = jnp.where(query.pos >= 0, query.pos % self.chunk, self.chunk)
        new = query.q.astype(queries.dtype)
        queries = queries.at[layer, row, row_in_chunk].set(new, mode="drop")
        number = jnp.maximum(end - 1, 0) // self.chunk
        complete = (end > 0) & (end % self.chunk == 0)

        def summarized():
            inside = jnp.arange(self.chunk, dtype=jnp.int32)[None]
            pos = number[:, None] * self.chunk + inside
            inside = jnp.broadcast_to(inside, pos.shape)
            k, v = query.rows(query.kv.k, pos), query.rows(query.kv.v, pos)
            k, q = (query.placement.at(x, inside) for x in (k, queries[layer].astype(k.dtype)))
            everything = jnp.ones((1, 1, 1, 1), bool)
            mean = scores.attention(query.config, q, k, v, everything).out.mean(1, keepdims=True)
            # A mean of outputs is no query of the model: its scores are not capped.
            plain = dataclasses.replace(query.config, soft_cap=None)
            of_chunk = scores.attention(plain, mean, k, k, everything).out[:, 0]
            return of_chunk.astype(summary.dtype)

        nothing = jnp.zeros_like(summary[0, :, 0])
        of_chunk = jax.lax.cond(complete.any(), summarized, lambda: nothing)
        slot = jnp.where(complete, number, summary.shape[2])
        summary = summary.at[layer, row[:, 0], slot].set(of_chunk, mode="drop")
        return {"summary": summary, "queries": queries}
