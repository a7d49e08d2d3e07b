"""HiP: the best keys of every block of queries, found by a search over a tree of key ranges.

Source: Lee et al. 2024, arXiv:2406.09827. Queries of one `query_block` share what they see: the
first `sinks` tokens, the last `window` of the block's first query and all after, and of the tokens
between them `topk`, in blocks of `block`; all where they are. Neighbouring keys score alike, so the
blocks between are cut into as many equal ranges as may be kept, and until each range is one block:

    halve each range; score a half by its first block, the largest product of its keys with any of
    the queries (the last of every `query_stride`); keep the best half of the halves

which asks for O(log) of the blocks. The query heads of a key head share one search. Decoding keeps
what it found for `refresh` tokens. The first `dense_layers` layers see everything. Positions are
the model's own: this saves work, and does not reach past the trained length.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import kernels
from lminf.attention import cache as caches
from lminf.attention import dense, policies, rope, select
from lminf.attention.policies import Held, HeldOrNone, Layers, Tokens
from lminf.errors import InputError


class Searching(select.Choosing):
    """Sinks, a window, and what a search in stages finds between them for a block of queries.

    Subclasses say how a stage searches, and where what is seen seems to be. Decoding keeps what a
    stage found until it or a stage before it searches again, and the window where it then began.
    """

    window: int  # tokens, the query's own included
    sinks: int  # tokens at the start that stay visible
    query_block: int  # tokens that see the same, where they are read together
    dense_layers: int  # layers at the start, of those with this policy, that see everything

    loose = 0  # tokens that a window may have beyond its width

    @property
    def near_width(self) -> int:
        return self.window

    @property
    def far_count(self) -> int:
        return self.sinks

    @property
    def refreshes(self) -> tuple[int, ...]:
        """Of every stage, the tokens that are written before it searches again."""
        raise NotImplementedError

    def kept(self, stage: int, slots: int) -> int:
        """Blocks that a stage keeps of a text of so many tokens."""
        raise NotImplementedError

    def window_start(self, first: Int[Array, " B"]) -> Int[Array, " B"]:
        """Where the window of a block of queries begins."""
        raise NotImplementedError

    def search(
        self, stage: int, keys: "Keys", group: select.Group, q, start, before
    ) -> Int[Array, "B K kept"]:
        """Numbers of the blocks that a stage keeps of those `before`, in order; first -1 for none.
        The first stage has `before` None, and everything from sinks to `start`.
        """
        raise NotImplementedError

    def tokens(self, blocks: Int[Array, "B K X"], start) -> Int[Array, "B K Y"]:
        """Positions of the tokens of the last stage's blocks; -1 for those of none."""
        raise NotImplementedError

    def places(self, slots: int, rows: int) -> int:
        """One past the largest place that `seem` or a search gives a key."""
        del rows
        return slots

    def seem(self, pos: Int[Array, "B K X"], found: int, start, rows_pos):
        """Places of the keys at `pos`, of which `found` stand before the window; and of the
        queries [B, R].
        """
        del found, start
        return pos, rows_pos

    def extra(self, sizes: caches.Sizes):
        stages = range(len(self.refreshes))
        kept = [(sizes.batch, sizes.kv_heads, self.kept(s, sizes.slots)) for s in stages]
        return {  # what decoding found last: blocks, -1 for none, and where its window began
            "found": tuple(jnp.full(shape, -1, jnp.int32) for shape in kept),
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
        count = self.places(layout.slots, groups.rows)
        some = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (len(positions), count))
        angles = places.rotation(some)

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
                keys = Keys(places, angles, held, layer)
                alone = groups.tokens == 1
                found, start, extra = self._found(keys, group, q, extra, alone)
                return self._attend(keys, group, q, found, start), extra

            return groups.run(one, q, extra)

        return read

    def _found(self, keys, group, q, extra, alone):
        """What the last stage keeps, where the window begins, and what is remembered of it, which
        is something where the group was read `alone`.
        """
        start, layer, found = self.window_start(group.first), keys.layer, None
        if not alone:
            for stage in range(len(self.refreshes)):
                found = self.search(stage, keys, group, q, start, found)
            return found, start, {**extra, "start": extra["start"].at[layer].set(-1)}
        old, known = extra["start"][layer], []
        stale = (old < 0) | (group.first % self.refreshes[0] == 0)
        start = jnp.where(stale, start, old)
        for stage, (refresh, last) in enumerate(zip(self.refreshes, extra["found"], strict=True)):
            stale |= group.first % refresh == 0
            search = functools.partial(self.search, stage, keys, group, q, start, found)
            found = jax.lax.cond(stale.any(), search, lambda last=last: last[layer])
            found = jnp.where(stale[:, None, None], found, last[layer])
            known.append(last.at[layer].set(found))
        return found, start, {"found": tuple(known), "start": extra["start"].at[layer].set(start)}

    def _attend(self, keys, group, q, found, start):
        batch, rows = group.pos.shape
        kv_heads = keys.held.k.shape[3]
        waited = self.refreshes[0] if rows == 1 else 0
        near = jnp.arange(self.window + rows + self.loose + waited, dtype=jnp.int32)
        near = start[:, None] + near[None]
        first = jnp.arange(self.sinks, dtype=jnp.int32)
        pos = jnp.concatenate(
            [
                jnp.broadcast_to(first, (batch, kv_heads, self.sinks)),
                self.tokens(found, start),
                jnp.broadcast_to(near[:, None], (batch, kv_heads, near.shape[1])),
            ],
            -1,
        )
        at_k, at_q = self.seem(pos, pos.shape[2] - near.shape[1], start, group.rows_pos)
        k = keys.at(keys.held.k, pos, at_k).astype(q.dtype)
        v = keys.at(keys.held.v, pos).astype(q.dtype)
        placed = keys.places.at(q, jnp.maximum(at_q, 0))
        seen = (pos[:, :, None] >= 0) & (pos[:, :, None] <= group.pos[:, None, :, None])
        scores = select.scores_of(keys.places.scoring, placed, k.swapaxes(1, 2), seen[:, :, None])
        weights = select.softmax(scores)
        return dense.mix(weights.astype(q.dtype), v.swapaxes(1, 2))


