"""The linear cross-entropy in Triton, for NVIDIA and AMD GPUs: no [rows, V] array, ever.

The forward keeps an online maximum and sum over the vocabulary, cut in splits to fill the GPU. The
backward recomputes a tile of logits, forms its gradient dx and adds dx C to dE and dx^T E to dC in
float32; a tile that no row gives weight to skips both. With `sort_vocab`, entries of like mean
logit share a tile, so that whole tiles fall under the threshold: the mean over the rows of e C^T is
mean(e) C^T, one cheap product. The sums are atomic, and their order is not fixed; `deterministic`
takes a pass for dE and one for dC, each owning what it adds to, for one more product.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf.kernels.common import dispatch, launch, numerics
from lminf.kernels.cross_entropy import blocks
from lminf.kernels.cross_entropy.operands import Losses, Operands, Rules


@dataclass(frozen=True)
class Tile:
    """Sizes of one kernel's tiles, and what the compiler is told."""

    rows: int
    vocab: int
    width: int  # columns of the embeddings in one step of a product
    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """Tiles of the kernels; flat, as tuning tables keep it."""

    forward_rows: int = 128
    forward_vocab: int = 128
    forward_width: int = 64
    forward_warps: int = 8
    forward_stages: int = 3
    backward_rows: int = 128
    backward_vocab: int = 128
    backward_width: int = 32
    backward_warps: int = 8
    backward_stages: int = 3
    narrow_rows: int = 64  # of a backward that needs more registers: see _backward
    narrow_vocab: int = 128
    narrow_width: int = 32
    narrow_warps: int = 8
    narrow_stages: int = 2

    def tile(self, kernel: str) -> Tile:
        names = (f"{kernel}_{field.name}" for field in dataclasses.fields(Tile))
        return Tile(*(getattr(self, name) for name in names))


def config_of(forward: Tile, backward: Tile, narrow: Tile) -> Config:
    """The config with these tiles."""
    return Config(*(x for tile in (forward, backward, narrow) for x in dataclasses.astuple(tile)))


def losses(rules: Rules, operands: Operands, labels: Int[Array, " rows"], config: object) -> Losses:
    """Loss and LSE of every row; differentiable in `operands`, through the LSE too."""
    launch.require()
    dtypes = {operands.embeddings.dtype, operands.classifier.dtype}
    if len(dtypes) > 1:
        raise NotImplementedError(f"operands of different dtypes: {sorted(map(str, dtypes))}")
    if operands.embeddings.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"operands in {operands.embeddings.dtype}")
    if jnp.dtype(rules.accum_dtype) != jnp.float32:
        raise NotImplementedError(f"accum_dtype={jnp.dtype(rules.accum_dtype)}; it adds in float32")
    config = dispatch.settled(
        Config, config, lambda: _TILES[operands.embeddings.dtype == jnp.float32]
    )
    return Losses(*_losses(rules, config, operands, labels))


# Not tuned: no GPU has run them yet. They compile without spilling a register.
_TILES = {
    False: config_of(Tile(128, 128, 64, 8, 3), Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 8, 2)),
    True: config_of(Tile(64, 64, 32, 8, 2), Tile(32, 64, 32, 8, 2), Tile(32, 64, 32, 8, 2)),
}

PROGRAMS = 264  # two for each multiprocessor of an H100


def _constants(rules: Rules, operands: Operands, tile: Tile) -> dict:
    return {
        "WIDTH": operands.embeddings.shape[1],
        "BLOCK_R": tile.rows,
        "BLOCK_V": tile.vocab,
        "BLOCK_D": tile.width,
        "CAP": rules.soft_cap,
        "BIAS": operands.bias is not None,
        # float32 products on tensor cores: three of tf32 each, as exact as one of float32.
        "PRECISION": "tf32x3",
    }


def _compute(rules: Rules, config: Config, operands: Operands, labels):
    call = functools.partial(_launch_statistics, rules, config.tile("forward"))
    statistics = jax.custom_batching.sequential_vmap(call)(operands, labels)
    return blocks.loss_and_lse(rules, blocks.Statistics(*statistics), operands.classifier.shape[0])


def _launch_statistics(rules: Rules, tile: Tile, operands: Operands, labels):
    """Maximum, sum, label's logit and sum of logits of every row."""
    from lminf.kernels.cross_entropy import triton_kernels  # needs triton

    embeddings, classifier, bias = operands
    rows, vocab = embeddings.shape[0], classifier.shape[0]
    row_blocks = math.ceil(rows / tile.rows)
    splits = min(math.ceil(PROGRAMS / row_blocks), math.ceil(vocab / tile.vocab))
    part = jax.ShapeDtypeStruct((splits, rows), jnp.float32)
    tops, totals, label_logits, summed = launch.run(
        launch.Launch(
            triton_kernels.statistics,
            (row_blocks * splits,),
            [
                embeddings, classifier, classifier if bias is None else bias, labels,
                rows, vocab, splits,
            ],
            [part] * 4,
            _constants(rules, operands, tile)
            | {"SUMMED": rules.label_smoothing != 0, "MASK": numerics.EMPTY_MAX},
            tile.warps,
            tile.stages,
            name="cross_entropy_statistics",
        )
    )  # fmt: skip
    top = tops.max(0)
    total = (totals * jnp.exp(tops - top[None])).sum(0)
    return top, total, label_logits.sum(0), summed.sum(0)


