"""Which tiles of keys a block of queries visits, which of them need a mask, and their logits.

Shared by the forward and the backward of `xla_chunked`. The keys that a block sees are one range of
rows in each branch. Its ends are edges, walked in narrow tiles where a mask decides; everything
between is seen by all rows of the block and walked in wide tiles without one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.common import masks, numerics
from kernels.lambda_attention.operands import Branch, Operands, Places, Rules


def dot(a, b, contract: tuple[int, int], dtype, precision) -> Float[Array, "X Y"]:
    """Matrix product over axis contract[0] of a and contract[1] of b, accumulated in `dtype`."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    if a.dtype != b.dtype:
        a, b = a.astype(dtype), b.astype(dtype)
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=dtype)


@dataclass(frozen=True)
class Config:
    """Sizes of the tiles, in positions."""

    block_q: int = 128  # queries in a program
    block_k: int = 512  # keys in a tile that needs no mask
    edge_k: int = 128  # keys in a masked tile, at least; never less than block_q


# --- Layout ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One branch as programs read it. M = B * K key heads.

    Keys and values of a head are one row of numbers: a tile is then a contiguous slice, which is
    copied several times faster than a slice of a matrix.
    """

    query: Float[Array, "M G T H"]  # T padded to whole blocks
    key: Float[Array, "M SH"]  # S padded by one tile
    value: Float[Array, "M SHv"]
    rows: int  # keys before padding
    width: int  # keys in a clear tile; 0: all tiles are masked
    edge: int  # keys in a masked tile


@dataclass(frozen=True)
class Plan:
    """One call: its arrays, and every size that is known when tracing."""

    rules: Rules
    places: Places
    near: Side
    far: Side | None
    block_q: int  # C, positions in a program
    key_heads: int  # K
    group: int  # G, query heads of one key head
    value_width: int  # Hv
    dtype: jnp.dtype  # of statistics and accumulators
    prescaled: bool  # queries are scaled before the product, not the scores after it

    @property
    def blocks(self) -> int:
        return self.near.query.shape[2] // self.block_q

    @property
    def programs(self) -> int:
        return self.near.query.shape[0] * self.blocks

    @property
    def score_scale(self) -> float:
        """From <query, key> to the exponent of 2; with a soft cap, to the argument of tanh."""
        cap = self.rules.soft_cap
        return self.rules.scale * (numerics.LOG2_E if cap is None else 1 / cap)


def plan(rules: Rules, config: Config, operands: Operands, places: Places) -> Plan:
    """The arrays of one call laid out for programs and tiles of these sizes."""
    block_q, block_k = config.block_q, config.block_k
    key_heads = operands.near.key.shape[2]

    def side(branch: Branch, rows_seen: int) -> Side:
        width, edge = block_k, config.edge_k
        if places.segments is not None or rows_seen <= width:
            edge, width = min(width, rows_seen), 0
        pad = max(width, edge)
        return Side(
            queries_first(branch.query, key_heads, block_q),
            _keys_flat(branch.key, pad),
            _keys_flat(branch.value, pad),
            branch.key.shape[1],
            width,
            edge,
        )

    near, far = operands.near, operands.far
    dtype = numerics.statistics_dtype(near.query.dtype)
    if places.segments is not None:
        q, kv = places.segments
        pad = block_q + block_k  # at least what queries and keys are padded by
        q, kv = (jnp.pad(x, ((0, 0), (0, pad)), constant_values=masks.PADDING) for x in (q, kv))
        places = places._replace(segments=masks.SegmentIds(q, kv))
    if places.far_distance is not None:
        query, key, scale = places.far_distance
        query = jnp.pad(query, ((0, 0), (0, block_q)))
        key = jnp.pad(key, ((0, 0), (0, block_k)))
        places = places._replace(far_distance=masks.GlobalDistance(query, key, scale))
    return Plan(
        rules,
        places,
        near=side(near, near.key.shape[1]),
        far=far and side(far, min(far.key.shape[1], rules.num_global)),
        block_q=block_q,
        key_heads=key_heads,
        group=near.query.shape[2] // key_heads,
        value_width=near.value.shape[3],
        dtype=dtype,
        # A rounding of the scaled query is free in float32 and not in bfloat16.
        prescaled=near.query.dtype == dtype,
    )


def queries_first(
    x: Float[Array, "B T N X"], key_heads: int, block: int, fill: float = 0.0
) -> Float[Array, "M G Tp X"]:
    b, _, n, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)), constant_values=fill)
    x = x.reshape(b, -1, key_heads, n // key_heads, width).transpose(0, 2, 3, 1, 4)
    return x.reshape(b * key_heads, n // key_heads, -1, width)


def _keys_flat(x: Float[Array, "B S K X"], pad: int) -> Float[Array, "M padded"]:
    b, s, k, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0)))
    return x.transpose(0, 2, 1, 3).reshape(b * k, (s + pad) * width)


def keys_last(
    x: Float[Array, "M padded"], like: Float[Array, "B S K X"]
) -> Float[Array, "B S K X"]:
    """Gradients of keys back in the shape and dtype of the keys."""
    b, s, k, width = like.shape
    x = x.reshape(b, k, -1, width)[:, :, :s]
    return x.transpose(0, 2, 1, 3).astype(like.dtype)


def blocks_last(
    x: Float[Array, "programs G C X"], plan: Plan, batch: int, length: int
) -> Float[Array, "B T N X"]:
    """What the programs yielded, in the shape of the queries."""
    _, g, c, width = x.shape
    x = x.reshape(batch, plan.key_heads, plan.blocks, g, c, width).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, plan.blocks * c, -1, width)[:, :length]


# --- Programs -------------------------------------------------------------------------------------


class Span(NamedTuple):
    """Rows [start, end) that some query of a block sees, [clear_start, clear_end) that all do."""

    start: Int[Array, ""]
    end: Int[Array, ""]
    clear_start: Int[Array, ""]
    clear_end: Int[Array, ""]


class Tile(NamedTuple):
    """Some keys of one branch, and what a block of queries needs to know to score them."""

    key: Float[Array, "W H"]
    value: Float[Array, "W Hv"]
    distance: Float[Array, "C W"] | None  # for ALiBi
    visible: Bool[Array, "C W"] | None  # None: all pairs


class Program:
    """One block of C queries of one key head: its rows, and the tiles that it visits."""

    def __init__(self, plan: Plan, index: Int[Array, ""]):
        self.plan = plan
        places = plan.places
        self.head = index // plan.blocks
        self.batch, self.key_head = self.head // plan.key_heads, self.head % plan.key_heads
        self.row = index % plan.blocks * plan.block_q
        # Where the first query of the block stands, counted in key rows and in positions.
        self.key_start = places.key_start[self.batch]
        self.at = places.query_offset + self.row
        self.position = self.at + self.key_start
        self.segment_start = jnp.int32(0)
        if places.segments is not None:
            # Of the block's first row: what stands before it is seen by nobody in the block.
            starts = masks.run_starts(places.segments.kv)
            row = jnp.clip(self.at, 0, plan.near.rows - 1)
            self.segment_start = starts[self.batch, row]

    def rows(self, x: Float[Array, "M G T X"]) -> Float[Array, "rows X"]:
        """The block's G * C rows of an array laid out like the queries."""
        _, group, _, width = x.shape
        size = (1, group, self.plan.block_q, width)
        zero = jnp.int32(0)  # a literal would be an int64 in x64 mode
        block = jax.lax.dynamic_slice(x, (self.head, zero, self.row, zero), size)
        return block.reshape(-1, width)

    def query(self, side: Side) -> Float[Array, "rows H"]:
        rows = self.rows(side.query)
        return rows * self.plan.score_scale if self.plan.prescaled else rows

    def per_row(self, x: Float[Array, " N"]) -> Float[Array, "rows 1"]:
        """One value for each query head, repeated for the block's rows."""
        return jnp.repeat(self._group(x), self.plan.block_q)[:, None]

    def _group(self, x: Float[Array, " N"]) -> Float[Array, " G"]:
        return x.reshape(self.plan.key_heads, -1)[self.key_head].astype(self.plan.dtype)

    def walk(self, side: Side, visit: Callable, carry):
        """Carry after `visit(carry, tile, first row of the tile)` of all tiles of a branch."""
        span = self._near_span() if side is self.plan.near else self._far_span()
        width, edge = side.width, side.edge

        def tiles(length, size):
            return jnp.maximum(length + size - 1, 0) // size

        def masked(start, carry):
            return visit(carry, self._tile(side, start, edge, True), start)

        if not width:
            return jax.lax.fori_loop(
                0,
                tiles(span.end - span.start, edge),
                lambda t, carry: masked(span.start + t * edge, carry),
                carry,
            )
        before = jnp.minimum(
            tiles(span.clear_start - span.start, edge), tiles(span.end - span.start, edge)
        )
        clear = span.start + before * edge
        count = jnp.maximum(span.clear_end - clear, 0) // width
        after = clear + count * width

        def edges(t, carry):
            start = jnp.where(t < before, span.start + t * edge, after + (t - before) * edge)
            return masked(start, carry)

        def interior(t, carry):
            start = clear + t * width
            return visit(carry, self._tile(side, start, width, False), start)

        carry = jax.lax.fori_loop(0, before + tiles(span.end - after, edge), edges, carry)
        return jax.lax.fori_loop(0, count, interior, carry)

    def logits(self, scores: Float[Array, "..."], tile: Tile, *, keys_first: bool):
        """Exponents of 2 of [G, C, W] raw scores ([W, G, C] with keys first), and d(logit)/d(score)
        where a soft cap bends it, both in the shape of `scores`.
        """
        plan, cap = self.plan, self.plan.rules.soft_cap

        def spread(x):  # [C, W] to the axes of the scores
            return x.T[:, None] if keys_first else x[None]

        if not plan.prescaled:
            scores = scores * plan.score_scale
        if plan.places.alibi_slopes is not None:
            unit = plan.score_scale / plan.rules.scale
            slopes = self._group(plan.places.alibi_slopes) * unit
            slopes = slopes[None, :, None] if keys_first else slopes[:, None, None]
            assert tile.distance is not None
            scores = scores - slopes * spread(tile.distance)
        bend = None
        if cap is not None:
            bent = jnp.tanh(scores)
            scores, bend = cap * numerics.LOG2_E * bent, 1 - bent * bent
        if tile.visible is not None:
            scores = jnp.where(spread(tile.visible), scores, numerics.MASK_VALUE)
        return scores, bend

    # Spans

    def _near_span(self) -> Span:
        first = jnp.maximum(self.at - self.plan.rules.window + 1, -self.key_start)
        first = jnp.maximum(first, self.segment_start)
        last = self.plan.near.rows
        return Span(
            first,
            jnp.minimum(self.at + self.plan.block_q, last),
            jnp.maximum(self.at + self.plan.block_q - self.plan.rules.window, first),
            jnp.minimum(self.at + 1, last),
        )

    def _far_span(self) -> Span:
        beyond = self.position - self.plan.rules.window
        last = self._last_global()
        return Span(
            self.segment_start,
            jnp.minimum(beyond + self.plan.block_q, last),
            self.segment_start,
            jnp.minimum(beyond + 1, last),
        )

    def _last_global(self):
        assert self.plan.far is not None
        return jnp.minimum(self.segment_start + self.plan.rules.num_global, self.plan.far.rows)

    # Tiles

    def _tile(self, side: Side, start, width: int, masked: bool) -> Tile:
        place = self._near_place if side is self.plan.near else self._far_place
        distance, visible = place(start, width)
        if self.plan.places.segments is not None:
            visible &= self._same_segment(self.plan.places.segments, start, width)
        return Tile(
            self._cut(side.key, start, width, side.query.shape[3]),
            self._cut(side.value, start, width, self.plan.value_width),
            distance.astype(self.plan.dtype) if self.plan.places.alibi_slopes is not None else None,
            visible if masked else None,
        )

    def _cut(self, x: Float[Array, "M SX"], start, count: int, width: int) -> Float[Array, "W X"]:
        size = (1, count * width)
        return jax.lax.dynamic_slice(x, (self.head, start * width), size).reshape(count, width)

    def add(self, total: Float[Array, "M SX"], start, part: Float[Array, "W X"]):
        """`total` with `part` added to this head's rows from `start` on."""
        count, width = part.shape
        part = (self._cut(total, start, count, width) + part).reshape(1, -1)
        return jax.lax.dynamic_update_slice(total, part, (self.head, start * width))

    def _near_place(self, start, width: int):
        column = (start + jnp.arange(width, dtype=jnp.int32))[None]
        distance = self._rows_from(self.at) - column
        visible = (distance >= 0) & (distance < self.plan.rules.window)
        return distance, visible & (column >= -self.key_start) & (column < self.plan.near.rows)

    def _far_place(self, start, width: int):
        column = (start + jnp.arange(width, dtype=jnp.int32))[None]
        distance = self._rows_from(self.position) - column
        visible = (distance >= self.plan.rules.window) & (column < self._last_global())
        if self.plan.rules.clip_distance is not None:
            distance = jnp.minimum(distance, self.plan.rules.clip_distance)
        if self.plan.places.far_distance is not None:
            distance = self._given_distance(self.plan.places.far_distance, start, width)
        return distance, visible

    def _rows_from(self, first) -> Int[Array, "C 1"]:
        return (first + jnp.arange(self.plan.block_q, dtype=jnp.int32))[:, None]

    def _given_distance(self, given: masks.GlobalDistance, start, width: int):
        def cut(x, at, size):
            row = jnp.minimum(self.batch, x.shape[0] - 1)
            return jax.lax.dynamic_slice(x, (row, at), (1, size))[0]

        query, key = cut(given.query, self.row, self.plan.block_q), cut(given.key, start, width)
        apart = query[:, None] - key[None]
        return apart.astype(self.plan.dtype) * jnp.asarray(given.scale, self.plan.dtype)

    def _same_segment(self, ids: masks.SegmentIds, start, width: int) -> Bool[Array, "C W"]:
        q = jax.lax.dynamic_slice(ids.q, (self.batch, self.row), (1, self.plan.block_q))[0]
        kv = jax.lax.dynamic_slice(ids.kv, (self.batch, start), (1, width))[0]
        return (q[:, None] == kv[None]) & (q != masks.PADDING)[:, None]
