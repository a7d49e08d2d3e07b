"""The linear cross-entropy with the classifier split over the vocabulary.

A device of `vocab_axis` holds V / n rows of the classifier and never sees the others:
    top = pmax(top_s);  lse = top + log psum(total_s exp(top_s - top));  x[label] = psum(owned ones)
The backward needs the LSE only: dC is local, dE is summed over the shards, in float32. Tokens may
be split over `token_axes`; dC is then summed over those.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lminf.kernels.common import dispatch
from lminf.kernels.cross_entropy import api, blocks, xla_chunked
from lminf.kernels.cross_entropy.operands import Losses, Operands, Rules


def sharded_linear_cross_entropy(
    embeddings: Float[Array, "*B D"],
    classifier: Float[Array, "V D"],
    labels: Int[Array, "*B"],
    *,
    mesh: Mesh,
    vocab_axis: str,
    token_axes: Sequence[str] = (),
    embed_reduce: Literal["psum", "psum_scatter"] = "psum",
    bias: Float[Array, " V"] | None = None,
    logits_soft_cap: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    shift: int = 0,
    return_lse: bool = False,
    filter_eps: float | Literal["auto"] | None = "auto",
    sort_vocab: bool = True,
    accum_dtype: DTypeLike = jnp.float32,
    deterministic: bool = False,
    implementation: dispatch.Choice = None,
    config: Any = None,
) -> Array | api.LossAndLse:
    """What `linear_cross_entropy` gives, with V split over `vocab_axis` of the mesh.

    Tokens, in the order of the flattened leading axes, are split over `token_axes`. With
    "psum_scatter" they are split over `vocab_axis` too: gathered before the products, and dE leaves
    as it came in. Neither V nor the number of tokens need be a multiple (they are padded here,
    which costs a copy of the classifier if V is not). The mesh's axes are of type Auto. The
    vocabulary keeps its order.
    """
    axes = (vocab_axis, *token_axes)
    for name, axis in zip(("vocab_axis", *["token_axes"] * len(token_axes)), axes, strict=True):
        if axis not in mesh.shape:
            raise ValueError(f"{name} names {axis!r}; the mesh has {tuple(mesh.shape)}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(f"mesh has axes of {mesh.axis_types}; make it with AxisType.Auto")
    if len(set(axes)) != len(axes):
        raise ValueError(f"token_axes={tuple(token_axes)} repeat an axis or hold {vocab_axis!r}")
    if embed_reduce not in ("psum", "psum_scatter"):
        raise ValueError(f"embed_reduce={embed_reduce!r} must be 'psum' or 'psum_scatter'")
    call = api.prepare(
        embeddings, classifier, labels, bias=bias, logits_soft_cap=logits_soft_cap,
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
        reduction=reduction, shift=shift, filter_eps=filter_eps, sort_vocab=sort_vocab,
        accum_dtype=accum_dtype, deterministic=deterministic,
    )  # fmt: skip
    layout = Layout(mesh, vocab_axis, tuple(token_axes), embed_reduce == "psum_scatter")
    of_rows = dispatch.run(
        "sharded_linear_cross_entropy", {"xla_chunked": losses}, {"cpu": ("xla_chunked",)},
        implementation, layout, call.rules, call.operands, call.labels, config,
    )  # fmt: skip
    return api.reduced(call, Losses(*of_rows), reduction, return_lse)


class Layout(NamedTuple):
    """Which mesh axes split what; hashable."""

    mesh: Mesh
    vocab_axis: str
    token_axes: tuple[str, ...]
    scattered: bool  # embeddings and dE are split over vocab_axis too

    @property
    def rows(self) -> P:
        return P(self.token_axes or None)

    def specs(self, operands: Operands) -> Operands:
        """Partition specs in the place of the operands."""
        tokens = (*self.token_axes, self.vocab_axis) if self.scattered else self.token_axes
        bias = None if operands.bias is None else P(self.vocab_axis)
        specs: list[Any] = [P(tokens or None, None), P(self.vocab_axis, None), bias]
        return Operands(*specs)

    def size(self, axes: Sequence[str]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)


def losses(
    layout: Layout, rules: Rules, operands: Operands, labels: Int[Array, " rows"],
    config: xla_chunked.Config | None,
) -> Losses:  # fmt: skip
    """Loss and LSE of every row, split as the tokens are."""
    rows, vocab = operands.embeddings.shape[0], operands.classifier.shape[0]
    row_shards = layout.size(layout.token_axes)
    even_rows = -rows % (row_shards * (layout.size([layout.vocab_axis]) if layout.scattered else 1))
    even_vocab = -vocab % layout.size([layout.vocab_axis])
    bias = operands.bias
    padded = Operands(
        jnp.pad(operands.embeddings, ((0, even_rows), (0, 0))),
        jnp.pad(operands.classifier, ((0, even_vocab), (0, 0))) if even_vocab
        else operands.classifier,
        bias if bias is None else jnp.pad(bias, (0, even_vocab)),
    )  # fmt: skip
    padded_losses = _losses(layout, rules, config, vocab, padded, jnp.pad(labels, (0, even_rows)))
    return Losses(*(x[:rows] for x in padded_losses))


def _compute(layout: Layout, rules, config, vocab, operands: Operands, labels) -> Losses:
    def local(operands: Operands, labels) -> Losses:
        operands = _gathered(layout, operands)
        walk, (labels,) = _walk(layout, rules, config, vocab, operands, labels)
        statistics = blocks.statistics(walk, labels)
        total = functools.partial(jax.lax.psum, axis_name=layout.vocab_axis)
        top = jax.lax.pmax(statistics.top, layout.vocab_axis)
        statistics = blocks.Statistics(
            top, total(statistics.total * jnp.exp(statistics.top - top)),
            total(statistics.label_logit), total(statistics.summed),
        )  # fmt: skip
        rows = operands.embeddings.shape[0]
        return Losses(*(x[:rows] for x in blocks.loss_and_lse(rules, statistics, vocab)))

    by_row: list[Any] = [layout.rows, layout.rows]
    return _shard_map(layout, local, operands, 1, Losses(*by_row))(operands, labels)


def _forward(layout: Layout, rules, config, vocab, operands: Operands, labels):
    losses = _compute(layout, rules, config, vocab, operands, labels)
    return losses, (operands, labels, losses.lse)


def _backward(layout: Layout, rules, config, vocab, saved, cotangents: Losses):
    operands, labels, lse = saved

    def local(given: Operands, labels, lse, d_loss, d_lse) -> Operands:
        operands = _gathered(layout, given)
        rows = operands.embeddings.shape[0]
        walk, each = _walk(layout, rules, config, vocab, operands, labels, lse, d_loss, d_lse)
        dtype = walk.accumulator if layout.token_axes else operands.classifier.dtype
        labels, lse, d_loss, d_lse = each
        grads = blocks.gradients(walk, labels, lse, d_loss, d_lse, dtype)
        d_embeddings = grads.embeddings[:rows]
        if layout.scattered:
            d_embeddings = jax.lax.psum_scatter(d_embeddings, layout.vocab_axis, tiled=True)
        else:
            d_embeddings = jax.lax.psum(d_embeddings, layout.vocab_axis)
        d_classifier, d_bias = grads.classifier, grads.bias
        if layout.token_axes:
            d_classifier, d_bias = jax.lax.psum((d_classifier, d_bias), layout.token_axes)
        return jax.tree.map(
            lambda x, like: x.astype(like.dtype),
            Operands(d_embeddings, d_classifier, d_bias),
            given,
        )

    gradients = _shard_map(layout, local, operands, 4, layout.specs(operands))(
        operands, labels, lse, *cotangents
    )
    return gradients, None


def _shard_map(layout: Layout, local, operands: Operands, each_row: int, out_specs):
    specs = (layout.specs(operands), *[layout.rows] * each_row)
    # Unchecked: the sums over axes are written out above, and loops carry both kinds of values.
    return jax.shard_map(
        local, mesh=layout.mesh, in_specs=specs, out_specs=out_specs, check_vma=False
    )


def _gathered(layout: Layout, operands: Operands) -> Operands:
    if not layout.scattered:
        return operands
    gathered = jax.lax.all_gather(operands.embeddings, layout.vocab_axis, tiled=True)
    return operands._replace(embeddings=gathered)


def _walk(layout: Layout, rules, config, vocab: int, operands: Operands, *each_row):
    """The walk over this device's shard, and the arrays by row padded to its blocks."""
    config = xla_chunked.sized(config, operands)
    entries = operands.classifier.shape[0]
    first = jax.lax.axis_index(layout.vocab_axis).astype(jnp.int32) * entries
    shard = blocks.Shard(first, jnp.clip(vocab - first, 0, entries))
    operands, *each_row = xla_chunked.padded(config, operands, *each_row)
    sizes = blocks.Sizes(config.block_rows, config.block_vocab)
    return blocks.Walk(rules, sizes, operands, shard, vocab), tuple(each_row)


_losses = jax.custom_vjp(_compute, nondiff_argnums=(0, 1, 2, 3))
_losses.defvjp(_forward, _backward)
