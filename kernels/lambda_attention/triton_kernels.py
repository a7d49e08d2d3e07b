"""Triton kernels of Λ-attention: forward, gradients of queries, gradients of keys and values.

Arrays are contiguous: queries [B, T, N, H], keys [B, S, K, H], values [B, S, K, Hv], LSE and delta
[B, N, T]; `places` [B, 2] holds each row's (key_start, query_offset). There is no JAX here, so that
the same source runs under jax-triton, in the Triton interpreter and in `triton.compile`.

A program walks the tiles of the globals and those of its window. Each walk is a loop over tiles
that every pair of sees, without any mask, and one over the tiles on an edge. Exponents are powers
of two: s = raw * UNIT with raw = <q, k>, or tanh(<q, k> * INNER) under a soft cap; the product with
UNIT and the subtraction of the maximum are one fused multiply-add, which costs no more than scaling
q beforehand and does not round it.
"""

# Triton is no dependency: where it is missing, this file is not imported.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from kernels.common.triton_math import LOG2_E, tanh

# --- Pieces ---------------------------------------------------------------------------------------


@triton.jit
def _tile(
    base, rows, valid,
    STRIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """Rows of a matrix, columns padded to BLOCK with zeros; with GUARD, invalid rows are zeros."""
    column = tl.arange(0, BLOCK)
    at = base + rows[:, None] * STRIDE + column[None, :]
    if GUARD and BLOCK != WIDTH:
        tile = tl.load(at, mask=valid[:, None] & (column < WIDTH)[None, :], other=0.0)
    elif GUARD:
        tile = tl.load(at, mask=valid[:, None], other=0.0)
    elif BLOCK != WIDTH:
        tile = tl.load(at, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _store(
    base, rows, valid, tile, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    at = base + rows[:, None] * STRIDE + column[None, :]
    mask = valid[:, None]
    if BLOCK != WIDTH:
        mask = mask & (column < WIDTH)[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _raw_scores(a, b, INNER: tl.constexpr, PRECISION: tl.constexpr):
    """[rows of a, rows of b] scores in units of UNIT."""
    raw = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if INNER is not None:
        raw = tanh(raw * INNER)
    return raw


@triton.jit
def _walk(first, clear_first, clear_end, end, BLOCK: tl.constexpr, ALL_MASKED: tl.constexpr):
    """How to visit [first, end), of which [clear_first, clear_end) needs no mask.

    (masked tiles from `first` on, start of the clear tiles, end of the clear tiles = start of the
    remaining masked ones, number of masked tiles)
    """
    whole = tl.cdiv(tl.maximum(end - first, 0), BLOCK)
    if ALL_MASKED:
        before = whole
        clear = first + before * BLOCK
        after = clear
    else:
        before = tl.minimum(tl.cdiv(tl.maximum(clear_first - first, 0), BLOCK), whole)
        clear = first + before * BLOCK
        after = clear + tl.maximum(clear_end - clear, 0) // BLOCK * BLOCK
    return before, clear, after, before + tl.cdiv(tl.maximum(end - after, 0), BLOCK)


@triton.jit
def _near_walk(
    at, last, window, key_start, keys, starts, origin, BLOCK: tl.constexpr, SEGMENTS: tl.constexpr
):  # fmt: skip
    """(first key, *_walk) of the window of queries that stand at key rows at..last."""
    first = tl.maximum(tl.maximum(at - window + 1, -key_start), 0)
    if SEGMENTS:
        beside = tl.minimum(tl.maximum(at, 0), keys - 1)
        first = tl.maximum(first, tl.load(starts + origin + beside))
    before, clear, after, masked = _walk(
        first, last - window + 1, tl.minimum(at + 1, keys), tl.minimum(last + 1, keys),
        BLOCK, SEGMENTS,
    )  # fmt: skip
    return first, before, clear, after, masked


@triton.jit
def _far_walk(
    at, last, window, key_start, num_global, far_rows, starts, origin,
    BLOCK: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """(first row, *_walk) of the globals of queries that stand at key rows at..last."""
    if SEGMENTS:
        # The globals of the segment that the first query is in, and then those of segments that
        # begin within the block: rows after the first query that the last one is w away from.
        first = tl.load(starts + origin + tl.minimum(tl.maximum(at, 0), far_rows - 1))
        end = tl.minimum(last - window + 1, far_rows)
        own = tl.minimum(first + num_global, end)
        before = tl.cdiv(tl.maximum(own - first, 0), BLOCK)
        clear = first + before * BLOCK
        after = tl.maximum(clear, at + 1)
        clear = after
        masked = before + tl.cdiv(tl.maximum(end - after, 0), BLOCK)
    else:
        first = at * 0
        limit = tl.minimum(num_global, far_rows)
        beyond = key_start - window + 1
        before, clear, after, masked = _walk(
            first, first, tl.minimum(at + beyond, limit), tl.minimum(last + beyond, limit),
            BLOCK, False,
        )  # fmt: skip
    return first, before, clear, after, masked


@triton.jit
def _near_visible(
    at, column, window, keys, ids_q, ids_kv, origin, SEGMENTS: tl.constexpr
):  # fmt: skip
    """[queries, keys] of the window; `at` are key rows that the queries stand beside."""
    distance = at[:, None] - column[None, :]
    visible = (distance >= 0) & (distance < window) & (column < keys)[None, :]
    if SEGMENTS:
        ids = tl.load(ids_kv + origin + column, mask=column < keys, other=-1)
        visible &= (ids_q[:, None] == ids[None, :]) & (ids_q >= 0)[:, None]
    return visible


@triton.jit
def _far_visible(
    at, column, window, key_start, num_global, far_rows, ids_q, ids_kv, starts, origin,
    SEGMENTS: tl.constexpr,
):  # fmt: skip
    """[queries, rows] of the globals."""
    inside = column < far_rows
    visible = at[:, None] + key_start - column[None, :] >= window
    if SEGMENTS:
        ids = tl.load(ids_kv + origin + column, mask=inside, other=-1)
        rank = column - tl.load(starts + origin + column, mask=inside, other=0)
        visible &= (inside & (rank < num_global))[None, :]
        visible &= (ids_q[:, None] == ids[None, :]) & (ids_q >= 0)[:, None]
    else:
        visible &= (inside & (column < num_global))[None, :]
    return visible


# --- Forward --------------------------------------------------------------------------------------


@triton.jit
def _attend(
    query, key, value, visible, top, total, out,
    UNIT: tl.constexpr, INNER: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """(top, total, out) after one tile of keys."""
    raw = _raw_scores(query, key, INNER, PRECISION)
    if MASKED:
        raw = tl.where(visible, raw, MASK)
    new_top = tl.maximum(top, tl.max(raw, 1) * UNIT)
    weights = tl.exp2(raw * UNIT - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    out = out * shrink[:, None]
    out = tl.dot(weights.to(value.dtype), value, out, input_precision=PRECISION)
    return new_top, total, out


@triton.jit
def forward(
    query, key, value, query_far, key_far, value_far, sinks, places, ids_q, ids_kv, starts,
    queries, keys, far_rows, window, num_global,
    out, lse,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
    UNIT: tl.constexpr, INNER: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    FAR: tl.constexpr, SINKS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Outputs [B, T, N, Hv] and LSE [B, N, T]; one program for each query head and BLOCK_Q rows."""
    program = tl.program_id(0)
    blocks = tl.cdiv(queries, BLOCK_Q)
    row = (blocks - 1 - program % blocks) * BLOCK_Q  # under causal attention, the longest first
    head = program // blocks % HEADS
    batch = program // (blocks * HEADS)
    key_head = head // (HEADS // KEY_HEADS)
    key_start = tl.load(places + 2 * batch)
    at = tl.load(places + 2 * batch + 1) + row
    last = at + tl.minimum(BLOCK_Q, queries - row) - 1

    rows = tl.arange(0, BLOCK_Q)
    slots = tl.arange(0, BLOCK_K)
    valid = rows < queries - row
    first_query = (batch.to(tl.int64) * queries + row) * HEADS + head
    key_origin = batch.to(tl.int64) * keys
    segments = valid
    if SEGMENTS:
        segments = tl.load(ids_q + batch.to(tl.int64) * queries + row + rows, mask=valid, other=-1)

    top = tl.full((BLOCK_Q,), MASK * UNIT / 2, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    sums = tl.zeros((BLOCK_Q, BLOCK_V), tl.float32)

    if FAR:
        q = _tile(query_far + first_query * WIDTH, rows, valid, HEADS * WIDTH, WIDTH, BLOCK_H, True)
        far_origin = batch.to(tl.int64) * far_rows
        first, before, clear, after, masked = _far_walk(
            at, last, window, key_start, num_global, far_rows, starts, key_origin,
            BLOCK_K, SEGMENTS,
        )  # fmt: skip
        for start in tl.range(clear, after, BLOCK_K):
            at_row = (far_origin + start) * KEY_HEADS + key_head
            k = _tile(
                key_far + at_row * WIDTH, slots, slots, KEY_HEADS * WIDTH, WIDTH, BLOCK_H, False
            )
            v = _tile(
                value_far + at_row * VALUE_WIDTH, slots, slots,
                KEY_HEADS * VALUE_WIDTH, VALUE_WIDTH, BLOCK_V, False,
            )  # fmt: skip
            top, total, sums = _attend(
                q, k, v, slots, top, total, sums, UNIT, INNER, MASK, PRECISION, False
            )
        for t in tl.range(0, masked):
            start = tl.where(t < before, first + t * BLOCK_K, after + (t - before) * BLOCK_K)
            at_row = (far_origin + start) * KEY_HEADS + key_head
            column = start + slots
            inside = column < far_rows
            k = _tile(
                key_far + at_row * WIDTH, slots, inside, KEY_HEADS * WIDTH, WIDTH, BLOCK_H, True
            )
            v = _tile(
                value_far + at_row * VALUE_WIDTH, slots, inside,
                KEY_HEADS * VALUE_WIDTH, VALUE_WIDTH, BLOCK_V, True,
            )  # fmt: skip
            visible = _far_visible(
                at + rows, column, window, key_start, num_global, far_rows,
                segments, ids_kv, starts, key_origin, SEGMENTS,
            )  # fmt: skip
            top, total, sums = _attend(
                q, k, v, visible, top, total, sums, UNIT, INNER, MASK, PRECISION, True
            )

    q = _tile(query + first_query * WIDTH, rows, valid, HEADS * WIDTH, WIDTH, BLOCK_H, True)
    first, before, clear, after, masked = _near_walk(
        at, last, window, key_start, keys, starts, key_origin, BLOCK_K, SEGMENTS
    )
    for start in tl.range(clear, after, BLOCK_K):
        at_row = (key_origin + start) * KEY_HEADS + key_head
        k = _tile(key + at_row * WIDTH, slots, slots, KEY_HEADS * WIDTH, WIDTH, BLOCK_H, False)
        v = _tile(
            value + at_row * VALUE_WIDTH, slots, slots,
            KEY_HEADS * VALUE_WIDTH, VALUE_WIDTH, BLOCK_V, False,
        )  # fmt: skip
        top, total, sums = _attend(
            q, k, v, slots, top, total, sums, UNIT, INNER, MASK, PRECISION, False
        )
    for t in tl.range(0, masked):
        start = tl.where(t < before, first + t * BLOCK_K, after + (t - before) * BLOCK_K)
        at_row = (key_origin + start) * KEY_HEADS + key_head
        column = start + slots
        inside = column < keys
        k = _tile(key + at_row * WIDTH, slots, inside, KEY_HEADS * WIDTH, WIDTH, BLOCK_H, True)
        v = _tile(
            value + at_row * VALUE_WIDTH, slots, inside,
            KEY_HEADS * VALUE_WIDTH, VALUE_WIDTH, BLOCK_V, True,
        )  # fmt: skip
        visible = _near_visible(
            at + rows, column, window, keys, segments, ids_kv, key_origin, SEGMENTS
        )
        top, total, sums = _attend(
            q, k, v, visible, top, total, sums, UNIT, INNER, MASK, PRECISION, True
        )

    empty = total == 0
    if SINKS:
        sink = tl.load(sinks + batch * HEADS + head).to(tl.float32) * LOG2_E
        new_top = tl.maximum(top, sink)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.exp2(sink - new_top)
        sums = sums * shrink[:, None]
        top = new_top
    total = tl.where(empty, 1.0, total)
    sums = tl.where(empty[:, None], 0.0, sums / total[:, None])
    lse_rows = tl.where(empty, float("-inf"), (top + tl.log2(total)) / LOG2_E)
    _store(
        out + first_query * VALUE_WIDTH, rows, valid, sums,
        HEADS * VALUE_WIDTH, VALUE_WIDTH, BLOCK_V,
    )  # fmt: skip
    at_lse = (batch.to(tl.int64) * HEADS + head) * queries + row + rows
    tl.store(lse + at_lse, lse_rows, mask=valid)


# --- Gradient of the queries ----------------------------------------------------------------------


@triton.jit
def _query_gradient(
    query, key, value, d_out, lse2, delta, visible, d_query,
    UNIT: tl.constexpr, INNER: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    raw = _raw_scores(query, key, INNER, PRECISION)
    if MASKED:
        exponent = tl.where(visible, raw, MASK) * UNIT
    else:
        exponent = raw * UNIT
    weights = tl.exp2(exponent - lse2[:, None])
    d_weights = tl.dot(d_out, tl.trans(value), input_precision=PRECISION)
    d_logits = weights * (d_weights - delta[:, None])
    if INNER is not None:
        d_logits = d_logits * (1 - raw * raw)
    return tl.dot(d_logits.to(key.dtype), key, d_query, input_precision=PRECISION)


@triton.jit
def gradient_of_queries(
    query, key, value, query_far, key_far, value_far, d_out, lse2, delta,
    places, ids_q, ids_kv, starts,
    queries, keys, far_rows, window, num_global,
    d_query, d_query_far,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr, INNER: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    FAR: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Gradients [B, T, N, H] of both queries, by the walk of the forward."""
    program = tl.program_id(0)
    blocks = tl.cdiv(queries, BLOCK_Q)
    row = (blocks - 1 - program % blocks) * BLOCK_Q
    head = program // blocks % HEADS
    batch = program // (blocks * HEADS)
    key_head = head // (HEADS // KEY_HEADS)
    key_start = tl.load(places + 2 * batch)
    at = tl.load(places + 2 * batch + 1) + row
    last = at + tl.minimum(BLOCK_Q, queries - row) - 1

    rows = tl.arange(0, BLOCK_Q)
    slots = tl.arange(0, BLOCK_K)
    valid = rows < queries - row
    first_query = (batch.to(tl.int64) * queries + row) * HEADS + head
    key_origin = batch.to(tl.int64) * keys
    segments = valid
    if SEGMENTS:
        segments = tl.load(ids_q + batch.to(tl.int64) * queries + row + rows, mask=valid, other=-1)

    at_lse = (batch.to(tl.int64) * HEADS + head) * queries + row + rows
    # Rows past the end weigh nothing.
    lse2_rows = tl.load(lse2 + at_lse, mask=valid, other=1e38)
    delta_rows = tl.load(delta + at_lse, mask=valid, other=0.0)
    do = _tile(
        d_out + first_query * VALUE_WIDTH, rows, valid,
        HEADS * VALUE_WIDTH, VALUE_WIDTH, BLOCK_V, True,
    )  # fmt: skip

    if FAR:
        q = _tile(query_far + first_query * WIDTH, rows, valid, HEADS * WIDTH, WIDTH, BLOCK_H, True)
        gradient = tl.zeros((BLOCK_Q, BLOCK_H), tl.float32)
        far_origin = batch.to(tl.int64) * far_rows
        first, before, clear, after, masked = _far_walk(
            at, last, window, key_start, num_global, far_rows, starts, key_origin,
            BLOCK_K, SEGMENTS,
        )  # fmt: skip
        for start in tl.range(clear, after, BLOCK_K):
            at_row = (far_origin + start) * KEY_HEADS + key_head
            k = _tile(
                key_far + at_row * WIDTH, slots, slots, KEY_HEADS * WIDTH, WIDTH, BLOCK_H, False
            )
            v = _tile(
                value_far + at_row * VALUE_WIDTH, slots, slots,
                KEY_HEADS * VALUE_WIDTH, VALUE_WIDTH, BLOCK_V, False,
            )  # fmt: skip
            gradient = _query_gradient(
                q, k, v, do, lse2_rows, delta_rows, slots, gradient,
                UNIT, INNER, MASK, PRECISION, False,
            )  # fmt: skip
        for t in tl.range(0, masked):
            start = tl.where(t < before, first + t * BLOCK_K, after + (t - before) * BLOCK_K)
            at_row = (far_origin + start) * KEY_HEADS + key_head
            column = start + slots
            inside = column < far_rows
            k = _tile(
                key_far + at_row * WIDTH, slots, inside, KEY_HEADS * WIDTH, WIDTH, BLOCK_H, True
            )
            v = _tile(
                value_far + at_row * VALUE_WIDTH, slots, inside,
                KEY_HEADS * VALUE_WIDTH, VALUE_WIDTH, BLOCK_V, True,
            )  # fmt: skip
            visible = _far_visible(
                at + rows, column, window, key_start, num_global, far_rows,
                segments, ids_kv, starts, key_origin, SEGMENTS,
            )  # fmt: skip
            gradient = _query_gradient(
                q, k, v, do, lse2_rows, delta_rows, visible, gradient,
                UNIT, INNER, MASK, PRECISION, True,
            )  # fmt: skip
        _store(
            d_query_far + first_query * WIDTH, rows, valid, gradient * SCALE,
            HEADS * WIDTH, WIDTH, BLOCK_H,
        )  # fmt: skip

    q = _tile(query + first_query * WIDTH, rows, valid, HEADS * WIDTH, WIDTH, BLOCK_H, True)
    gradient = tl.zeros((BLOCK_Q, BLOCK_H), tl.float32)
    first, before, clear, after, masked = _near_walk(
        at, last, window, key_start, keys, starts, key_origin, BLOCK_K, SEGMENTS
    )
    for start in tl.range(clear, after, BLOCK_K):
        at_row = (key_origin + start) * KEY_HEADS + key_head
        k = _tile(key + at_row * WIDTH, slots, slots, KEY_HEADS * WIDTH, WIDTH, BLOCK_H, False)
        v = _tile(
            value + at_row * VALUE_WIDTH, slots, slots,
            KEY_HEADS * VALUE_WIDTH, VALUE_WIDTH, BLOCK_V, False,
        )  # fmt: skip
        gradient = _query_gradient(
            q, k, v, do, lse2_rows, delta_rows, slots, gradient,
            UNIT, INNER, MASK, PRECISION, False,
        )  # fmt: skip
    for t in tl.range(0, masked):
        start = tl.where(t < before, first + t * BLOCK_K, after + (t - before) * BLOCK_K)
        at_row = (key_origin + start) * KEY_HEADS + key_head
        column = start + slots
        inside = column < keys
        k = _tile(key + at_row * WIDTH, slots, inside, KEY_HEADS * WIDTH, WIDTH, BLOCK_H, True)
        v = _tile(
            value + at_row * VALUE_WIDTH, slots, inside,
            KEY_HEADS * VALUE_WIDTH, VALUE_WIDTH, BLOCK_V, True,
        )  # fmt: skip
        visible = _near_visible(
            at + rows, column, window, keys, segments, ids_kv, key_origin, SEGMENTS
        )
        gradient = _query_gradient(
            q, k, v, do, lse2_rows, delta_rows, visible, gradient,
            UNIT, INNER, MASK, PRECISION, True,
        )  # fmt: skip
    _store(
        d_query + first_query * WIDTH, rows, valid, gradient * SCALE,
        HEADS * WIDTH, WIDTH, BLOCK_H,
    )  # fmt: skip


# --- Gradients of keys and values -----------------------------------------------------------------


@triton.jit
def _key_gradients(
    query, key, value, d_out, lse2, delta, visible, d_key, d_value,
    UNIT: tl.constexpr, INNER: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """(d_key, d_value) after one tile of queries; scores are [keys, queries] here."""
    raw = _raw_scores(key, query, INNER, PRECISION)
    if MASKED:
        exponent = tl.where(visible, raw, MASK) * UNIT
    else:
        exponent = raw * UNIT
    weights = tl.exp2(exponent - lse2[None, :])
    d_value = tl.dot(weights.to(d_out.dtype), d_out, d_value, input_precision=PRECISION)
    d_weights = tl.dot(value, tl.trans(d_out), input_precision=PRECISION)
    d_logits = weights * (d_weights - delta[None, :])
    if INNER is not None:
        d_logits = d_logits * (1 - raw * raw)
    d_key = tl.dot(d_logits.to(query.dtype), query, d_key, input_precision=PRECISION)
    return d_key, d_value


@triton.jit
def gradient_of_keys(
    query, key, value, d_out, lse2, delta, places, ids_q, ids_kv, starts, ends,
    batches, queries, keys, window, num_global, chunks,
    d_key, d_value,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr, INNER: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    FAR: tl.constexpr, SEGMENTS: tl.constexpr,
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
    before, clear, after, masked = _walk(
        first, clear_first, tl.minimum(clear_end, end), end, BLOCK_Q, SEGMENTS
    )

    k = _tile(key + at_key * WIDTH, slots, inside, KEY_HEADS * WIDTH, WIDTH, BLOCK_H, True)
    v = _tile(
        value + at_key * VALUE_WIDTH, slots, inside,
        KEY_HEADS * VALUE_WIDTH, VALUE_WIDTH, BLOCK_V, True,
    )  # fmt: skip
    d_k = tl.zeros((BLOCK_K, BLOCK_H), tl.float32)
    d_v = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    # All query heads of the key head in one loop: nested ones would start their pipeline anew for
    # each head, and keep twice the addresses in registers.
    query_origin = batch.to(tl.int64) * queries
    clear_tiles = (after - clear) // BLOCK_Q
    for turn in tl.range(0, group * clear_tiles):
        head = key_head * group + turn // clear_tiles
        row = clear + turn % clear_tiles * BLOCK_Q
        at_row = (query_origin + row) * HEADS + head
        q = _tile(query + at_row * WIDTH, rows, rows, HEADS * WIDTH, WIDTH, BLOCK_H, False)
        do = _tile(
            d_out + at_row * VALUE_WIDTH, rows, rows,
            HEADS * VALUE_WIDTH, VALUE_WIDTH, BLOCK_V, False,
        )  # fmt: skip
        statistics = (batch.to(tl.int64) * HEADS + head) * queries + row
        lse2_rows = tl.load(lse2 + statistics + rows)
        delta_rows = tl.load(delta + statistics + rows)
        d_k, d_v = _key_gradients(
            q, k, v, do, lse2_rows, delta_rows, rows, d_k, d_v,
            UNIT, INNER, MASK, PRECISION, False,
        )  # fmt: skip
    for turn in tl.range(0, group * masked):
        head = key_head * group + turn // masked
        t = turn % masked
        row = tl.where(t < before, first + t * BLOCK_Q, after + (t - before) * BLOCK_Q)
        at_row = (query_origin + row) * HEADS + head
        asked = row + rows < end
        q = _tile(query + at_row * WIDTH, rows, asked, HEADS * WIDTH, WIDTH, BLOCK_H, True)
        do = _tile(
            d_out + at_row * VALUE_WIDTH, rows, asked,
            HEADS * VALUE_WIDTH, VALUE_WIDTH, BLOCK_V, True,
        )  # fmt: skip
        statistics = (batch.to(tl.int64) * HEADS + head) * queries + row
        lse2_rows = tl.load(lse2 + statistics + rows, mask=asked, other=1e38)
        delta_rows = tl.load(delta + statistics + rows, mask=asked, other=0.0)
        distance = (offset + row + rows)[None, :] - column[:, None]
        if FAR:
            visible = distance + key_start >= window
        else:
            visible = (distance >= 0) & (distance < window)
        visible &= asked[None, :]
        if SEGMENTS:
            ids_rows = tl.load(ids_q + query_origin + row + rows, mask=asked, other=-1)
            visible &= (ids_rows[None, :] == ids[:, None]) & (ids_rows >= 0)[None, :]
        d_k, d_v = _key_gradients(
            q, k, v, do, lse2_rows, delta_rows, visible, d_k, d_v,
            UNIT, INNER, MASK, PRECISION, True,
        )  # fmt: skip

    # Keys that nobody may see were scored with the others; what they gathered is dropped here.
    d_k = tl.where(seen[:, None], d_k * SCALE, 0.0)
    d_v = tl.where(seen[:, None], d_v, 0.0)
    to = ((chunk.to(tl.int64) * batches + batch) * keys + start) * KEY_HEADS + key_head
    _store(d_key + to * WIDTH, slots, inside, d_k, KEY_HEADS * WIDTH, WIDTH, BLOCK_H)
    _store(
        d_value + to * VALUE_WIDTH, slots, inside, d_v,
        KEY_HEADS * VALUE_WIDTH, VALUE_WIDTH, BLOCK_V,
    )  # fmt: skip
