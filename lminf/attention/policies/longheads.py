"""LongHeads: every head attends to a few chunks of its own choice, as if they stood in one row.

Source: Lu et al. 2024, arXiv:2402.10685. The text is cut into chunks of w = `chunk` tokens, and
each query of each head sees chunk 0, its own up to itself, the one before, and the best others,
`chunks` in all. Positions are packed: a key in a chosen chunk seems w nearer for every chunk
between them that was not chosen. A chunk's summary, of each head, is made of its tokens alone:

    u = mean over its tokens of non-causal attention inside it, positions 0..w-1
    c = softmax(<u, k> / sqrt(H)) k        over its keys at positions 0..w-1

and a query, unrotated, ranks chunks by <q, c>. The reference leaves a token's own key out while it
reads a prompt, though not when it writes; here every token sees itself, so both are one function,
however a text is divided into calls. Reading visits the keys and values of all chunks, in products
that mask those not chosen; a token that is written fetches its own chunks and no others.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lminf.attention import cache as caches
from lminf.attention import scores, sparse
from lminf.attention.policy import Held, Tokens, register
from lminf.errors import InputError


@register("longheads")
@dataclass(frozen=True)
class LongHeads(sparse.SparsePolicy):
    """Chunks chosen by each head, packed. Source: Lu et al. 2024, arXiv:2402.10685."""

    attended: Tokens  # tokens that a head attends to at most: a multiple of `chunk`
    chunk: Held = 256  # tokens

    num_sinks = 0
    selected_distance = "packed"
    needs_rotary = True

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
    def group(self) -> int:
        return self.chunk

    @property
    def max_selected(self) -> int:
        return self.attended - self.window

    @property
    def chunks(self) -> int:
        return self.attended // self.chunk

    def table_size(self, slots, rows):
        """Of every distance that packing can make."""
        return min(self.chunks, -(-slots // self.chunk)) * self.chunk

    def init_state(self, shape: caches.CacheShape):
        if shape.slots <= self.attended:  # nothing is ever left out
            return ()
        of_head = (shape.heads, shape.head_dim)
        return {
            "summary": jnp.zeros((shape.batch, shape.slots // self.chunk, *of_head), shape.dtype),
            "queries": jnp.zeros((shape.batch, self.chunk, *of_head), shape.dtype),
        }

    def select(self, state, query):
        w, count = self.chunk, -(-query.slots // self.chunk)
        number = jnp.maximum(query.group.end - 1, 0) // w
        chosen = self._chosen(query, state, number, count)  # [B, R, N, C]
        if not query.alone:
            return sparse.SelectedBlocks(chosen, w, number.max() + 1), state
        every = jnp.arange(count, dtype=jnp.int32)[None, None]
        in_order = jnp.where(chosen[:, 0], count - every, 0)
        left, _ = jax.lax.top_k(in_order, min(self.chunks, count))  # [B, N, M]
        inside = jnp.arange(w, dtype=jnp.int32)[None, None, None]
        pos = (count - left)[..., None] * w + inside
        pos = jnp.where(left[..., None] > 0, pos, -1).reshape(*left.shape[:2], -1)
        return sparse.Selected(pos, query.group.base, 0), state

    def _chosen(self, query, state, number, count):
        """Which chunks [B, R, N, chunks of the text] each query sees, when its own is `number`."""
        chunk = jnp.arange(count, dtype=jnp.int32)[None, None, None]
        own, q = number[:, None, None, None], query.q
        always = (chunk == 0) | ((chunk >= own - 1) & (chunk <= own))
        always = jnp.broadcast_to(always, (*q.shape[:3], count))
        if not state:
            return always | (chunk <= own)
        summary = state["summary"][query.layer].astype(q.dtype)
        found = jnp.einsum("brnh,bmnh->brnm", q, summary, preferred_element_type=jnp.float32)
        found = jnp.pad(found, ((0, 0),) * 3 + ((0, count - summary.shape[1]),))
        found = jnp.where((chunk > 0) & (chunk < own - 1), found, -jnp.inf)
        best, at = jax.lax.top_k(found, min(self.chunks - 3, count))
        named = jax.nn.one_hot(jnp.where(jnp.isneginf(best), -1, at), count, dtype=bool)
        return always | named.any(-2)

    def observe(self, state, query, selected, received):
        """The queries of the chunk that is being read, and its summary where that was its end."""
        if not state:
            return state
        group, q, layer = query.group, query.q, query.layer
        number = jnp.maximum(group.end - 1, 0) // self.chunk
        rows = jnp.arange(q.shape[0], dtype=jnp.int32)[:, None]
        at = jnp.where(group.pos >= 0, group.pos % self.chunk, self.chunk)
        queries = state["queries"]
        queries = queries.at[layer, rows, at].set(q.astype(queries.dtype), mode="drop")
        complete = (group.end > 0) & (group.end % self.chunk == 0) & (group.end > group.first)
        slot = jnp.where(complete, number, state["summary"].shape[2])

        def summarized():
            inside = jnp.arange(self.chunk, dtype=jnp.int32)[None]
            pos = number[:, None] * self.chunk + inside
            inside = jnp.broadcast_to(inside, pos.shape)
            k, v = query.rows(query.kv.k, pos), query.rows(query.kv.v, pos)
            k = query.placement.at(k, inside)
            own = query.placement.at(queries[layer].astype(q.dtype), inside)
            mean = _attend_all(query.config, own, k, v).mean(1, keepdims=True)
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
