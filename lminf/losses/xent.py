"""Next-token losses from hidden states, without the [B, T, V] array of logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf.models import decoder
from lminf.models.spec import ModelSpec
from lminf.types import Params

CHUNK = 512  # tokens whose logits exist at once: 100 MB in float32 at a vocabulary of 49,152


def token_nll(
    spec: ModelSpec,
    params: Params,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
) -> Float[Array, "B T"]:
    """-log p(target) of every position, nats, float32."""
    batch, tokens, width = hidden.shape
    rows = batch * tokens
    chunk = min(CHUNK, rows)
    padding = -rows % chunk
    flat = jnp.pad(hidden.reshape(rows, width), ((0, padding), (0, 0)))
    wanted = jnp.pad(targets.reshape(rows), (0, padding))

    def one_chunk(arrays):
        states, target = arrays
        scores = decoder.logits(spec, params, states)
        picked = jnp.take_along_axis(scores, target[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(scores, axis=-1) - picked

    # Gradients compute each chunk's logits again; kept, they would be the whole array after all.
    losses = jax.lax.map(
        jax.checkpoint(one_chunk), (flat.reshape(-1, chunk, width), wanted.reshape(-1, chunk))
    ).reshape(-1)
    return losses[:rows].reshape(batch, tokens)
