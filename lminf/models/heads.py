"""Heads: what is read off the final hidden states of a decoder.

Each is a function of its parameters and of hidden states [..., D]; one that has parameters of its
own has an initialiser beside it. Outputs are float32.
"""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lminf.models.layers import product
from lminf.models.quantization import Weights
from lminf.models.spec import ModelSpec
from lminf.types import Params

Pooling: TypeAlias = Literal["mean", "last"]


def classifier(params: Params) -> Weights:
    """The output embedding [V, D] of a decoder: the input embedding where the two are tied."""
    return params.get("head", params["embed"])


def lm(spec: ModelSpec, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Next-token logits, from the decoder's own parameters."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    logits = product(rows, classifier(params), dtype=jnp.float32, transposed=True)
    logits = logits.reshape(*hidden.shape[:-1], -1)
    if spec.logit_scale != 1.0:
        logits = logits * spec.logit_scale
    if spec.head_bias:
        logits = logits + jnp.broadcast_to(params["head_bias"].astype(jnp.float32), logits.shape)
    if spec.final_soft_cap is not None:
        logits = spec.final_soft_cap * jnp.tanh(logits / spec.final_soft_cap)
    return logits


def scaled(spec: ModelSpec, hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Hidden states whose product with the classifier has the scale of `lm`'s logits: for losses,
    which form that product in pieces."""
    scale = jnp.asarray(spec.logit_scale, hidden.dtype)
    return hidden if spec.logit_scale == 1.0 else hidden * scale


def embed(
    hidden: Float[Array, "B T D"], mask: Bool[Array, "B T"], *, pooling: Pooling = "mean"
) -> Float[Array, "B D"]:
    """One vector per row: the mean, or the last, of the hidden states where `mask` holds.

    The mask of a padded text is `positions >= 0`, that of one text of a packed row
    `segments == number`. A row without any such token gives zeros.
    """
    if pooling == "last":
        tokens = jnp.arange(mask.shape[1], dtype=jnp.int32)[None]
        mask = mask & (tokens == jnp.where(mask, tokens, -1).max(1, keepdims=True))
    count = jnp.maximum(mask.sum(1, keepdims=True), 1)
    total = jnp.where(mask[..., None], hidden, 0).sum(1, dtype=jnp.float32)
    return total / count.astype(jnp.float32)


def init_scalar(width: int, *, key: jax.Array) -> dict[str, Array]:
    """Parameters of `scalar`: w [D], b []."""
    return {"w": jax.random.normal(key, (width,)) * width**-0.5, "b": jnp.zeros(())}


def scalar(params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """One number per hidden state: a value, a reward or a ranking score."""
    weights = params["w"].astype(hidden.dtype)
    return jnp.dot(hidden, weights, preferred_element_type=jnp.float32) + params["b"]


def init_tags(width: int, classes: int, *, key: jax.Array) -> dict[str, Array]:
    """Parameters of `tags`: w [D, classes], b [classes]."""
    return {
        "w": jax.random.normal(key, (width, classes)) * width**-0.5,
        "b": jnp.zeros((classes,)),
    }


def tags(params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B C"]:
    """Logits of the classes of every hidden state: of each token, or of each text after `embed`."""
    weights = params["w"].astype(hidden.dtype)
    logits = jnp.dot(hidden, weights, preferred_element_type=jnp.float32)
    return logits + jnp.broadcast_to(params["b"].astype(jnp.float32), logits.shape)