@dataclass(frozen=True)
class Keys:
    """Keys and values of one layer at positions of each key head's own."""

    places: select.Places
    angles: rope.Rotation | None  # of places 0.. [B, X, P]
    held: caches.Held
    layer: Array

    def at(
        self,
        stored: Float[Array, "L B S K H"],
        pos: Int[Array, "B K X"],
        seem: Int[Array, "B K X"] | None = None,
    ) -> Float[Array, "B K X H"]:
        """What is stored at these positions, rotated to where it is to seem."""
        row = jnp.arange(pos.shape[0], dtype=jnp.int32)[:, None, None]
        head = jnp.arange(pos.shape[1], dtype=jnp.int32)[None, :, None]
        x = stored[self.layer, row, jnp.clip(pos, 0, stored.shape[2] - 1), head]
        if seem is None or self.angles is None:
            return x
        seem = jnp.clip(seem, 0, self.angles.cos.shape[1] - 1)
        by = rope.Rotation(self.angles.cos[row, seem], self.angles.sin[row, seem])
        return rope.rotate(x[..., None, :], by, self.places.encoding.layout)[..., 0, :]


def _dense(places, q, positions, held, layer, every):
    """Full attention over what is held."""
    k, v = (x[layer].astype(q.dtype) for x in (held.k, held.v))
    k, q = places.at(k, every), places.at(q, jnp.maximum(positions, 0))
    scoring = places.scoring
    if q.shape[1] == 1:
        seen = every[:, None] <= positions[:, :, None]
        return select.attend_branches(scoring, [select.Branch(q, k, v, seen)])[0]

    def one_row(row):
        q, k, v, offset = row
        return kernels.lambda_attention(
            q[None], k[None], v[None], num_global=0, window_size=k.shape[0], query_offset=offset,
            scale=scoring.scale, logits_soft_cap=scoring.soft_cap,
        )[0]  # fmt: skip

    return jax.lax.map(one_row, (q, k, v, positions[:, 0]))