def _forward(rules: Rules, config: Config, operands: Operands, labels):
    loss, lse = _compute(rules, config, operands, labels)
    return (loss, lse), (operands, labels, lse)


class _Rows(NamedTuple):
    """What the backward reads of every row."""

    labels: Int[Array, " rows"]
    lse: Float[Array, " rows"]
    weigh: Float[Array, " rows"]  # of the softmax in d(loss)
    factor: Float[Array, " rows"]  # of the softmax in the gradient
    d_loss: Float[Array, " rows"]


def _backward(rules: Rules, config: Config, saved, cotangents):
    operands, labels, lse = saved
    d_loss, d_lse = cotangents
    weigh = 1 + 2 * rules.z_loss * lse
    rows = _Rows(labels, lse, weigh, weigh * d_loss + d_lse, d_loss)
    order = labels  # never read
    if rules.filter_eps is not None and rules.sort_vocab:
        order = _by_mean_logit(operands)
    # A soft cap keeps a second tile of numbers, smoothing a mask; owners keep their addresses.
    narrow = rules.deterministic or rules.soft_cap is not None or rules.label_smoothing > 0
    tile = config.tile("narrow" if narrow else "backward")
    call = functools.partial(_launch_gradients, rules, tile)
    gradients = jax.custom_batching.sequential_vmap(call)(operands, rows, order)
    d_embeddings, d_classifier, d_bias = gradients
    bias = operands.bias
    return (
        Operands(
            d_embeddings.astype(operands.embeddings.dtype),
            d_classifier.astype(operands.classifier.dtype),
            None if bias is None else d_bias.astype(bias.dtype),
        ),
        None,
    )


def _by_mean_logit(operands: Operands) -> Int[Array, " V"]:
    """Entries from the highest mean logit to the lowest; a soft cap leaves the order alone."""
    embeddings, classifier, bias = operands
    mean = embeddings.mean(0, dtype=jnp.float32).astype(classifier.dtype)
    logits = jnp.matmul(classifier, mean, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias.astype(jnp.float32)
    return jnp.argsort(-logits).astype(jnp.int32)


def _launch_gradients(rules: Rules, tile: Tile, operands: Operands, rows: _Rows, order):
    """Float32 gradients of embeddings, classifier and bias."""
    from lminf.kernels.cross_entropy import triton_kernels  # needs triton

    embeddings, classifier, bias = operands
    count, vocab = embeddings.shape[0], classifier.shape[0]
    row_blocks, vocab_blocks = math.ceil(count / tile.rows), math.ceil(vocab / tile.vocab)
    shapes = [embeddings.shape, classifier.shape, (vocab,) if bias is not None else (1,)]

    all_gradients, of_embeddings, of_classifier = (
        triton_kernels.BOTH.value, triton_kernels.EMBEDDINGS.value, triton_kernels.CLASSIFIER.value,
    )  # fmt: skip

    def part(which: int, programs: int):
        indices = {of_embeddings: (0,), of_classifier: (1, 2)}.get(which, (0, 1, 2))
        outputs = [
            jax.ShapeDtypeStruct(shape if i in indices else (1,), jnp.float32)
            for i, shape in enumerate(shapes)
        ]
        return launch.run(
            launch.Launch(
                triton_kernels.gradients,
                (programs,),
                [
                    embeddings, classifier, classifier if bias is None else bias,
                    rows.labels, order, *rows[1:], count, vocab,
                ],
                outputs,
                _constants(rules, operands, tile)
                | {
                    "SMOOTHING": rules.label_smoothing,
                    "SORTED": rules.filter_eps is not None and rules.sort_vocab,
                    "EPSILON": rules.filter_eps,
                    "PASS": which,
                },
                tile.warps,
                tile.stages,
                zeroed=(0, 1, 2),
                name="cross_entropy_gradients",
            )
        )  # fmt: skip

    if not rules.deterministic:
        return part(all_gradients, row_blocks * vocab_blocks)
    d_embeddings, _, _ = part(of_embeddings, row_blocks)
    _, d_classifier, d_bias = part(of_classifier, vocab_blocks)
    return d_embeddings, d_classifier, d_bias


_losses = jax.custom_vjp(_compute, nondiff_argnums=(0, 1))
_losses.defvjp(_forward, _backward)
