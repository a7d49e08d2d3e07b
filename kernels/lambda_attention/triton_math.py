"""Positions in the Triton kernels of Λ-attention: which tiles are visited, who sees whom in them,
and how far away. No JAX here.

Queries stand beside key rows `at` .. `last`; `key_start` is the position of key row 0.
"""

# Triton is no dependency: where it is missing, this file is not imported.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl


@triton.jit
def walk(first, clear_first, clear_end, end, BLOCK: tl.constexpr, ALL_MASKED: tl.constexpr):
    """How to visit [first, end), of which [clear_first, clear_end) needs no mask.

    (masked tiles from `first` on, start of the clear tiles, end of the clear tiles = start of the
    remaining masked ones, number of masked tiles)
    """
    tiles = tl.cdiv(tl.maximum(end - first, 0), BLOCK)
    if ALL_MASKED:
        num_head = tiles
        clear = first + num_head * BLOCK
        tail = clear
    else:
        num_head = tl.minimum(tl.cdiv(tl.maximum(clear_first - first, 0), BLOCK), tiles)
        clear = first + num_head * BLOCK
        tail = clear + tl.maximum(clear_end - clear, 0) // BLOCK * BLOCK
    return num_head, clear, tail, num_head + tl.cdiv(tl.maximum(end - tail, 0), BLOCK)


