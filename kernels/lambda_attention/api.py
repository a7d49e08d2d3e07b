"""Λ-attention: the last w keys at their true distance, the first g keys beyond them through a
second set of operands, one softmax over both. This file checks the arguments and fills in defaults.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.common import dispatch
from kernels.common.masks import GlobalDistance, SegmentIds
from kernels.lambda_attention import reference, xla, xla_chunked
from kernels.lambda_attention.operands import Operands, Places, Residuals, Rules

IMPLEMENTATIONS = {
    "reference": reference.attention,
    "xla": xla.attention,
    "xla_chunked": xla_chunked.attention,
}
ORDER = {"cpu": ("xla", "xla_chunked")}


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
    config: xla_chunked.Config | None = None,
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

    `alibi_slopes` (no gradient) subtracts slope * distance from the scaled score: d on the local
    branch; on the global one min(d, clip_distance), or what `global_distance` says. Then
    `logits_soft_cap` c gives c * tanh(x / c). `sinks` adds exp(sink) to the denominator only.
    `head_window` and `head_num_global` give one value for each key head instead of one for all.
    A row that sees nothing has output 0, LSE -inf and no gradient. Statistics are float32.
    """
    batch, queries, heads, width = _shape("query", query, "B T N H", (None,) * 4)
    _, keys, key_heads, _ = _shape("key", key, "B S K H", (batch, None, None, width))
    *_, value_width = _shape("value", value, "B S K Hv", (batch, keys, key_heads, None))
    if heads % key_heads:
        raise ValueError(f"query has {heads} heads, not a multiple of the {key_heads} of key")
    _check_count("window_size", window_size, least=1)
    _check_count("num_global", num_global, least=0)
    if clip_distance is not None:
        _check_count("clip_distance", clip_distance, least=1)
    for name, vector in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if vector is not None:
            _shape(name, vector, "N", (heads,))
    explicit = key_global is not None
    from_zero = isinstance(key_start, int) and key_start == 0
    if num_global and not explicit and not from_zero:
        raise ValueError("key_start other than the int 0 needs key_global, the keys at 0, 1, ...")
    if not explicit and value_global is not None:
        raise ValueError("value_global needs key_global")
    if segment_ids is not None:
        _shape("segment_ids.q", segment_ids.q, "B T", (batch, queries))
        _shape("segment_ids.kv", segment_ids.kv, "B S", (batch, keys))
        if not from_zero:
            raise ValueError(
                "key_start must be the int 0 with segment_ids, whose positions restart"
            )

    if query_global is not None:
        _shape("query_global", query_global, "B T N H", query.shape)
    if segment_ids is not None:
        rows = keys
    else:
        rows = num_global if explicit else min(num_global, keys)
    if key_global is not None:
        _shape("key_global", key_global, "B R K H", (batch, rows, key_heads, width))
    if value_global is not None:
        _shape("value_global", value_global, "B R K Hv", (batch, rows, key_heads, value_width))
    if value_global is None and rows > keys:
        raise ValueError(f"value_global is needed: {rows} globals but value has {keys} rows")
    if global_distance is not None:
        one_or_batch = global_distance.query.shape[0] if global_distance.query.ndim else None
        if one_or_batch not in (1, batch):
            raise ValueError(f"global_distance.query has shape {global_distance.query.shape}")
        _shape("global_distance.query", global_distance.query, "B|1 T", (one_or_batch, queries))
        one_or_batch = global_distance.key.shape[0] if global_distance.key.ndim else None
        if one_or_batch not in (1, batch):
            raise ValueError(f"global_distance.key has shape {global_distance.key.shape}")
        _shape("global_distance.key", global_distance.key, "B|1 R", (one_or_batch, rows))

    operands = Operands(
        query,
        key,
        value,
        query if query_global is None else query_global,
        key[:, :rows] if key_global is None else key_global,
        value[:, :rows] if value_global is None else value_global,
        sinks,
    )
    places = Places(
        key_start=jnp.broadcast_to(jnp.asarray(key_start, jnp.int32), (batch,)),
        query_offset=jnp.asarray(query_offset, jnp.int32),
        segment_q=None if segment_ids is None else segment_ids.q.astype(jnp.int32),
        segment_kv=None if segment_ids is None else segment_ids.kv.astype(jnp.int32),
        alibi_slopes=None if alibi_slopes is None else jax.lax.stop_gradient(alibi_slopes),
        distance_query=None if global_distance is None else global_distance.query,
        distance_key=None if global_distance is None else global_distance.key,
        distance_scale=None
        if global_distance is None
        else jnp.asarray(global_distance.scale, jnp.float32),
    )
    rules = Rules(
        window=window_size,
        num_global=num_global,
        scale=width**-0.5 if scale is None else scale,
        soft_cap=logits_soft_cap,
        clip_distance=clip_distance,
        precision=precision,
    )

    def attend(rules: Rules, operands: Operands, places: Places) -> Residuals:
        if rules.num_global == 0:
            operands = operands._replace(query_global=None, key_global=None, value_global=None)
        return dispatch.run(
            "lambda_attention", IMPLEMENTATIONS, ORDER, implementation,
            rules, operands, places, config,
        )  # fmt: skip

    if head_window is None and head_num_global is None:
        result = attend(rules, operands, places)
    else:
        windows = _per_head("head_window", head_window, window_size, key_heads, least=1)
        counts = _per_head("head_num_global", head_num_global, num_global, key_heads, least=0)
        if max(counts) > num_global:
            raise ValueError(f"head_num_global={counts} exceeds num_global={num_global}")
        result = _by_head(attend, rules, operands, places, windows, counts)
    return result if return_residuals else result.out


