"""Triton kernels of Λ-decoding: parts of the slots, then one softmax out of the parts.

Queries are [B, N, H], slots [B, K, S, H] (with LAYERS, those of `layer` in [L, B, K, S, H]),
contiguous. Of the ring each key head sees the last `near` [B, K] tokens, of the globals the first
`far` [B, K] rows. With ALIBI, `slopes` [B, N] are in units of raw scores, the globals are
`far_distance` [B, R] away. There is no JAX here, so that the same source
runs under jax-triton, in the Triton interpreter and in `triton.compile`.
"""

# Triton is no dependency: where it is missing, this file is not imported.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from lminf.kernels.common import triton_kernels as tiles
from lminf.kernels.common.triton_math import LOG2_E


@triton.jit
def parts(
    query, query_far, k_global, v_global, k_ring, v_ring, length, near, far, layer,
    slopes, far_distance,
    batches, ranks, window, splits,
    outs, tops, totals,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
    UNIT: tl.constexpr, INNER: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    FAR: tl.constexpr, LAYERS: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """Unnormalised outputs [splits, B, N, Hv], maxima and sums [splits, B, N].

    A program is one key head and one part of the tiles of slots, those of the globals first; its
    query heads are the rows of the products.
    """
    program = tl.program_id(0)
    split = program % splits
    key_head = program // splits % KEY_HEADS
    batch = program // (splits * KEY_HEADS)
    group = HEADS // KEY_HEADS
    last = tl.load(length + batch) - 1

    rows = tl.arange(0, BLOCK_M)
    slots = tl.arange(0, BLOCK_K)
    ours = rows < group
    first_query = batch.to(tl.int64) * HEADS + key_head * group
    near_slots = tl.load(near + batch * KEY_HEADS + key_head)
    far_slots = tl.load(far + batch * KEY_HEADS + key_head)
    slot_head = batch.to(tl.int64) * KEY_HEADS + key_head
    if LAYERS:
        slot_head += tl.load(layer).to(tl.int64) * batches * KEY_HEADS
    head_slopes = rows.to(tl.float32)
    if ALIBI:
        head_slopes = tl.load(slopes + first_query + rows, mask=ours, other=0.0)
    # Slots that nobody sees are not read.
    far_tiles = tl.cdiv(far_slots, BLOCK_K)
    near_tiles = tl.cdiv(near_slots, BLOCK_K)
    share = tl.cdiv(far_tiles + near_tiles, splits)
    first = split * share
    end = tl.minimum(first + share, far_tiles + near_tiles)

    top = tl.full((BLOCK_M,), MASK * UNIT / 2, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    if FAR:
        q = tiles.tile(query_far + first_query * WIDTH, rows, ours, WIDTH, WIDTH, BLOCK_H, True)
        for tile in tl.range(tl.minimum(first, far_tiles), tl.minimum(end, far_tiles)):
            rank = tile * BLOCK_K + slots
            seen = rank < far_slots
            offset = slot_head * ranks
            k = tiles.tile(k_global + offset * WIDTH, rank, seen, WIDTH, WIDTH, BLOCK_H, True)
            v = tiles.tile(
                v_global + offset * VALUE_WIDTH, rank, seen, VALUE_WIDTH, VALUE_WIDTH, BLOCK_V, True
            )
            away = slots
            if ALIBI:
                distances = far_distance + batch.to(tl.int64) * ranks
                distances = tl.load(distances + rank, mask=seen, other=0.0)
                away = head_slopes[:, None] * distances[None, :]
            top, total, out = tiles.attend(
                q, k, v, seen[None, :], away, top, total, out,
                UNIT, INNER, MASK, PRECISION, ALIBI, True,
            )  # fmt: skip
    q = tiles.tile(query + first_query * WIDTH, rows, ours, WIDTH, WIDTH, BLOCK_H, True)
    oldest = tl.maximum(last - near_slots + 1, 0) % tl.maximum(window, 1)  # the slot of the first
    for tile in tl.range(
        tl.maximum(first, far_tiles) - far_tiles, tl.maximum(end, far_tiles) - far_tiles
    ):
        token = tile * BLOCK_K + slots
        seen = token < near_slots
        slot = oldest + token
        slot = tl.where(slot >= window, slot - window, slot)
        offset = slot_head * window
        k = tiles.tile(k_ring + offset * WIDTH, slot, seen, WIDTH, WIDTH, BLOCK_H, True)
        v = tiles.tile(
            v_ring + offset * VALUE_WIDTH, slot, seen, VALUE_WIDTH, VALUE_WIDTH, BLOCK_V, True
        )
        away = head_slopes[:, None] * (near_slots - 1 - token).to(tl.float32)[None, :]
        top, total, out = tiles.attend(
            q, k, v, seen[None, :], away, top, total, out,
            UNIT, INNER, MASK, PRECISION, ALIBI, True,
        )  # fmt: skip

    to = split.to(tl.int64) * batches * HEADS + first_query + rows
    column = tl.arange(0, BLOCK_V)
    tl.store(
        outs + to[:, None] * VALUE_WIDTH + column[None, :], out,
        mask=ours[:, None] & (column < VALUE_WIDTH)[None, :],
    )  # fmt: skip
    tl.store(tops + to, top, mask=ours)
    tl.store(totals + to, total, mask=ours)


@triton.jit
def combine(
    outs, tops, totals, sinks,
    batches, splits,
    out, lse,
    HEADS: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr, EMPTY: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Outputs [B, N, Hv] and LSE [B, N] out of the parts; one program for each query head."""
    head = tl.program_id(0)
    part = tl.arange(0, BLOCK_S)
    column = tl.arange(0, BLOCK_V)
    exists = part < splits
    offset = part.to(tl.int64) * (batches * HEADS) + head
    part_tops = tl.load(tops + offset, mask=exists, other=EMPTY)
    part_totals = tl.load(totals + offset, mask=exists, other=0.0)
    part_outs = tl.load(
        outs + offset[:, None] * VALUE_WIDTH + column[None, :],
        mask=exists[:, None] & (column < VALUE_WIDTH)[None, :], other=0.0,
    )  # fmt: skip
    top = tl.max(part_tops, 0)
    sink = top
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        top = tl.maximum(top, sink)
    weights = tl.exp2(part_tops - top)
    total = tl.sum(part_totals * weights, 0)
    empty = total == 0
    if SINKS:
        total += tl.exp2(sink - top)
    total = tl.where(empty, 1.0, total)
    result = tl.sum(part_outs * weights[:, None], 0) / total
    result = tl.where(empty, 0.0, result)
    tl.store(
        out + head.to(tl.int64) * VALUE_WIDTH + column,
        result.to(out.dtype.element_ty),
        mask=column < VALUE_WIDTH,
    )
    tl.store(lse + head, tl.where(empty, float("-inf"), (top + tl.log2(total)) / LOG2_E))
