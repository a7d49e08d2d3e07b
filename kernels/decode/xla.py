"""One token of Λ-attention in plain XLA: two matrix products over the g + w slots as they lie.

The G query heads of a key head are the rows of one product, so keys and values are read once and
copied never. Both branches share one maximum and one sum; bytes read are those of the slots,
whatever the length of the text.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lminf.kernels.common import numerics
from lminf.kernels.decode import cache as caches
from lminf.kernels.decode.cache import RollingCache
from lminf.kernels.decode.operands import DecodeResiduals, Places, Queries, Rules


def decode(
    rules: Rules, queries: Queries, cache: RollingCache, places: Places, config: object
) -> DecodeResiduals:
    """Outputs and log-denominators; statistics in float32."""
    if config is not None:
        raise NotImplementedError("there is nothing to configure")
    cache = cache.of(places.layer)
    batch, heads, _ = queries.near.shape
    key_heads = cache.k_ring.shape[1]
    dtype = numerics.statistics_dtype(queries.near.dtype)
    seen = caches.seen(cache, places)

    def logits(query, key, visible: Bool[Array, "B K S"], distance) -> Float[Array, "B K G S"]:
        grouped = query.reshape(batch, key_heads, heads // key_heads, -1)
        scores = _product("bkgh,bksh->bkgs", grouped, key, dtype) * rules.scale
        if places.alibi_slopes is not None:
            slopes = places.alibi_slopes.astype(dtype).reshape(1, key_heads, -1, 1)
            scores -= slopes * distance.astype(dtype)[:, None, None]
        if rules.soft_cap is not None:
            scores = rules.soft_cap * jnp.tanh(scores / rules.soft_cap)
        return jnp.where(visible[:, :, None], scores, numerics.MASK_VALUE)

    ago, rank = caches.ring_distances(cache), jnp.arange(cache.num_global, dtype=jnp.int32)
    near = logits(queries.near, cache.k_ring, ago[:, None] < seen.near[..., None], ago)
    apart = None
    if places.alibi_slopes is not None:
        apart = caches.far_distances(rules, cache, places)
    far = logits(queries.far, cache.k_global, rank[None, None] < seen.far[..., None], apart)
    top = near.max(-1, keepdims=True, initial=numerics.EMPTY_MAX)
    if cache.num_global:
        top = jnp.maximum(top, far.max(-1, keepdims=True))
    sinks = queries.sinks
    if sinks is not None:
        sinks = sinks.astype(dtype).reshape(1, key_heads, -1, 1)
        top = jnp.maximum(top, sinks)
    top = jax.lax.stop_gradient(top)
    near, far = jnp.exp(near - top), jnp.exp(far - top)
    total = near.sum(-1, keepdims=True) + far.sum(-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks - top)
    empty = (seen.near + seen.far <= 0)[:, :, None, None]
    total = jnp.where(empty, 1, total)
    out = _product("bkgs,bksh->bkgh", near.astype(cache.v_ring.dtype), cache.v_ring, dtype)
    out += _product("bkgs,bksh->bkgh", far.astype(cache.v_global.dtype), cache.v_global, dtype)
    out = jnp.where(empty, 0, out / total).astype(queries.near.dtype)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    return DecodeResiduals(out.reshape(batch, heads, -1), lse.reshape(batch, heads))


def gradients(rules: Rules, saved: Any, cotangents: DecodeResiduals) -> tuple[Any, ...]:
    """Those of queries, cache and places, for whichever forward: nobody decodes for their speed."""
    queries, cache, places = saved
    _, pull = jax.vjp(lambda q, c: decode(rules, q, c, places, None), queries, cache)
    return *pull(cotangents), None


def _product(axes: str, x, y, dtype) -> Array:
    if x.dtype != y.dtype:
        x, y = x.astype(dtype), y.astype(dtype)
    return jnp.einsum(axes, x, y, preferred_element_type=dtype)
