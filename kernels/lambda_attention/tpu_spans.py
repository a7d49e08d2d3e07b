"""Which blocks of queries and keys see each other in Λ-attention, for a TPU's grid of them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.common import tpu_blocks
from kernels.lambda_attention.operands import Rules


@dataclass(frozen=True)
class Plan:
    """One call: every size that is known when tracing."""

    rules: Rules
    heads: int  # N
    key_heads: int  # K
    queries: int  # T
    keys: int  # S
    globals: int  # R, at most num_global
    block_q: int  # C
    block_k: int  # W
    block_g: int

    @property
    def scoring(self) -> tpu_blocks.Scoring:
        return tpu_blocks.Scoring(self.rules.scale, self.rules.soft_cap, self.rules.precision)

    @property
    def group(self) -> int:
        return self.heads // self.key_heads

    @property
    def query_blocks(self) -> int:
        return pl.cdiv(self.queries, self.block_q)

    @property
    def sides(self) -> "tuple[Near | Far, ...]":
        """The branches in the order in which blocks of queries walk them."""
        return (Far(self), Near(self)) if self.globals else (Near(self),)


class Span(NamedTuple):
    """Rows from `first` to `last`, both seen; last < first: none."""

    first: Any
    last: Any

    def block(self, step, size: int, count: int):
        """The block of `size` rows at this step of a walk; the last one when the walk is over."""
        first, last = (jax.lax.div(jnp.clip(x, 0, count * size - 1), size) for x in self)
        return jnp.minimum(first + jnp.maximum(step, 0), jnp.maximum(first, last))

    def visits(self, step, size: int):
        """Whether the walk has a block at this step."""
        first, last = (jax.lax.div(jnp.maximum(x, 0), size) for x in self)
        return (step >= 0) & (self.first <= self.last) & (first + step <= last)


class Near:
    """The keys of the window. Scalars: the query offset, then where each batch row's keys start."""

    def __init__(self, plan: Plan):
        self.plan, self.block, self.rows = plan, plan.block_k, plan.keys
        self.window = min(plan.rules.window, 2**30)  # beyond every position, sums stay in int32

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.rows, self.block)

    @property
    def key_steps(self) -> int:
        """Blocks of keys that a block of queries visits, at most."""
        offset = self.plan.rules.query_offset
        first = None if offset is None else offset - self.window + 1
        length = self.plan.block_q + self.window - 1
        return min(self.blocks, touched(first, length, self.block, every=self.plan.block_q))

    @property
    def query_steps(self) -> int:
        """Blocks of queries that a block of keys visits, at most."""
        offset = self.plan.rules.query_offset
        first = None if offset is None else -offset
        length = self.block + self.window - 1
        blocks = touched(first, length, self.plan.block_q, every=self.block)
        return min(self.plan.query_blocks, blocks)

    def keys_of(self, scalars, batch, i) -> Span:
        """Rows of keys that some query of block i sees."""
        at, start = scalars[0] + i * self.plan.block_q, scalars[batch + 1]
        first = jnp.maximum(jnp.maximum(at - self.window + 1, -start), 0)
        return Span(first, jnp.minimum(at + self.plan.block_q, self.rows) - 1)

    def queries_of(self, scalars, batch, j) -> Span:
        """Rows of queries that see some key of block j."""
        offset, start = scalars[0], scalars[batch + 1]
        first = jnp.maximum(j * self.block, -start)
        end = jnp.minimum((j + 1) * self.block, self.rows)
        last = jnp.where(first < end, end + self.window - 2 - offset, -1)
        return Span(jnp.maximum(first - offset, 0), jnp.minimum(last, self.plan.queries - 1))

    def clear(self, scalars, batch, i, j):
        """Whether all queries of block i see all keys of block j."""
        at, first = scalars[0] + i * self.plan.block_q, j * self.block
        seen = (first + self.block - 1 <= at) & (at + self.plan.block_q - first <= self.window)
        return seen & (first >= -scalars[batch + 1]) & (first + self.block <= self.rows)

    def visible(self, scalars, batch, i, j):
        """Which pairs of the two blocks see each other, keys first."""
        key, query = tpu_blocks.rows_and_columns(self.block, self.plan.block_q)
        key += j * self.block
        distance = scalars[0] + i * self.plan.block_q + query - key
        seen = (distance >= 0) & (distance < self.window)
        return seen & (key >= -scalars[batch + 1]) & (key < self.rows)


class Far:
    """The globals, row r at position r; as Near."""

    def __init__(self, plan: Plan):
        self.plan, self.block, self.rows = plan, plan.block_g, plan.globals
        self.window = min(plan.rules.window, 2**30)

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.rows, self.block)

    @property
    def key_steps(self) -> int:
        return self.blocks

    @property
    def query_steps(self) -> int:
        return self.plan.query_blocks

    def _beyond(self, scalars, batch, i):
        """Globals up to this one are beyond the window of block i's first query."""
        return scalars[0] + i * self.plan.block_q + scalars[batch + 1] - self.window

    def keys_of(self, scalars, batch, i) -> Span:
        last = self._beyond(scalars, batch, i) + self.plan.block_q - 1
        return Span(jnp.int32(0), jnp.minimum(last, self.rows - 1))

    def queries_of(self, scalars, batch, j) -> Span:
        first = j * self.block + self.window - scalars[batch + 1] - scalars[0]
        return Span(jnp.maximum(first, 0), jnp.int32(self.plan.queries - 1))

    def clear(self, scalars, batch, i, j):
        end = (j + 1) * self.block
        return (end <= self.rows) & (end - 1 <= self._beyond(scalars, batch, i))

    def visible(self, scalars, batch, i, j):
        row, query = tpu_blocks.rows_and_columns(self.block, self.plan.block_q)
        row += j * self.block
        return (row <= self._beyond(scalars, batch, i) + query) & (row < self.rows)


def touched(first: int | None, length: int, size: int, *, every: int) -> int:
    """Blocks of `size` rows that `length` rows touch, at most, if they start at
    first + n * every for some n; None: anywhere.
    """
    if first is None or every % size:
        return (length + size - 2) // size + 1
    return (first % size + length - 1) // size + 1
