"""The softmax of a vocabulary whose rows are divided over the devices of a mesh axis, in passes.

    S   Y = X Wᵀ,  m' = max Y,  s' = Σ exp(Y - m'),  P' = exp(Y - m') / s'       of the own rows W
    C1  m = max m',  s = Σ s' exp(m' - m),  α = s' exp(m' - m) / s               one all-reduce
    T   dW = (g (α P' - G))ᵀ X,  and with two barriers dX = Σ g (α P' - G) W     a second one

G is one at the label. With one barrier, S also forms A = P' W and B = G W, so that C1 gives
dX = Σ g (α A - B) and nothing waits for T. Source: Yeung et al. 2024, arXiv:2411.05288.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

PADDING_LOGIT = -1e30  # the logit of a row that only fills up the last device's share


class LocalSoftmax(NamedTuple):
    """The softmax of N tokens over the device's own rows of the vocabulary; float32."""

    top: Float[Array, " N"]  # m'
    total: Float[Array, " N"]  # s'
    label_logit: Float[Array, " N"]  # 0 where another device has the label
    label_slope: Float[Array, " N"]  # derivative of that logit; 0 there too
    slopes: Float[Array, "N V"]  # P' times the derivatives, which a soft cap makes less than 1
    softmax_rows: Float[Array, "N D"] | None  # A; None with two barriers
    label_rows: Float[Array, "N D"] | None  # B
    # Of what is minimised, to be multiplied with `slopes` and with G; 0 until C1.
    softmax_weight: Float[Array, " N"]
    label_weight: Float[Array, " N"]


def softmax_pass(
    hidden: Float[Array, "N D"],
    rows: Float[Array, "V D"],
    labels: Int[Array, " N"],
    *,
    first: Int[Array, ""],
    vocab_size: int,
    soft_cap: float | None,
    barriers: int,
) -> LocalSoftmax:
    """S, where `rows` are those from `first` on of a vocabulary of `vocab_size`."""
    logits = jnp.einsum("nd,vd->nv", hidden, rows, preferred_element_type=jnp.float32)
    derivative = jnp.ones((1, 1), jnp.float32)
    if soft_cap is not None:
        capped = jnp.tanh(logits / soft_cap)
        logits, derivative = soft_cap * capped, 1 - jnp.square(capped)
    ids = first + jnp.arange(rows.shape[0], dtype=jnp.int32)[None]
    logits = jnp.where(ids < vocab_size, logits, PADDING_LOGIT)
    top = logits.max(1)
    unnormalised = jnp.exp(logits - top[:, None])
    total = unnormalised.sum(1)
    slopes = unnormalised / total[:, None] * derivative
    at_label = ids == labels[:, None]
    label_slope = jnp.where(at_label, derivative, 0.0).sum(1)
    softmax_rows = label_rows = None
    if barriers == 1:
        softmax_rows = _einsum_f32("nv,vd->nd", slopes, rows)
        label = jnp.clip(labels - first, 0, rows.shape[0] - 1)
        label_rows = label_slope[:, None] * rows[label].astype(jnp.float32)
    zero = jnp.zeros_like(top)
    label_logit = jnp.where(at_label, logits, 0.0).sum(1)
    return LocalSoftmax(
        top, total, label_logit, label_slope, slopes, softmax_rows, label_rows, zero, zero
    )


def _einsum_f32(axes: str, weights: Array, operand: Array) -> Array:
    """Float32 sums of products in the dtype of the model."""
    weights = weights.astype(operand.dtype)
    return jnp.einsum(axes, weights, operand, preferred_element_type=jnp.float32)


class Reduced(NamedTuple):
    """The loss after the all-reduce C1; equal on all devices but for `local`."""

    nll: Float[Array, " N"]  # nats
    lse: Float[Array, " N"]
    hidden_gradient: Float[Array, "N D"] | None  # None with two barriers
    local: LocalSoftmax  # with its weights


def reduce_softmax(
    local: LocalSoftmax, weight: Float[Array, " N"], *, axis: str, z_loss: float
) -> Reduced:
    """The all-reduce C1 for the objective Σ weight (nll + z_loss lse²)."""
    top = jax.lax.pmax(local.top, axis)
    local_total = local.total * jnp.exp(local.top - top)
    total, label_logit = jax.lax.psum((local_total, local.label_logit), axis)
    lse = top + jnp.log(total)
    local = local._replace(
        softmax_weight=weight * (1 + 2 * z_loss * lse) * local_total / total, label_weight=weight
    )
    gradient = None
    if local.softmax_rows is not None and local.label_rows is not None:
        part = local.softmax_weight[:, None] * local.softmax_rows
        gradient = jax.lax.psum(part - weight[:, None] * local.label_rows, axis)
    return Reduced(lse - label_logit, lse, gradient, local)


def gradient_pass(
    local: LocalSoftmax,
    hidden: Float[Array, "N D"],
    rows: Float[Array, "V D"],
    labels: Int[Array, " N"],
    *,
    first: Int[Array, ""],
) -> tuple[Float[Array, "V D"], Float[Array, "N D"] | None]:
    """T: the gradient of the rows, and with two barriers this device's part of that of `hidden`."""
    ids = first + jnp.arange(rows.shape[0], dtype=jnp.int32)[None]
    at_label = jnp.where(
        ids == labels[:, None], (local.label_weight * local.label_slope)[:, None], 0
    )
    logits = local.softmax_weight[:, None] * local.slopes - at_label
    of_hidden = None if local.softmax_rows is not None else _einsum_f32("nv,vd->nd", logits, rows)
    return _einsum_f32("nv,nd->vd", logits, hidden), of_hidden
