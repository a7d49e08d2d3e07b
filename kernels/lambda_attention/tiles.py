"""Which tiles of keys a block of queries visits, which of them need a mask, and their logits.

Shared by the forward and the backward of `xla_chunked`. A block's window is a range of key rows;
its ends are edges, where a mask decides, and everything between is seen by all rows of the block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.common import masks, numerics
from kernels.lambda_attention.operands import Operands, Places, Rules


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def dot(a, b, contract: tuple[int, int], dtype, precision) -> Float[Array, "X Y"]:
    """Matrix product over axis contract[0] of a and contract[1] of b, accumulated in `dtype`."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    if a.dtype != b.dtype:
        a, b = a.astype(dtype), b.astype(dtype)
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=dtype)


# --- Layout: heads in front, padded to whole tiles ------------------------------------------------


class Layout(NamedTuple):
    """Arrays as programs read them. M = B * K key heads; M-major, so a program's rows are close."""

    query: Float[Array, "M G T H"]
    query_global: Float[Array, "M G T H"] | None
    key: Float[Array, "M S H"]
    value: Float[Array, "M S Hv"]
    key_global: Float[Array, "M R H"] | None
    value_global: Float[Array, "M R Hv"] | None
    sinks: Float[Array, "K G"] | None
    slopes: Float[Array, "K G"] | None
    segment_q: Int[Array, "B T"] | None
    segment_kv: Int[Array, "B S"] | None
    segment_starts: Int[Array, "B S"] | None
    distance_query: Int[Array, "B|1 T"] | None
    distance_key: Int[Array, "B|1 R"] | None


@dataclass(frozen=True)
class Plan:
    """One call: its arrays, and every size that is known when tracing."""

    rules: Rules
    places: Places
    layout: Layout
    block_q: int  # C, positions in a program
    near_width: int  # keys in a tile of the window
    far_width: int  # keys in a tile of the globals; 0: there are none
    keys: int  # S before padding
    far_rows: int  # R before padding
    dtype: jnp.dtype  # of statistics and accumulators

    @property
    def blocks(self) -> int:
        return self.layout.query.shape[2] // self.block_q

    @property
    def programs(self) -> int:
        return self.layout.query.shape[0] * self.blocks

    @property
    def rows(self) -> int:
        return self.layout.query.shape[1] * self.block_q

    @property
    def has_clear_tiles(self) -> bool:
        return self.layout.segment_q is None


def plan(rules: Rules, block_q: int, block_k: int, operands: Operands, places: Places) -> Plan:
    """The arrays of one call laid out for blocks of `block_q` queries, tiles of `block_k` keys."""
    key_heads = operands.key.shape[2]
    group = operands.query.shape[2] // key_heads
    far_rows = 0 if operands.key_global is None else operands.key_global.shape[1]
    far_width = min(block_k, round_up(min(far_rows, rules.num_global), 16))
    query_pad = -operands.query.shape[1] % block_q

    def queries(x):
        return None if x is None else queries_first(x, key_heads, block_q)

    def by_head(x):
        return None if x is None else x.reshape(key_heads, group)

    def columns(x, pad, fill=0):
        return None if x is None else jnp.pad(x, ((0, 0), (0, pad)), constant_values=fill)

    starts = None if places.segment_kv is None else masks.run_starts(places.segment_kv)
    layout = Layout(
        query=queries_first(operands.query, key_heads, block_q),
        query_global=queries(operands.query_global),
        key=_keys_first(operands.key, block_k),
        value=_keys_first(operands.value, block_k),
        key_global=None if not far_width else _keys_first(operands.key_global, far_width),
        value_global=None if not far_width else _keys_first(operands.value_global, far_width),
        sinks=by_head(operands.sinks),
        slopes=by_head(places.alibi_slopes),
        segment_q=columns(places.segment_q, query_pad, masks.PADDING),
        segment_kv=columns(places.segment_kv, block_k, masks.PADDING),
        segment_starts=starts,
        distance_query=columns(places.distance_query, query_pad),
        distance_key=columns(places.distance_key, far_width),
    )
    return Plan(
        rules, places, layout, block_q, block_k, far_width,
        keys=operands.key.shape[1],
        far_rows=far_rows,
        dtype=numerics.statistics_dtype(operands.query.dtype),
    )  # fmt: skip


