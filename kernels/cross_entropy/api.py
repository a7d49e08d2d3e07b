"""Linear cross-entropy: head, softmax and loss of hidden states, never the [*, V] logits."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lminf.kernels.common import arguments, dispatch, numerics, tuning
from lminf.kernels.common.config import Key
from lminf.kernels.cross_entropy import reference, xla_chunked
from lminf.kernels.cross_entropy.operands import Losses, Operands, Rules

IMPLEMENTATIONS = {
    "reference": reference.losses,
    "xla_chunked": xla_chunked.losses,
    "mosaic_tpu": dispatch.lazily("lminf.kernels.cross_entropy.mosaic_tpu", "losses"),
    "triton": dispatch.lazily("lminf.kernels.cross_entropy.triton", "losses"),
}
ORDER = {
    "cpu": ("xla_chunked",),
    "tpu": ("mosaic_tpu", "xla_chunked"),
    "gpu": ("triton", "xla_chunked"),
}


class LossAndLse(NamedTuple):
    """What `return_lse` asks for: the loss as reduced, and the log-sum-exp of every token."""

    loss: Float[Array, "..."]
    lse: Float[Array, "..."]


def linear_cross_entropy(
    embeddings: Float[Array, "*B D"],
    classifier: Float[Array, "V D"],
    labels: Int[Array, "*B"],
    *,
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
) -> Array | LossAndLse:
    """Cross-entropy in nats per token, float32 (float64 for float64 inputs).

    Tokens whose label is `ignore_index` have loss 0 and do not count in the mean (none left: 0).
    With `shift`, state t is scored on label t + shift and the last `shift` states on nothing, so
    "none" has that many tokens fewer. `filter_eps` leaves blocks of the vocabulary whose softmax
    stays below it out of the gradients; "auto" is finfo(dtype).eps / 32, None filters nothing.
    `sort_vocab` lets an implementation that filters put entries of like mean logit side by side
    (`triton`; the others keep their order). Gradients are summed in `accum_dtype`. `deterministic`
    asks for bitwise equal runs, which `reference` and, on a CPU, `xla_chunked` give anyway.
    A label outside the vocabulary raises ValueError; inside jit, where it cannot, its loss is NaN.
    """
    call = prepare(
        embeddings, classifier, labels, bias=bias, logits_soft_cap=logits_soft_cap,
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
        reduction=reduction, shift=shift, filter_eps=filter_eps, sort_vocab=sort_vocab,
        accum_dtype=accum_dtype, deterministic=deterministic,
    )  # fmt: skip
    if not call.labels.size:
        of_rows = jnp.zeros((2, 0), numerics.statistics_dtype(embeddings.dtype))
    elif isinstance(config, xla_chunked.Config) and config.gradients == "forward":
        return _in_the_forward(call, reduction, return_lse, implementation, config)
    else:
        tuned = tuning.tuned(IMPLEMENTATIONS, _key(call))
        of_rows = dispatch.run(
            "linear_cross_entropy", tuned, ORDER, implementation,
            call.rules, call.operands, call.labels, config,
        )  # fmt: skip
    return reduced(call, Losses(*of_rows), reduction, return_lse)


def _key(call: "Call") -> Key:
    rows, width = call.operands.embeddings.shape
    vocab = call.operands.classifier.shape[0]
    dtype = str(call.operands.embeddings.dtype)
    return Key("linear_cross_entropy", dtype, 1, 1, width, rows, vocab, vocab, 0)


class Call(NamedTuple):
    """One call with its arguments checked: tokens as rows, labels that are safe to look up."""

    rules: Rules
    operands: Operands
    labels: Int[Array, " rows"]  # 0 where there is none or it is outside
    counted: Bool[Array, "*B"]
    outside: Bool[Array, "*B"]  # neither in the vocabulary nor ignored


def prepare(
    embeddings: Array, classifier: Array, labels: Array, *, bias: Array | None,
    logits_soft_cap: float | None, ignore_index: int, label_smoothing: float, z_loss: float,
    reduction: str, shift: int, filter_eps: float | str | None, sort_vocab: bool,
    accum_dtype: Any, deterministic: bool,
) -> Call:  # fmt: skip
    """The arguments as implementations take them; ValueError names what does not fit."""
    width = embeddings.shape[-1]
    vocab, _ = arguments.shape("classifier", classifier, "V D", (None, width))
    if labels.shape != embeddings.shape[:-1]:
        raise ValueError(f"labels has shape {labels.shape}; it must be {embeddings.shape[:-1]}")
    if not vocab:
        raise ValueError("classifier has no rows; a vocabulary has at least 1")
    if bias is not None:
        arguments.shape("bias", bias, "V", (vocab,))
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} must be 'mean', 'sum' or 'none'")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1)")
    if not isinstance(shift, int) or not 0 <= shift <= (labels.shape or (0,))[-1]:
        raise ValueError(f"shift={shift!r} must be an int from 0 to the {labels.shape} labels")
    if shift:
        length = labels.shape[-1] - shift
        embeddings, labels = embeddings[..., :length, :], labels[..., shift:]
    counted = labels != ignore_index
    outside = counted & ((labels < 0) | (labels >= vocab))
    if not isinstance(outside, Tracer) and np.asarray(outside).any():
        wrong = np.asarray(labels)[np.asarray(outside)][0]
        raise ValueError(f"labels holds {wrong}, which is neither in [0, {vocab}) nor ignore_index")
    if filter_eps == "auto":
        filter_eps = float(jnp.finfo(embeddings.dtype).eps) / 32
    rules = Rules(
        logits_soft_cap, label_smoothing, z_loss, filter_eps,
        sort_vocab, jnp.dtype(accum_dtype), deterministic,
    )  # fmt: skip
    operands = Operands(embeddings.reshape(-1, width), classifier, bias)
    safe = jnp.where(counted & ~outside, labels, 0).astype(jnp.int32).reshape(-1)
    return Call(rules, operands, safe, counted, outside)


def reduced(call: Call, of_rows: Losses, reduction: str, return_lse: bool) -> Array | LossAndLse:
    """What the caller asked for, from the loss and LSE of every row."""
    losses, lse = (x.reshape(call.counted.shape) for x in of_rows)
    loss = jnp.where(call.counted, jnp.where(call.outside, jnp.nan, losses), 0)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / jnp.maximum(call.counted.sum(), 1).astype(loss.dtype)
    return LossAndLse(loss, lse) if return_lse else loss


def _in_the_forward(call: Call, reduction, return_lse, implementation, config):
    """The loss whose gradients `xla_chunked` forms in the forward; its LSE has no gradient."""

    def total(weights):
        if reduction == "none":
            raise NotImplementedError('gradients="forward" needs reduction="mean" or "sum"')
        return xla_chunked.total(call.rules, call.operands, call.labels, weights, config)

    dtype = numerics.statistics_dtype(call.operands.embeddings.dtype)
    weights = (call.counted & ~call.outside).astype(dtype).reshape(-1)
    if reduction == "mean":
        weights = weights / jnp.maximum(call.counted.sum(), 1).astype(dtype)
    loss, lse = dispatch.run(
        "linear_cross_entropy", {"xla_chunked": total}, {"cpu": ("xla_chunked",)}, implementation,
        weights,
    )  # fmt: skip
    loss = jnp.where(call.outside.any(), jnp.nan, loss)
    return LossAndLse(loss, lse.reshape(call.counted.shape)) if return_lse else loss
