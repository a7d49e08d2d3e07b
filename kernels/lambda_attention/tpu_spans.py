"""Which blocks of queries and keys see each other in Λ-attention, for a TPU's grid of them."""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from lminf.kernels.common import tpu_blocks
from lminf.kernels.lambda_attention.operands import Rules

MOST = 2**30  # beyond every position; sums of two such stay in int32


@dataclass(frozen=True)
class Plan:
    """One call: every size that is known when tracing."""

    rules: Rules
    heads: int  # N
    key_heads: int  # K
    queries: int  # T
    keys: int  # S
    globals: int  # R, at most num_global; with segments, of all of them
    block_q: int  # C
    block_k: int  # W
    block_g: int
    packed: int | None = None  # rows of the ranges that say who is seen, where there are such
    lists: int | None = None  # of positions of the globals, for each row of the batch

    @property
    def scoring(self) -> tpu_blocks.Scoring:
        return tpu_blocks.Scoring(self.rules.scale, self.rules.soft_cap, self.rules.precision)

    @property
    def group(self) -> int:
        return self.heads // self.key_heads

    @property
    def range_heads(self) -> tuple[int, int]:
        """Query and key heads that share a row of ranges."""
        lists = self.lists or 1
        return self.heads // lists, self.key_heads // lists

    @property
    def query_blocks(self) -> int:
        return pl.cdiv(self.queries, self.block_q)

    @property
    def sides(self) -> "tuple[Side, ...]":
        """The branches in the order in which blocks of queries walk them."""
        sides = (Far(self), Near(self)) if self.globals else (Near(self),)
        if self.packed is None:
            return sides
        packed, offset = [], 0
        for side in sides:
            packed.append(
                Packed(
                    self, side.name, side.rows, side.block, side.key_steps, side.query_steps, offset
                )
            )
            offset = packed[-1].end
        return tuple(packed)


class Span(NamedTuple):
    """Rows from `first` to `last`, both seen; last < first: none."""

    first: Any
    last: Any

    def block(self, step: ArrayLike, size: int, count: int) -> Array:
        """The block of `size` rows at this step of a walk; the last one when the walk is over."""
        first, last = (jax.lax.div(jnp.clip(x, 0, count * size - 1), size) for x in self)
        return jnp.minimum(first + jnp.maximum(step, 0), jnp.maximum(first, last))

    def visits(self, step: ArrayLike, size: int) -> Array:
        """Whether the walk has a block at this step."""
        first, last = (jax.lax.div(jnp.maximum(x, 0), size) for x in self)
        return (step >= 0) & (self.first <= self.last) & (first + step <= last)


class Near:
    """The keys of the window. Scalars: the query offset, then where each batch row's keys start."""

    name = "near"

    def __init__(self, plan: Plan):
        self.plan, self.block, self.rows = plan, plan.block_k, plan.keys
        self.window = min(plan.rules.window, MOST)

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.rows, self.block)

    @property
    def key_steps(self) -> int:
        """Blocks of keys that a block of queries visits, at most."""
        offset = self.plan.rules.query_offset
        first = None if offset is None else offset - self.window + 1
        length = self.plan.block_q + self.window - 1
        return min(self.blocks, touched(first, length, self.block, stride=self.plan.block_q))

    @property
    def query_steps(self) -> int:
        """Blocks of queries that a block of keys visits, at most."""
        offset = self.plan.rules.query_offset
        first = None if offset is None else -offset
        length = self.block + self.window - 1
        blocks = touched(first, length, self.plan.block_q, stride=self.block)
        return min(self.plan.query_blocks, blocks)

    def keys_of(self, scalars: Any, batch: ArrayLike, i: ArrayLike) -> Span:
        """Rows of keys that some query of block i sees."""
        first_query, start = scalars[0] + i * self.plan.block_q, scalars[batch + 1]
        first = jnp.maximum(jnp.maximum(first_query - self.window + 1, -start), 0)
        return Span(first, jnp.minimum(first_query + self.plan.block_q, self.rows) - 1)

    def queries_of(self, scalars: Any, batch: ArrayLike, j: ArrayLike) -> Span:
        """Rows of queries that see some key of block j."""
        offset, start = scalars[0], scalars[batch + 1]
        first = jnp.maximum(j * self.block, -start)
        end = jnp.minimum((j + 1) * self.block, self.rows)
        last = jnp.where(first < end, end + self.window - 2 - offset, -1)
        return Span(jnp.maximum(first - offset, 0), jnp.minimum(last, self.plan.queries - 1))

    def clear(self, scalars: Any, batch: ArrayLike, i: ArrayLike, j: ArrayLike) -> Any:
        """Whether all queries of block i see all keys of block j."""
        first_query, first = scalars[0] + i * self.plan.block_q, j * self.block
        seen = (first + self.block - 1 <= first_query) & (
            first_query + self.plan.block_q - first <= self.window
        )
        return seen & (first >= -scalars[batch + 1]) & (first + self.block <= self.rows)

    def visible(
        self,
        scalars: Any,
        batch: ArrayLike,
        i: ArrayLike,
        j: ArrayLike,
        ranges: "Ranges | None" = None,
    ) -> Array:  # fmt: skip
        """Which pairs of the two blocks see each other, keys first; only `Packed` has ranges."""
        key, query = tpu_blocks.rows_and_columns(self.block, self.plan.block_q)
        key += j * self.block
        distance = scalars[0] + i * self.plan.block_q + query - key
        seen = (distance >= 0) & (distance < self.window)
        return seen & (key >= -scalars[batch + 1]) & (key < self.rows)


