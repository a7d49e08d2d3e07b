"""The linear cross-entropy on a TPU's matrix unit (Pallas, Mosaic): no [rows, V] array, five GEMMs.

Logits are kept vocabulary first, x^T [W, R] for W entries and R rows, so that statistics are rows
[1, R] and reductions run down the sublanes. C is the classifier, E the embeddings.
    forward   grid (rows, V): online maximum m and sum l;  lse = m + log l
    dE        grid (rows, V): dx = (g (1 + 2 z lse) + g_lse) softmax(x) - g smoothing / V
                                   - g (1 - smoothing) at the label;  dE += dx C
    dC        grid (V, rows): the same dx;  dC += dx^T E, dbias += sum dx
A TPU adds nothing to memory atomically, so dE and dC recompute x each in its own pass; two runs are
bitwise equal. A block whose |dx| without labels and upstream factor stays under `filter_eps`, and
which holds no label, skips its second product; the bias is never filtered. Vocabulary keeps its
order: `sort_vocab` changes nothing here. The label's logit is a gathered dot product in XLA.

Bytes: C once for each R rows in the forward and in dE, E once for each W entries in dC.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from lminf.kernels.common import dispatch, numerics
from lminf.kernels.cross_entropy.operands import Losses, Operands, Rules

LANES = 128
VMEM_BYTES = 48 * 2**20  # of the 128 MB of a v5e or v6e core; 16 MB are the default


@dataclass(frozen=True)
class Config:
    """Sizes of a block of logits: multiples of 128 on a device, of 8 in the interpreter."""

    block_rows: int = 512  # tokens
    block_vocab: int = 512  # entries


def losses(rules: Rules, operands: Operands, labels: Int[Array, " rows"], config: object) -> Losses:
    """Loss and LSE of every row; differentiable in `operands`, through the LSE too."""
    embeddings, classifier, _ = operands
    rows, width = embeddings.shape
    vocab = classifier.shape[0]
    config = dispatch.settled(Config, config, lambda: _fitting(width, embeddings.dtype.itemsize))
    if embeddings.dtype not in (jnp.bfloat16, jnp.float32) or embeddings.dtype != classifier.dtype:
        raise NotImplementedError(
            f"embeddings in {embeddings.dtype}, classifier in {classifier.dtype}; "
            "it takes both bfloat16 or both float32"
        )
    if jnp.dtype(rules.accum_dtype) != jnp.float32:
        raise NotImplementedError(f"accum_dtype={rules.accum_dtype}; it sums in float32")
    if vocab < config.block_vocab:
        # Blocks may reach past the end of an array, but not be larger than it.
        config = Config(config.block_rows, vocab)
    config = Config(min(config.block_rows, rows + -rows % LANES), config.block_vocab)
    plan = Plan(rules, vocab, config.block_rows, config.block_vocab)
    padding = -rows % config.block_rows
    padded = operands._replace(embeddings=jnp.pad(embeddings, ((0, padding), (0, 0))))
    padded_losses = _losses(plan, padded, jnp.pad(labels, (0, padding)))
    return Losses(*(x[:rows] for x in padded_losses))


def _fitting(width: int, itemsize: int) -> Config:
    """The largest blocks whose operands, accumulator and logits fit into the memory of a core."""
    for size in (512, 256, 128):
        operands = 2 * (2 * itemsize + itemsize)  # E, C and the gradient, double buffered
        if size * width * (operands + 4) + 4 * 4 * size * size <= VMEM_BYTES:
            return Config(size, size)
    raise NotImplementedError(f"D={width}: blocks of 128 rows exceed {VMEM_BYTES} bytes of memory")


@dataclass(frozen=True)
class Plan:
    """One call: every size that is known when tracing."""

    rules: Rules
    vocab: int
    block_rows: int
    block_vocab: int

    @property
    def vocab_blocks(self) -> int:
        return pl.cdiv(self.vocab, self.block_vocab)

    @property
    def incomplete(self) -> bool:
        """Whether the last block of the vocabulary reaches past its end."""
        return self.vocab % self.block_vocab != 0


class PerRow(NamedTuple):
    """What a block of rows knows beside its embeddings, as rows of one array in this order."""

    lse: Any
    weigh: Any  # of the softmax, without the upstream factor
    factor: Any  # of the softmax
    even: Any  # subtracted from every entry
    at_label: Any  # added at the label


# --- Kernels --------------------------------------------------------------------------------------


def _dot(a, b, contract: tuple[int, int]) -> Float[Array, "X Y"]:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def _entries(plan: Plan, block):
    """Numbers of a block's entries, as a column [W, 1]."""
    column = jax.lax.broadcasted_iota(jnp.int32, (plan.block_vocab, 1), 0)
    return block * plan.block_vocab + column


