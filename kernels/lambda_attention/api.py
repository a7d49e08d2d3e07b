"""Λ-attention: the last w keys at their true distance, the first g keys beyond them through a
second set of operands, one softmax over both. This file checks the arguments and fills in defaults.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf.kernels.common import arguments, dispatch, tuning
from lminf.kernels.common.config import Key
from lminf.kernels.common.masks import GlobalDistance, SegmentIds
from lminf.kernels.lambda_attention import reference, xla, xla_chunked
from lminf.kernels.lambda_attention.operands import Branch, Operands, Places, Residuals, Rules

IMPLEMENTATIONS = {
    "reference": reference.attention,
    "xla": xla.attention,
    "xla_chunked": xla_chunked.attention,
    "mosaic_tpu": dispatch.lazily("lminf.kernels.lambda_attention.mosaic_tpu", "attention"),
    "triton": dispatch.lazily("lminf.kernels.lambda_attention.triton", "attention"),
    "mosaic_gpu": dispatch.lazily("lminf.kernels.lambda_attention.mosaic_gpu", "attention"),
}
ORDER = {
    "cpu": ("xla", "xla_chunked"),
    "tpu": ("mosaic_tpu", "xla_chunked"),
    "gpu": ("triton", "xla_chunked"),
}


def lambda_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    *,
    num_global: int,
    window_size: int,
    query_global: Float[Array, "B T N H"] | None = None,
    key_global: Float[Array, "B R K H"] | None = None,
    value_global: Float[Array, "B R K Hv"] | None = None,
    global_positions: Int[Array, "B R"] | Int[Array, "B K R"] | None = None,
    query_offset: int | Int[Array, ""] = 0,
    key_start: int | Int[Array, ""] | Int[Array, " B"] = 0,
    segment_ids: SegmentIds | None = None,
    alibi_slopes: Float[Array, " N"] | None = None,
    clip_distance: int | None = None,
    global_distance: GlobalDistance | None = None,
    sinks: Float[Array, " N"] | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    head_window: Sequence[int] | None = None,
    head_num_global: Sequence[int] | None = None,
    return_residuals: bool = False,
    precision: jax.lax.PrecisionLike = None,
    implementation: dispatch.Choice = None,
    config: Any = None,
) -> Array | Residuals:
    """Attention outputs [B, T, N, Hv]; with `return_residuals`, also the LSE [B, N, T].

    Key row j stands at position key_start + j (negative: padding, never seen), query row i at
    key_start + query_offset + i. With d their difference:
      local branch   0 <= d < window_size       query . key
      global branch  row r < num_global of the globals, at position r, d >= window_size:
                     query_global . key_global, weighting value_global
    Globals default to the first rows of `key` and `value`, so `key_start` must then be the int 0.
    `window_size >= S` is full causal attention; `num_global = S` sends every far key through the
    global operands. With `segment_ids`, the first keys of each segment are its globals, and
    `key_global`, `value_global`, if given, have one row beside each key row (R = S).
    With `global_positions`, row r of the R = num_global globals is at position global_positions[b,
    r] ([b, k, r]: for key head k) instead of r: ascending, and hidden where it is -1, which rows
    before or after the others may be. Then there may be no keys (S = 0): window_size still says
    which globals are too near; 0 hides none but those after the query.

    `alibi_slopes` (no gradient) subtracts slope * distance from the scaled score: d on the local
    branch; on the global one min(d, clip_distance), or what `global_distance` says. Then
    `logits_soft_cap` c gives c * tanh(x / c). `sinks` adds exp(sink) to the denominator only.
    `head_window` and `head_num_global` give one value for each key head instead of one for all.
    A row that sees nothing has output 0, LSE -inf and no gradient. Statistics are float32.
    """
    operands, places, rules = _prepare(
        query, key, value,
        num_global=num_global, window_size=window_size,
        query_global=query_global, key_global=key_global, value_global=value_global,
        global_positions=global_positions,
        query_offset=query_offset, key_start=key_start, segment_ids=segment_ids,
        alibi_slopes=alibi_slopes, clip_distance=clip_distance, global_distance=global_distance,
        sinks=sinks, scale=scale, logits_soft_cap=logits_soft_cap, precision=precision,
    )  # fmt: skip

    def attend(rules: Rules, operands: Operands, places: Places) -> Residuals:
        if rules.num_global == 0:
            operands, places = operands._replace(far=None), places._replace(far_positions=None)
        (_, queries, heads, width), keys = operands.near.query.shape, operands.near.key.shape[1]
        key = Key(
            "lambda_attention", str(operands.near.query.dtype), heads, operands.near.key.shape[2],
            width, queries, keys, rules.window, rules.num_global,
        )  # fmt: skip
        return dispatch.run(
            "lambda_attention", tuning.tuned(IMPLEMENTATIONS, key), ORDER, implementation,
            rules, operands, places, config,
        )  # fmt: skip

    if head_window is None and head_num_global is None:
        result = attend(rules, operands, places)
    else:
        key_heads = key.shape[2]
        windows = _per_head("head_window", head_window, window_size, key_heads, least=1)
        counts = _per_head("head_num_global", head_num_global, num_global, key_heads, least=0)
        if max(counts) > num_global:
            raise ValueError(f"head_num_global={counts} exceeds num_global={num_global}")
        result = _by_head(attend, rules, operands, places, windows, counts)
    return result if return_residuals else result.out


def _prepare(
    query, key, value, *, num_global, window_size, query_global, key_global, value_global,
    global_positions, query_offset, key_start, segment_ids, alibi_slopes, clip_distance,
    global_distance, sinks, scale, logits_soft_cap, precision,
) -> tuple[Operands, Places, Rules]:  # fmt: skip
    """The arguments with defaults filled in; ValueError names what does not fit."""
    batch, queries, heads, width = arguments.shape("query", query, "B T N H", (None,) * 4)
    _, keys, key_heads, _ = arguments.shape("key", key, "B S K H", (batch, None, None, width))
    *_, value_width = arguments.shape("value", value, "B S K Hv", (batch, keys, key_heads, None))
    if heads % key_heads:
        raise ValueError(f"query has {heads} heads, not a multiple of the {key_heads} of key")
    arguments.count("window_size", window_size, least=1 if global_positions is None else 0)
    arguments.count("num_global", num_global, least=0)
    if clip_distance is not None:
        arguments.count("clip_distance", clip_distance, least=1)
    for name, vector in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if vector is not None:
            arguments.shape(name, vector, "N", (heads,))

    from_zero = isinstance(key_start, int) and key_start == 0
    if segment_ids is not None:
        arguments.shape("segment_ids.q", segment_ids.q, "B T", (batch, queries))
        arguments.shape("segment_ids.kv", segment_ids.kv, "B S", (batch, keys))
        if not from_zero:
            raise ValueError("key_start must be the int 0 with segment_ids: positions restart")
    if num_global and not from_zero and (key_global is None or value_global is None):
        raise ValueError(
            "key_start other than the int 0 needs key_global and value_global, the first keys"
        )
    if key_global is None and value_global is not None:
        raise ValueError("value_global needs key_global")
    if global_positions is not None:
        if segment_ids is not None or key_global is None or value_global is None:
            raise ValueError(
                "global_positions needs key_global and value_global, the rows at these positions, "
                "and no segment_ids"
            )
        shared, by_head = (batch, num_global), (batch, key_heads, num_global)
        if global_positions.shape not in (shared, by_head):
            raise ValueError(
                f"global_positions has shape {global_positions.shape}; "
                f"it must be {list(shared)} or {list(by_head)}"
            )

    rows = keys if segment_ids is not None else num_global
    if key_global is None:
        rows = min(rows, keys)
        key_global = key[:, :rows]
    if value_global is None:
        if rows > keys:
            raise ValueError(f"value_global is needed: value has {keys} rows for {rows} globals")
        value_global = value[:, :rows]
    if query_global is None:
        query_global = query
    arguments.shape("query_global", query_global, "B T N H", (batch, queries, heads, width))
    arguments.shape("key_global", key_global, "B R K H", (batch, rows, key_heads, width))
    arguments.shape("value_global", value_global, "B R K Hv", (batch, rows, key_heads, value_width))
    if global_distance is not None:
        global_distance = global_distance.checked(batch, queries, rows)

    def int32(ids):
        return jnp.asarray(ids, jnp.int32)

    if segment_ids is None and not (keys and window_size):
        # One row that comes after every query: no implementation need know of windows without keys.
        key, value = (jnp.zeros((batch, 1, *x.shape[2:]), x.dtype) for x in (key, value))
        key_start, query_offset = int32(key_start) + int32(query_offset) + queries, -queries

    return (
        Operands(Branch(query, key, value), Branch(query_global, key_global, value_global), sinks),
        Places(
            key_start=jnp.broadcast_to(int32(key_start), (batch,)),
            query_offset=int32(query_offset),
            segments=segment_ids and SegmentIds(*map(int32, segment_ids)),
            alibi_slopes=None if alibi_slopes is None else jax.lax.stop_gradient(alibi_slopes),
            far_distance=global_distance,
            far_positions=None
            if global_positions is None
            else int32(global_positions).reshape(batch, -1, num_global),
        ),
        Rules(
            window=window_size,
            num_global=num_global,
            scale=width**-0.5 if scale is None else scale,
            soft_cap=logits_soft_cap,
            clip_distance=clip_distance,
            precision=precision,
            query_offset=query_offset if isinstance(query_offset, int) else None,
        ),
    )


def _by_head(attend, rules, operands, places, windows, counts) -> Residuals:
    """The result where key heads differ: one call for each distinct (window, num_global)."""
    key_heads = operands.near.key.shape[2]
    group = operands.near.query.shape[2] // key_heads
    outs, lses, order = [], [], []
    for window, count in sorted(set(zip(windows, counts, strict=True))):
        ours = [h for h in range(key_heads) if (windows[h], counts[h]) == (window, count)]
        queries = [h * group + n for h in ours for n in range(group)]
        of_query, of_key = jnp.array(queries), jnp.array(ours)
        # Globals count from the front, except in packed rows, where they stand beside the keys.
        rows = slice(None) if places.segments is not None else slice(count)

        def pick(branch: Branch, rows, of_query=of_query, of_key=of_key) -> Branch:
            query, key, value = branch
            return Branch(
                query[:, :, of_query], key[:, rows][:, :, of_key], value[:, rows][:, :, of_key]
            )

        slopes, distance, sinks = places.alibi_slopes, places.far_distance, operands.sinks
        positions = places.far_positions
        if positions is not None:
            positions = (positions if positions.shape[1] == 1 else positions[:, of_key])[..., rows]
        result = attend(
            dataclasses.replace(rules, window=window, num_global=count),
            Operands(
                pick(operands.near, slice(None)),
                pick(operands.far, rows),
                None if sinks is None else sinks[of_query],
            ),
            places._replace(
                alibi_slopes=None if slopes is None else slopes[of_query],
                far_distance=distance and distance._replace(key=distance.key[:, rows]),
                far_positions=positions,
            ),
        )
        outs.append(result.out)
        lses.append(result.lse)
        order += queries
    back = jnp.array(sorted(range(len(order)), key=order.__getitem__))
    return Residuals(jnp.concatenate(outs, 2)[:, :, back], jnp.concatenate(lses, 1)[:, back])


def _per_head(name, values, default, key_heads: int, *, least: int) -> tuple[int, ...]:
    if values is None:
        return (default,) * key_heads
    if len(values) != key_heads:
        raise ValueError(f"{name} has {len(values)} values; key has {key_heads} heads")
    for value in values:
        arguments.count(name, value, least=least)
    return tuple(values)
