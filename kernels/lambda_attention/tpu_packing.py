"""Segments, and lists of globals, for the TPU kernels of Λ-attention: what each query sees is one
range of rows.

A segment is a run of rows, so its part of a window is a range of keys. The globals of all segments
are gathered first: in that order those that a query sees are a range too, and few are left, for a
segment no longer than the window shows nobody its globals. Of a list in order, a query sees the
rows up to some position. Two numbers a query are thus the whole mask. Which blocks to walk, and
which of them everybody sees, is found here in plain XLA.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lminf.kernels.common import masks
from lminf.kernels.lambda_attention.operands import Branch, Operands, Places, Rules
from lminf.kernels.lambda_attention.tpu_spans import MOST, Plan, Ranges, Side


class Where(NamedTuple):
    """What the kernels read beside the operands."""

    scalars: Int[Array, " scalars"]
    ranges: tuple[Ranges, ...] = ()  # of each side, where there are segments or lists


def most_globals(rules: Rules, keys: int) -> int:
    """How many globals the segments of a row can show somebody.

    Each segment but the last, which goes on where queries do, needs a window of keys after them.
    """
    return min(
        keys, rules.num_global * keys // (rules.num_global + rules.window) + rules.num_global
    )


def pack(plan: Plan, operands: Operands, places: Places) -> tuple[Operands, Where]:
    """The operands, those of segments with their globals gathered, and what places them."""
    if places.segments is None:
        ranges = _of_lists(plan, places)
    else:
        operands, ranges = _of_segments(plan, operands, places, places.segments)
    beyond = ((0, 0), (0, -plan.queries % plan.block_q))
    padded = tuple(Ranges(*(jnp.pad(x, beyond, mode="edge")[:, None] for x in r)) for r in ranges)
    scalars = [_scalars(plan, side, r) for side, r in zip(plan.sides, padded, strict=True)]
    return operands, Where(jnp.concatenate(scalars), padded)


def _of_lists(plan: Plan, places: Places) -> list[Ranges]:
    """What each query sees of the list of globals, and of the window; a row for each list."""
    listed = places.far_positions
    assert listed is not None
    listed, row = listed.reshape(-1, listed.shape[2]), jnp.arange(listed.shape[2], dtype=jnp.int32)
    start = jnp.repeat(places.key_start, len(listed) // len(places.key_start))[:, None]
    position = places.query_offset + jnp.arange(plan.queries, dtype=jnp.int32)[None]  # of a key row
    window = min(plan.rules.window, MOST)

    hidden = jnp.where(listed >= 0, row[None], plan.globals).min(1, keepdims=True)  # in front
    ordered = jnp.where((listed < 0) & (row[None] > hidden), MOST, listed)
    count = jax.vmap(lambda x, limits: jnp.searchsorted(x, limits, side="right"))
    end = jnp.maximum(count(ordered, position + start - window).astype(jnp.int32), hidden)
    far = Ranges(jnp.broadcast_to(hidden, end.shape), end)
    end = jnp.broadcast_to(jnp.clip(position + 1, 0, plan.keys), end.shape)
    first = jnp.maximum(jnp.maximum(position - window + 1, -start), 0)
    return [far, Ranges(jnp.minimum(first, end), end)]


def _of_segments(
    plan: Plan, operands: Operands, places: Places, segments: masks.SegmentIds
) -> tuple[Operands, list[Ranges]]:
    """The operands with the globals gathered, and what each query sees of them and of the keys."""
    position = places.query_offset + jnp.arange(plan.queries, dtype=jnp.int32)[None]
    beside = jnp.clip(position[0], 0, plan.keys - 1)
    ids = segments.kv[:, beside]
    real = (segments.q == ids) & (ids != masks.PADDING) & (position >= 0)
    starts = masks.run_starts(segments.kv)
    start = starts[:, beside]
    window = min(plan.rules.window, MOST)

    end = jnp.broadcast_to(jnp.clip(position + 1, 0, plan.keys), start.shape)
    first = jnp.minimum(jnp.maximum(start, position - window + 1), end)
    ranges = [Ranges(jnp.where(real, first, end), end)]
    if plan.globals and operands.far is not None:
        count = jnp.cumsum(_shown(plan.rules, segments.kv, starts), 1, dtype=jnp.int32)
        operands = operands._replace(far=_gathered(operands.far, count, plan.globals))
        num_before = jnp.pad(count, ((0, 0), (1, 0)))
        end = jnp.clip(position - window + 1, start, plan.keys)
        first, end = (jnp.take_along_axis(num_before, row, 1) for row in (start, end))
        ranges.insert(0, Ranges(first, jnp.where(real, end, first)))
    return operands, ranges


def _shown(rules: Rules, ids: Int[Array, "B S"], starts: Int[Array, "B S"]) -> Bool[Array, "B S"]:
    """Which keys are globals that somebody sees: their segment goes on for a window."""
    keys = ids.shape[1]
    window = min(rules.window, keys)
    last = jnp.broadcast_to(starts[:, -1:], (ids.shape[0], window))
    later = jnp.concatenate([starts[:, window:], last], 1)  # queries may follow the last key
    rank = jnp.arange(keys, dtype=jnp.int32)[None] - starts
    return (rank < rules.num_global) & (later == starts) & (ids != masks.PADDING)


def _gathered(far: Branch, count: Int[Array, "B S"], rows: int) -> Branch:
    """The branch with the rows that `count` counts; those left over repeat one, unseen."""
    ranks = jnp.arange(1, rows + 1, dtype=jnp.int32)
    rows_of = jax.vmap(lambda count: jnp.searchsorted(count, ranks))(count)
    rows_of = jnp.minimum(rows_of, count.shape[1] - 1)[:, :, None, None]
    return far._replace(
        key=jnp.take_along_axis(far.key, rows_of, 1),
        value=jnp.take_along_axis(far.value, rows_of, 1),
    )


def _scalars(plan: Plan, side: Side, ranges: Ranges) -> Int[Array, " scalars"]:
    """What `Packed` reads."""
    first, end = (x.reshape(-1, plan.query_blocks, plan.block_q) for x in ranges)
    nonempty = first < end
    low = jnp.where(nonempty, first, MOST).min(-1)
    high = jnp.where(nonempty, end, 0).max(-1) - 1
    # A query that sees nothing has first == end, so no block is clear to its own.
    of_queries = jnp.stack([low, high, first.max(-1), end.min(-1)], -1)

    i = jnp.arange(plan.query_blocks, dtype=jnp.int32)[None, :, None]
    row = jnp.arange(side.blocks, dtype=jnp.int32)[None, None] * side.block
    meets = (low[..., None] < row + side.block) & (high[..., None] >= row)
    low = jnp.where(meets, i, plan.query_blocks).min(1) * plan.block_q
    high = (jnp.where(meets, i, -1).max(1) + 1) * plan.block_q - 1
    of_keys = jnp.stack([low, high], -1)
    return jnp.concatenate([of_queries.reshape(-1), of_keys.reshape(-1)])