@triton.jit
def near_walk(
    key_row, last, window, key_start, keys, starts, origin,
    BLOCK: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """(first key, *walk) of the window of queries that stand at key rows key_row..last."""
    first = tl.maximum(tl.maximum(key_row - window + 1, -key_start), 0)
    if SEGMENTS:
        beside = tl.minimum(tl.maximum(key_row, 0), keys - 1)
        first = tl.maximum(first, tl.load(starts + origin + beside))
    num_head, clear, tail, masked = walk(
        first, last - window + 1, tl.minimum(key_row + 1, keys), tl.minimum(last + 1, keys),
        BLOCK, SEGMENTS,
    )  # fmt: skip
    return first, num_head, clear, tail, masked


@triton.jit
def far_walk(
    key_row, last, window, key_start, num_global, far_rows, starts, origin, list_end,
    BLOCK: tl.constexpr, SEGMENTS: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    """(first row, *walk) of the globals of queries that stand at key rows key_row..last."""
    if SEGMENTS:
        # The globals of the segment that the first query is in, and then those of segments that
        # begin within the block: rows after the first query that the last one is w away from.
        first = tl.load(starts + origin + tl.minimum(tl.maximum(key_row, 0), far_rows - 1))
        end = tl.minimum(last - window + 1, far_rows)
        end_of_first = tl.minimum(first + num_global, end)
        num_head = tl.cdiv(tl.maximum(end_of_first - first, 0), BLOCK)
        clear = first + num_head * BLOCK
        tail = tl.maximum(clear, key_row + 1)
        clear = tail
        masked = num_head + tl.cdiv(tl.maximum(end - tail, 0), BLOCK)
    elif LISTS:
        first = key_row * 0
        num_head, clear, tail, masked = walk(first, first, first, tl.load(list_end), BLOCK, True)
    else:
        first = key_row * 0
        limit = tl.minimum(num_global, far_rows)
        beyond = key_start - window + 1
        num_head, clear, tail, masked = walk(
            first, first, tl.minimum(key_row + beyond, limit), tl.minimum(last + beyond, limit),
            BLOCK, False,
        )  # fmt: skip
    return first, num_head, clear, tail, masked


@triton.jit
def near_visible(
    key_row, column, window, keys, ids_q, ids_kv, origin, SEGMENTS: tl.constexpr
):  # fmt: skip
    """[queries, keys] of the window; `key_row` are key rows that the queries stand beside."""
    distance = key_row[:, None] - column[None, :]
    visible = (distance >= 0) & (distance < window) & (column < keys)[None, :]
    if SEGMENTS:
        ids = tl.load(ids_kv + origin + column, mask=column < keys, other=-1)
        visible &= (ids_q[:, None] == ids[None, :]) & (ids_q >= 0)[:, None]
    return visible


@triton.jit
def far_visible(
    key_row, column, standing, window, key_start, num_global, far_rows, ids_q, ids_kv, starts,
    origin, SEGMENTS: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    """[queries, rows] of the globals, which are `standing` at these positions."""
    inside = column < far_rows
    visible = key_row[:, None] + key_start - standing[None, :] >= window
    if SEGMENTS:
        ids = tl.load(ids_kv + origin + column, mask=inside, other=-1)
        rank = column - tl.load(starts + origin + column, mask=inside, other=0)
        visible &= (inside & (rank < num_global))[None, :]
        visible &= (ids_q[:, None] == ids[None, :]) & (ids_q >= 0)[:, None]
    elif LISTS:
        visible &= (standing >= 0)[None, :]
    else:
        visible &= (inside & (column < num_global))[None, :]
    return visible


@triton.jit
def own(places, queries, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, BLOCK_Q: tl.constexpr):
    """(batch row, head, its key head, first row, key_start, the key rows at which the first and the
    last row stand) of a program that owns queries."""
    program = tl.program_id(0)
    blocks = tl.cdiv(queries, BLOCK_Q)
    row = (blocks - 1 - program % blocks) * BLOCK_Q  # under causal attention, the longest first
    head = program // blocks % HEADS
    batch = program // (blocks * HEADS)
    key_head = head // (HEADS // KEY_HEADS)
    key_start = tl.load(places + 2 * batch)
    key_row = tl.load(places + 2 * batch + 1) + row
    last = key_row + tl.minimum(BLOCK_Q, queries - row) - 1
    return batch, head, key_head, row, key_start, key_row, last


@triton.jit
def list_of(batch, key_head, far_rows, LISTS: tl.constexpr):
    """(index of the key head's list of positions, of its first row)."""
    index = batch * 0
    if LISTS:
        index = batch * LISTS + key_head % LISTS
    return index, index.to(tl.int64) * far_rows


@triton.jit
def standing_at(listed, column, far_rows, LISTS: tl.constexpr):
    """Positions of rows of the globals."""
    if LISTS:
        column = tl.load(listed + column, mask=column < far_rows, other=-1)
    return column


@triton.jit
def placed_queries(
    ids_q, slopes, far_at, far_unit, batch, row, head, queries, rows, valid,
    HEADS: tl.constexpr, SEGMENTS: tl.constexpr, ALIBI: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """(segment ids, slope, where ALiBi says that they stand seen from the globals, its unit)."""
    segments, placed, slope, unit = rows, rows, 0.0, 1.0
    offset = batch.to(tl.int64) * queries + row + rows
    if SEGMENTS:
        segments = tl.load(ids_q + offset, mask=valid, other=-1)
    if ALIBI:
        slope = tl.load(slopes + batch * HEADS + head)
    if GIVEN:
        placed = tl.load(far_at + offset, mask=valid, other=0)
        unit = tl.load(far_unit + batch)
    return segments, slope, placed, unit


@triton.jit
def near_away(slope, key_row, column, ALIBI: tl.constexpr):
    """What ALiBi takes off scores [queries, keys] of the window."""
    if ALIBI:
        column = slope * (key_row[:, None] - column[None, :]).to(tl.float32)
    return column


@triton.jit
def far_away(
    slope, position, placed, column, standing, far_rows, far_from, unit, clip,
    ALIBI: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """What it takes off scores [queries, rows] of the globals."""
    away = column
    if ALIBI and GIVEN:
        origin = tl.load(far_from + column, mask=column < far_rows, other=0)
        away = slope * ((placed[:, None] - origin[None, :]).to(tl.float32) * unit)
    elif ALIBI:
        away = slope * tl.minimum(position[:, None] - standing[None, :], clip).to(tl.float32)
    return away
