"""Which tiles of keys a block of queries visits, which of them need a mask, and their logits.

Shared by the forward and the backward of `xla_chunked`. The keys that a block sees are one range of
rows in each branch. Its ends are edges, walked in narrow tiles where a mask decides; everything
between is seen by all rows of the block and walked in wide tiles without one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lminf.kernels.common import masks, numerics
from lminf.kernels.lambda_attention.operands import Branch, Operands, Places, Rules


def dot(
    a: Array, b: Array, contract: tuple[int, int], dtype: Any, precision: Any
) -> Float[Array, "X Y"]:
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
    """One branch as programs read it: as the caller laid it out, queries padded to whole blocks."""

    query: Float[Array, "B Tp N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K Hv"]
    width: int  # keys in a clear tile; 0: all tiles are masked
    edge: int  # keys in a masked tile

    @property
    def rows(self) -> int:
        return self.key.shape[1]


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
    def length(self) -> int:
        """Queries, padded to whole blocks."""
        return self.near.query.shape[1]

    @property
    def heads(self) -> Int[Array, " BK"]:
        return jnp.arange(self.near.query.shape[0] * self.key_heads, dtype=jnp.int32)

    @property
    def blocks(self) -> Int[Array, " blocks"]:
        return jnp.arange(self.length // self.block_q, dtype=jnp.int32)

    @property
    def score_scale(self) -> float:
        """From <query, key> to the exponent of 2; with a soft cap, to the argument of tanh."""
        cap = self.rules.soft_cap
        return self.rules.scale * (numerics.LOG2_E if cap is None else 1 / cap)


def plan(rules: Rules, config: Config, operands: Operands, places: Places) -> Plan:
    """The arrays of one call and the tiles of these sizes."""
    block_q, block_k = config.block_q, config.block_k
    key_heads = operands.near.key.shape[2]

    def side(branch: Branch, rows_seen: int) -> Side:
        width, edge = block_k, config.edge_k
        if places.segments is not None or rows_seen <= width:
            edge, width = min(width, rows_seen), 0
        return Side(whole_blocks(branch.query, block_q), branch.key, branch.value, width, edge)

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


def whole_blocks(x: Float[Array, "B T N X"], block: int) -> Float[Array, "B Tp N X"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)))


# --- Programs -------------------------------------------------------------------------------------


class Span(NamedTuple):
    """Rows [start, end) that some query of a block sees, [clear_start, clear_end) that all do."""

    start: Int[Array, ""]
    end: Int[Array, ""]
    clear_start: Int[Array, ""]
    clear_end: Int[Array, ""]


class Tile(NamedTuple):
    """Some keys of one branch, and what a block of queries needs to know to score them."""

    start: Int[Array, ""]
    width: int  # W
    distance: Float[Array, "C W"] | None  # for ALiBi
    visible: Bool[Array, "C W"] | None  # None: all pairs

    def rows(self, x: Float[Array, "S X"]) -> Float[Array, "W X"]:
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.width, 0)

    def columns(self, x: Float[Array, "X S"]) -> Float[Array, "X W"]:
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.width, 1)

    def add(self, total: Float[Array, "S X"], part: Float[Array, "W X"]) -> Float[Array, "S X"]:
        """`total` with `part` added to the rows of this tile."""
        return jax.lax.dynamic_update_slice_in_dim(total, self.rows(total) + part, self.start, 0)


class Head:
    """One key head of one sequence, with the G query heads that read it."""

    def __init__(self, plan: Plan, index: Int[Array, ""]):
        self.plan = plan
        self.batch, self.key_head = index // plan.key_heads, index % plan.key_heads

    def rows(self, x: Float[Array, "B S K X"]) -> Float[Array, "S X"]:
        """This head's keys or values, side by side: they are read many times, from the cache."""
        _, rows, _, width = x.shape
        return jax.lax.dynamic_slice(x, self._corner(), (1, rows, 1, width))[0, :, 0]

    def put_rows(
        self, total: Float[Array, "B S K X"], rows: Float[Array, "S X"]
    ) -> Float[Array, "B S K X"]:
        """`total` with this head's rows replaced."""
        part = rows[None, :, None].astype(total.dtype)
        return jax.lax.dynamic_update_slice(total, part, self._corner())

    def _corner(self):
        zero = jnp.int32(0)  # a literal would be an int64 in x64 mode
        return self.batch, zero, self.key_head, zero

    def group(self, x: Float[Array, " N"]) -> Float[Array, " G"]:
        return x.reshape(self.plan.key_heads, -1)[self.key_head].astype(self.plan.dtype)


