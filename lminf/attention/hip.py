"""HiP: the best keys of every block of queries, found by a search over a tree of key ranges.

Source: Lee et al. 2024, arXiv:2406.09827. Queries of one `query_block` share what they see: the
first `sinks` tokens, the last `window` of the block's first query and all after, and of the tokens
between them `topk`, in blocks of `block`; all where they are. Neighbouring keys score alike, so the
blocks between are cut into as many equal ranges as may be kept, and until each range is one block:

    halve each range; score a half by its first block, the largest product of its keys with any of
    the queries (every `query_stride`-th); keep the best half of the halves

which asks for O(log) of the blocks. The query heads of a key head share one search. Decoding keeps
what it found for `refresh` tokens. The first `dense_layers` layers see everything. Positions are
the model's own: this saves work, and does not reach past the trained length.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

import kernels
from lminf.attention import cache as caches
from lminf.attention import policies, rope, select
from lminf.attention.policies import at_least
from lminf.errors import InputError


@policies.register("hip")
@dataclass(frozen=True)
class HiP(select.Choosing):
    """Keys found by a tree search. Source: Lee et al. 2024, arXiv:2406.09827."""

    topk: int = 512  # tokens found, a multiple of `block`
    window: int = 256  # tokens, the query's own included
    sinks: int = 16  # tokens at the start that stay visible
    block: int = 2  # tokens
    query_block: int = 64  # tokens that see the same, where they are read together
    query_stride: int = 2  # of these, every so-manieth asks
    refresh: int = 8  # tokens that are written before the next search
    dense_layers: int = 3  # layers at the start, of those with this policy, that see everything

    needs_rotary = False

    def __post_init__(self):
        for field in ("window", "block", "query_block", "query_stride", "refresh"):
            at_least(self, field, 1)
        for field in ("sinks", "dense_layers"):
            at_least(self, field, 0)
        if self.topk % self.block or self.topk < self.block:
            raise InputError(
                f"topk={self.topk} tokens is no whole number of blocks of block={self.block}; "
                f"give a multiple"
            )

    @property
    def near_width(self) -> int:
        return self.window

    @property
    def far_count(self) -> int:
        return self.sinks

    @property
    def looked_up(self) -> int:
        return self.topk

    def _kept(self, slots: int) -> int:
        """Blocks that are kept of a text of so many tokens."""
        return min(self.topk // self.block, max(slots - self.window - self.sinks, 0) // self.block)

    def extra(self, sizes: caches.Sizes):
        kept = (sizes.batch, sizes.kv_heads, self._kept(sizes.slots))
        return {  # what decoding found last: blocks, -1 for none, and where its window began
            "found": jnp.full(kept, -1, jnp.int32),
            "start": jnp.full((sizes.batch,), -1, jnp.int32),
        }

    def reader(self, scoring, layout, positions):
        if isinstance(scoring.encoding, rope.Alibi):
            raise InputError(
                f"{self.name} ranks keys by products alone, but this model's positions are Alibi; "
                f"use a policy of positions"
            )
        groups = select.Groups(positions, self.query_block)
        places = select.Places(scoring, positions)
        every = jnp.arange(layout.slots, dtype=jnp.int32)
        every = jnp.broadcast_to(every, (len(positions), layout.slots))
        angles = places.rotation(every)

        def read(q, held, layer):
            extra = held.extra
            if self.dense_layers == 0:
                return sparse(q, held, layer, extra)
            return jax.lax.cond(
                layer < self.dense_layers,
                lambda: (_dense(places, q, positions, held, layer, every), extra),
                lambda: sparse(q, held, layer, extra),
            )

        def sparse(q, held, layer, extra):
            def one(group, q, extra):
                start = self._window_start(group.first)
                keys = _Keys(places, angles, held, layer)

                def search():
                    return self._search(keys, group, q, start)

                if len(groups.positions[0]) == 1:
                    old = extra["found"][layer], extra["start"][layer]
                    stale = (old[1] < 0) | (group.first % self.refresh == 0)
                    found = jax.lax.cond(stale.any(), search, lambda: old[0])
                    found = jnp.where(stale[:, None, None], found, old[0])
                    start = jnp.where(stale, start, old[1])
                    extra = {"found": extra["found"].at[layer].set(found),
                             "start": extra["start"].at[layer].set(start)}  # fmt: skip
                else:
                    found = search()
                    extra = {**extra, "start": extra["start"].at[layer].set(-1)}
                return self._attend(keys, group, q, found, start), extra

            return groups.run(one, q, extra)

        return read

    def _window_start(self, first):
        """Where the window of a block of queries begins: after the last whole block before it."""
        blocks = jnp.maximum(first - self.window + 1 - self.sinks, 0) // self.block
        return self.sinks + blocks * self.block

    def _tokens(self, blocks):
        """Positions [B, K, X * block] of the tokens of blocks [B, K, X]; -1 for those of -1."""
        inside = jnp.arange(self.block, dtype=jnp.int32)[None, None, None]
        pos = self.sinks + blocks[..., None] * self.block + inside
        return jnp.where(blocks[..., None] >= 0, pos, -1).reshape(*blocks.shape[:2], -1)

    def _search(self, keys, group, q, start):
        """Numbers [B, K, kept] of the blocks that are seen, in order, and -1 for none."""
        kv_heads = keys.held.k.shape[3]
        most = max(keys.held.k.shape[2] - self.window - self.sinks, 0) // self.block
        kept = self._kept(keys.held.k.shape[2])
        if not kept:
            return jnp.zeros((len(q), kv_heads, 0), jnp.int32)
        blocks = (start - self.sinks) // self.block
        row = jnp.arange(0, q.shape[1], self.query_stride, dtype=jnp.int32)[None]
        row = row + (group.first - group.base)[:, None]
        asks = (row < q.shape[1]) & (
            jnp.take_along_axis(group.pos, jnp.minimum(row, q.shape[1] - 1), 1) >= 0
        )
        some = select.rows_of(q[None], 0, row)
        some = keys.places.at(some, jnp.maximum(group.base[:, None] + row, 0))
        some = some.reshape(*some.shape[:2], kv_heads, -1, some.shape[3])

        def score(at, size):
            """Of ranges of so many blocks that begin at block `at`, [B, K, X]."""
            k = keys.at(keys.held.k, self._tokens(at), placed=True)
            products = jnp.einsum(
                "btkgh,bksh->bkstg", some, k.astype(some.dtype), preferred_element_type=jnp.float32
            )
            products = jnp.where(asks[:, None, None, :, None], products, -jnp.inf).max((3, 4))
            return jnp.where(size > 0, products.reshape(*at.shape, self.block).max(-1), -jnp.inf)

        ends = jnp.arange(kept + 1, dtype=jnp.int32)[None] * blocks[:, None] // kept
        at = jnp.broadcast_to(ends[:, None, :-1], (len(q), kv_heads, kept))
        size = jnp.broadcast_to(jnp.diff(ends)[:, None], at.shape)

        def halve(_, ranges):
            at, size = ranges
            left = size // 2
            at, size = (
                jnp.concatenate([at, at + left], -1),
                jnp.concatenate([left, size - left], -1),
            )
            _, best = jax.lax.top_k(score(at, size), kept)
            return jnp.take_along_axis(at, best, 2), jnp.take_along_axis(size, best, 2)

        rounds = (-(-most // kept) - 1).bit_length()
        at, size = jax.lax.fori_loop(0, rounds, halve, (at, size))
        return jnp.sort(jnp.where(size > 0, at, -1), axis=-1)

    def _attend(self, keys, group, q, found, start):
        batch, rows = group.pos.shape
        kv_heads = keys.held.k.shape[3]
        waited = self.refresh if rows == 1 else 0
        near = jnp.arange(self.window + rows + self.block + waited, dtype=jnp.int32)
        near = start[:, None] + near[None]
        first = jnp.arange(self.sinks, dtype=jnp.int32)
        pos = jnp.concatenate(
            [
                jnp.broadcast_to(first, (batch, kv_heads, self.sinks)),
                self._tokens(found),
                jnp.broadcast_to(near[:, None], (batch, kv_heads, near.shape[1])),
            ],
            -1,
        )
        k = keys.at(keys.held.k, pos, placed=True).astype(q.dtype)
        v = keys.at(keys.held.v, pos).astype(q.dtype)
        placed = keys.places.at(q, jnp.maximum(group.rows_pos, 0))
        scoring = keys.places.scoring
        grouped = placed.reshape(batch, rows, kv_heads, -1, q.shape[3])
        grouped = grouped * jnp.asarray(scoring.scale, q.dtype)
        scores = jnp.einsum("btkgh,bksh->bkgts", grouped, k, preferred_element_type=jnp.float32)
        if scoring.soft_cap is not None:
            scores = scoring.soft_cap * jnp.tanh(scores / scoring.soft_cap)
        seen = (pos[:, :, None] >= 0) & (pos[:, :, None] <= group.pos[:, None, :, None])
        weights = select.softmax(jnp.where(seen[:, :, None], scores, select.MASKED))
        out = jnp.einsum("bkgts,bksh->btkgh", weights.astype(q.dtype), v)
        return out.reshape(q.shape)


@dataclass(frozen=True)
class _Keys:
    """Keys and values of one layer at positions of each key head's own."""

    places: select.Places
    angles: rope.Rotation | None  # of positions 0.. [B, S, P]
    held: caches.Held
    layer: jax.Array

    def at(self, stored, pos, *, placed: bool = False):
        """[B, K, X, H] for positions [B, K, X]."""
        pos = jnp.clip(pos, 0, stored.shape[2] - 1)
        row = jnp.arange(pos.shape[0], dtype=jnp.int32)[:, None, None]
        head = jnp.arange(pos.shape[1], dtype=jnp.int32)[None, :, None]
        x = stored[self.layer, row, pos, head]
        if not placed or self.angles is None:
            return x
        by = rope.Rotation(self.angles.cos[row, pos], self.angles.sin[row, pos])
        return rope.rotate(x[..., None, :], by, self.places.encoding.layout)[..., 0, :]


def _dense(places, q, positions, held, layer, every):
    """Full attention over what is held."""
    k, v = (x[layer].astype(q.dtype) for x in (held.k, held.v))
    k, q = places.at(k, every), places.at(q, jnp.maximum(positions, 0))
    scoring = places.scoring
    if q.shape[1] == 1:
        seen = every[:, None] <= positions[:, :, None]
        return select.attend(scoring, [select.Branch(q, k, v, seen)])[0]

    def one_row(row):
        q, k, v, offset = row
        return kernels.lambda_attention(
            q[None], k[None], v[None], num_global=0, window_size=k.shape[0], query_offset=offset,
            scale=scoring.scale, logits_soft_cap=scoring.soft_cap,
        )[0]  # fmt: skip

    return jax.lax.map(one_row, (q, k, v, positions[:, 0]))
