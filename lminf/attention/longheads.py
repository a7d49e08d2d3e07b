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
from lminf.attention import dense, policies, rope, select
from lminf.attention.policies import Held, Tokens
from lminf.errors import InputError


@policies.register("longheads")
@dataclass(frozen=True)
class LongHeads(select.Choosing):
    """Chunks chosen by each head, packed. Source: Lu et al. 2024, arXiv:2402.10685."""

    attended: Tokens  # tokens that a head attends to at most: a multiple of `chunk`
    chunk: Held = 256  # tokens

    def __post_init__(self):
        super().__post_init__()
        if self.attended % self.chunk or self.attended < 3 * self.chunk:
            raise InputError(
                f"attended={self.attended} is not three or more chunks of chunk={self.chunk} "
                f"tokens; give a multiple"
            )

    @property
    def near_width(self) -> int:
        return self.chunk + 1  # the chunk before is always seen

    @property
    def looked_up(self) -> int:
        return self.attended - self.near_width

    @property
    def chunks(self) -> int:
        return self.attended // self.chunk

    def extra(self, sizes: caches.Sizes):
        if sizes.slots <= self.attended:  # nothing is ever left out
            return ()
        of_head = (sizes.heads, sizes.head_dim)
        return {
            "summary": jnp.zeros((sizes.batch, sizes.slots // self.chunk, *of_head), sizes.dtype),
            "queries": jnp.zeros((sizes.batch, self.chunk, *of_head), sizes.dtype),
        }

    def reader(self, scoring, layout, positions):
        groups = select.Groups(positions, self.chunk)
        places = select.Places(scoring, positions)
        count = -(-layout.slots // self.chunk)
        # Angles of every distance that packing can make: [chunks * w, P].
        packed = jnp.arange(min(self.chunks, count) * self.chunk, dtype=jnp.int32)
        angles = places.rotation(jnp.broadcast_to(packed, (len(positions), len(packed))))

        def read(q, held, layer):
            def one(group, q, extra):
                number = jnp.maximum(group.end - 1, 0) // self.chunk
                summary = extra["summary"][layer] if extra else None
                chosen = self._chosen(q, summary, number, count)
                if groups.tokens == 1:
                    out = self._attend_alone(places, angles, group, q, held, layer, chosen)
                else:
                    out = self._attend(places, angles, group, q, held, layer, chosen, number)
                if extra:
                    extra = self._remember(places, group, q, held, layer, extra, number)
                return out, extra

            return groups.run(one, q, held.extra)

        return read

    def _chosen(self, q, summary, number, count):
        """Which chunks [B, R, N, chunks of the text] each query sees, when its own is `number`."""
        chunk = jnp.arange(count, dtype=jnp.int32)[None, None, None]
        own = number[:, None, None, None]
        always = (chunk == 0) | ((chunk >= own - 1) & (chunk <= own))
        always = jnp.broadcast_to(always, (*q.shape[:3], count))
        if summary is None:
            return always | (chunk <= own)
        scores = jnp.einsum(
            "brnh,bmnh->brnm", q, summary.astype(q.dtype), preferred_element_type=jnp.float32
        )
        scores = jnp.pad(scores, ((0, 0),) * 3 + ((0, count - summary.shape[1]),))
        scores = jnp.where((chunk > 0) & (chunk < own - 1), scores, -jnp.inf)
        best, at = jax.lax.top_k(scores, min(self.chunks - 3, count))
        named = jax.nn.one_hot(jnp.where(jnp.isneginf(best), -1, at), count, dtype=bool)
        return always | named.any(-2)

    def _attend_alone(self, places, angles, group, q, held, layer, chosen):
        """One token: every head fetches its own chunks, and no others are read."""
        w, count = self.chunk, chosen.shape[-1]
        heads_per_kv = q.shape[2] // held.k.shape[3]
        chosen = chosen[:, 0]  # [B, N, C]
        every = jnp.arange(count, dtype=jnp.int32)[None, None]
        in_order = jnp.where(chosen, count - every, 0)
        left, _ = jax.lax.top_k(in_order, min(self.chunks, count))  # [B, N, M]
        number = count - left  # rising; any where nothing is left
        inside = jnp.arange(w, dtype=jnp.int32)[None, None, None]
        pos = (number[..., None] * w + inside).reshape(*number.shape[:2], -1)  # [B, N, S]
        seen = jnp.repeat(left > 0, w, axis=-1) & (pos <= group.pos[:, :, None])
        row = jnp.arange(len(pos), dtype=jnp.int32)[:, None, None]
        head = jnp.arange(pos.shape[1], dtype=jnp.int32)[None, :, None] // heads_per_kv
        at = jnp.clip(pos, 0, held.k.shape[2] - 1)
        k, v = (x[layer, row, at, head].astype(q.dtype).swapaxes(1, 2) for x in (held.k, held.v))
        if angles is not None:
            k = rope.rotate(k, angles, places.encoding.layout)
        own = (chosen.sum(-1, dtype=jnp.int32) - 1) * w + jnp.maximum(group.pos, 0) % w
        placed = places.turned_by_head(q, angles, own[:, None])
        scores = select.scores_of(places.scoring, placed, k, seen[:, :, None, None])
        weights = select.softmax(scores)  # [B, N, 1, 1, S]
        return jnp.einsum("bngts,bsnh->btnh", weights.astype(v.dtype), v).astype(q.dtype)

    def _attend(self, places, angles, group, q, held, layer, chosen, number):
        """Online softmax over the chunks of the text, in each of them over who chose it."""
        scoring, w = places.scoring, self.chunk
        kv_heads = held.k.shape[3]
        inside = jnp.arange(w, dtype=jnp.int32)
        after = chosen.astype(jnp.int32)
        after = jnp.cumsum(after[..., ::-1], -1)[..., ::-1] - after  # chosen ones after each
        offset = jnp.maximum(group.pos, 0) % w
        shape = (q.shape[0], kv_heads, q.shape[2] // kv_heads, q.shape[1])  # [B, K, G, R]

        def visit(m, carry):
            top, total, out = carry
            pos = m * w + inside[None]
            pos = jnp.broadcast_to(pos, (q.shape[0], w))
            k, v = (select.rows_of(x, layer, pos).astype(q.dtype) for x in (held.k, held.v))
            k = places.at(k, jnp.broadcast_to(inside, pos.shape))
            apart = after[..., m] * w + offset[..., None]  # [B, R, N] of the chunk's first token
            placed = places.turned_by_head(q, angles, apart)
            mine = chosen[..., m].transpose(0, 2, 1).reshape(shape)[..., None]
            seen = mine & (pos[:, None] <= group.pos[:, :, None])[:, None, None]
            scores = select.scores_of(scoring, placed, k, seen)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            rows = weights.astype(v.dtype).reshape(*shape[:2], -1, w)
            part = jnp.einsum("bkrs,bskh->bkrh", rows, v, preferred_element_type=jnp.float32)
            out = out * shrink[..., None] + part.reshape(out.shape)
            return new_top, total * shrink + weights.sum(-1), out

        start = (
            jnp.full(shape, dense.MASKED / 2, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((*shape, q.shape[3]), jnp.float32),
        )
        stop = (number.max() + 1).astype(jnp.int32)
        _, total, out = jax.lax.fori_loop(jnp.int32(0), stop, visit, start)
        out = out / jnp.where(total == 0, 1.0, total)[..., None]
        return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)

    def _remember(self, places, group, q, held, layer, extra, number):
        """The queries of the chunk that is being read, and its summary where that was its end."""
        rows = jnp.arange(q.shape[0], dtype=jnp.int32)[:, None]
        at = jnp.where(group.pos >= 0, group.pos % self.chunk, self.chunk)
        kept = extra["queries"].dtype
        queries = extra["queries"].at[layer, rows, at].set(q.astype(kept), mode="drop")
        complete = (group.end > 0) & (group.end % self.chunk == 0)
        summaries = extra["summary"].shape[2]
        slot = jnp.where(complete & (group.end > group.first), number, summaries)

        def summarised():
            pos = number[:, None] * self.chunk + jnp.arange(self.chunk, dtype=jnp.int32)[None]
            k, v = (select.rows_of(x, layer, pos).astype(q.dtype) for x in (held.k, held.v))
            inside = jnp.broadcast_to(jnp.arange(self.chunk, dtype=jnp.int32), pos.shape)
            k, own = places.at(k, inside), places.at(queries[layer].astype(q.dtype), inside)
            every = jnp.ones((len(q), self.chunk, self.chunk), bool)
            out, _ = select.attend_branches(places.scoring, [select.Branch(own, k, v, every)])
            mean = out.mean(1, keepdims=True)
            # A mean of outputs is no query of the model: its scores are not capped.
            plain = dataclasses.replace(places.scoring, soft_cap=None)
            out, _ = select.attend_branches(plain, [select.Branch(mean, k, k, every[:, :1])])
            return out[:, 0]

        nothing = jnp.zeros((q.shape[0], *q.shape[2:]), q.dtype)
        of_chunk = jax.lax.cond((slot < summaries).any(), summarised, lambda: nothing)
        summary = (
            extra["summary"]
            .at[layer, rows[:, 0], slot]
            .set(of_chunk.astype(extra["summary"].dtype), mode="drop")
        )
        return {"summary": summary, "queries": queries}