class Program:
    """One block of C queries of one key head: its G * C rows, and the tiles that it visits."""

    def __init__(self, head: Head, block: Int[Array, ""]):
        self.head, self.plan, self.batch = head, head.plan, head.batch
        places = self.plan.places
        self.row = block * self.plan.block_q
        # Where the first query of the block stands, counted in key rows and in positions.
        self.key_start = places.key_start[self.batch]
        self.at = places.query_offset + self.row
        self.position = self.at + self.key_start
        self.segment_start = jnp.int32(0)
        if places.segments is not None:
            # Of the block's first row: what stands before it is seen by nobody in the block.
            starts = masks.run_starts(places.segments.kv)
            row = jnp.clip(self.at, 0, self.plan.near.rows - 1)
            self.segment_start = starts[self.batch, row]
        self.listed = None
        if places.far_positions is not None:
            lists = places.far_positions.shape[1]
            self.listed = places.far_positions[self.batch, jnp.minimum(head.key_head, lists - 1)]

    def rows(self, x: Float[Array, "B Tp N X"]) -> Float[Array, "rows X"]:
        """The block's rows of an array laid out like the queries."""
        plan, width = self.plan, x.shape[3]
        size = (1, plan.block_q, plan.group, width)
        block = jax.lax.dynamic_slice(x, self._corner(), size)
        return block[0].swapaxes(0, 1).reshape(-1, width)

    def put_rows(
        self, total: Float[Array, "B Tp N X"], rows: Float[Array, "rows X"]
    ) -> Float[Array, "B Tp N X"]:
        """`total` with the block's rows replaced."""
        plan = self.plan
        block = rows.reshape(1, plan.group, plan.block_q, -1).swapaxes(1, 2)
        return jax.lax.dynamic_update_slice(total, block.astype(total.dtype), self._corner())

    def statistic(self, x: Float[Array, "B N Tp"]) -> Float[Array, "1 rows"]:
        plan = self.plan
        size = (1, plan.group, plan.block_q)
        return jax.lax.dynamic_slice(x, self._statistic_corner(), size).reshape(1, -1)

    def put_statistic(
        self, total: Float[Array, "B N Tp"], x: Float[Array, "rows 1"]
    ) -> Float[Array, "B N Tp"]:
        block = x.reshape(1, self.plan.group, self.plan.block_q)
        return jax.lax.dynamic_update_slice(total, block, self._statistic_corner())

    def _corner(self):
        return self.batch, self.row, self.head.key_head * self.plan.group, jnp.int32(0)

    def _statistic_corner(self):
        return self.batch, self.head.key_head * self.plan.group, self.row

    def query(self, side: Side) -> Float[Array, "rows H"]:
        rows = self.rows(side.query)
        return rows * self.plan.score_scale if self.plan.prescaled else rows

    def per_row(self, x: Float[Array, " N"]) -> Float[Array, "rows 1"]:
        """One value for each query head, repeated for the block's rows."""
        return jnp.repeat(self.head.group(x), self.plan.block_q)[:, None]

    def walk(self, side: Side, visit: Callable, carry: Any) -> Any:
        """Carry after `visit(carry, tile)` of all tiles of a branch."""
        span = self._near_span() if side is self.plan.near else self._far_span()
        width, edge = side.width, side.edge

        def tiles(length, size):
            return jnp.maximum(length + size - 1, 0) // size

        def masked(first, carry):
            # At the end of the keys the tile lies further back, behind keys it must not show.
            start = jnp.minimum(first, side.rows - edge)
            return visit(carry, self._tile(side, start, edge, first))

        if not width:
            return jax.lax.fori_loop(
                0,
                tiles(span.end - span.start, edge),
                lambda t, carry: masked(span.start + t * edge, carry),
                carry,
            )
        num_head = jnp.minimum(
            tiles(span.clear_start - span.start, edge), tiles(span.end - span.start, edge)
        )
        clear = span.start + num_head * edge
        count = jnp.maximum(span.clear_end - clear, 0) // width
        tail = clear + count * width

        def edges(t, carry):
            start = jnp.where(t < num_head, span.start + t * edge, tail + (t - num_head) * edge)
            return masked(start, carry)

        def interior(t, carry):
            start = clear + t * width
            return visit(carry, self._tile(side, start, width, None))

        carry = jax.lax.fori_loop(0, num_head + tiles(span.end - tail, edge), edges, carry)
        return jax.lax.fori_loop(0, count, interior, carry)

    def logits(
        self, scores: Float[Array, "..."], tile: Tile, *, keys_first: bool
    ) -> tuple[Array, Array | None]:
        """Exponents of 2 of raw scores [rows, W] ([W, rows] with keys first), and d(logit)/d(score)
        where a soft cap bends it, both in the shape of `scores`.
        """
        plan, cap = self.plan, self.plan.rules.soft_cap
        flat, cube = scores.shape, (plan.group, plan.block_q)

        def spread(x):  # [C, W] to the axes of the cube of scores
            return x.T[:, None] if keys_first else x[None]

        scores = scores.reshape(-1, *cube) if keys_first else scores.reshape(*cube, -1)
        if not plan.prescaled:
            scores = scores * plan.score_scale
        if plan.places.alibi_slopes is not None:
            unit = plan.score_scale / plan.rules.scale
            slopes = self.head.group(plan.places.alibi_slopes) * unit
            slopes = slopes[None, :, None] if keys_first else slopes[:, None, None]
            assert tile.distance is not None
            scores = scores - slopes * spread(tile.distance)
        bend = None
        if cap is not None:
            bent = jnp.tanh(scores)
            scores, bend = cap * numerics.LOG2_E * bent, (1 - bent * bent).reshape(flat)
        if tile.visible is not None:
            scores = jnp.where(spread(tile.visible), scores, numerics.MASK_VALUE)
        return scores.reshape(flat), bend

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
        if self.listed is not None:  # from the first row that somebody sees to the last
            row, rows = jnp.arange(self.listed.shape[0], dtype=jnp.int32), self.listed.shape[0]
            seen = (self.listed >= 0) & (self.listed < beyond + self.plan.block_q)
            start = jnp.where(seen, row, rows).min()
            part = (row >= start) & ~(seen & (self.listed <= beyond))
            end = jnp.where(seen, row + 1, 0).max()
            return Span(start, end, start, jnp.where(part, row, rows).min())
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

    def _tile(self, side: Side, start, width: int, first) -> Tile:
        """Keys from `start` on; without a `first`, all of them are visible to all rows."""
        place = self._near_place if side is self.plan.near else self._far_place
        distance, visible = place(start, width)
        if self.plan.places.segments is not None:
            visible &= self._same_segment(self.plan.places.segments, start, width)
        if first is not None:
            visible &= start + jnp.arange(width, dtype=jnp.int32)[None] >= first
        return Tile(
            start,
            width,
            distance.astype(self.plan.dtype) if self.plan.places.alibi_slopes is not None else None,
            visible if first is not None else None,
        )

    def _near_place(self, start, width: int):
        column = (start + jnp.arange(width, dtype=jnp.int32))[None]
        distance = self._rows_from(self.at) - column
        visible = (distance >= 0) & (distance < self.plan.rules.window)
        return distance, visible & (column >= -self.key_start) & (column < self.plan.near.rows)

    def _far_place(self, start, width: int):
        if self.listed is None:
            column = (start + jnp.arange(width, dtype=jnp.int32))[None]
        else:
            column = jax.lax.dynamic_slice_in_dim(self.listed, start, width)[None]
        distance = self._rows_from(self.position) - column
        visible = distance >= self.plan.rules.window
        visible &= column < self._last_global() if self.listed is None else column >= 0
        if self.plan.rules.clip_distance is not None:
            distance = jnp.minimum(distance, self.plan.rules.clip_distance)
        if self.plan.places.far_distance is not None:
            distance = self._given_distance(self.plan.places.far_distance, start, width)
        return distance, visible

    def _rows_from(self, first) -> Int[Array, "C 1"]:
        return (first + jnp.arange(self.plan.block_q, dtype=jnp.int32))[:, None]

    def _given_distance(self, given: masks.GlobalDistance, start, width: int):
        def cut(x, column, size):
            row = jnp.minimum(self.batch, x.shape[0] - 1)
            return jax.lax.dynamic_slice(x, (row, column), (1, size))[0]

        query, key = cut(given.query, self.row, self.plan.block_q), cut(given.key, start, width)
        apart = query[:, None] - key[None]
        return apart.astype(self.plan.dtype) * jnp.asarray(given.scale, self.plan.dtype)

    def _same_segment(self, ids: masks.SegmentIds, start, width: int) -> Bool[Array, "C W"]:
        q = jax.lax.dynamic_slice(ids.q, (self.batch, self.row), (1, self.plan.block_q))[0]
        kv = jax.lax.dynamic_slice(ids.kv, (self.batch, start), (1, width))[0]
        return (q[:, None] == kv[None]) & (q != masks.PADDING)[:, None]
