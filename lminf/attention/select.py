"""Visibility chosen by content: what the policies that choose among all earlier tokens share.

All of them keep every key and value, in order. Tokens choose in groups: those at positions
[n size, (n + 1) size) which one call reads are a group, however the row is padded. So a text read
at once equals the text read in chunks whose sizes are multiples of the group's, and with groups of
one token it equals any partition into chunks. A token that is read alone chooses alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lminf.attention import cache as caches
from lminf.attention import dense, rope
from lminf.attention.policies import ByContent

TILE = 128  # queries whose weights exist at a time


class Choosing(ByContent):
    """Chooses among all earlier tokens. Subclasses say how a layer reads a chunk."""

    @property
    def bounded(self) -> bool:
        return False  # what it may choose from is everything

    def layout(self, capacity: int) -> caches.Append:
        return caches.Append(capacity)

    def reader(self, scoring: Any, layout: caches.Append, positions: Int[Array, "B T"]) -> Callable:
        """(q, held, layer) -> out, extra; `held` has the chunk's keys and values in it."""
        raise NotImplementedError

    def through(self, scoring, layout, stored_pos, positions):
        slots = caches.destinations(layout, positions)
        read = self.reader(scoring, layout, positions)

        def step(q, k, v, held, layer):
            held = held._replace(
                k=caches.write(held.k, k, layer, slots), v=caches.write(held.v, v, layer, slots)
            )
            out, extra = read(q, held, layer)
            return out, held._replace(extra=extra)

        return step, caches.write_pos(stored_pos, positions, slots)


# --- Groups of tokens -----------------------------------------------------------------------------


class Group(NamedTuple):
    """The tokens of one call that choose together, in R rows, some of them empty."""

    columns: Int[Array, "B R"]  # where in the chunk they stand
    rows_pos: Int[Array, "B R"]  # rising by one along the rows, empty ones too
    pos: Int[Array, "B R"]  # -1 where the row is empty
    first: Int[Array, " B"]  # the smallest position that is not
    end: Int[Array, " B"]  # one past the largest; `first` in an empty group

    @property
    def base(self) -> Int[Array, " B"]:
        """The position of the first row."""
        return self.rows_pos[:, 0]

    def cut(self, x: Float[Array, "B T N H"]) -> Float[Array, "B R N H"]:
        return x[_each_row(self.columns), jnp.clip(self.columns, 0, x.shape[1] - 1)]

    def put(self, out: Float[Array, "B T N H"], part) -> Float[Array, "B T N H"]:
        at = jnp.where(self.pos >= 0, self.columns, out.shape[1])
        return out.at[_each_row(at), at].set(part.astype(out.dtype), mode="drop")


