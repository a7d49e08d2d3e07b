"""Λ-attention as its definition says it: one masked softmax over the [T, R + S] logits.

d = query position - key position, w = window, g = globals.
    local branch   0 <= d < w, key position >= 0     logit  <query, key> * scale
    global branch  d >= w, key among the first g     logit  <query_global, key_global> * scale
                   (or in a list of positions p >= 0)
    out = sum_j exp(logit_j) value_j / (exp(sink) + sum_j exp(logit_j))
Dense, O(T * S) memory, differentiated by JAX; in float64 wherever that is switched on. Every other
implementation is tested against this one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from lminf.kernels.common import masks, numerics
from lminf.kernels.lambda_attention.operands import Branch, Operands, Places, Residuals, Rules


def attention(rules: Rules, operands: Operands, places: Places, config: object) -> Residuals:
    """Outputs and log-denominators, computed densely."""
    if config is not None:
        raise NotImplementedError("there is nothing to configure")
    # Without x64 mode this canonicalises to float32.
    return dense(rules, operands, places, jax.dtypes.canonicalize_dtype(jnp.float64))


def dense(rules: Rules, operands: Operands, places: Places, dtype: Any) -> Residuals:
    """The definition, computed in `dtype`."""
    near, far, sinks = jax.tree.map(lambda x: x.astype(dtype), operands)
    heads = near.query.shape[2]

    distance = _distances(places, near.query.shape[1], near.key.shape[1])
    real = places.key_start[:, None] + _index(near.key.shape[1])[None] >= 0
    visible = (distance >= 0) & (distance < rules.window) & real[:, None, :]
    visible &= _same_segment(places)
    logits = _logits(rules, places, near, distance[:, None])
    visible = jnp.broadcast_to(visible[:, None], logits.shape)
    value = near.value
    if far is not None:
        far_visible, far_distance = _global_branch(rules, places, far.key.shape[1], distance)
        logits = jnp.concatenate([_logits(rules, places, far, far_distance), logits], -1)
        far_visible = jnp.repeat(far_visible, heads // far_visible.shape[1], 1)
        visible = jnp.concatenate([far_visible, visible], -1)
        value = jnp.concatenate([far.value, value], 1)

    logits = jnp.where(visible, logits, numerics.MASK_VALUE)
    top = logits.max(-1)
    if sinks is not None:
        sinks = sinks[None, :, None]
        top = jnp.maximum(top, sinks)
    top = jax.lax.stop_gradient(top)
    weights = jnp.where(visible, jnp.exp(logits - top[..., None]), 0)
    total = weights.sum(-1)
    if sinks is not None:
        total += jnp.exp(sinks - top)
    empty = ~visible.any(-1)
    total = jnp.where(empty, 1, total)
    value = jnp.repeat(value, heads // value.shape[2], 2)
    out = jnp.einsum("bnts,bsnh->btnh", weights / total[..., None], value, precision="highest")
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    given = operands.near.query.dtype
    return Residuals(out.astype(given), lse.astype(numerics.statistics_dtype(given)))


def _index(count: int) -> Int[Array, " count"]:
    return jnp.arange(count, dtype=jnp.int32)


def _distances(places: Places, queries: int, keys: int) -> Int[Array, "B T S"]:
    rows = places.query_offset + _index(queries)[:, None] - _index(keys)[None]
    return jnp.broadcast_to(rows, (places.key_start.shape[0], queries, keys))


def _same_segment(places: Places) -> Bool[Array, "..."]:
    if places.segments is None:
        return jnp.array(True)
    q, kv = places.segments.q[:, :, None], places.segments.kv[:, None, :]
    return (q == kv) & (q != masks.PADDING)


def _global_branch(
    rules: Rules, places: Places, rows: int, distance: Int[Array, "B T S"]
) -> tuple[Bool[Array, "B P T R"], Num[Array, "B P T R"]]:
    """Visibility of every row of the globals, and how far away ALiBi takes it to be; for all heads
    (P = 1) or each key head.
    """
    if places.segments is None:
        offsets = places.query_offset + _index(distance.shape[1])
        positions = places.key_start[:, None] + offsets[None]
        listed = places.far_positions
        if listed is None:  # row r is position r
            listed = jnp.where(_index(rows) < rules.num_global, _index(rows), -1)[None, None]
        true = positions[:, None, :, None] - listed[:, :, None]
        visible = (true >= rules.window) & (listed >= 0)[:, :, None]
    else:  # row r is key r, and counts from the start of its segment
        true = distance[:, None]
        rank = _index(rows)[None] - masks.run_starts(places.segments.kv)
        visible = (true >= rules.window) & (rank < rules.num_global)[:, None, None]
        visible &= _same_segment(places)[:, None]
    seeming = true
    if rules.clip_distance is not None:
        seeming = jnp.minimum(true, rules.clip_distance)
    if places.far_distance is not None:
        query, key, scale = places.far_distance
        apart = (query[:, :, None] - key[:, None, :])[:, None]
        seeming = apart.astype(jnp.float32) * scale
    return visible, jnp.broadcast_to(seeming, visible.shape)


def _logits(
    rules: Rules, places: Places, branch: Branch, distance: Num[Array, "B P T S"]
) -> Float[Array, "B N T S"]:
    key = jnp.repeat(branch.key, branch.query.shape[2] // branch.key.shape[2], 2)
    logits = jnp.einsum("btnh,bsnh->bnts", branch.query, key, precision="highest") * rules.scale
    if places.alibi_slopes is not None:
        slopes = places.alibi_slopes.astype(logits.dtype)[None, :, None, None]
        distance = jnp.repeat(distance, logits.shape[1] // distance.shape[1], 1)
        logits -= slopes * distance.astype(logits.dtype)
    if rules.soft_cap is not None:
        logits = rules.soft_cap * jnp.tanh(logits / rules.soft_cap)
    return logits
