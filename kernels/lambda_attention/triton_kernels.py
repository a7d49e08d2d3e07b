"""Triton kernels of Λ-attention: forward, gradients of queries, gradients of keys and values.

Arrays are contiguous: queries [B, T, N, H], keys [B, S, K, H], values [B, S, K, Hv], LSE and delta
[B, N, T]; `places` [B, 2] holds each row's (key_start, query_offset). There is no JAX here, so that
the same source runs under jax-triton, in the Triton interpreter and in `triton.compile`.

A program walks the tiles of the globals and those of its window. Each walk is a loop over tiles
that every pair of sees, without any mask, and one over the tiles on an edge. What happens to one
tile is in `common/triton_kernels`. With ALIBI, `slopes` [B, N] are in units of raw scores; with
GIVEN, the globals' distances are (far_at[row] - far_from[key]) * far_unit. With LISTS lists a batch
row, their positions are listed [B, LISTS, R], of which the first list_ends [B, LISTS] are walked.
"""

# Triton is no dependency: where it is missing, this file is not imported.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from lminf.kernels.common import triton_kernels as tiles
from lminf.kernels.common.triton_math import LOG2_E
from lminf.kernels.lambda_attention import triton_math as walks

# --- Forward --------------------------------------------------------------------------------------


@triton.jit
def forward(
    query, key, value, query_far, key_far, value_far, sinks, places, ids_q, ids_kv, starts, ends,
    slopes, far_at, far_from, far_unit, listed, list_ends,
    queries, keys, far_rows, window, num_global, clip,
    out, lse,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
    UNIT: tl.constexpr, INNER: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    FAR: tl.constexpr, SINKS: tl.constexpr, SEGMENTS: tl.constexpr,
    ALIBI: tl.constexpr, GIVEN: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    """Outputs [B, T, N, Hv] and LSE [B, N, T]; one program for each query head and BLOCK_Q rows."""
    batch, head, key_head, row, key_start, key_row, last = walks.own(
        places, queries, HEADS, KEY_HEADS, BLOCK_Q
    )
    rows = tl.arange(0, BLOCK_Q)
    slots = tl.arange(0, BLOCK_K)
    valid = rows < queries - row
    first_query = (batch.to(tl.int64) * queries + row) * HEADS + head
    key_origin = batch.to(tl.int64) * keys
    segments, slope, placed, unit = walks.placed_queries(
        ids_q, slopes, far_at, far_unit, batch, row, head, queries, rows, valid,
        HEADS, SEGMENTS, ALIBI, GIVEN,
    )  # fmt: skip
    position = key_row + rows + key_start

    top = tl.full((BLOCK_Q,), MASK * UNIT / 2, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    sums = tl.zeros((BLOCK_Q, BLOCK_V), tl.float32)

    if FAR:
        q = tiles.tile(
            query_far + first_query * WIDTH, rows, valid, HEADS * WIDTH, WIDTH, BLOCK_H, True
        )
        far_origin = batch.to(tl.int64) * far_rows
        index, list_origin = walks.list_of(batch, key_head, far_rows, LISTS)
        first, num_head, clear, tail, masked = walks.far_walk(
            key_row, last, window, key_start, num_global, far_rows, starts, key_origin,
            list_ends + index, BLOCK_K, SEGMENTS, LISTS,
        )  # fmt: skip
        for start in tl.range(clear, tail, BLOCK_K):
            at_row = (far_origin + start) * KEY_HEADS + key_head
            k, v = tiles.key_and_value(
                key_far, value_far, at_row, slots, slots,
                KEY_HEADS, WIDTH, VALUE_WIDTH, BLOCK_H, BLOCK_V, False,
            )  # fmt: skip
            column = start + slots
            away = walks.far_away(
                slope, position, placed, column, column, far_rows, far_from + far_origin,
                unit, clip, ALIBI, GIVEN,
            )  # fmt: skip
            top, total, sums = tiles.attend(
                q, k, v, slots, away, top, total, sums, UNIT, INNER, MASK, PRECISION, ALIBI, False
            )  # fmt: skip
        for t in tl.range(0, masked):
            start = tl.where(t < num_head, first + t * BLOCK_K, tail + (t - num_head) * BLOCK_K)
            at_row = (far_origin + start) * KEY_HEADS + key_head
            column = start + slots
            inside = column < far_rows
            k, v = tiles.key_and_value(
                key_far, value_far, at_row, slots, inside,
                KEY_HEADS, WIDTH, VALUE_WIDTH, BLOCK_H, BLOCK_V, True,
            )  # fmt: skip
            standing = walks.standing_at(listed + list_origin, column, far_rows, LISTS)
            visible = walks.far_visible(
                key_row + rows, column, standing, window, key_start, num_global, far_rows,
                segments, ids_kv, starts, key_origin, SEGMENTS, LISTS,
            )  # fmt: skip
            away = walks.far_away(
                slope, position, placed, column, standing, far_rows, far_from + far_origin,
                unit, clip, ALIBI, GIVEN,
            )  # fmt: skip
            top, total, sums = tiles.attend(
                q, k, v, visible, away, top, total, sums, UNIT, INNER, MASK, PRECISION, ALIBI, True
            )  # fmt: skip

    q = tiles.tile(query + first_query * WIDTH, rows, valid, HEADS * WIDTH, WIDTH, BLOCK_H, True)
    first, num_head, clear, tail, masked = walks.near_walk(
        key_row, last, window, key_start, keys, starts, key_origin, BLOCK_K, SEGMENTS
    )
    for start in tl.range(clear, tail, BLOCK_K):
        at_row = (key_origin + start) * KEY_HEADS + key_head
        k, v = tiles.key_and_value(
            key, value, at_row, slots, slots,
            KEY_HEADS, WIDTH, VALUE_WIDTH, BLOCK_H, BLOCK_V, False,
        )  # fmt: skip
        away = walks.near_away(slope, key_row + rows, start + slots, ALIBI)
        top, total, sums = tiles.attend(
            q, k, v, slots, away, top, total, sums, UNIT, INNER, MASK, PRECISION, ALIBI, False
        )  # fmt: skip
    for t in tl.range(0, masked):
        start = tl.where(t < num_head, first + t * BLOCK_K, tail + (t - num_head) * BLOCK_K)
        at_row = (key_origin + start) * KEY_HEADS + key_head
        column = start + slots
        inside = column < keys
        k, v = tiles.key_and_value(
            key, value, at_row, slots, inside,
            KEY_HEADS, WIDTH, VALUE_WIDTH, BLOCK_H, BLOCK_V, True,
        )  # fmt: skip
        visible = walks.near_visible(
            key_row + rows, column, window, keys, segments, ids_kv, key_origin, SEGMENTS
        )
        away = walks.near_away(slope, key_row + rows, column, ALIBI)
        top, total, sums = tiles.attend(
            q, k, v, visible, away, top, total, sums, UNIT, INNER, MASK, PRECISION, ALIBI, True
        )  # fmt: skip

    empty = total == 0
    if SINKS:
        sink = tl.load(sinks + batch * HEADS + head).to(tl.float32) * LOG2_E
        new_top = tl.maximum(top, sink)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.exp2(sink - new_top)
        sums = sums * shrink[:, None]
        top = new_top
    tiles.write(
        out, lse, empty, top, total, sums, batch, row, head, queries, rows, valid,
        HEADS, VALUE_WIDTH, BLOCK_V,
    )  # fmt: skip


# --- Gradient of the queries ----------------------------------------------------------------------


@triton.jit
def gradient_of_queries(
    query, key, value, query_far, key_far, value_far, d_out, lse2, delta,
    places, ids_q, ids_kv, starts, ends, slopes, far_at, far_from, far_unit, listed, list_ends,
    queries, keys, far_rows, window, num_global, clip,
    d_query, d_query_far,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr, INNER: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    FAR: tl.constexpr, SEGMENTS: tl.constexpr, ALIBI: tl.constexpr, GIVEN: tl.constexpr,
    LISTS: tl.constexpr,
):  # fmt: skip
    """Gradients [B, T, N, H] of both queries, by the walk of the forward."""
    batch, head, key_head, row, key_start, key_row, last = walks.own(
        places, queries, HEADS, KEY_HEADS, BLOCK_Q
    )
    rows = tl.arange(0, BLOCK_Q)
    slots = tl.arange(0, BLOCK_K)
    valid = rows < queries - row
    first_query = (batch.to(tl.int64) * queries + row) * HEADS + head
    key_origin = batch.to(tl.int64) * keys
    segments, slope, placed, unit = walks.placed_queries(
        ids_q, slopes, far_at, far_unit, batch, row, head, queries, rows, valid,
        HEADS, SEGMENTS, ALIBI, GIVEN,
    )  # fmt: skip
    position = key_row + rows + key_start

    _, do, lse2_rows, delta_rows = tiles.of_queries(
        query, d_out, lse2, delta, batch, row, head, queries, rows, valid,
        HEADS, WIDTH, VALUE_WIDTH, BLOCK_H, BLOCK_V, True,
    )  # fmt: skip

    if FAR:
        q = tiles.tile(
            query_far + first_query * WIDTH, rows, valid, HEADS * WIDTH, WIDTH, BLOCK_H, True
        )
        gradient = tl.zeros((BLOCK_Q, BLOCK_H), tl.float32)
        far_origin = batch.to(tl.int64) * far_rows
        index, list_origin = walks.list_of(batch, key_head, far_rows, LISTS)
        first, num_head, clear, tail, masked = walks.far_walk(
            key_row, last, window, key_start, num_global, far_rows, starts, key_origin,
            list_ends + index, BLOCK_K, SEGMENTS, LISTS,
        )  # fmt: skip
        for start in tl.range(clear, tail, BLOCK_K):
            at_row = (far_origin + start) * KEY_HEADS + key_head
            k, v = tiles.key_and_value(
                key_far, value_far, at_row, slots, slots,
                KEY_HEADS, WIDTH, VALUE_WIDTH, BLOCK_H, BLOCK_V, False,
            )  # fmt: skip
            column = start + slots
            away = walks.far_away(
                slope, position, placed, column, column, far_rows, far_from + far_origin,
                unit, clip, ALIBI, GIVEN,
            )  # fmt: skip
            gradient = tiles.query_gradient(
                q, k, v, do, lse2_rows, delta_rows, slots, away, gradient,
                UNIT, INNER, MASK, PRECISION, ALIBI, False,
            )  # fmt: skip
        for t in tl.range(0, masked):
            start = tl.where(t < num_head, first + t * BLOCK_K, tail + (t - num_head) * BLOCK_K)
            at_row = (far_origin + start) * KEY_HEADS + key_head
            column = start + slots
            inside = column < far_rows
            k, v = tiles.key_and_value(
                key_far, value_far, at_row, slots, inside,
                KEY_HEADS, WIDTH, VALUE_WIDTH, BLOCK_H, BLOCK_V, True,
            )  # fmt: skip
            standing = walks.standing_at(listed + list_origin, column, far_rows, LISTS)
            visible = walks.far_visible(
                key_row + rows, column, standing, window, key_start, num_global, far_rows,
                segments, ids_kv, starts, key_origin, SEGMENTS, LISTS,
            )  # fmt: skip
            away = walks.far_away(
                slope, position, placed, column, standing, far_rows, far_from + far_origin,
                unit, clip, ALIBI, GIVEN,
            )  # fmt: skip
            gradient = tiles.query_gradient(
                q, k, v, do, lse2_rows, delta_rows, visible, away, gradient,
                UNIT, INNER, MASK, PRECISION, ALIBI, True,
            )  # fmt: skip
        tiles.store(
            d_query_far + first_query * WIDTH, rows, valid, gradient * SCALE,
            HEADS * WIDTH, WIDTH, BLOCK_H,
        )  # fmt: skip

    q = tiles.tile(query + first_query * WIDTH, rows, valid, HEADS * WIDTH, WIDTH, BLOCK_H, True)
    gradient = tl.zeros((BLOCK_Q, BLOCK_H), tl.float32)
    first, num_head, clear, tail, masked = walks.near_walk(
        key_row, last, window, key_start, keys, starts, key_origin, BLOCK_K, SEGMENTS
    )
    for start in tl.range(clear, tail, BLOCK_K):
        at_row = (key_origin + start) * KEY_HEADS + key_head
        k, v = tiles.key_and_value(
            key, value, at_row, slots, slots,
            KEY_HEADS, WIDTH, VALUE_WIDTH, BLOCK_H, BLOCK_V, False,
        )  # fmt: skip
        away = walks.near_away(slope, key_row + rows, start + slots, ALIBI)
        gradient = tiles.query_gradient(
            q, k, v, do, lse2_rows, delta_rows, slots, away, gradient,
            UNIT, INNER, MASK, PRECISION, ALIBI, False,
        )  # fmt: skip
    for t in tl.range(0, masked):
        start = tl.where(t < num_head, first + t * BLOCK_K, tail + (t - num_head) * BLOCK_K)
        at_row = (key_origin + start) * KEY_HEADS + key_head
        column = start + slots
        inside = column < keys
        k, v = tiles.key_and_value(
            key, value, at_row, slots, inside,
            KEY_HEADS, WIDTH, VALUE_WIDTH, BLOCK_H, BLOCK_V, True,
        )  # fmt: skip
        visible = walks.near_visible(
            key_row + rows, column, window, keys, segments, ids_kv, key_origin, SEGMENTS
        )
        away = walks.near_away(slope, key_row + rows, column, ALIBI)
        gradient = tiles.query_gradient(
            q, k, v, do, lse2_rows, delta_rows, visible, away, gradient,
            UNIT, INNER, MASK, PRECISION, ALIBI, True,
        )  # fmt: skip
    tiles.store(
        d_query + first_query * WIDTH, rows, valid, gradient * SCALE,
        HEADS * WIDTH, WIDTH, BLOCK_H,
    )  # fmt: skip


# --- Gradients of keys and values -----------------------------------------------------------------


@triton.jit
def _away_from_keys(
    slopes, head, key_row, column, standing, key_start, far_at, valid, far_from, key_origin, keys,
    far_unit, clip,
    FAR: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """What ALiBi takes off scores [keys, queries]; `far_at` points to what the queries have."""
    slope = tl.load(slopes + head)
    if FAR:
        placed = key_row
        unit = 1.0
        if GIVEN:
            placed = tl.load(far_at, mask=valid, other=0)
            unit = tl.load(far_unit)
        away = walks.far_away(
            slope, key_row + key_start, placed, column, standing, keys, far_from + key_origin,
            unit, clip, True, GIVEN,
        )  # fmt: skip
    else:
        away = walks.near_away(slope, key_row, column, True)
    return tl.trans(away)


@triton.jit
def gradient_of_keys(
    query, key, value, d_out, lse2, delta, places, ids_q, ids_kv, starts, ends,
    slopes, far_at, far_from, far_unit, listed, list_ends,
    batches, queries, keys, window, num_global, clip, chunks,
    d_key, d_value,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr, INNER: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    FAR: tl.constexpr, SEGMENTS: tl.constexpr, ALIBI: tl.constexpr, GIVEN: tl.constexpr,
    LISTS: tl.constexpr,
):  # fmt: skip
    """Gradients [chunks, B, S, K, ...] of one branch's keys and values, a part for each chunk of
    queries; with FAR the branch is that of the globals, and `keys` counts its rows.

    One program for each key head, BLOCK_K keys and chunk; it owns what it writes.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(keys, BLOCK_K)
    start = program % blocks * BLOCK_K
    chunk = program // blocks % chunks
    key_head = program // (blocks * chunks) % KEY_HEADS
    batch = program // (blocks * chunks * KEY_HEADS)
    key_start = tl.load(places + 2 * batch)
    offset = tl.load(places + 2 * batch + 1)
    group = HEADS // KEY_HEADS

    slots = tl.arange(0, BLOCK_K)
    rows = tl.arange(0, BLOCK_Q)
    column = start + slots
    inside = column < keys
    last = tl.minimum(start + BLOCK_K, keys) - 1
    key_origin = batch.to(tl.int64) * keys
    at_key = (key_origin + start) * KEY_HEADS + key_head
    ids = column
    if SEGMENTS:
        ids = tl.load(ids_kv + key_origin + column, mask=inside, other=-1)

    standing = column
    # Which queries see some of these keys, and which see all of them.
    if FAR:
        beyond = window - offset - key_start
        first = start + beyond
        clear_first = start + BLOCK_K - 1 + beyond
        end = first * 0 + queries
        clear_end = end
        seen = inside & (column < num_global)
        if SEGMENTS:
            rank = column - tl.load(starts + key_origin + column, mask=inside, other=0)
            seen = inside & (rank < num_global)
            run_end = tl.load(ends + key_origin + column, mask=inside, other=0)
            end = tl.max(tl.where(seen, run_end, 0), 0) - offset
        if LISTS:
            _, list_origin = walks.list_of(batch, key_head, keys, LISTS)
            standing = walks.standing_at(listed + list_origin, column, keys, LISTS)
            seen = standing >= 0
            first = tl.min(tl.where(seen, standing + beyond, end), 0)
            clear_first = end  # all tiles are masked
    else:
        first = start - offset
        clear_first = start + BLOCK_K - 1 - offset
        end = last + window - offset
        clear_end = start + window - offset
        seen = inside & (column >= -key_start)
        if SEGMENTS:
            end = tl.minimum(end, tl.load(ends + key_origin + last) - offset)
    part = tl.cdiv(queries, chunks)
    first = tl.maximum(first, chunk * part)
    end = tl.minimum(end, tl.minimum((chunk + 1) * part, queries))
    num_head, clear, tail, masked = walks.walk(
        first, clear_first, tl.minimum(clear_end, end), end, BLOCK_Q, SEGMENTS
    )

    k, v = tiles.key_and_value(
        key, value, at_key, slots, inside, KEY_HEADS, WIDTH, VALUE_WIDTH, BLOCK_H, BLOCK_V, True
    )
    d_k = tl.zeros((BLOCK_K, BLOCK_H), tl.float32)
    d_v = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    # All query heads of the key head in one loop: nested ones would start their pipeline anew for
    # each head, and keep twice the addresses in registers.
    query_origin = batch.to(tl.int64) * queries
    clear_tiles = (tail - clear) // BLOCK_Q
    for turn in tl.range(0, group * clear_tiles):
        head = key_head * group + turn // clear_tiles
        row = clear + turn % clear_tiles * BLOCK_Q
        q, do, lse2_rows, delta_rows = tiles.of_queries(
            query, d_out, lse2, delta, batch, row, head, queries, rows, rows,
            HEADS, WIDTH, VALUE_WIDTH, BLOCK_H, BLOCK_V, False,
        )  # fmt: skip
        away = slots
        if ALIBI:
            away = _away_from_keys(
                slopes, batch * HEADS + head, offset + row + rows, column, standing, key_start,
                far_at + query_origin + row + rows, row + rows < end, far_from, key_origin, keys,
                far_unit + batch, clip, FAR, GIVEN,
            )  # fmt: skip
        d_k, d_v = tiles.key_gradients(
            q, k, v, do, lse2_rows, delta_rows, rows, away, d_k, d_v,
            UNIT, INNER, MASK, PRECISION, ALIBI, False,
        )  # fmt: skip
    for turn in tl.range(0, group * masked):
        head = key_head * group + turn // masked
        t = turn % masked
        row = tl.where(t < num_head, first + t * BLOCK_Q, tail + (t - num_head) * BLOCK_Q)
        valid = row + rows < end
        q, do, lse2_rows, delta_rows = tiles.of_queries(
            query, d_out, lse2, delta, batch, row, head, queries, rows, valid,
            HEADS, WIDTH, VALUE_WIDTH, BLOCK_H, BLOCK_V, True,
        )  # fmt: skip
        away = slots
        if ALIBI:
            away = _away_from_keys(
                slopes, batch * HEADS + head, offset + row + rows, column, standing, key_start,
                far_at + query_origin + row + rows, valid, far_from, key_origin, keys,
                far_unit + batch, clip, FAR, GIVEN,
            )  # fmt: skip
        distance = (offset + row + rows)[None, :] - standing[:, None]
        if FAR:
            visible = distance + key_start >= window
        else:
            visible = (distance >= 0) & (distance < window)
        visible &= valid[None, :]
        if SEGMENTS:
            ids_rows = tl.load(ids_q + query_origin + row + rows, mask=valid, other=-1)
            visible &= (ids_rows[None, :] == ids[:, None]) & (ids_rows >= 0)[None, :]
        d_k, d_v = tiles.key_gradients(
            q, k, v, do, lse2_rows, delta_rows, visible, away, d_k, d_v,
            UNIT, INNER, MASK, PRECISION, ALIBI, True,
        )  # fmt: skip

    # Keys that nobody may see were scored with the others; what they gathered is dropped here.
    d_k = tl.where(seen[:, None], d_k * SCALE, 0.0)
    d_v = tl.where(seen[:, None], d_v, 0.0)
    to = ((chunk.to(tl.int64) * batches + batch) * keys + start) * KEY_HEADS + key_head
    tiles.store(d_key + to * WIDTH, slots, inside, d_k, KEY_HEADS * WIDTH, WIDTH, BLOCK_H)
    tiles.store(
        d_value + to * VALUE_WIDTH, slots, inside, d_v,
        KEY_HEADS * VALUE_WIDTH, VALUE_WIDTH, BLOCK_V,
    )  # fmt: skip
