"""The linear cross-entropy in blocks of rows and vocabulary: no [rows, V] array, four GEMMs in all.

The forward keeps an online maximum and sum over the blocks of the vocabulary; the label's logit is
a gathered dot product. The backward recomputes a block's logits x and forms
    dx = (g (1 + 2 z lse) + g_lse) softmax(x) - g smoothing / V      on the block
       - g (1 - smoothing) at the label                              by gather and scatter
    dE += dx C;  dC += dx^T E
A block in which |dx| before its upstream factor stays under `filter_eps` skips the two products;
the labels' part and the bias are never skipped.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.common import numerics
from kernels.cross_entropy.operands import Losses, Operands, Rules


@dataclass(frozen=True)
class Config:
    """Sizes of the blocks. On a CPU the logits of a block (6 MB) should stay near the caches."""

    block_rows: int = 1024  # tokens
    block_vocab: int = 1536  # entries


def losses(
    rules: Rules, operands: Operands, labels: Int[Array, " rows"], config: Config | None
) -> Losses:
    """Loss and LSE of every row; differentiable in `operands`, through the LSE too."""
    config = config or Config()
    rows, vocab = operands.embeddings.shape[0], operands.classifier.shape[0]
    config = Config(min(config.block_rows, rows), min(config.block_vocab, vocab))
    padding = -rows % config.block_rows
    padded = operands._replace(embeddings=jnp.pad(operands.embeddings, ((0, padding), (0, 0))))
    found = _losses(rules, config, padded, jnp.pad(labels, (0, padding)))
    return Losses(*(x[:rows] for x in found))


class _Blocks:
    """The vocabulary in blocks of W entries. The last one starts early rather than end late: its
    first entries were seen before and do not count again, and the classifier is never copied.
    """

    def __init__(self, rules: Rules, config: Config, operands: Operands):
        self.rules, self.width, self.operands = rules, config.block_vocab, operands
        self.vocab = operands.classifier.shape[0]
        self.count = jnp.int32(-(-self.vocab // self.width))
        self.dtype = numerics.statistics_dtype(operands.embeddings.dtype)

    def start(self, index):
        return jnp.minimum(index * self.width, self.vocab - self.width)

    def fresh(self, index):
        """Which entries of the block no earlier block had: [1, W]."""
        entries = self.start(index) + jnp.arange(self.width, dtype=jnp.int32)
        return (entries >= index * self.width)[None]

    def classifier(self, index) -> Float[Array, "W D"]:
        return jax.lax.dynamic_slice_in_dim(self.operands.classifier, self.start(index), self.width)

    def logits(self, embeddings, classifier, index):
        """[rows, W] logits, and d(logit)/d(product) where a soft cap bends it."""
        logits = _dot(embeddings, classifier, (1, 1), self.dtype)
        if self.operands.bias is not None:
            bias = jax.lax.dynamic_slice_in_dim(self.operands.bias, self.start(index), self.width)
            logits += bias.astype(self.dtype)[None]
        return self.capped(logits)

    def wanted(self, embeddings, labels):
        """The label's logit of every row, its bend, and the labels' classifier rows."""
        rows = self.operands.classifier[labels]
        logits = (embeddings.astype(self.dtype) * rows.astype(self.dtype)).sum(-1)
        if self.operands.bias is not None:
            logits += self.operands.bias[labels].astype(self.dtype)
        logits, bend = self.capped(logits)
        return logits, bend, rows

    def capped(self, logits) -> tuple[Array, Array | None]:
        cap = self.rules.soft_cap
        if cap is None:
            return logits, None
        bent = jnp.tanh(logits / cap)
        return cap * bent, 1 - bent * bent


def _dot(a, b, contract: tuple[int, int], dtype) -> Float[Array, "X Y"]:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    if a.dtype != b.dtype:
        a, b = a.astype(dtype), b.astype(dtype)
    return jax.lax.dot_general(a, b, dims, preferred_element_type=dtype)


def _compute(rules: Rules, config: Config, operands: Operands, labels) -> Losses:
    blocks = _Blocks(rules, config, operands)
    dtype = blocks.dtype

    def of_rows(given):
        embeddings, labels = given

        def visit(index, carry):
            top, total, summed = carry
            logits, _ = blocks.logits(embeddings, blocks.classifier(index), index)
            fresh = blocks.fresh(index)
            seen = jnp.where(fresh, logits, numerics.MASK_VALUE)
            new_top = jnp.maximum(top, seen.max(-1))
            total = total * jnp.exp(top - new_top) + jnp.exp(seen - new_top[:, None]).sum(-1)
            if rules.label_smoothing:
                summed += jnp.where(fresh, logits, 0).sum(-1)
            return new_top, total, summed

        zeros = jnp.zeros(embeddings.shape[:1], dtype)
        carry = (jnp.full_like(zeros, numerics.EMPTY_MAX), zeros, zeros)
        top, total, summed = jax.lax.fori_loop(jnp.int32(0), blocks.count, visit, carry)
        lse = top + jnp.log(total)
        wanted = blocks.wanted(embeddings, labels)[0]
        loss = lse - (1 - rules.label_smoothing) * wanted
        loss += rules.z_loss * lse * lse - rules.label_smoothing * summed / blocks.vocab
        return loss, lse

    loss, lse = jax.lax.map(of_rows, _by_block(config, operands.embeddings, labels))
    return Losses(loss.reshape(-1), lse.reshape(-1))


def _by_block(config: Config, *arrays):
    return tuple(x.reshape(-1, config.block_rows, *x.shape[1:]) for x in arrays)


def _forward(rules: Rules, config: Config, operands: Operands, labels):
    found = _compute(rules, config, operands, labels)
    return found, (operands, labels, found.lse)


def _backward(rules: Rules, config: Config, saved, cotangents: Losses):
    operands, labels, lse = saved
    blocks = _Blocks(rules, config, operands)
    dtype = blocks.dtype

    def of_rows(carry, given):
        embeddings, labels, lse, d_loss, d_lse = given
        weigh = (1 + 2 * rules.z_loss * lse)[:, None]

        def visit(index, carry):
            d_embeddings, d_classifier, d_bias = carry
            classifier, start = blocks.classifier(index), blocks.start(index)
            logits, bend = blocks.logits(embeddings, classifier, index)
            share = jnp.where(blocks.fresh(index), jnp.exp(logits - lse[:, None]), 0)
            even = jnp.where(blocks.fresh(index), rules.label_smoothing / blocks.vocab, 0)
            # Judged before the upstream factor, so that the scale of the loss decides nothing.
            size = jnp.abs(share * weigh - even).max()
            d_logits = share * (weigh * d_loss[:, None] + d_lse[:, None]) - even * d_loss[:, None]
            if bend is not None:
                d_logits = d_logits * bend
            if d_bias is not None:
                part = jax.lax.dynamic_slice_in_dim(d_bias, start, blocks.width) + d_logits.sum(0)
                d_bias = jax.lax.dynamic_update_slice_in_dim(d_bias, part, start, 0)
            rounded = d_logits.astype(embeddings.dtype)

            def products(grads):
                d_embeddings, d_classifier = grads
                part = jax.lax.dynamic_slice_in_dim(d_classifier, start, blocks.width)
                part += _dot(rounded, embeddings, (0, 0), dtype)
                return (
                    d_embeddings + _dot(rounded, classifier, (1, 0), dtype),
                    jax.lax.dynamic_update_slice_in_dim(d_classifier, part, start, 0),
                )

            grads = (d_embeddings, d_classifier)
            if rules.filter_eps is None:
                grads = products(grads)
            else:
                grads = jax.lax.cond(size >= rules.filter_eps, products, lambda g: g, grads)
            return *grads, d_bias

        d_classifier, d_bias = carry
        _, bend, rows = blocks.wanted(embeddings, labels)
        at_label = -(1 - rules.label_smoothing) * d_loss
        if bend is not None:
            at_label = at_label * bend
        d_embeddings = at_label[:, None] * rows.astype(dtype)
        d_classifier = d_classifier.at[labels].add(at_label[:, None] * embeddings.astype(dtype))
        if d_bias is not None:
            d_bias = d_bias.at[labels].add(at_label)
        d_embeddings, *carry = jax.lax.fori_loop(
            jnp.int32(0), blocks.count, visit, (d_embeddings, d_classifier, d_bias)
        )
        return tuple(carry), d_embeddings.astype(embeddings.dtype)

    bias = operands.bias
    carry = (
        jnp.zeros(operands.classifier.shape, dtype),
        None if bias is None else jnp.zeros(bias.shape, dtype),
    )
    given = _by_block(config, operands.embeddings, labels, lse, *cotangents)
    (d_classifier, d_bias), d_embeddings = jax.lax.scan(of_rows, carry, given)
    return (
        Operands(
            d_embeddings.reshape(operands.embeddings.shape),
            d_classifier.astype(operands.classifier.dtype),
            d_bias if bias is None else jnp.asarray(d_bias, bias.dtype),
        ),
        None,
    )


_losses = jax.custom_vjp(_compute, nondiff_argnums=(0, 1))
_losses.defvjp(_forward, _backward)