def _each_block(plan: Plan, block, visit) -> None:
    """`visit(inside)`: which entries of the block exist [W, 1], None if all do."""
    if not plan.incomplete:
        visit(None)
        return

    @pl.when(block < plan.vocab_blocks - 1)
    def _():
        visit(None)

    @pl.when(block == plan.vocab_blocks - 1)
    def _():
        visit(_entries(plan, block) < plan.vocab)


def _logits(plan: Plan, embeddings, classifier, bias, inside):
    """Logits [W, R], d(logit)/d(product) where a soft cap bends it, and the classifier's rows.

    Entries past the vocabulary hold anything, NaN too: their logits and rows come back harmless.
    """
    rows, cap = classifier[...], plan.rules.soft_cap
    if inside is not None:
        rows = jnp.where(inside, rows, jnp.zeros_like(rows))
    logits = _dot(rows, embeddings[...], (1, 1))
    if bias is not None:
        # A row of lanes becomes a column through a whole tile.
        logits += jnp.broadcast_to(bias[...], (LANES, plan.block_vocab)).T[:, :1]
    bend = None
    if cap is not None:
        bent = jnp.tanh(logits / cap)
        logits, bend = cap * bent, 1 - bent * bent
    if inside is not None:
        logits = jnp.where(inside, logits, numerics.MASK_VALUE)
    return logits, bend, rows


def _forward_kernel(plan: Plan, arrays: "Arrays", lse, summed, top, total, sums):
    block = pl.program_id(1)

    @pl.when(block == 0)
    def _():
        top[...] = jnp.full_like(top, numerics.EMPTY_MAX)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def visit(inside):
        logits, _, _ = _logits(plan, arrays.embeddings, arrays.classifier, arrays.bias, inside)
        old = top[...]
        new = jnp.maximum(old, logits.max(0, keepdims=True))
        weights = jnp.exp(logits - new)
        total[...] = total[...] * jnp.exp(old - new) + weights.sum(0, keepdims=True)
        top[...] = new
        if plan.rules.label_smoothing:
            seen = logits if inside is None else jnp.where(inside, logits, 0)
            sums[...] += seen.sum(0, keepdims=True)

    _each_block(plan, block, visit)

    @pl.when(block == plan.vocab_blocks - 1)
    def _():
        lse[...] = top[...] + jnp.log(total[...])
        summed[...] = sums[...]


def _gradient(plan: Plan, arrays: "Arrays", block, inside):
    """dx [W, R], whether it is worth a product, and the classifier's rows."""
    logits, bend, rows = _logits(plan, arrays.embeddings, arrays.classifier, arrays.bias, inside)
    known = PerRow(*(arrays.per_row[i : i + 1, :] for i in range(len(PerRow._fields))))
    share = jnp.exp(logits - known.lse)
    even = known.even
    size = share * known.weigh
    if plan.rules.label_smoothing:
        size -= plan.rules.label_smoothing / plan.vocab
    labels = arrays.labels[...] - block * plan.block_vocab
    entry = jax.lax.broadcasted_iota(jnp.int32, (plan.block_vocab, 1), 0)
    d_logits = share * known.factor - even + jnp.where(entry == labels, known.at_label, 0)
    if bend is not None:
        d_logits *= bend
    if inside is not None:
        size, d_logits = jnp.where(inside, size, 0), jnp.where(inside, d_logits, 0)
    if plan.rules.filter_eps is None:
        return d_logits, True, rows
    labelled = ((labels >= 0) & (labels < plan.block_vocab)).astype(jnp.float32).max()
    # Judged before the upstream factor, so that the scale of the loss decides nothing.
    return d_logits, (jnp.abs(size).max() >= plan.rules.filter_eps) | (labelled > 0), rows


