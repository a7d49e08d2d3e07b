"""How much attention each key received from a set of queries: what policies that select go by.

    received[j] = sum over queries i that see j of exp(logit_ij - lse_i)

`lse` is that of the whole softmax, so the keys given here may be some of those it was taken over.
Attention kernels do not return their weights; this computes them again, a block of keys at a time.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from lminf.attention import scores
from lminf.attention.scores import ScoreConfig
from lminf.kernels.common import numerics

Seen: TypeAlias = Callable[[Int[Array, "B T 1"], Int[Array, "B 1 S"]], Bool[Array, "B T S"]]

BLOCK = 256  # keys: the weights of 2,048 queries and 9 heads over them are 19 MB


def by_key(
    config: ScoreConfig,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    lse: Float[Array, "B N T"],
    *,
    q_pos: Int[Array, "B T"],
    k_pos: Int[Array, "B S"],
    seen: Seen,
    block: int = BLOCK,
) -> Float32[Array, "B N S"]:
    """Attention each key received by query head, summed over the queries that see it.

    q and k are placed (rotated) already. A position below 0 is padding or an empty slot, which
    neither attends nor is attended to.
    """
    keys = k.shape[1]
    block = min(block, keys)
    padding = (0, 0), (0, -keys % block)
    k = jnp.pad(k, (*padding, (0, 0), (0, 0))).swapaxes(1, 2)
    k_pos = jnp.pad(k_pos, padding, constant_values=-1)
    log2_e = jnp.float32(numerics.LOG2_E)
    lse2, query_pos = lse.astype(jnp.float32)[..., None] * log2_e, q_pos[:, :, None]

    def of_block(start: Array) -> Array:
        some_k = jax.lax.dynamic_slice_in_dim(k, start, block, 2)
        key_pos = jax.lax.dynamic_slice_in_dim(k_pos, start, block, 1)[:, None]
        # What is not visible may be beyond what exp2 takes.
        weights = numerics.exp2(scores.logits(config, q, some_k, lists=True) * log2_e - lse2)
        visible = seen(query_pos, key_pos) & (query_pos >= 0) & (key_pos >= 0)
        return jnp.where(visible[:, None], weights, 0.0).sum(2)

    parts = jax.lax.map(of_block, jnp.arange(0, k.shape[2], block, dtype=jnp.int32))
    return jnp.moveaxis(parts, 0, 2).reshape(*lse.shape[:2], -1)[..., :keys]
