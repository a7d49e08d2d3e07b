"""How much attention each key received from a set of queries: what policies that select go by.

    received[j] = sum over queries i that see j of exp(score_ij - lse_i)

`lse` is that of the whole softmax, so the keys given here may be some of those it was taken over.
Attention kernels do not return their weights; this computes them again, a block of keys at a time.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from lminf.attention import scores as scores_
from lminf.attention.scores import ScoreConfig
from lminf.kernels.common import numerics

Seen: TypeAlias = Callable[[Int[Array, "B T 1"], Int[Array, "B 1 S"]], Bool[Array, "B T S"]]

LOG2_E = np.float32(numerics.LOG2_E)
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
    batch, keys, key_heads, width = k.shape
    block = min(block, keys)
    blocks = -(-keys // block)
    k = jnp.pad(k, ((0, 0), (0, blocks * block - keys), (0, 0), (0, 0))).swapaxes(1, 2)
    k_pos = jnp.pad(k_pos, ((0, 0), (0, blocks * block - keys)), constant_values=-1)
    rows = scores_.rows_of_key_heads(q, key_heads)  # [B, K, G, T, H]
    flat = rows.reshape(batch, key_heads, -1, width)
    lse2 = lse.astype(jnp.float32).reshape(*rows.shape[:4], 1) * LOG2_E
    query_pos = q_pos[:, :, None]

    def of_block(start: Array) -> Array:
        some_k = jax.lax.dynamic_slice_in_dim(k, start, block, 2)
        key_pos = jax.lax.dynamic_slice_in_dim(k_pos, start, block, 1)[:, None]
        scores = jnp.einsum("bkrh,bksh->bkrs", flat, some_k, preferred_element_type=jnp.float32)
        scores = config.capped(scores.reshape(*rows.shape[:4], block) * jnp.float32(config.scale))
        # What is not visible may be beyond what exp2 takes.
        weights = numerics.exp2(scores * LOG2_E - lse2)
        visible = (seen(query_pos, key_pos) & (query_pos >= 0) & (key_pos >= 0))[:, None, None]
        return jnp.where(visible, weights, 0.0).sum(3)

    parts = jax.lax.map(of_block, jnp.arange(blocks, dtype=jnp.int32) * block)  # [.., B, K, G, C]
    return jnp.moveaxis(parts, 0, 3).reshape(batch, q.shape[2], -1)[..., :keys]