def _d_embeddings_kernel(plan: Plan, arrays: "Arrays", d_embeddings, acc):
    block = pl.program_id(1)

    @pl.when(block == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    def visit(inside):
        d_logits, kept, rows = _gradient(plan, arrays, block, inside)

        @pl.when(kept)
        def _():
            acc[...] += _dot(d_logits.astype(rows.dtype), rows, (0, 0))

    _each_block(plan, block, visit)

    @pl.when(block == plan.vocab_blocks - 1)
    def _():
        d_embeddings[...] = acc[...].astype(d_embeddings.dtype)


def _d_classifier_kernel(plan: Plan, arrays: "Arrays", d_classifier, *outputs: Any):
    *d_bias, acc, bias_acc = outputs
    block, step = pl.program_id(0), pl.program_id(1)

    @pl.when(step == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        bias_acc[...] = jnp.zeros_like(bias_acc)

    def visit(inside):
        d_logits, kept = _gradient(plan, arrays, block, inside)[:2]
        if d_bias:
            ones = jnp.ones((8, plan.block_rows), jnp.float32)
            bias_acc[...] += _dot(ones, d_logits, (1, 1))[:1]

        @pl.when(kept)
        def _():
            embeddings = arrays.embeddings[...]
            acc[...] += _dot(d_logits.astype(embeddings.dtype), embeddings, (1, 0))

    _each_block(plan, block, visit)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        d_classifier[...] = acc[...].astype(d_classifier.dtype)
        for out in d_bias:
            out[...] = bias_acc[...]


# --- Calls ----------------------------------------------------------------------------------------


class Arrays(NamedTuple):
    """What a kernel reads; what a call does without is None."""

    embeddings: Any  # [rows, D]
    classifier: Any  # [V, D]
    bias: Any  # [1, V]
    labels: Any  # [1, rows]
    per_row: Any  # [5, rows]


def _specs(plan: Plan, arrays: Arrays, row_at, vocab_at) -> Arrays:
    """Block specs; `row_at`, `vocab_at` map the grid to a block of rows and of the vocabulary."""

    def columns(x, size, index):
        return None if x is None else pl.BlockSpec((x.shape[0], size), lambda *g: (0, index(*g)))

    return Arrays(
        _row_blocks(arrays.embeddings, plan.block_rows, row_at),
        _row_blocks(arrays.classifier, plan.block_vocab, vocab_at),
        columns(arrays.bias, plan.block_vocab, vocab_at),
        columns(arrays.labels, plan.block_rows, row_at),
        columns(arrays.per_row, plan.block_rows, row_at),
    )


def _row_blocks(x, size: int, index) -> pl.BlockSpec:
    return pl.BlockSpec((size, x.shape[1]), lambda *grid: (index(*grid), 0))


def _call(plan: Plan, kernel, arrays: Arrays, *, vocab_first: bool, outputs, scratch, products):
    """A pallas_call over (rows, V) or, with `vocab_first`, (V, rows); `outputs` pairs shapes with
    functions from the two index maps to block specs.
    """
    rows, width = arrays.embeddings.shape
    row_blocks = rows // plan.block_rows
    grid = (row_blocks, plan.vocab_blocks)

    def outer(i, j):
        return i

    def inner(i, j):
        return j

    row_at, vocab_at = (inner, outer) if vocab_first else (outer, inner)
    shapes, specs = zip(*outputs, strict=True)
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=grid[::-1] if vocab_first else grid,
        in_specs=[_specs(plan, arrays, row_at, vocab_at)],
        out_specs=[spec(row_at, vocab_at) for spec in specs],
        out_shape=list(shapes),
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * rows * plan.vocab * width,
            transcendentals=rows * plan.vocab,
            bytes_accessed=plan.vocab * width * arrays.classifier.dtype.itemsize * row_blocks,
        ),
        name=f"cross_entropy{kernel.__name__.removesuffix('_kernel')}",
    )(arrays)


