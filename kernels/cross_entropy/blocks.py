"""The walk over blocks of rows and vocabulary that the plain and the sharded form share.

The classifier may be a shard: entries [first, first + valid) of a vocabulary of `vocab`, and rows
past `valid` that count for nothing. Labels are numbers in the whole vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from lminf.kernels.common import numerics, platforms
from lminf.kernels.cross_entropy.operands import Operands, Rules


class Shard(NamedTuple):
    """Where the classifier stands in the vocabulary."""

    first: Int[Array, ""]
    valid: Int[Array, ""]


class Sizes(NamedTuple):
    """Rows and entries of a block of logits; rows are a multiple, the vocabulary need not be."""

    rows: int
    vocab: int


class Statistics(NamedTuple):
    """Of every row over the shard: lse = top + log(total); sums of logits, the label's logit."""

    top: Float[Array, " rows"]
    total: Float[Array, " rows"]
    label_logit: Float[Array, " rows"]  # 0 where another shard owns the label
    summed: Float[Array, " rows"]


class Gradients(NamedTuple):
    """dE in the dtype of accumulation, the bias's in float32, dC in the dtype asked for."""

    embeddings: Float[Array, "rows D"]
    classifier: Float[Array, "V D"]
    bias: Float[Array, " V"] | None


class Walk:
    """The shard in blocks of W entries. The last one starts early rather than end late: its first
    entries were seen before and do not count again, and the classifier is never copied.
    """

    def __init__(self, rules: Rules, sizes: Sizes, operands: Operands, shard: Shard, vocab: int):
        self.rules, self.operands, self.shard, self.whole = rules, operands, shard, vocab
        self.entries = operands.classifier.shape[0]
        self.width = min(sizes.vocab, self.entries)
        self.count = jnp.int32(-(-self.entries // self.width))
        self.block_rows = sizes.rows
        self.row_blocks = jnp.int32(operands.embeddings.shape[0] // sizes.rows)
        self.dtype = numerics.statistics_dtype(operands.embeddings.dtype)
        wide = self.dtype == jnp.float64
        self.accumulator = self.dtype if wide else jnp.dtype(rules.accum_dtype)

    def start(self, index: ArrayLike) -> Array:
        return jnp.minimum(index * self.width, self.entries - self.width)

    def fresh(self, index: ArrayLike) -> Bool[Array, "1 W"]:
        """Which entries of the block no earlier block had and the shard really holds."""
        entries = self.start(index) + jnp.arange(self.width, dtype=jnp.int32)
        return ((entries >= index * self.width) & (entries < self.shard.valid))[None]

    def cut(self, x: Array, index: ArrayLike) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, self.start(index), self.width)

    def rows(self, x: Array, index: ArrayLike) -> Array:
        """The rows of one block of an array with one row for each token."""
        return jax.lax.dynamic_slice_in_dim(x, index * self.block_rows, self.block_rows)

    def logits(
        self, embeddings: Array, classifier: Array, index: ArrayLike
    ) -> tuple[Array, Array | None]:
        """[rows, W] logits, and d(logit)/d(product) where a soft cap bends it."""
        logits = dot(embeddings, classifier, (1, 1), self.dtype)
        if self.operands.bias is not None:
            logits += self.cut(self.operands.bias, index).astype(self.dtype)[None]
        return self.capped(logits)

    def owned(self, labels: Array) -> tuple[Array, Array]:
        """Labels counted from the shard's first entry, and which of them it holds."""
        local = labels - self.shard.first
        return jnp.clip(local, 0, self.entries - 1), (local >= 0) & (local < self.shard.valid)

    def label_logits(self, embeddings: Array, labels: Array) -> tuple[Array, Array | None]:
        """The label's logit of every row (0 where another shard has it), and its bend."""
        local, ours = self.owned(labels)
        rows = self.operands.classifier[local]
        logits = (embeddings.astype(self.dtype) * rows.astype(self.dtype)).sum(-1)
        if self.operands.bias is not None:
            logits += self.operands.bias[local].astype(self.dtype)
        logits, bend = self.capped(logits)
        return jnp.where(ours, logits, 0), bend

    def capped(self, logits: Array) -> tuple[Array, Array | None]:
        cap = self.rules.soft_cap
        if cap is None:
            return logits, None
        bent = jnp.tanh(logits / cap)
        return cap * bent, 1 - bent * bent


def dot(a: Array, b: Array, contract: tuple[int, int], dtype: Any) -> Float[Array, "X Y"]:
    """Matrix product over axis contract[0] of a and contract[1] of b, accumulated in `dtype`."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    if a.dtype != b.dtype:
        a, b = a.astype(dtype), b.astype(dtype)
    return jax.lax.dot_general(a, b, dims, preferred_element_type=dtype)


def statistics(walk: Walk, labels: Int[Array, " rows"]) -> Statistics:
    """Statistics of every row; one pass over the shard for each block of rows."""
    dtype = walk.dtype

    def of_rows(given):
        embeddings, labels = given

        def visit(index, carry):
            top, total, summed = carry
            logits, _ = walk.logits(embeddings, walk.cut(walk.operands.classifier, index), index)
            fresh = walk.fresh(index)
            seen = jnp.where(fresh, logits, numerics.MASK_VALUE)
            new_top = jnp.maximum(top, seen.max(-1))
            total = total * jnp.exp(top - new_top) + jnp.exp(seen - new_top[:, None]).sum(-1)
            if walk.rules.label_smoothing:
                summed += jnp.where(fresh, logits, 0).sum(-1)
            return new_top, total, summed

        zeros = jnp.zeros(embeddings.shape[:1], dtype)
        carry = (jnp.full_like(zeros, numerics.EMPTY_MAX), zeros, zeros)
        top, total, summed = jax.lax.fori_loop(jnp.int32(0), walk.count, visit, carry)
        return Statistics(top, total, walk.label_logits(embeddings, labels)[0], summed)

    rows = (walk.operands.embeddings, labels)
    by_block = tuple(x.reshape(-1, walk.block_rows, *x.shape[1:]) for x in rows)
    return Statistics(*(x.reshape(-1) for x in jax.lax.map(of_rows, by_block)))


def loss_and_lse(rules: Rules, statistics: Statistics, vocab: int) -> tuple[Array, Array]:
    """Loss and LSE of every row from the statistics over the whole vocabulary."""
    lse = statistics.top + jnp.log(statistics.total)
    loss = lse - (1 - rules.label_smoothing) * statistics.label_logit
    return loss + rules.z_loss * lse * lse - rules.label_smoothing * statistics.summed / vocab, lse


def gradients(
    walk: Walk,
    labels: Array,
    lse: Array,
    d_loss: Array,
    d_lse: Array,
    classifier_dtype: Any,
) -> Gradients:
    """Gradients of every operand; one block of the classifier after the other, each finished before
    the next, so that its sum over the rows is wide and the whole is not.
    """
    rules, operands, dtype = walk.rules, walk.operands, walk.dtype
    local, ours = walk.owned(labels)
    at_label = jnp.where(ours, -(1 - rules.label_smoothing) * d_loss, 0)
    at_label_product = at_label
    if rules.soft_cap is not None:
        bend = walk.label_logits(operands.embeddings, labels)[1]
        assert bend is not None
        at_label_product = at_label * bend
    local = jnp.where(ours, local, -1)
    weigh = 1 + 2 * rules.z_loss * lse
    factor = weigh * d_loss + d_lse
    # A filtered block scatters its labels' rows, which on an accelerator has no order.
    ordered = not rules.deterministic or platforms.current() == "cpu"
    filter_eps = rules.filter_eps if ordered else None

    def of_block(index, carry):
        d_embeddings, d_classifier, d_bias = carry
        classifier, start = walk.cut(operands.classifier, index), walk.start(index)
        fresh = walk.fresh(index)
        column = (start + jnp.arange(walk.width, dtype=jnp.int32))[None]

        def of_rows(row, carry):
            d_embeddings, d_block, d_bias = carry
            embeddings = walk.rows(operands.embeddings, row)
            each = (local, at_label, at_label_product, lse, weigh, factor, d_loss)
            target, labelled, labelled_product, lse_, weigh_, factor_, d_loss_ = (
                walk.rows(x, row) for x in each
            )
            logits, bend = walk.logits(embeddings, classifier, index)
            share = jnp.where(fresh, jnp.exp(logits - lse_[:, None]), 0)
            even = jnp.where(fresh, rules.label_smoothing / walk.whole, 0).astype(dtype)
            is_label = (target[:, None] == column) & fresh
            d_logits = share * factor_[:, None] - even * d_loss_[:, None]
            d_logits += jnp.where(is_label, labelled[:, None], 0)
            if bend is not None:
                d_logits = d_logits * bend
            if d_bias is not None:
                d_bias = d_bias + d_logits.sum(0)

            def add(grads, part_embeddings, d_block):
                d_embeddings = grads
                part = walk.rows(d_embeddings, row).astype(dtype) + part_embeddings
                return (
                    jax.lax.dynamic_update_slice_in_dim(
                        d_embeddings, part.astype(walk.accumulator), row * walk.block_rows, 0
                    ),
                    d_block,
                )

            def products(grads):
                d_embeddings, d_block = grads
                rounded = d_logits.astype(embeddings.dtype)
                d_block = d_block.astype(dtype) + dot(rounded, embeddings, (0, 0), dtype)
                return add(
                    d_embeddings,
                    dot(rounded, classifier, (1, 0), dtype),
                    d_block.astype(walk.accumulator),
                )

            def labels_only(grads):
                d_embeddings, d_block = grads
                inside = jnp.clip(target - start, 0, walk.width - 1)
                mine = is_label.any(-1)
                weight = jnp.where(mine, labelled_product, 0)[:, None]
                part = (weight * embeddings.astype(dtype)).astype(walk.accumulator)
                return add(
                    d_embeddings,
                    weight * classifier[inside].astype(dtype),
                    d_block.at[inside].add(part),
                )

            grads = (d_embeddings, d_block)
            if filter_eps is None:
                grads = products(grads)
            else:
                # Judged before the upstream factor, so that the scale of the loss decides nothing.
                size = jnp.abs(share * weigh_[:, None] - even).max()
                grads = jax.lax.cond(size >= filter_eps, products, labels_only, grads)
            return *grads, d_bias

        d_block = jnp.zeros((walk.width, classifier.shape[1]), walk.accumulator)
        d_bias_block = None if d_bias is None else jnp.zeros(walk.width, dtype)
        d_embeddings, d_block, d_bias_block = jax.lax.fori_loop(
            jnp.int32(0), walk.row_blocks, of_rows, (d_embeddings, d_block, d_bias_block)
        )

        def store(total, part):
            kept = fresh[0].reshape(-1, *(1,) * (part.ndim - 1))
            part = jnp.where(kept, part.astype(total.dtype), walk.cut(total, index))
            return jax.lax.dynamic_update_slice_in_dim(total, part, start, 0)

        d_classifier = store(d_classifier, d_block)
        return d_embeddings, d_classifier, None if d_bias is None else store(d_bias, d_bias_block)

    carry = (
        jnp.zeros(operands.embeddings.shape, walk.accumulator),
        jnp.zeros(operands.classifier.shape, classifier_dtype),
        None if operands.bias is None else jnp.zeros(operands.bias.shape, dtype),
    )
    return Gradients(*jax.lax.fori_loop(jnp.int32(0), walk.count, of_block, carry))
