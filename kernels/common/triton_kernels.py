"""Pieces that the Triton kernels of Λ-attention and of block-sparse attention are made of.

Arrays are contiguous: queries [B, T, N, H], keys [B, S, K, H], values [B, S, K, Hv], LSE and delta
[B, N, T]. Exponents are powers of two: s = raw * UNIT with raw = <q, k> - away, or the tanh of
INNER times that under a soft cap; the product with UNIT and the subtraction of the maximum are one
fused multiply-add, which costs no more than scaling q beforehand and does not round it. `away` is
what ALiBi takes off. No JAX here.
"""

# Triton is no dependency: where it is missing, this file is not imported.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from lminf.kernels.common.triton_math import LOG2_E, tanh

# --- Tiles ----------------------------------------------------------------------------------------


@triton.jit
def tile(
    base, rows, valid,
    STRIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """Rows of a matrix, columns padded to BLOCK with zeros; with GUARD, invalid rows are zeros."""
    column = tl.arange(0, BLOCK)
    pointers = base + rows[:, None] * STRIDE + column[None, :]
    if GUARD and BLOCK != WIDTH:
        loaded = tl.load(pointers, mask=valid[:, None] & (column < WIDTH)[None, :], other=0.0)
    elif GUARD:
        loaded = tl.load(pointers, mask=valid[:, None], other=0.0)
    elif BLOCK != WIDTH:
        loaded = tl.load(pointers, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        loaded = tl.load(pointers)
    return loaded


@triton.jit
def store(
    base, rows, valid, values, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    pointers = base + rows[:, None] * STRIDE + column[None, :]
    mask = valid[:, None]
    if BLOCK != WIDTH:
        mask = mask & (column < WIDTH)[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def key_and_value(
    key, value, row, slots, inside,
    KEY_HEADS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """Tiles of keys and values; `row` counts rows of [B, S, K] before the first one's head."""
    k = tile(key + row * WIDTH, slots, inside, KEY_HEADS * WIDTH, WIDTH, BLOCK_H, GUARD)
    v = tile(
        value + row * VALUE_WIDTH, slots, inside,
        KEY_HEADS * VALUE_WIDTH, VALUE_WIDTH, BLOCK_V, GUARD,
    )  # fmt: skip
    return k, v


@triton.jit
def of_queries(
    query, d_out, lse2, delta, batch, row, head, queries, rows, valid,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """(queries, gradients of outputs, LSE, delta) of one head's rows from `row` on."""
    at_row = (batch.to(tl.int64) * queries + row) * HEADS + head
    q = tile(query + at_row * WIDTH, rows, valid, HEADS * WIDTH, WIDTH, BLOCK_H, GUARD)
    do = tile(
        d_out + at_row * VALUE_WIDTH, rows, valid,
        HEADS * VALUE_WIDTH, VALUE_WIDTH, BLOCK_V, GUARD,
    )  # fmt: skip
    offset = (batch.to(tl.int64) * HEADS + head) * queries + row
    # One address for the tile and small offsets: an address for each row takes registers.
    if GUARD:  # rows past the end weigh nothing
        lse2_rows = tl.load(lse2 + offset + rows, mask=valid, other=1e38)
        delta_rows = tl.load(delta + offset + rows, mask=valid, other=0.0)
    else:
        lse2_rows = tl.load(lse2 + offset + rows)
        delta_rows = tl.load(delta + offset + rows)
    return q, do, lse2_rows, delta_rows


# --- Forward --------------------------------------------------------------------------------------


@triton.jit
def raw_scores(
    a, b, away, INNER: tl.constexpr, PRECISION: tl.constexpr, ALIBI: tl.constexpr
):  # fmt: skip
    """[rows of a, rows of b] scores in units of UNIT."""
    raw = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if ALIBI:
        raw = raw - away
    if INNER is not None:
        raw = tanh(raw * INNER)
    return raw


@triton.jit
def attend(
    query, key, value, visible, away, top, total, out,
    UNIT: tl.constexpr, INNER: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    ALIBI: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(top, total, out) after one tile of keys."""
    raw = raw_scores(query, key, away, INNER, PRECISION, ALIBI)
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
def write(
    out, lse, empty, top, total, sums, batch, row, head, queries, rows, valid,
    HEADS: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Stores outputs and LSE of one head's rows from `row` on."""
    total = tl.where(empty, 1.0, total)
    sums = tl.where(empty[:, None], 0.0, sums / total[:, None])
    lse_rows = tl.where(empty, float("-inf"), (top + tl.log2(total)) / LOG2_E)
    at_row = (batch.to(tl.int64) * queries + row) * HEADS + head
    store(out + at_row * VALUE_WIDTH, rows, valid, sums, HEADS * VALUE_WIDTH, VALUE_WIDTH, BLOCK_V)
    offset = (batch.to(tl.int64) * HEADS + head) * queries + row + rows
    tl.store(lse + offset, lse_rows, mask=valid)


# --- Gradients ------------------------------------------------------------------------------------


@triton.jit
def query_gradient(
    query, key, value, d_out, lse2, delta, visible, away, d_query,
    UNIT: tl.constexpr, INNER: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    ALIBI: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """d_query after one tile of keys."""
    raw = raw_scores(query, key, away, INNER, PRECISION, ALIBI)
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
def key_gradients(
    query, key, value, d_out, lse2, delta, visible, away, d_key, d_value,
    UNIT: tl.constexpr, INNER: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    ALIBI: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(d_key, d_value) after one tile of queries; scores are [keys, queries] here."""
    raw = raw_scores(key, query, away, INNER, PRECISION, ALIBI)
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
