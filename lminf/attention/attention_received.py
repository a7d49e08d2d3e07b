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
    (batch, keys, key_heads, width), queries = k.shape, q.shape[1]
    block = min(block, keys)
    blocks = -(-keys // block)
    k = jnp.pad(k, ((0, 0), (0, blocks * block - keys), (0, 0), (0, 0)))
    k_pos = jnp.pad(k_pos, ((0, 0), (0, blocks * block - keys)), constant_values=-1)
    lse2 = lse.astype(jnp.float32).reshape(batch, key_heads, -1, queries, 1) * LOG2_E
    query_pos = q_pos[:, :, None]

    def of_block(block_of: tuple[Array, Array]) -> Array:
        k, key_pos = block_of[0], block_of[1][:, None]
        scores = config.capped(scores_.scaled(config, q, k))
        # What is not visible may be beyond what exp2 takes.
        weights = numerics.exp2(scores * LOG2_E - lse2)
        visible = (seen(query_pos, key_pos) & (query_pos >= 0) & (key_pos >= 0))[:, None, None]
        return jnp.where(visible, weights, 0.0).sum(3)

    parts = jax.lax.map(of_block, (
        k.reshape(batch, blocks, block, key_heads, width).swapaxes(0, 1),
        k_pos.reshape(batch, blocks, block).swapaxes(0, 1),
    ))  # fmt: skip  # [.., B, K, G, C]
    return jnp.moveaxis(parts, 0, 3).reshape(batch, q.shape[2], -1)[..., :keys]
