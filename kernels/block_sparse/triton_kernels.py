"""Triton kernels of block-sparse attention: forward, gradients of queries, of keys and values.

Arrays are contiguous: queries [B, T, N, H], keys [B, S, K, H], values [B, S, K, Hv], LSE and delta
[B, N, T], lists of blocks [B, K, Q, M]. There is no JAX here, so that the same source runs under
jax-triton, in the Triton interpreter and in `triton.compile`.

A program owns a tile within one listed block (LIST_Q queries, LIST_KV keys) and walks its list,
tile by tile of each block that the list names. The launcher has counted which of them every pair of
sees: those are walked without masks, and the others after them.
"""

# Triton is no dependency: where it is missing, this file is not imported.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from lminf.kernels.common import triton_kernels as tiles


@triton.jit
def _visible(inside, row, column, CAUSAL: tl.constexpr):
    """Which pairs of `inside` see each other; rows lie along one axis, columns along the other."""
    if CAUSAL:
        inside = inside & (row >= column)
    return inside


# --- Forward --------------------------------------------------------------------------------------


@triton.jit
def forward(
    query, key, value, indices, spans,
    queries, keys, listed,
    out, lse,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    LIST_Q: tl.constexpr, LIST_KV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
    UNIT: tl.constexpr, INNER: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    CLEAR: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Outputs [B, T, N, Hv] and LSE [B, N, T]; one program for each query head and BLOCK_Q rows of
    a block. `spans` [B, K, Q, 2]: how many blocks are listed, how many of them first are clear.
    """
    PARTS: tl.constexpr = (LIST_Q + BLOCK_Q - 1) // BLOCK_Q
    TILES: tl.constexpr = (LIST_KV + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    blocks = tl.cdiv(queries, LIST_Q)
    tile = blocks * PARTS - 1 - program % (blocks * PARTS)  # causal lists: the longest first
    block = tile // PARTS
    row = block * LIST_Q + tile % PARTS * BLOCK_Q
    head = program // (blocks * PARTS) % HEADS
    batch = program // (blocks * PARTS * HEADS)
    key_head = head // (HEADS // KEY_HEADS)

    rows = tl.arange(0, BLOCK_Q)
    slots = tl.arange(0, BLOCK_K)
    valid = row + rows < tl.minimum((block + 1) * LIST_Q, queries)
    first_query = (batch.to(tl.int64) * queries + row) * HEADS + head
    key_origin = batch.to(tl.int64) * keys
    at_list = (batch.to(tl.int64) * KEY_HEADS + key_head) * blocks + block
    count = tl.load(spans + 2 * at_list)
    names = indices + at_list * listed

    top = tl.full((BLOCK_Q,), MASK * UNIT / 2, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    sums = tl.zeros((BLOCK_Q, BLOCK_V), tl.float32)
    q = tiles.tile(query + first_query * WIDTH, rows, valid, HEADS * WIDTH, WIDTH, BLOCK_H, True)
    clear = count * 0
    if CLEAR:
        clear = tl.load(spans + 2 * at_list + 1)
        for turn in tl.range(0, clear * TILES):
            start = tl.load(names + turn // TILES) * LIST_KV + turn % TILES * BLOCK_K
            at_row = (key_origin + start) * KEY_HEADS + key_head
            k, v = tiles.key_and_value(
                key, value, at_row, slots, slots,
                KEY_HEADS, WIDTH, VALUE_WIDTH, BLOCK_H, BLOCK_V, False,
            )  # fmt: skip
            top, total, sums = tiles.attend(
                q, k, v, slots, slots, top, total, sums, UNIT, INNER, MASK, PRECISION, False, False
            )  # fmt: skip
    for turn in tl.range(clear * TILES, count * TILES):
        kv_block = tl.load(names + turn // TILES)
        start = kv_block * LIST_KV + turn % TILES * BLOCK_K
        end = tl.minimum((kv_block + 1) * LIST_KV, keys)
        at_row = (key_origin + start) * KEY_HEADS + key_head
        column = start + slots
        inside = column < end
        k, v = tiles.key_and_value(
            key, value, at_row, slots, inside,
            KEY_HEADS, WIDTH, VALUE_WIDTH, BLOCK_H, BLOCK_V, True,
        )  # fmt: skip
        visible = _visible(inside[None, :], (row + rows)[:, None], column[None, :], CAUSAL)
        top, total, sums = tiles.attend(
            q, k, v, visible, slots, top, total, sums, UNIT, INNER, MASK, PRECISION, False, True
        )  # fmt: skip

    tiles.write(
        out, lse, total == 0, top, total, sums, batch, row, head, queries, rows, valid,
        HEADS, VALUE_WIDTH, BLOCK_V,
    )  # fmt: skip


# --- Gradient of the queries ----------------------------------------------------------------------


@triton.jit
def gradient_of_queries(
    query, key, value, d_out, lse2, delta, indices, spans,
    queries, keys, listed,
    d_query,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    LIST_Q: tl.constexpr, LIST_KV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr, INNER: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    CLEAR: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Gradients [B, T, N, H], by the walk of the forward."""
    PARTS: tl.constexpr = (LIST_Q + BLOCK_Q - 1) // BLOCK_Q
    TILES: tl.constexpr = (LIST_KV + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    blocks = tl.cdiv(queries, LIST_Q)
    tile = blocks * PARTS - 1 - program % (blocks * PARTS)
    block = tile // PARTS
    row = block * LIST_Q + tile % PARTS * BLOCK_Q
    head = program // (blocks * PARTS) % HEADS
    batch = program // (blocks * PARTS * HEADS)
    key_head = head // (HEADS // KEY_HEADS)

    rows = tl.arange(0, BLOCK_Q)
    slots = tl.arange(0, BLOCK_K)
    valid = row + rows < tl.minimum((block + 1) * LIST_Q, queries)
    first_query = (batch.to(tl.int64) * queries + row) * HEADS + head
    key_origin = batch.to(tl.int64) * keys
    at_list = (batch.to(tl.int64) * KEY_HEADS + key_head) * blocks + block
    count = tl.load(spans + 2 * at_list)
    names = indices + at_list * listed

    q, do, lse2_rows, delta_rows = tiles.of_queries(
        query, d_out, lse2, delta, batch, row, head, queries, rows, valid,
        HEADS, WIDTH, VALUE_WIDTH, BLOCK_H, BLOCK_V, True,
    )  # fmt: skip
    gradient = tl.zeros((BLOCK_Q, BLOCK_H), tl.float32)
    clear = count * 0
    if CLEAR:
        clear = tl.load(spans + 2 * at_list + 1)
        for turn in tl.range(0, clear * TILES):
            start = tl.load(names + turn // TILES) * LIST_KV + turn % TILES * BLOCK_K
            at_row = (key_origin + start) * KEY_HEADS + key_head
            k, v = tiles.key_and_value(
                key, value, at_row, slots, slots,
                KEY_HEADS, WIDTH, VALUE_WIDTH, BLOCK_H, BLOCK_V, False,
            )  # fmt: skip
            gradient = tiles.query_gradient(
                q, k, v, do, lse2_rows, delta_rows, slots, slots, gradient,
                UNIT, INNER, MASK, PRECISION, False, False,
            )  # fmt: skip
    for turn in tl.range(clear * TILES, count * TILES):
        kv_block = tl.load(names + turn // TILES)
        start = kv_block * LIST_KV + turn % TILES * BLOCK_K
        end = tl.minimum((kv_block + 1) * LIST_KV, keys)
        at_row = (key_origin + start) * KEY_HEADS + key_head
        column = start + slots
        inside = column < end
        k, v = tiles.key_and_value(
            key, value, at_row, slots, inside,
            KEY_HEADS, WIDTH, VALUE_WIDTH, BLOCK_H, BLOCK_V, True,
        )  # fmt: skip
        visible = _visible(inside[None, :], (row + rows)[:, None], column[None, :], CAUSAL)
        gradient = tiles.query_gradient(
            q, k, v, do, lse2_rows, delta_rows, visible, slots, gradient,
            UNIT, INNER, MASK, PRECISION, False, True,
        )  # fmt: skip
    tiles.store(
        d_query + first_query * WIDTH, rows, valid, gradient * SCALE,
        HEADS * WIDTH, WIDTH, BLOCK_H,
    )  # fmt: skip


# --- Gradients of keys and values -----------------------------------------------------------------


@triton.jit
def gradient_of_keys(
    query, key, value, d_out, lse2, delta, names, spans,
    queries, keys, listed,
    d_key, d_value,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    LIST_Q: tl.constexpr, LIST_KV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr, INNER: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    CLEAR: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Gradients [B, S, K, ...]; one program for each key head and BLOCK_K keys of a block, which
    owns what it writes. `names` [B, K, E] holds the transposed lists; `spans` [B, K, blocks, 4]
    where one starts, its clear blocks start, they end, it ends.
    """
    PARTS: tl.constexpr = (LIST_KV + BLOCK_K - 1) // BLOCK_K
    TILES: tl.constexpr = (LIST_Q + BLOCK_Q - 1) // BLOCK_Q
    program = tl.program_id(0)
    blocks = tl.cdiv(keys, LIST_KV)
    tile = program % (blocks * PARTS)
    block = tile // PARTS
    start = block * LIST_KV + tile % PARTS * BLOCK_K
    key_head = program // (blocks * PARTS) % KEY_HEADS
    batch = program // (blocks * PARTS * KEY_HEADS)
    group = HEADS // KEY_HEADS

    slots = tl.arange(0, BLOCK_K)
    rows = tl.arange(0, BLOCK_Q)
    column = start + slots
    inside = column < tl.minimum((block + 1) * LIST_KV, keys)
    key_origin = batch.to(tl.int64) * keys
    at_key = (key_origin + start) * KEY_HEADS + key_head

    at_head = batch.to(tl.int64) * KEY_HEADS + key_head
    at_span = spans + (at_head * blocks + block) * 4
    names += at_head * listed
    begin = tl.load(at_span)
    end = tl.load(at_span + 3)
    num_head = end - begin
    clear_tiles = num_head * 0
    tail = end
    if CLEAR:
        num_head = tl.load(at_span + 1) - begin
        tail = tl.load(at_span + 2)
        clear_tiles = (tail - begin - num_head) * TILES
    masked_tiles = (num_head + end - tail) * TILES

    k, v = tiles.key_and_value(
        key, value, at_key, slots, inside,
        KEY_HEADS, WIDTH, VALUE_WIDTH, BLOCK_H, BLOCK_V, True,
    )  # fmt: skip
    d_k = tl.zeros((BLOCK_K, BLOCK_H), tl.float32)
    d_v = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if CLEAR:
        for turn in tl.range(0, group * clear_tiles):
            head = key_head * group + turn // clear_tiles
            t = turn % clear_tiles
            q_block = tl.load(names + begin + num_head + t // TILES)
            row = q_block * LIST_Q + t % TILES * BLOCK_Q
            q, do, lse2_rows, delta_rows = tiles.of_queries(
                query, d_out, lse2, delta, batch, row, head, queries, rows, rows,
                HEADS, WIDTH, VALUE_WIDTH, BLOCK_H, BLOCK_V, False,
            )  # fmt: skip
            d_k, d_v = tiles.key_gradients(
                q, k, v, do, lse2_rows, delta_rows, rows, rows, d_k, d_v,
                UNIT, INNER, MASK, PRECISION, False, False,
            )  # fmt: skip
    for turn in tl.range(0, group * masked_tiles):
        head = key_head * group + turn // masked_tiles
        t = turn % masked_tiles
        entry = t // TILES
        q_block = tl.load(
            names + tl.where(entry < num_head, begin + entry, tail + entry - num_head)
        )
        row = q_block * LIST_Q + t % TILES * BLOCK_Q
        valid = row + rows < tl.minimum((q_block + 1) * LIST_Q, queries)
        q, do, lse2_rows, delta_rows = tiles.of_queries(
            query, d_out, lse2, delta, batch, row, head, queries, rows, valid,
            HEADS, WIDTH, VALUE_WIDTH, BLOCK_H, BLOCK_V, True,
        )  # fmt: skip
        visible = _visible(valid[None, :], (row + rows)[None, :], column[:, None], CAUSAL)
        d_k, d_v = tiles.key_gradients(
            q, k, v, do, lse2_rows, delta_rows, visible, rows, d_k, d_v,
            UNIT, INNER, MASK, PRECISION, False, True,
        )  # fmt: skip

    tiles.store(
        d_key + at_key * WIDTH, slots, inside, d_k * SCALE, KEY_HEADS * WIDTH, WIDTH, BLOCK_H
    )
    tiles.store(
        d_value + at_key * VALUE_WIDTH, slots, inside, d_v,
        KEY_HEADS * VALUE_WIDTH, VALUE_WIDTH, BLOCK_V,
    )  # fmt: skip
