"""What every implementation of the linear cross-entropy receives and returns, one row a token."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Operands(NamedTuple):
    """The arrays that receive gradients."""

    embeddings: Float[Array, "rows D"]
    classifier: Float[Array, "V D"]
    bias: Float[Array, " V"] | None


@dataclass(frozen=True)
class Rules:
    """What is fixed when tracing."""

    soft_cap: float | None
    label_smoothing: float
    z_loss: float
    filter_eps: float | None  # blocks whose softmax stays below are left out of the gradient
    sort_vocab: bool = True  # put entries of like mean logit into one block before filtering
    accum_dtype: Any = jnp.float32  # of the sums of gradients; wider inputs win
    deterministic: bool = False  # two runs are bitwise equal


class Losses(NamedTuple):
    """Loss and log-sum-exp of every row, nats, float32 (float64 for float64 inputs)."""

    loss: Float[Array, " rows"]
    lse: Float[Array, " rows"]