@policies.register("hip")
@dataclass(frozen=True)
class HiP(Searching):
    """Keys found by a tree search. Source: Lee et al. 2024, arXiv:2406.09827."""

    topk: Tokens = 512  # tokens found, a multiple of `block`
    window: Tokens = 256  # tokens, the query's own included
    sinks: HeldOrNone = 16  # tokens at the start that stay visible
    block: Held = 2  # tokens
    query_block: Tokens = 64  # tokens that see the same, where they are read together
    query_stride: Tokens = 2  # of so many of these the last asks
    refresh: Held = 8  # tokens that are written before the next search
    dense_layers: Layers = 3  # layers at the start, of those with this policy, that see everything

    needs_rotary = False

    def __post_init__(self):
        super().__post_init__()
        if self.topk % self.block or self.topk < self.block:
            raise InputError(
                f"topk={self.topk} tokens is no whole number of blocks of block={self.block}; "
                f"give a multiple"
            )

    @property
    def looked_up(self) -> int:
        return self.topk

    @property
    def loose(self) -> int:
        return self.block

    @property
    def refreshes(self) -> tuple[int]:
        return (self.refresh,)

    def kept(self, stage, slots):
        return min(self.topk // self.block, max(slots - self.window - self.sinks, 0) // self.block)

    def window_start(self, first):
        """After the last whole block before it."""
        blocks = jnp.maximum(first - self.window + 1 - self.sinks, 0) // self.block
        return self.sinks + blocks * self.block

    def tokens(self, blocks, start):
        del start
        inside = jnp.arange(self.block, dtype=jnp.int32)[None, None, None]
        pos = self.sinks + blocks[..., None] * self.block + inside
        return jnp.where(blocks[..., None] >= 0, pos, -1).reshape(*blocks.shape[:2], -1)

    def search(self, stage, keys, group, q, start, before):
        del before  # there is one stage
        kv_heads = keys.held.k.shape[3]
        most = max(keys.held.k.shape[2] - self.window - self.sinks, 0) // self.block
        kept = self.kept(stage, keys.held.k.shape[2])
        if not kept:
            return jnp.zeros((len(q), kv_heads, 0), jnp.int32)
        blocks = (start - self.sinks) // self.block
        # The last of every `query_stride` asks, so that the last of a block does; where fewer are
        # read, the last of them.
        ask = -(group.first % self.query_block + 1) % self.query_stride
        ask = jnp.minimum(group.first + ask, group.end - 1) - group.base
        row = jnp.arange(0, q.shape[1], self.query_stride, dtype=jnp.int32)[None] + ask[:, None]
        asks = (row < q.shape[1]) & (
            jnp.take_along_axis(group.pos, jnp.minimum(row, q.shape[1] - 1), 1) >= 0
        )
        some = select.rows_of(q[None], 0, row)
        some = keys.places.at(some, jnp.maximum(group.base[:, None] + row, 0))
        some = dense.rows_of_key_heads(some, kv_heads)
        flat = some.reshape(*some.shape[:2], -1, some.shape[4])

        def score(at, size):
            """Of ranges of so many blocks that begin at block `at`, [B, K, X]."""
            pos = self.tokens(at, start)
            k = keys.at(keys.held.k, pos, pos)
            products = jnp.einsum(
                "bkrh,bksh->bkrs", flat, k.astype(flat.dtype), preferred_element_type=jnp.float32
            )
            products = products.reshape(*some.shape[:4], -1)
            products = jnp.where(asks[:, None, None, :, None], products, -jnp.inf).max((2, 3))
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