def _arrays(operands: Operands, labels=None, per_row=None) -> Arrays:
    bias = None if operands.bias is None else operands.bias.astype(jnp.float32)[None]
    return Arrays(operands.embeddings, operands.classifier, bias, labels, per_row)


def _label_logits(rules: Rules, operands: Operands, labels) -> tuple[Array, Array | None]:
    """The label's logit of every row, and its bend."""
    rows = operands.classifier[labels].astype(jnp.float32)
    logits = (operands.embeddings.astype(jnp.float32) * rows).sum(-1)
    if operands.bias is not None:
        logits += operands.bias[labels].astype(jnp.float32)
    if rules.soft_cap is None:
        return logits, None
    bent = jnp.tanh(logits / rules.soft_cap)
    return rules.soft_cap * bent, 1 - bent * bent


def _compute(plan: Plan, operands: Operands, labels: Int[Array, " rows"]) -> Losses:
    rows = labels.shape[0]
    row = jax.ShapeDtypeStruct((1, rows), jnp.float32)

    def row_spec(row_at, vocab_at):
        return pl.BlockSpec((1, plan.block_rows), lambda *grid: (0, row_at(*grid)))

    lse, summed = _call(
        plan, _forward_kernel, _arrays(operands), vocab_first=False,
        outputs=[(row, row_spec)] * 2, scratch=[(1, plan.block_rows)] * 3, products=1,
    )  # fmt: skip
    lse, summed, smoothing = lse[0], summed[0], plan.rules.label_smoothing
    label_logits, _ = _label_logits(plan.rules, operands, labels)
    loss = lse - (1 - smoothing) * label_logits - smoothing * summed / plan.vocab
    return Losses(loss + plan.rules.z_loss * lse * lse, lse)


def _forward(plan: Plan, operands: Operands, labels):
    losses = _compute(plan, operands, labels)
    return losses, (operands, labels, losses.lse)


def _backward(plan: Plan, saved, cotangents: Losses):
    operands, labels, lse = saved
    d_loss, d_lse = cotangents
    smoothing = plan.rules.label_smoothing
    weigh = 1 + 2 * plan.rules.z_loss * lse
    per_row = PerRow(
        lse,
        weigh,
        weigh * d_loss + d_lse,
        d_loss * smoothing / plan.vocab,
        (smoothing - 1) * d_loss,
    )
    arrays = _arrays(operands, labels[None], jnp.stack(per_row))
    width = operands.embeddings.shape[1]
    (d_embeddings,) = _call(
        plan, _d_embeddings_kernel, arrays, vocab_first=False,
        outputs=[(
            jax.ShapeDtypeStruct(arrays.embeddings.shape, arrays.embeddings.dtype),
            lambda row_at, vocab_at: _row_blocks(arrays.embeddings, plan.block_rows, row_at),
        )],
        scratch=[(plan.block_rows, width)], products=2,
    )  # fmt: skip
    outputs: list[Any] = [
        (
            jax.ShapeDtypeStruct(arrays.classifier.shape, arrays.classifier.dtype),
            lambda row_at, vocab_at: _row_blocks(arrays.classifier, plan.block_vocab, vocab_at),
        )
    ]
    if operands.bias is not None:

        def bias_spec(row_at, vocab_at):
            return pl.BlockSpec((1, plan.block_vocab), lambda *grid: (0, vocab_at(*grid)))

        outputs.append((jax.ShapeDtypeStruct((1, plan.vocab), jnp.float32), bias_spec))
    d_classifier, *d_bias = _call(
        plan, _d_classifier_kernel, arrays, vocab_first=True, outputs=outputs,
        scratch=[(plan.block_vocab, width), (1, plan.block_vocab)], products=2,
    )  # fmt: skip
    bias = operands.bias
    return (
        Operands(
            d_embeddings, d_classifier, bias if bias is None else d_bias[0][0].astype(bias.dtype)
        ),
        None,
    )


_losses = jax.custom_vjp(_compute, nondiff_argnums=(0,))
_losses.defvjp(_forward, _backward)
