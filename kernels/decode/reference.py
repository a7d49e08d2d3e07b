"""One token of Λ-attention by its definition, from the position that every slot holds.

The query stands at i = length - 1. Ring slot s holds the last position p <= i with p % w = s, seen
if p >= 0; global slot r holds position r, seen if i - r >= w. One softmax over both, in float64
wherever that is switched on.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.common import numerics
from kernels.decode.cache import RollingCache
from kernels.decode.operands import DecodeResiduals, Queries, Rules


def decode(rules: Rules, queries: Queries, cache: RollingCache, config: object) -> DecodeResiduals:
    """Outputs and log-denominators, computed slot by slot position."""
    if config is not None:
        raise NotImplementedError("there is nothing to configure")
    dtype = jax.dtypes.canonicalize_dtype(jnp.float64)
    heads = queries.near.shape[1]

    def per_query_head(x: Float[Array, "B K S X"]) -> Float[Array, "B N S X"]:
        return jnp.repeat(x.astype(dtype), heads // x.shape[1], 1)

    def logits(query: Float[Array, "B N H"], key: Float[Array, "B K S H"]):
        scores = jnp.einsum(
            "bnh,bnsh->bns", query.astype(dtype), per_query_head(key), precision="highest"
        )
        scores = scores * rules.scale
        if rules.soft_cap is None:
            return scores
        return rules.soft_cap * jnp.tanh(scores / rules.soft_cap)

    last, window = cache.length[:, None] - 1, cache.window_size
    slot = jnp.arange(window, dtype=jnp.int32)[None]
    ring_position = last - (last - slot) % window
    global_position = jnp.arange(cache.num_global, dtype=jnp.int32)[None]
    seen = jnp.concatenate([last - global_position >= window, ring_position >= 0], 1)[:, None]

    exponents = jnp.concatenate(
        [logits(queries.far, cache.k_global), logits(queries.near, cache.k_ring)], -1
    )
    top = jax.lax.stop_gradient(jnp.where(seen, exponents, numerics.MASK_VALUE).max(-1))
    if queries.sinks is not None:
        top = jnp.maximum(top, jax.lax.stop_gradient(queries.sinks.astype(dtype))[None])
    weights = jnp.where(seen, jnp.exp(exponents - top[..., None]), 0)
    total = weights.sum(-1)
    if queries.sinks is not None:
        total += jnp.exp(queries.sinks.astype(dtype)[None] - top)
    empty = ~seen.any(-1)
    total = jnp.where(empty, 1, total)
    values = jnp.concatenate([per_query_head(cache.v_global), per_query_head(cache.v_ring)], 2)
    out = jnp.einsum("bns,bnsh->bnh", weights / total[..., None], values, precision="highest")
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    given = queries.near.dtype
    return DecodeResiduals(out.astype(given), lse.astype(numerics.statistics_dtype(given)))
