"""Λ-attention as its definition says it: one masked softmax over the [T, S + R] logits.

d = query position - key position, w = window, g = globals.
    local branch   0 <= d < w, key position >= 0     logit  <query, key> * scale
    global branch  d >= w, key among the first g     logit  <query_global, key_global> * scale
    out = sum_j exp(logit_j) value_j / (exp(sink) + sum_j exp(logit_j))
Dense, O(T * S) memory, differentiated by JAX; in float64 wherever that is switched on. Every other
implementation is tested against this one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from kernels.common import masks, numerics
from kernels.lambda_attention.operands import Operands, Places, Residuals, Rules


def attention(rules: Rules, operands: Operands, places: Places, config: None) -> Residuals:
    """Outputs and log-denominators, computed densely."""
    if config is not None:
        raise NotImplementedError("the reference has nothing to configure")
    # Without x64 mode this canonicalises to float32.
    return dense(rules, operands, places, jax.dtypes.canonicalize_dtype(jnp.float64))


def dense(rules: Rules, operands: Operands, places: Places, dtype) -> Residuals:
    """The definition, computed in `dtype`."""
    query, key, value = (x.astype(dtype) for x in operands[:3])
    heads = query.shape[2]

    distance = _distances(places, query.shape[1], key.shape[1])
    real = places.key_start[:, None] + jnp.arange(key.shape[1])[None] >= 0
    visible = (distance >= 0) & (distance < rules.window) & real[:, None, :]
    visible &= _same_segment(places)
    logits = _logits(rules, places, query, key, distance)

    if operands.query_global is not None:
        assert operands.key_global is not None
        assert operands.value_global is not None
        query_global = operands.query_global.astype(dtype)
        key_global = operands.key_global.astype(dtype)
        far_visible, far_distance = _global_branch(rules, places, key_global.shape[1], distance)
        far = _logits(rules, places, query_global, key_global, far_distance)
        logits = jnp.concatenate([far, logits], -1)
        visible = jnp.concatenate([far_visible, jnp.broadcast_to(visible, distance.shape)], -1)
        value = jnp.concatenate([operands.value_global.astype(dtype), value], 1)

    visible = jnp.broadcast_to(visible[:, None], logits.shape)
    logits = jnp.where(visible, logits, numerics.MASK_VALUE)
    sinks = None if operands.sinks is None else operands.sinks.astype(dtype)[None, :, None]
    top = logits.max(-1) if sinks is None else jnp.maximum(logits.max(-1), sinks)
    top = jax.lax.stop_gradient(top)
    weights = jnp.where(visible, jnp.exp(logits - top[..., None]), 0)
    total = weights.sum(-1) + (0 if sinks is None else jnp.exp(sinks - top))
    empty = ~visible.any(-1)
    total = jnp.where(empty, 1, total)
    value = jnp.repeat(value, heads // value.shape[2], 2)
    out = jnp.einsum("bnts,bsnh->btnh", weights / total[..., None], value, precision="highest")
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    return Residuals(
        out.astype(operands.query.dtype),
        lse.astype(numerics.statistics_dtype(operands.query.dtype)),
    )


def _distances(places: Places, queries: int, keys: int) -> Int[Array, "B T S"]:
    rows = places.query_offset + jnp.arange(queries)[:, None] - jnp.arange(keys)[None]
    return jnp.broadcast_to(rows, (places.key_start.shape[0], queries, keys))


def _same_segment(places: Places) -> Bool[Array, "..."]:
    if places.segment_q is None or places.segment_kv is None:
        return jnp.array(True)
    q, kv = places.segment_q[:, :, None], places.segment_kv[:, None, :]
    return (q == kv) & (q != masks.PADDING)


def _global_branch(
    rules: Rules, places: Places, rows: int, distance: Int[Array, "B T S"]
) -> tuple[Bool[Array, "B T R"], Num[Array, "B T R"]]:
    """Visibility of every row of the globals, and how far away ALiBi takes it to be."""
    if places.segment_kv is None:  # row r is position r
        offsets = places.query_offset + jnp.arange(distance.shape[1])
        positions = places.key_start[:, None] + offsets[None]
        true = positions[:, :, None] - jnp.arange(rows)[None, None]
        visible = (true >= rules.window) & (jnp.arange(rows) < rules.num_global)[None, None]
    else:  # row r is key r, and counts from the start of its segment
        true = distance
        rank = jnp.arange(rows)[None] - masks.run_starts(places.segment_kv)
        visible = (true >= rules.window) & (rank < rules.num_global)[:, None]
        visible &= _same_segment(places)
    seeming = true
    if rules.clip_distance is not None:
        seeming = jnp.minimum(true, rules.clip_distance)
    if places.distance_query is not None:
        assert places.distance_key is not None
        seeming = places.distance_query[:, :, None] - places.distance_key[:, None, :]
        seeming = seeming * places.distance_scale
    return visible, jnp.broadcast_to(seeming, visible.shape)


def _logits(
    rules: Rules,
    places: Places,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    distance: Num[Array, "B T S"],
) -> Float[Array, "B N T S"]:
    key = jnp.repeat(key, query.shape[2] // key.shape[2], 2)
    logits = jnp.einsum("btnh,bsnh->bnts", query, key, precision="highest") * rules.scale
    if places.alibi_slopes is not None:
        slopes = places.alibi_slopes.astype(logits.dtype)[None, :, None, None]
        logits -= slopes * distance[:, None].astype(logits.dtype)
    if rules.soft_cap is not None:
        logits = rules.soft_cap * jnp.tanh(logits / rules.soft_cap)
    return logits