class Groups:
    """A chunk's tokens in groups that are aligned to positions, not to columns of the chunk."""

    def __init__(self, positions: Int[Array, "B T"], size: int):
        self.positions, self.size = positions, size
        self.tokens = positions.shape[1]
        self.rows = min(size, self.tokens)
        self.first = jnp.maximum(positions[:, 0], 0) // size
        self.count = jnp.max(positions[:, -1] // size - self.first) + 1

    def at(self, index) -> Group:
        number = (self.first + index)[:, None]
        if self.tokens <= self.size:
            columns = jnp.arange(self.tokens, dtype=jnp.int32)
            columns = jnp.broadcast_to(columns, self.positions.shape)
            rows_pos = self.positions
            held = rows_pos // self.size == number
        else:
            rows_pos = number * self.size + jnp.arange(self.size, dtype=jnp.int32)[None]
            columns = rows_pos - self.positions[:, :1]
            held = (columns >= 0) & (columns < self.tokens)
        pos = jnp.where(held & (rows_pos >= 0), rows_pos, -1)
        end = pos.max(1) + 1
        first = jnp.where(pos >= 0, pos, end[:, None]).min(1)
        return Group(columns, rows_pos, pos, first, end)

    def run(self, one: Callable, q: Float[Array, "B T N H"], extra) -> tuple[Array, Any]:
        """(out, extra) after `one(group, its q, extra)` gave those of every group in turn."""

        def body(index, carry):
            out, extra = carry
            group = self.at(index)
            part, extra = one(group, group.cut(q), extra)
            return group.put(out, part), extra

        carry = jnp.zeros_like(q), extra
        if self.tokens == 1:
            return body(jnp.int32(0), carry)
        return jax.lax.fori_loop(jnp.int32(0), self.count.astype(jnp.int32), body, carry)


# --- Keys and values at some positions ------------------------------------------------------------


def rows_of(stored: Float[Array, "L B S K H"], layer, at: Int[Array, "B R"]):
    """[B, R, K, H] of one layer; positions that there are none of give any row."""
    return stored[layer, _each_row(at), jnp.clip(at, 0, stored.shape[2] - 1)]


def _each_row(at: Int[Array, "B R"]) -> Int[Array, "B 1"]:
    return jnp.arange(at.shape[0], dtype=jnp.int32)[:, None]


class Places:
    """Where queries and keys seem to be, under a rotary encoding or none."""

    def __init__(self, scoring, positions: Int[Array, "B T"]):
        self.scoring, self.encoding = scoring, scoring.encoding
        self.length = None
        if isinstance(self.encoding, rope.Rotary) and isinstance(
            self.encoding.scaling, rope.DynamicNTK
        ):
            self.length = positions.max(-1, keepdims=True) + 1

    def at(self, x: Float[Array, "B R N H"], pos: Int[Array, "B R"]) -> Float[Array, "B R N H"]:
        by = self.rotation(pos)
        return x if by is None else rope.rotate(x, by, self.encoding.layout)

    def rotation(self, pos: Int[Array, "B R"]) -> rope.Rotation | None:
        if not isinstance(self.encoding, rope.Rotary):
            return None
        return rope.rotation(self.encoding, pos, length=self.length)

    def turned_by_head(
        self, q: Float[Array, "B R N H"], angles: rope.Rotation | None, pos: Int[Array, "B R N"]
    ) -> Float[Array, "B R N H"]:
        """q with every head placed by itself; `angles` are those of positions 0.. [B, X, P]."""
        if angles is None:
            return q
        rows = jnp.arange(len(pos), dtype=jnp.int32)[:, None, None]
        by = rope.Rotation(angles.cos[rows, pos], angles.sin[rows, pos])
        return rope.rotate(q[..., None, :], by, self.encoding.layout)[..., 0, :]

    def away(self, q: Float[Array, "B R N H"], distance: int) -> Float[Array, "B R N H"]:
        """q such that keys as they are stored seem to be so far away."""
        if not isinstance(self.encoding, rope.Rotary):
            return q
        by = rope.rotation(
            self.encoding, jnp.full(q.shape[:2], distance, jnp.int32), length=self.length
        )
        # The keys' own rotation by nothing still carries the schedule's temperature: in the
        # channels that are rotated, and in no others.
        by = rope.Rotation(*(x * jnp.float32(self.encoding.scaling.temperature) for x in by))
        return rope.rotate(q, by, self.encoding.layout)


# --- Softmax over several sets of keys ------------------------------------------------------------


class Branch(NamedTuple):
    """Queries and keys, placed; the branches of one softmax hold different keys."""

    q: Float[Array, "B R N H"]
    k: Float[Array, "B C K H"]
    v: Float[Array, "B C K H"]
    seen: Bool[Array, "B R C"]


def attend_branches(
    scoring, branches: Sequence[Branch]
) -> tuple[Float[Array, "B R N H"], list[Array]]:
    """Outputs, zero where nothing is seen; and what each key of each branch received from all the
    queries, [B, N, C] float32. One softmax over all branches, some queries at a time.
    """
    rows = branches[0].q.shape[1]
    tile = TILE if rows % TILE == 0 else rows
    v = jnp.concatenate([branch.v for branch in branches], 1)

    def some(start):
        def cut(x):
            return jax.lax.dynamic_slice_in_dim(x, start, tile, 1)

        scores = jnp.concatenate(
            [scores_of(scoring, cut(b.q), b.k, cut(b.seen)[:, None, None]) for b in branches], -1
        )
        weights = softmax(scores)
        received = weights.sum(3)
        received = received.reshape(received.shape[0], -1, received.shape[3])
        return dense.mix(weights.astype(v.dtype), v), received

    if rows == tile:
        out, received = some(0)
    else:
        starts = jnp.arange(0, rows, tile, dtype=jnp.int32)
        out, received = jax.lax.map(some, starts)
        out = jnp.moveaxis(out, 0, 1).reshape(out.shape[1], rows, *out.shape[3:])
        received = received.sum(0)
    ends, start = [], 0
    for branch in branches:
        ends.append(received[..., start : start + branch.k.shape[1]])
        start += branch.k.shape[1]
    return out, ends


def scores_of(
    scoring,
    q: Float[Array, "B R N H"],
    k: Float[Array, "B C K H"],
    seen: Bool[Array, " B #K #G R C"],
) -> Float[Array, "B K G R C"]:
    """Scaled and capped scores of placed queries and keys, dense.MASKED where not seen."""
    scores = dense.dot(q * jnp.asarray(scoring.scale, q.dtype), k)
    return jnp.where(seen, dense.capped(scoring, scores), dense.MASKED)


def softmax(scores: Float[Array, "B K G R C"]) -> Float[Array, "B K G R C"]:
    """Weights, float32; all zero for a query that sees nothing."""
    top = jnp.maximum(scores.max(-1, keepdims=True), dense.MASKED / 2)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total == 0, 1.0, total)
