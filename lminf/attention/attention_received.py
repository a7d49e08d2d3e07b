"""How much attention each key received from a set of queries: what policies that select go by.

    received[j] = sum over queries i that see j of exp(score_ij - lse_i)

`lse` is that of the whole softmax, so the keys given here may be some of those it was taken over.
Attention kernels do not return their weights; this computes them again, a block of keys at a time.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from lminf.attention import scores as scores_
from lminf.kernels.common import numerics

Seen: TypeAlias = Callable[[Int[Array, "B T 1"], Int[Array, "B 1 S"]], Bool[Array, "B T S"]]

BLOCK = 256  # keys: the weights of 2,048 queries and 9 heads over them are 19 MB


def by_key(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    lse: Float[Array, "B N T"],
    *,
    q_pos: Int[Array, "B T"],
    k_pos: Int[Array, "B S"],
    seen: Seen,
    scale: float,
    soft_cap: float | None = None,
    slopes: Float[Array, " N"] | None = None,
    block: int = BLOCK,
) -> Float32[Array, "B N S"]:
    """Attention each key received by query head, summed over the queries that see it.

    q and k are placed (rotated) already. A position below 0 is padding or an empty slot, which
    neither attends nor is attended to. `slopes` subtract slope * (q_pos - k_pos), as ALiBi does.
    """
    keys, key_heads = k.shape[1:3]
    batch, _, heads, _ = q.shape
    block = min(block, keys)
    blocks = -(-keys // block)
    short = blocks * block - keys
    k = jnp.pad(k, ((0, 0), (0, short), (0, 0), (0, 0))).swapaxes(1, 2)
    k_pos = jnp.pad(k_pos, ((0, 0), (0, short)), constant_values=-1)
    rows = scores_.rows_of_key_heads(q, key_heads)
    by_head = rows.shape[:4]  # [B, K, G, T]
    lse2 = lse.astype(jnp.float32).reshape(*by_head, 1) * jnp.float32(numerics.LOG2_E)
    to = q_pos[:, :, None]

    def of_block(start):
        some_k = jax.lax.dynamic_slice_in_dim(k, start, block, 2)
        at = jax.lax.dynamic_slice_in_dim(k_pos, start, block, 1)[:, None]
        scores = jnp.einsum(
            "bkrh,bksh->bkrs", rows.reshape(batch, key_heads, -1, q.shape[3]), some_k,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        scores = scores.reshape(*by_head, block) * jnp.float32(scale)
        if slopes is not None:
            steep = slopes.reshape(1, key_heads, -1, 1, 1)
            scores = scores - steep * (to - at).astype(jnp.float32)[:, None, None]
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        # What is not visible may be beyond what exp2 takes.
        weights = numerics.exp2(scores * jnp.float32(numerics.LOG2_E) - lse2)
        visible = (seen(to, at) & (to >= 0) & (at >= 0))[:, None, None]
        return jnp.where(visible, weights, 0.0).sum(3)

    parts = jax.lax.map(of_block, jnp.arange(blocks, dtype=jnp.int32) * block)  # [.., B, K, G, C]
    return jnp.moveaxis(parts, 0, 3).reshape(batch, heads, -1)[..., :keys]
