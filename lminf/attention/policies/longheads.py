"""LongHeads: every head attends to a few chunks of its own choice, as if they stood in one row.

Source: Lu et al. 2024, arXiv:2402.10685; docs/policies.md has the mathematics. A chunk's summary,
of each head, is made of its w tokens alone, at positions 0..w-1, and a query, unrotated, ranks
chunks by <q, c>:

    u = mean over its tokens of non-causal attention inside it
    c = softmax(<u, k> / sqrt(H)) k        over its keys
"""

import dataclasses
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from lminf.attention import cache as caches
from lminf.attention import scores, sparse
from lminf.attention.policy import Count, Tokens, register
from lminf.errors import InputError


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

    def __post_init__(self):
        super().__post_init__()
        if self.attended % self.chunk or self.attended < 3 * self.chunk:
            raise InputError(
                f"attended={self.attended} is not three or more chunks of chunk={self.chunk} "
                f"tokens; give a multiple"
            )

    @property
    def window(self) -> int:
        return self.chunk + 1  # the chunk before is always seen

    @property
    def max_selected(self) -> int:
        return self.attended - self.window

    @property
    def chunks(self) -> int:
        return self.attended // self.chunk

    def table_size(self, slots: int, rows: int) -> int:
        """Of every distance that packing can make."""
        return min(self.chunks, -(-slots // self.chunk)) * self.chunk

    def init_state(self, shape: caches.CacheShape) -> Any:
        if shape.slots <= self.attended:  # nothing is ever left out
            return ()
        of_head = (shape.heads, shape.head_dim)
        return {
            "summary": jnp.zeros((shape.batch, shape.slots // self.chunk, *of_head), shape.dtype),
            "queries": jnp.zeros((shape.batch, self.chunk, *of_head), shape.dtype),
        }

    def select(self, state: Any, query: sparse.Query) -> tuple[Any, Any]:
        w, count = self.chunk, -(-query.slots // self.chunk)
        number = jnp.maximum(query.group.end - 1, 0) // w
        chosen = self._chosen(query, state, number, count)  # [B, R, N, C]
        if not query.alone:
            return (chosen, number.max() + 1), state
        every = jnp.arange(count, dtype=jnp.int32)[None, None]
        ids, _ = jax.lax.top_k(jnp.where(chosen[:, 0], every, -1), min(self.chunks, count))
        pos = sparse.block_positions(ids[..., ::-1], w)  # in order
        return sparse.Selected(pos, query.group.base, 0), state

    def attend(self, query: sparse.Query, selected: Any) -> tuple[Array, Any]:
        if query.alone:
            return super().attend(query, selected)
        return _visit_chunks(query, selected[0], self.chunk, selected[1]), None

    def _chosen(self, query, state, number, count):
        """Which chunks [B, R, N, chunks of the text] each query sees, when its own is `number`."""
        chunk = jnp.arange(count, dtype=jnp.int32)[None, None, None]
        current, q = number[:, None, None, None], query.q
        always = (chunk == 0) | ((chunk >= current - 1) & (chunk <= current))
        always = jnp.broadcast_to(always, (*q.shape[:3], count))
        if not state:
            return always | (chunk <= current)
        summary = state["summary"][query.layer].astype(q.dtype)
        chunk_scores = jnp.einsum("brnh,bmnh->brnm", q, summary, preferred_element_type=jnp.float32)
        chunk_scores = jnp.pad(chunk_scores, ((0, 0),) * 3 + ((0, count - summary.shape[1]),))
        chunk_scores = jnp.where((chunk > 0) & (chunk < current - 1), chunk_scores, -jnp.inf)
        best, chunk_ids = jax.lax.top_k(chunk_scores, min(self.chunks - 3, count))
        named = jax.nn.one_hot(jnp.where(jnp.isneginf(best), -1, chunk_ids), count, dtype=bool)
        return always | named.any(-2)

    def observe(self, state: Any, query: sparse.Query, selected: Any, received: Any) -> Any:
        """The queries of the chunk that is being read, and its summary where that was its end."""
        if not state:
            return state
        group, q, layer = query.group, query.q, query.layer
        number = jnp.maximum(group.end - 1, 0) // self.chunk
        rows = jnp.arange(q.shape[0], dtype=jnp.int32)[:, None]
        row_in_chunk = jnp.where(group.pos >= 0, group.pos % self.chunk, self.chunk)
        queries = state["queries"]
        queries = queries.at[layer, rows, row_in_chunk].set(q.astype(queries.dtype), mode="drop")
        complete = (group.end > 0) & (group.end % self.chunk == 0) & (group.end > group.first)
        slot = jnp.where(complete, number, state["summary"].shape[2])

        def summarized():
            inside = jnp.arange(self.chunk, dtype=jnp.int32)[None]
            pos = number[:, None] * self.chunk + inside
            inside = jnp.broadcast_to(inside, pos.shape)
            k, v = query.rows(query.kv.k, pos), query.rows(query.kv.v, pos)
            k = query.placement.at(k, inside)
            placed_q = query.placement.at(queries[layer].astype(q.dtype), inside)
            mean = _attend_all(query.config, placed_q, k, v).mean(1, keepdims=True)
            # A mean of outputs is no query of the model: its scores are not capped.
            plain = dataclasses.replace(query.config, soft_cap=None)
            return _attend_all(plain, mean, k, k)[:, 0]

        nothing = jnp.zeros((q.shape[0], *q.shape[2:]), q.dtype)
        summary = state["summary"]
        of_chunk = jax.lax.cond((slot < summary.shape[2]).any(), summarized, lambda: nothing)
        of_chunk = of_chunk.astype(summary.dtype)
        summary = summary.at[layer, rows[:, 0], slot].set(of_chunk, mode="drop")
        return {"summary": summary, "queries": queries}


def _attend_all(config, q, k, v):
    """Attention of a chunk inside itself, in both directions."""
    weights = scores.softmax(config, scores.scaled(config, q, k), jnp.ones((1,) * 5, bool))
    return scores.mix(weights.astype(v.dtype), v)


def _visit_chunks(query, chosen: Bool[Array, "B R N C"], size: int, visited):
    """Every query of every head has a list of its own: the first `visited` chunks, one after
    another, masked where not chosen. Gathering would copy the listed chunks for each query and
    head; sorting pairs by chunk, as MoBA does, takes 1.6 times as long (2,048 tokens, a CPU).
    """
    group, q = query.group, query.q
    inside = jnp.arange(size, dtype=jnp.int32)
    after = chosen.astype(jnp.int32)
    after = jnp.cumsum(after[..., ::-1], -1)[..., ::-1] - after  # chosen ones after each
    offset = jnp.maximum(group.pos, 0) % size
    shape = (len(q), query.kv_heads, q.shape[2] // query.kv_heads, q.shape[1])  # [B, K, G, R]

    def visit(m, carry):
        top, total, out = carry
        pos = jnp.broadcast_to(m * size + inside[None], (len(q), size))
        k, v = query.rows(query.kv.k, pos), query.rows(query.kv.v, pos)
        k = query.placement.at(k, jnp.broadcast_to(inside, pos.shape))
        apart = after[..., m] * size + offset[..., None]  # [B, R, N] of the chunk's first token
        placed = query.placed(q, apart)
        mine = chosen[..., m].transpose(0, 2, 1).reshape(shape)[..., None]
        seen = mine & (pos[:, None] <= group.pos[:, :, None])[:, None, None]
        logits = query.config.capped(scores.scaled(query.config, placed, k))
        logits = jnp.where(seen, logits, scores.MASKED)
        new_top = jnp.maximum(top, logits.max(-1))
        weights = jnp.exp(logits - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        rows = weights.astype(v.dtype).reshape(*shape[:2], -1, size)
        part = jnp.einsum("bkrs,bskh->bkrh", rows, v, preferred_element_type=jnp.float32)
        out = out * shrink[..., None] + part.reshape(out.shape)
        return new_top, total * shrink + weights.sum(-1), out

    start = (
        jnp.full(shape, scores.MASKED / 2, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, q.shape[3]), jnp.float32),
    )
    _, total, out = jax.lax.fori_loop(jnp.int32(0), visited.astype(jnp.int32), visit, start)
    out = out / jnp.where(total == 0, 1.0, total)[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