def queries_first(
    x: Float[Array, "B T N H"], key_heads: int, block: int, fill: float = 0.0
) -> Float[Array, "M G padded H"]:
    b, t, n, h = x.shape
    x = jnp.pad(x, ((0, 0), (0, -t % block), (0, 0), (0, 0)), constant_values=fill)
    x = x.reshape(b, -1, key_heads, n // key_heads, h).transpose(0, 2, 3, 1, 4)
    return x.reshape(b * key_heads, n // key_heads, -1, h)


def _keys_first(x: Float[Array, "B S K H"], pad: int) -> Float[Array, "M padded H"]:
    b, s, k, h = x.shape
    x = jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0)))
    return x.transpose(0, 2, 1, 3).reshape(b * k, s + pad, h)


def keys_last(
    x: Float[Array, "M padded H"], like: Float[Array, "B S K H"]
) -> Float[Array, "B S K H"]:
    """Gradients of keys back in the shape and dtype of the keys."""
    b, s, k, h = like.shape
    return x[:, :s].reshape(b, k, s, h).transpose(0, 2, 1, 3).astype(like.dtype)


def blocks_last(
    x: Float[Array, "programs G C H"], plan: Plan, shape: tuple[int, int]
) -> Float[Array, "B T N H"]:
    """What the programs yielded, in the shape of the queries."""
    batch, length = shape
    _, g, c, h = x.shape
    x = x.reshape(batch, -1, plan.blocks, g, c, h).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, plan.blocks * c, -1, h)[:, :length]


# --- Spans ----------------------------------------------------------------------------------------


class Span(NamedTuple):
    """Tiles start + t * width for t in [0, count); those in [clear_from, clear_to) need no mask."""

    start: Int[Array, ""]
    clear_from: Int[Array, ""]
    clear_to: Int[Array, ""]
    count: Int[Array, ""]