def _by_head(attend, rules, operands, places, windows, counts) -> Residuals:
    """The result where key heads differ: one call for each distinct (window, num_global)."""
    key_heads = operands.key.shape[2]
    group = operands.query.shape[2] // key_heads
    kinds = sorted(set(zip(windows, counts, strict=True)))
    outs, lses, order = [], [], []
    for window, count in kinds:
        ours = [h for h in range(key_heads) if (windows[h], counts[h]) == (window, count)]
        queries = [h * group + n for h in ours for n in range(group)]
        # Globals count from the front, except in packed rows, where they stand beside the keys.
        rows = slice(None) if places.segment_kv is not None else slice(count)

        def pick(x, heads):
            return x[:, :, jnp.array(heads)]

        result = attend(
            dataclasses.replace(rules, window=window, num_global=count),
            Operands(
                pick(operands.query, queries),
                pick(operands.key, ours),
                pick(operands.value, ours),
                pick(operands.query_global, queries),
                pick(operands.key_global[:, rows], ours),
                pick(operands.value_global[:, rows], ours),
                None if operands.sinks is None else operands.sinks[jnp.array(queries)],
            ),
            places._replace(
                alibi_slopes=None
                if places.alibi_slopes is None
                else places.alibi_slopes[jnp.array(queries)],
                distance_key=None if places.distance_key is None else places.distance_key[:, rows],
            ),
        )
        outs.append(result.out)
        lses.append(result.lse)
        order += queries
    back = jnp.array(sorted(range(len(order)), key=order.__getitem__))
    return Residuals(jnp.concatenate(outs, 2)[:, :, back], jnp.concatenate(lses, 1)[:, back])


def _shape(name: str, x: Array, letters: str, expected: tuple[int | None, ...]) -> tuple[int, ...]:
    fits = x.ndim == len(expected) and all(
        e is None or e == n for e, n in zip(expected, x.shape, strict=True)
    )
    if not fits:
        known = " ".join(
            letter if e is None else f"{letter}={e}"
            for letter, e in zip(letters.split(), expected, strict=True)
        )
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [{known}]")
    return x.shape


def _check_count(name: str, count: int, *, least: int) -> None:
    if not isinstance(count, int) or count < least:
        raise ValueError(f"{name}={count!r} must be an int of at least {least}")


def _per_head(name, values, default, key_heads: int, *, least: int) -> tuple[int, ...]:
    if values is None:
        return (default,) * key_heads
    if len(values) != key_heads:
        raise ValueError(f"{name} has {len(values)} values; key has {key_heads} heads")
    for value in values:
        _check_count(name, value, least=least)
    return tuple(values)
