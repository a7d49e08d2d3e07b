"""One token of Λ-attention by its definition, from the position that every slot holds.

The query stands at i = length - 1. Ring slot s of W holds the last position p <= i with p % W = s,
seen if p >= 0 and i - p < w, the key head's window (W, if not given); global slot r holds position
r, seen if i - r >= w and r < global_count. One softmax over both, in float64 wherever that is
switched on.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lminf.kernels.common import numerics
from lminf.kernels.decode.cache import RollingCache
from lminf.kernels.decode.operands import DecodeResiduals, Places, Queries, Rules


def decode(
    rules: Rules, queries: Queries, cache: RollingCache, places: Places, config: object
) -> DecodeResiduals:
    """Outputs and log-denominators, computed slot by slot position."""
    if config is not None:
        raise NotImplementedError("there is nothing to configure")
    cache = cache.of(places.layer)
    dtype = jax.dtypes.canonicalize_dtype(jnp.float64)
    heads, key_heads = queries.near.shape[1], cache.k_ring.shape[1]

    def per_query_head(x: Float[Array, "B K S X"]) -> Float[Array, "B N S X"]:
        return jnp.repeat(x.astype(dtype), heads // x.shape[1], 1)

    def logits(query: Float[Array, "B N H"], key: Float[Array, "B K S H"], distance):
        scores = jnp.einsum(
            "bnh,bnsh->bns", query.astype(dtype), per_query_head(key), precision="highest"
        )
        scores = scores * rules.scale
        if places.alibi_slopes is not None:
            slopes = places.alibi_slopes.astype(dtype)[None, :, None]
            scores -= slopes * distance[:, None].astype(dtype)
        if rules.soft_cap is None:
            return scores
        return rules.soft_cap * jnp.tanh(scores / rules.soft_cap)

    last, slots = cache.length[:, None] - 1, cache.window_size
    slot = jnp.arange(slots, dtype=jnp.int32)[None]
    ring_position = last - (last - slot) % max(slots, 1)
    global_position = jnp.arange(cache.num_global, dtype=jnp.int32)[None]
    away_near, away = last - ring_position, last - global_position
    window, count = jnp.full((1, 1, 1), slots), jnp.full((1, 1, 1), cache.num_global)
    if places.head_window is not None:
        window = places.head_window[None, :, None]
    if places.global_count is not None:
        count = places.global_count[:, :, None]
    near = (ring_position >= 0)[:, None] & (away_near[:, None] < window)
    far = (away[:, None] >= window) & (global_position[:, None] < count)
    seen = [jnp.broadcast_to(x, (len(last), key_heads, x.shape[2])) for x in (far, near)]
    seen = jnp.repeat(jnp.concatenate(seen, 2), heads // key_heads, 1)
    if rules.clip_distance is not None:
        away = jnp.minimum(away, rules.clip_distance)
    if places.far_distance is not None:
        query, key, scale = places.far_distance
        away = (query - key).astype(dtype) * jnp.asarray(scale, dtype)

    exponents = jnp.concatenate(
        [
            logits(queries.far, cache.k_global, away),
            logits(queries.near, cache.k_ring, away_near),
        ],
        -1,
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
