"""The linear cross-entropy in blocks of rows and vocabulary: no [rows, V] array.

Two ways, chosen by `Config.gradients`:
"backward"  Four GEMMs. The forward keeps an online maximum and sum over the blocks of the
            vocabulary; the label's logit is a gathered dot product. The backward recomputes a
            block's logits x and forms
                dx = (g (1 + 2 z lse) + g_lse) softmax(x) - g smoothing / V
                     - g (1 - smoothing) at the label
                dE += dx C;  dC += dx^T E
            A block in which |dx| without labels and upstream factor stays under `filter_eps` adds
            its labels' rows and skips the two products; the bias is never filtered.
"forward"   Three GEMMs. For each chunk of rows, all logits, the loss and both gradients at once, to
            be scaled by the upstream scalar: only for reduced losses, with one wide dC to keep.
Vocabulary is taken in its own order: `sort_vocab` changes nothing here.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf.kernels.common import dispatch, numerics, platforms
from lminf.kernels.cross_entropy import blocks
from lminf.kernels.cross_entropy.operands import Losses, Operands, Rules

BUDGET_BYTES = 256 * 10**6  # of temporary memory, on an accelerator


@dataclass(frozen=True)
class Config:
    """Sizes of a block of logits, and when gradients are formed ("forward" takes whole rows)."""

    block_rows: int = 1024  # tokens
    block_vocab: int = 1024  # entries
    gradients: Literal["backward", "forward"] = "backward"


def default_config(rows: int, vocab: int, width: int, itemsize: int, budget_bytes: int) -> Config:
    """The blocks of a call: on a CPU 4 MB of logits, which stay near the caches; elsewhere as large
    as the budget allows, since narrow products do not fill a GPU.

    The budget pays for logits and their rounded gradient, the wide sums of dE, and one block of dC.
    """
    if platforms.current() == "cpu":
        return Config()
    for block_vocab in (16384, 8192, 4096, 2048):
        left = budget_bytes - 4 * width * (rows + block_vocab)
        most = left // (block_vocab * (4 + itemsize)) // 256 * 256
        if most >= min(rows, 2048):
            count = -(-rows // most)  # of blocks, as even as they come: padding is work
            return Config(min(-(-rows // (256 * count)) * 256, rows), block_vocab)
    return Config(1024, 2048)


def sized(config: object, operands: Operands) -> Config:
    (rows, width), vocab = operands.embeddings.shape, operands.classifier.shape[0]
    itemsize = operands.embeddings.dtype.itemsize
    default = default_config(rows, vocab, width, itemsize, BUDGET_BYTES)
    config = dispatch.settled(Config, config, lambda: default)
    return Config(min(config.block_rows, rows), min(config.block_vocab, vocab), config.gradients)


def losses(rules: Rules, operands: Operands, labels: Int[Array, " rows"], config: object) -> Losses:
    """Loss and LSE of every row; differentiable in `operands`, through the LSE too."""
    config = sized(config, operands)
    if config.gradients != "backward":
        raise NotImplementedError('gradients="forward" needs a loss reduced to one number')
    rows = operands.embeddings.shape[0]
    padded_losses = _losses(rules, config, *padded(config, operands, labels))
    return Losses(*(x[:rows] for x in padded_losses))


def padded(config: Config, operands: Operands, *each_row: Array) -> tuple[Any, ...]:
    """Operands and arrays of one number a row, with rows padded to whole blocks."""
    padding = -operands.embeddings.shape[0] % config.block_rows
    embeddings = jnp.pad(operands.embeddings, ((0, padding), (0, 0)))
    return operands._replace(embeddings=embeddings), *(jnp.pad(x, (0, padding)) for x in each_row)


def _walk(rules: Rules, config: Config, operands: Operands) -> blocks.Walk:
    vocab = operands.classifier.shape[0]
    sizes = blocks.Sizes(config.block_rows, config.block_vocab)
    return blocks.Walk(rules, sizes, operands, blocks.Shard(jnp.int32(0), jnp.int32(vocab)), vocab)


def _compute(rules: Rules, config: Config, operands: Operands, labels) -> Losses:
    statistics = blocks.statistics(_walk(rules, config, operands), labels)
    return Losses(*blocks.loss_and_lse(rules, statistics, operands.classifier.shape[0]))


def _forward(rules: Rules, config: Config, operands: Operands, labels):
    losses = _compute(rules, config, operands, labels)
    return losses, (operands, labels, losses.lse)


def _backward(rules: Rules, config: Config, saved, cotangents: Losses):
    operands, labels, lse = saved
    walk = _walk(rules, config, operands)
    grads = blocks.gradients(walk, labels, lse, *cotangents, operands.classifier.dtype)
    return jax.tree.map(lambda grad, x: grad.astype(x.dtype), Operands(*grads), operands), None


_losses = jax.custom_vjp(_compute, nondiff_argnums=(0, 1))
_losses.defvjp(_forward, _backward)


# --- Gradients formed in the forward --------------------------------------------------------------


def total(
    rules: Rules,
    operands: Operands,
    labels: Int[Array, " rows"],
    weights: Float[Array, " rows"],
    config: Config | None,
) -> tuple[Float[Array, ""], Float[Array, " rows"]]:
    """sum(weights * loss), differentiable in `operands`, and the LSE of every row, which is not."""
    config = sized(config, operands)
    rows = operands.embeddings.shape[0]
    loss, lse = _total(rules, config, *padded(config, operands, labels, weights))
    return loss, jax.lax.stop_gradient(lse[:rows])


def _total_only(rules: Rules, config: Config, operands: Operands, labels, weights):
    losses = _compute(rules, config, operands, labels)
    return (losses.loss * weights).sum(), losses.lse


def _total_forward(rules: Rules, config: Config, operands: Operands, labels, weights):
    dtype = numerics.statistics_dtype(operands.embeddings.dtype)
    accumulator = dtype if dtype == jnp.float64 else jnp.dtype(rules.accum_dtype)
    vocab = operands.classifier.shape[0]
    walk = _walk(rules, Config(config.block_rows, vocab), operands)
    column = jnp.arange(vocab, dtype=jnp.int32)[None]

    def of_rows(carry, given):
        d_classifier, d_bias = carry
        embeddings, labels, weights = given
        logits, bend = walk.logits(embeddings, operands.classifier, jnp.int32(0))
        top = logits.max(-1)
        lse = top + jnp.log(jnp.exp(logits - top[:, None]).sum(-1))
        is_label = labels[:, None] == column
        label_logits = jnp.where(is_label, logits, 0).sum(-1)
        smooth = rules.label_smoothing
        loss = lse - (1 - smooth) * label_logits + rules.z_loss * lse * lse
        if smooth:
            loss -= smooth * logits.mean(-1)
        d_logits = jnp.exp(logits - lse[:, None]) * (1 + 2 * rules.z_loss * lse)[:, None]
        d_logits = (d_logits - smooth / vocab - jnp.where(is_label, 1 - smooth, 0)) * weights[
            :, None
        ]
        if bend is not None:
            d_logits = d_logits * bend
        if d_bias is not None:
            d_bias += d_logits.sum(0)
        rounded = d_logits.astype(embeddings.dtype)
        part = blocks.dot(rounded, embeddings, (0, 0), dtype)
        d_classifier = (d_classifier.astype(dtype) + part).astype(accumulator)
        d_embeddings = blocks.dot(rounded, operands.classifier, (1, 0), dtype)
        return (d_classifier, d_bias), (loss, lse, d_embeddings.astype(embeddings.dtype))

    carry = (
        jnp.zeros(operands.classifier.shape, accumulator),
        None if operands.bias is None else jnp.zeros(vocab, dtype),
    )
    given = tuple(
        x.reshape(-1, config.block_rows, *x.shape[1:])
        for x in (operands.embeddings, labels, weights)
    )
    (d_classifier, d_bias), (loss, lse, d_embeddings) = jax.lax.scan(of_rows, carry, given)
    grads = Operands(
        d_embeddings.reshape(operands.embeddings.shape),
        d_classifier.astype(operands.classifier.dtype),
        None if d_bias is None else d_bias.astype(jnp.asarray(operands.bias).dtype),
    )
    return ((loss.reshape(-1) * weights).sum(), lse.reshape(-1)), grads


def _total_backward(rules: Rules, config: Config, grads: Operands, cotangents):
    upstream, _ = cotangents
    scale = functools.partial(jax.tree.map, lambda x: x * upstream.astype(x.dtype))
    return scale(grads), None, None


_total = jax.custom_vjp(_total_only, nondiff_argnums=(0, 1))
_total.defvjp(_total_forward, _total_backward)