class Far:
    """The globals, row r at position r; as Near."""

    name = "far"

    def __init__(self, plan: Plan):
        self.plan, self.block, self.rows = plan, plan.block_g, plan.globals
        self.window = min(plan.rules.window, MOST)

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.rows, self.block)

    @property
    def key_steps(self) -> int:
        if self.plan.packed is None or self.plan.lists:
            return self.blocks
        # Those of the first query's segment, and of segments that begin in the block of queries.
        later = max(self.plan.block_q - self.window, 0)
        return min(self.blocks, touched(None, self.plan.rules.num_global + later, self.block))

    @property
    def query_steps(self) -> int:
        return self.plan.query_blocks

    def _beyond(self, scalars, batch, i):
        """Globals up to this one are beyond the window of block i's first query."""
        return scalars[0] + i * self.plan.block_q + scalars[batch + 1] - self.window

    def keys_of(self, scalars: Any, batch: ArrayLike, i: ArrayLike) -> Span:
        last = self._beyond(scalars, batch, i) + self.plan.block_q - 1
        return Span(jnp.int32(0), jnp.minimum(last, self.rows - 1))

    def queries_of(self, scalars: Any, batch: ArrayLike, j: ArrayLike) -> Span:
        first = j * self.block + self.window - scalars[batch + 1] - scalars[0]
        return Span(jnp.maximum(first, 0), jnp.int32(self.plan.queries - 1))

    def clear(self, scalars: Any, batch: ArrayLike, i: ArrayLike, j: ArrayLike) -> Any:
        end = (j + 1) * self.block
        return (end <= self.rows) & (end - 1 <= self._beyond(scalars, batch, i))

    def visible(
        self,
        scalars: Any,
        batch: ArrayLike,
        i: ArrayLike,
        j: ArrayLike,
        ranges: "Ranges | None" = None,
    ) -> Array:  # fmt: skip
        row, query = tpu_blocks.rows_and_columns(self.block, self.plan.block_q)
        row += j * self.block
        return (row <= self._beyond(scalars, batch, i) + query) & (row < self.rows)


class Ranges(NamedTuple):
    """Query t sees the rows first[t] <= row < end[t] of one side."""

    first: Int[Array, "B 1 T"]
    end: Int[Array, "B 1 T"]


@dataclass(frozen=True)
class Packed:
    """A side of which each query sees a range of rows: that of its segment, or of a list.

    Scalars from `offset` on: for each batch row and block of queries the first and last row that
    one of them sees, and the first and the end of those that all see; then for each batch row and
    block of keys the first and the last query that sees one of them. `tpu_packing` makes them.
    """

    plan: Plan
    name: str
    rows: int
    block: int
    key_steps: int
    query_steps: int
    offset: int

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.rows, self.block)

    @property
    def _keys_at(self) -> int:
        assert self.plan.packed is not None
        return self.offset + 4 * self.plan.packed * self.plan.query_blocks

    @property
    def end(self) -> int:
        """Where the scalars of this side are over."""
        assert self.plan.packed is not None
        return self._keys_at + 2 * self.plan.packed * self.blocks

    def keys_of(self, scalars: Any, batch: ArrayLike, i: ArrayLike) -> Span:
        index = self.offset + 4 * (batch * self.plan.query_blocks + i)
        return Span(scalars[index], scalars[index + 1])

    def queries_of(self, scalars: Any, batch: ArrayLike, j: ArrayLike) -> Span:
        index = self._keys_at + 2 * (batch * self.blocks + j)
        return Span(scalars[index], scalars[index + 1])

    def clear(self, scalars: Any, batch: ArrayLike, i: ArrayLike, j: ArrayLike) -> Any:
        index = self.offset + 4 * (batch * self.plan.query_blocks + i)
        return (scalars[index + 2] <= j * self.block) & ((j + 1) * self.block <= scalars[index + 3])

    def visible(
        self, scalars: Any, batch: ArrayLike, i: ArrayLike, j: ArrayLike, ranges: "Ranges | None"
    ) -> Array:
        """As Near; `ranges` are those of block i."""
        first, end = ranges.first[...], ranges.end[...]
        row, _ = tpu_blocks.rows_and_columns(self.block, self.plan.block_q)
        row += j * self.block
        return (row >= first) & (row < end)


Side: TypeAlias = Near | Far | Packed


def touched(first: int | None, length: int, size: int, *, stride: int = 1) -> int:
    """Blocks of `size` rows that `length` rows touch, at most, if they start at
    first + n * every for some n; None: anywhere.
    """
    if first is None or stride % size:
        return (length + size - 2) // size + 1
    return (first % size + length - 1) // size + 1
