"""Linear cross-entropy: head, softmax and loss of hidden states, never the [*, V] logits."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from kernels.common import dispatch
from kernels.cross_entropy import reference, xla_chunked
from kernels.cross_entropy.operands import Operands, Rules

IMPLEMENTATIONS = {"reference": reference.losses, "xla_chunked": xla_chunked.losses}
ORDER = {"cpu": ("xla_chunked",)}


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
    implementation: dispatch.Choice = None,
    config: xla_chunked.Config | None = None,
) -> Array | LossAndLse:
    """Cross-entropy in nats per token, float32 (float64 for float64 inputs).

    Tokens whose label is `ignore_index` have loss 0 and do not count in the mean (none left: 0).
    With `shift`, state t is scored on label t + shift and the last `shift` states on nothing, so
    "none" has that many tokens fewer. `filter_eps` leaves blocks of the vocabulary whose softmax
    stays below it out of the gradients; "auto" is finfo(dtype).eps / 32, None filters nothing.
    A label outside the vocabulary raises ValueError; inside jit, where it cannot, its loss is NaN.
    """
    if classifier.ndim != 2 or classifier.shape[-1] != embeddings.shape[-1]:
        raise ValueError(
            f"classifier has shape {classifier.shape}; it must be [V, D={embeddings.shape[-1]}]"
        )
    if labels.shape != embeddings.shape[:-1]:
        raise ValueError(f"labels has shape {labels.shape}; it must be {embeddings.shape[:-1]}")
    vocab, width = classifier.shape
    if bias is not None and bias.shape != (vocab,):
        raise ValueError(f"bias has shape {bias.shape}; it must be [V={vocab}]")
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
    shape = labels.shape
    if not labels.size:
        losses, lse = jnp.zeros((2, *shape), jnp.float32)
    else:
        found = dispatch.run(
            "linear_cross_entropy", IMPLEMENTATIONS, ORDER, implementation,
            Rules(logits_soft_cap, label_smoothing, z_loss, filter_eps),
            Operands(embeddings.reshape(-1, width), classifier, bias),
            jnp.where(counted & ~outside, labels, 0).astype(jnp.int32).reshape(-1),
            config,
        )  # fmt: skip
        losses, lse = (x.reshape(shape) for x in found)
    losses = jnp.where(counted, jnp.where(outside, jnp.nan, losses), 0)
    loss = losses
    if reduction != "none":
        loss = losses.sum()
    if reduction == "mean":
        loss = loss / jnp.maximum(counted.sum(), 1).astype(loss.dtype)
    return LossAndLse(loss, lse) if return_lse else loss