def _span(start, end, clear_start, clear_end, width: int) -> Span:
    """Tiles that cover rows [start, end), of which all see rows [clear_start, clear_end)."""
    count = jnp.maximum(end - start + width - 1, 0) // width
    clear_from = jnp.clip((clear_start - start + width - 1) // width, 0, count)
    clear_to = jnp.clip((clear_end - start) // width, clear_from, count)
    return Span(start, clear_from, clear_to, count)


def walk(span: Span, width: int, has_clear: bool, visit: Callable, carry):
    """Carry after `visit(carry, first row of the tile, whether it needs a mask)` of every tile."""
    if not has_clear:
        return jax.lax.fori_loop(
            0, span.count, lambda t, c: visit(c, span.start + t * width, True), carry
        )
    clear = span.clear_to - span.clear_from

    def edge(t, carry):
        t = jnp.where(t < span.clear_from, t, t + clear)
        return visit(carry, span.start + t * width, True)

    carry = jax.lax.fori_loop(0, span.count - clear, edge, carry)
    return jax.lax.fori_loop(
        span.clear_from, span.clear_to,
        lambda t, c: visit(c, span.start + t * width, False), carry,
    )  # fmt: skip


# --- Programs -------------------------------------------------------------------------------------


class Program:
    """One block of C queries of one key head: its rows, its spans, the logits of a tile."""

    def __init__(self, plan: Plan, index: Int[Array, ""]):
        self.plan, self.layout, self.rules = plan, plan.layout, plan.rules
        key_heads = plan.layout.query.shape[0] // plan.places.key_start.shape[0]
        self.head = index // plan.blocks
        self.batch, self.key_head = self.head // key_heads, self.head % key_heads
        self.row = index % plan.blocks * plan.block_q
        # Where the first query of the block stands, counted in key rows and in positions.
        self.key_start = plan.places.key_start[self.batch]
        self.at = plan.places.query_offset + self.row
        self.position = self.at + self.key_start
        starts = plan.layout.segment_starts
        self.segment_start = (
            jnp.int32(0)
            if starts is None
            else starts[self.batch, jnp.clip(self.at, 0, starts.shape[1] - 1)]
        )

    # Rows and tiles

    def rows(self, x: Float[Array, "M G T X"]) -> Float[Array, "rows X"]:
        """The block's rows of an array laid out like the queries."""
        _, group, _, width = x.shape
        size = (1, group, self.plan.block_q, width)
        block = jax.lax.dynamic_slice(x, (self.head, 0, self.row, 0), size)
        return block.reshape(self.plan.rows, width)

    def scaled_rows(self, x: Float[Array, "M G T H"]) -> Float[Array, "rows H"]:
        scaled = self.rows(x).astype(self.plan.dtype) * self.rules.scale
        return scaled.astype(x.dtype)

    def per_row(self, x: Float[Array, "K G"]) -> Float[Array, "rows 1"]:
        """One value for each query head, repeated for the block's rows."""
        return jnp.repeat(x[self.key_head].astype(self.plan.dtype), self.plan.block_q)[:, None]

    def near_tile(self, start):
        """Keys and values of a tile of the window, and the function that gives its logits."""
        width = self.plan.near_width
        return (
            self._cut(self.layout.key, start, width),
            self._cut(self.layout.value, start, width),
            self._near_logits,
        )

    def far_tile(self, start):
        """The same for a tile of the globals."""
        width = self.plan.far_width
        return (
            self._cut(self.layout.key_global, start, width),
            self._cut(self.layout.value_global, start, width),
            self._far_logits,
        )

    def _cut(self, x, start, width: int):
        return jax.lax.dynamic_slice(x, (self.head, start, 0), (1, width, x.shape[2]))[0]

    def add(self, total: Float[Array, "M S X"], start, part: Float[Array, "W X"]):
        """`total` with `part` added to this head's rows from `start` on."""
        sum_ = self._cut(total, start, part.shape[0]) + part
        return jax.lax.dynamic_update_slice(total, sum_[None], (self.head, start, 0))

    # Spans

    def near_span(self) -> Span:
        at, block, window = self.at, self.plan.block_q, self.rules.window
        first = jnp.maximum(at - window + 1, -self.key_start)
        return _span(
            jnp.maximum(first, self.segment_start),
            jnp.minimum(at + block, self.plan.keys),
            at + block - window,
            jnp.minimum(at + 1, self.plan.keys),
            self.plan.near_width,
        )

    def far_span(self) -> Span:
        position, window = self.position, self.rules.window
        last = self._last_global()
        return _span(
            self.segment_start,
            jnp.minimum(position + self.plan.block_q - window, last),
            self.segment_start,
            jnp.minimum(position - window + 1, last),
            self.plan.far_width,
        )

    def _last_global(self):
        return jnp.minimum(self.segment_start + self.rules.num_global, self.plan.far_rows)

    # Logits

    def _near_logits(self, query, key, start, masked: bool):
        """Logits [G*C, W], and d(logit)/d(scaled score) where that is not 1."""
        column = start + jnp.arange(key.shape[0], dtype=jnp.int32)
        distance = self._rows_from(self.at) - column
        visible = None
        if masked:
            visible = (distance >= 0) & (distance < self.rules.window)
            visible &= (column >= -self.key_start) & (column < self.plan.keys)
        return self._logits(query, key, start, distance, visible)

    def _far_logits(self, query, key, start, masked: bool):
        column = start + jnp.arange(key.shape[0], dtype=jnp.int32)
        distance = self._rows_from(self.position) - column
        visible = None
        if masked:
            visible = (distance >= self.rules.window) & (column < self._last_global())
        if self.rules.clip_distance is not None:
            distance = jnp.minimum(distance, self.rules.clip_distance)
        if self.layout.distance_query is not None:
            distance = self._given_distance(start, key.shape[0])
        return self._logits(query, key, start, distance, visible)

    def _rows_from(self, first) -> Int[Array, "C 1"]:
        return (first + jnp.arange(self.plan.block_q, dtype=jnp.int32))[:, None]

    def _given_distance(self, start, width: int) -> Float[Array, "C W"]:
        def cut(x, at, size):
            row = jnp.minimum(self.batch, x.shape[0] - 1)
            return jax.lax.dynamic_slice(x, (row, at), (1, size))[0].astype(jnp.int32)

        query = cut(self.layout.distance_query, self.row, self.plan.block_q)
        difference = query[:, None] - cut(self.layout.distance_key, start, width)
        return difference.astype(self.plan.dtype) * self.plan.places.distance_scale

    def _same_segment(self, start, width: int) -> Bool[Array, "C W"]:
        size = self.plan.block_q
        q = jax.lax.dynamic_slice(self.layout.segment_q, (self.batch, self.row), (1, size))[0]
        kv = jax.lax.dynamic_slice(self.layout.segment_kv, (self.batch, start), (1, width))[0]
        return (q[:, None] == kv) & (q != masks.PADDING)[:, None]

    def _logits(self, query, key, start, distance, visible):
        scores = dot(query, key, (1, 1), self.plan.dtype, self.rules.precision)
        scores = scores.reshape(-1, self.plan.block_q, key.shape[0])
        if self.layout.slopes is not None:
            slopes = self.layout.slopes[self.key_head].astype(self.plan.dtype)
            scores -= slopes[:, None, None] * distance.astype(self.plan.dtype)
        bend = None
        cap = self.rules.soft_cap
        if cap is not None:
            bent = jnp.tanh(scores / cap)
            scores, bend = cap * bent, (1 - bent * bent).reshape(-1, key.shape[0])
        if visible is not None:
            if self.layout.segment_q is not None:
                visible &= self._same_segment(start, key.shape[0])
            scores = jnp.where(visible, scores, numerics.MASK_VALUE)
        return scores.reshape(-1, key.shape[0]), bend
