"""Triton kernels of the linear cross-entropy: statistics of rows, and gradients tile by tile.

Embeddings are [rows, D], the classifier [V, D], both contiguous; every statistic is float32. Rows
and entries past the end are read as the last one and masked in the logits, so that no load needs a
mask. There is no JAX here, so that the same source runs under jax-triton, in the Triton interpreter
and in `triton.compile`.
"""

# Triton is no dependency: where it is missing, this file is not imported.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from lminf.kernels.common.triton_math import LOG2_E, tanh


@triton.jit
def _part(base, row, start, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns [start, start + BLOCK_D) of some rows of a [., WIDTH] matrix; zeros past the end."""
    column = start + tl.arange(0, BLOCK_D)
    pointers = base + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    if WIDTH % BLOCK_D == 0:
        part = tl.load(pointers)
    else:
        part = tl.load(pointers, mask=(column < WIDTH)[None, :], other=0.0)
    return part


@triton.jit
def _logits(
    embeddings, classifier, bias, row, entry,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    CAP: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[rows, entries] logits, and tanh of the product where a soft cap bends it."""
    products = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for start in tl.range(0, WIDTH, BLOCK_D):
        e = _part(embeddings, row, start, WIDTH, BLOCK_D)
        c = _part(classifier, entry, start, WIDTH, BLOCK_D)
        products = tl.dot(e, tl.trans(c), products, input_precision=PRECISION)
    if BIAS:
        products += tl.load(bias + entry).to(tl.float32)[None, :]
    bent = products
    if CAP is not None:
        bent = tanh(products / CAP)
        products = bent * CAP
    return products, bent


@triton.jit
def statistics(
    embeddings, classifier, bias, labels,
    rows, vocab, splits,
    tops, totals, label_logits, summed,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    CAP: tl.constexpr, BIAS: tl.constexpr, SUMMED: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of every row and each split of the vocabulary, [splits, rows]: maximum, sum of exponentials,
    the label's logit (0 in the other splits), and with SUMMED the sum of logits.
    """
    program = tl.program_id(0)
    row_blocks = tl.cdiv(rows, BLOCK_R)
    # Neighbours share entries of the classifier, the larger operand.
    row = program % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    split = program // row_blocks
    valid = row < rows
    inside = tl.minimum(row, rows - 1)
    label = tl.load(labels + inside)

    top = tl.full((BLOCK_R,), MASK / 2, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    at_label = tl.zeros((BLOCK_R,), tl.float32)
    sums = tl.zeros((BLOCK_R,), tl.float32)
    blocks = tl.cdiv(tl.cdiv(vocab, BLOCK_V), splits)
    for block in range(split * blocks, tl.minimum((split + 1) * blocks, tl.cdiv(vocab, BLOCK_V))):
        entry = block * BLOCK_V + tl.arange(0, BLOCK_V)
        exists = (entry < vocab)[None, :]
        logits, _ = _logits(
            embeddings, classifier, bias, inside, tl.minimum(entry, vocab - 1),
            WIDTH, BLOCK_R, BLOCK_V, BLOCK_D, CAP, BIAS, PRECISION,
        )  # fmt: skip
        at_label += tl.sum(tl.where(entry[None, :] == label[:, None], logits, 0.0), 1)
        if SUMMED:
            sums += tl.sum(tl.where(exists, logits, 0.0), 1)
        logits = tl.where(exists, logits, MASK)
        new_top = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp2((top - new_top) * LOG2_E)
        total += tl.sum(tl.exp2((logits - new_top[:, None]) * LOG2_E), 1)
        top = new_top

    offset = split.to(tl.int64) * rows + row
    tl.store(tops + offset, top, mask=valid)
    tl.store(totals + offset, total, mask=valid)
    tl.store(label_logits + offset, at_label, mask=valid)
    tl.store(summed + offset, sums, mask=valid)


BOTH = tl.constexpr(0)
EMBEDDINGS = tl.constexpr(1)
CLASSIFIER = tl.constexpr(2)


@triton.jit
def _add(
    base, row, valid, start, part,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Adds to columns of a float32 matrix: atomically where other programs add to them too."""
    column = start + tl.arange(0, BLOCK_D)
    pointers = base + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    mask = valid[:, None] & (column < WIDTH)[None, :]
    if SHARED:
        tl.atomic_add(pointers, part, mask=mask, sem="relaxed")
    else:
        tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + part, mask=mask)


@triton.jit
def gradients(
    embeddings, classifier, bias, labels, order, lse, weigh, factor, d_loss,
    rows, vocab,
    d_embeddings, d_classifier, d_bias,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    CAP: tl.constexpr, BIAS: tl.constexpr, SMOOTHING: tl.constexpr, SORTED: tl.constexpr,
    EPSILON: tl.constexpr, PRECISION: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """Float32 sums of dE, dC and d(bias), into zeros.

    PASS is BOTH (one tile a program, atomic sums), EMBEDDINGS (a program owns its rows and walks
    the vocabulary) or CLASSIFIER (it owns its entries and walks the rows). A tile whose softmax
    stays under EPSILON and that holds no label skips its products; the bias is never skipped.
    """
    program = tl.program_id(0)
    row_blocks = tl.cdiv(rows, BLOCK_R)
    turns = 1
    if PASS == EMBEDDINGS:
        turns = tl.cdiv(vocab, BLOCK_V)
    if PASS == CLASSIFIER:
        turns = row_blocks
    for turn in range(0, turns):
        if PASS == BOTH:
            row_block, block = program % row_blocks, program // row_blocks
        elif PASS == EMBEDDINGS:
            row_block, block = program, turn
        else:
            row_block, block = turn, program
        row = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
        slot = block * BLOCK_V + tl.arange(0, BLOCK_V)
        valid, exists = row < rows, slot < vocab
        inside = tl.minimum(row, rows - 1)
        entry = tl.minimum(slot, vocab - 1)
        if SORTED:
            entry = tl.load(order + entry)
        logits, bent = _logits(
            embeddings, classifier, bias, inside, entry,
            WIDTH, BLOCK_R, BLOCK_V, BLOCK_D, CAP, BIAS, PRECISION,
        )  # fmt: skip

        real = valid[:, None] & exists[None, :]
        share = tl.exp2((logits - tl.load(lse + inside)[:, None]) * LOG2_E)
        share = tl.where(real, share, 0.0)
        even = tl.where(real, SMOOTHING / vocab, 0.0)
        upstream = tl.load(d_loss + inside)[:, None]
        is_label = (tl.load(labels + inside)[:, None] == entry[None, :]) & real
        d_logits = share * tl.load(factor + inside)[:, None] - even * upstream
        d_logits -= tl.where(is_label, (1 - SMOOTHING) * upstream, 0.0)
        if CAP is not None:
            d_logits = d_logits * (1 - bent * bent)
        if BIAS and PASS != EMBEDDINGS:
            column_sums = tl.sum(d_logits, 0)
            if PASS == BOTH:
                tl.atomic_add(d_bias + entry, column_sums, mask=exists, sem="relaxed")
            else:
                so_far = tl.load(d_bias + entry, mask=exists, other=0.0)
                tl.store(d_bias + entry, so_far + column_sums, mask=exists)

        survives = turns > 0
        if EPSILON is not None:
            # Judged before the upstream factor, so that the scale of the loss decides nothing.
            size = tl.abs(share * tl.load(weigh + inside)[:, None] - even)
            size = tl.where(is_label, float("inf"), size)
            survives = tl.max(size) >= EPSILON
        if survives:
            rounded = d_logits.to(embeddings.dtype.element_ty)
            for start in range(0, WIDTH, BLOCK_D):
                if PASS != CLASSIFIER:
                    c = _part(classifier, entry, start, WIDTH, BLOCK_D)
                    part = tl.dot(rounded, c, input_precision=PRECISION)
                    _add(d_embeddings, row, valid, start, part, WIDTH, BLOCK_D, PASS == BOTH)
                if PASS != EMBEDDINGS:
                    e = _part(embeddings, inside, start, WIDTH, BLOCK_D)
                    part = tl.dot(tl.trans(rounded), e, input_precision=PRECISION)
                    _add(d_classifier, entry, exists, start, part, WIDTH, BLOCK_D, PASS == BOTH)
        if PASS != BOTH:
            # What one thread has added another may read at the next turn.
            tl.debug_barrier()
