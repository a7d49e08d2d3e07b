"""Attention for any policy and any encoding, in the forms that models run.

    prefill     a whole sequence: kernels.lambda_attention
    extend      a chunk with a cache: kernels.lambda_attention, or for one token the slots

Both are called once per forward pass, compute every rotation there, and return the function that
each layer calls, so angles are not recomputed per layer. Policies that select, evict or compress
process a sequence through their cache, in one call, so that prefill and extend are one function.

Both also run inside shard_map with a sequence's (or chunk's) tokens sharded over a mesh axis,
`context_axis`: each device attends from its queries to the keys of all. In a prefill, a policy with
a window fetches only the window's keys from its neighbours (a halo) and the sinks from the device
that has them; full attention is ring attention; the others gather all keys, as packed rows do.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lminf import kernels
from lminf.attention import cache as caches
from lminf.attention import decode, scores, slots, sparse
from lminf.attention.context_parallel import ContextShards
from lminf.attention.policy import FULL, LayerPolicy, Policy
from lminf.attention.scores import Branches, Placement, ScoreConfig, by_head
from lminf.errors import InputError
from lminf.kernels.common import masks

Prefill: TypeAlias = Callable[[Array, Array, Array], Array]  # (q, k, v) -> out [B, T, heads, H]
# (q, k, v, kv, layer) -> out, kv
Extend: TypeAlias = Callable[[Array, Array, Array, caches.KVState, Any],
                             tuple[Array, caches.KVState]]  # fmt: skip


# --- A whole sequence -----------------------------------------------------------------------------


def prefill(
    policy: LayerPolicy,
    config: ScoreConfig,
    positions: Int[Array, "B T"],
    *,
    segments: Int[Array, "B T"] | None = None,
    context_axis: str | None = None,
    implementation: str | None = None,
) -> Prefill:
    """Attention of a text over itself.

    Positions rise by one along a row, from 0 or below (never above: the first tokens must be
    there), or along each segment, from 0. Tokens below 0 are padding, as those in segment
    masks.PADDING are: they see nothing and are not seen.
    """
    if not policy.context_parallel:
        return _prefill_through_cache(policy, config, positions, segments, context_axis)
    shards = ContextShards(context_axis, positions.shape[1])

    def make(part: Policy):
        if context_axis is not None and segments is None:
            if part.bounded:
                return _halo_attention(part, config, positions, shards, implementation)
            if part.window is None and part.num_sinks == 0:
                return _ring_attention(part, config, positions, shards, implementation)
        return _over_sequence(part, config, positions, segments, shards, implementation)

    return by_head(policy, config, make)


def _prefill_through_cache(policy, config, positions, segments, context_axis):
    if segments is not None:
        raise InputError(
            f"{policy.name} chooses within one text, but packed rows hold several; give each text "
            f"its own row"
        )
    batch, tokens = positions.shape

    def run(q, k, v):
        layout = caches.layout_for(policy, tokens)
        kv_heads, width = k.shape[2:]
        shape = caches.CacheShape(batch, layout.slots, q.shape[2], kv_heads, width, k.dtype)
        empty = caches.empty(
            layout, layers=1, batch=batch, kv_heads=kv_heads, head_dim=width, dtype=k.dtype,
            state=policy.init_state(shape),
        )  # fmt: skip
        step, _ = extend(policy, config, layout, empty.pos, positions, context_axis=context_axis)
        return step(q, k, v, empty.kv, jnp.int32(0))[0]

    return run


def _over_sequence(policy, config, positions, segments, shards, implementation):
    key_pos = shards.all(positions)
    batch, tokens = key_pos.shape
    count = tokens if policy.num_sinks is None else min(policy.num_sinks, tokens)
    if segments is None:
        # Far keys are the tokens at positions 0.. of each row: behind the padding, if any.
        far_pos = _first_positions(batch, count)
        rows = jnp.clip(far_pos - key_pos[:, :1], 0, tokens - 1)
        key_start = key_pos[:, 0]
    else:
        # Every segment has first tokens of its own: the kernel picks them out of all.
        far_pos, rows, key_start = key_pos, None, 0
        ids = jnp.where(positions < 0, masks.PADDING, segments)
        segments = kernels.SegmentIds(ids, shards.all(ids))

    def keys(k, v):
        k, v = shards.all(k), shards.all(v)
        return k, v, *((k, v) if rows is None else (_rows(k, rows), _rows(v, rows)))

    return _attention(
        policy, config, Placement(config, key_pos, segments), positions, key_pos, far_pos, count,
        keys, key_start=key_start, query_offset=shards.first, segments=segments,
        implementation=implementation,
    )  # fmt: skip


def _halo_attention(policy, config, positions, shards, implementation):
    """Of a sequence on several devices: the window's keys from the left, and the sinks."""
    batch, tokens = positions.shape
    reach = min(policy.window - 1, shards.total - tokens)  # keys that stand on other devices
    count = min(policy.num_sinks, shards.total)
    key_pos = positions[:, :1] + jnp.arange(-reach, tokens, dtype=positions.dtype)[None]
    far_pos = _first_positions(batch, count)
    rows = far_pos - positions[:, :1]
    here = ((rows >= 0) & (rows < tokens))[..., None, None]

    def sinks_of(x):
        local = _rows(x, jnp.clip(rows, 0, tokens - 1))
        return shards.sum(jnp.where(here, local, jnp.zeros((), x.dtype)))

    def keys(k, v):
        return *(shards.with_halo(x, reach) for x in (k, v)), sinks_of(k), sinks_of(v)

    return _attention(
        policy, config, Placement(config, shards.all(positions)), positions, key_pos, far_pos,
        count, keys, key_start=key_pos[:, 0], query_offset=reach, implementation=implementation,
    )  # fmt: skip


def _ring_attention(policy, config, positions, shards, implementation):
    """Ring attention: the keys of one device after another."""
    placement = Placement(config, shards.all(positions))
    branches = Branches(policy, placement, positions, positions, positions[:, :0])

    def attend(q, k, v, slopes):
        near_q, near_k = branches.near(q, k)
        fixed = {"num_global": 0, "window_size": shards.total, "implementation": implementation,
                 "return_residuals": True, **config.for_kernel(slopes)}  # fmt: skip

        def visit(carry, away):
            k, v, out, lse = carry
            # Keys from beyond the last device are of later tokens, which nobody here sees.
            offset = jnp.where(away <= shards.index, away, away - shards.devices) * q.shape[1]
            part, part_lse = kernels.lambda_attention(
                near_q, k, v, query_offset=offset, key_start=positions[:, 0] - offset, **fixed
            )
            out, lse = scores.merge((out, lse), (part, part_lse))
            return (shards.from_left(k), shards.from_left(v), out, lse), None

        empty = jnp.full((q.shape[0], q.shape[2], q.shape[1]), -jnp.inf, jnp.float32)
        start = near_k, v, jnp.zeros((*q.shape[:3], v.shape[3]), jnp.float32), empty
        steps = jnp.arange(shards.devices, dtype=jnp.int32)
        (_, _, out, _), _ = jax.lax.scan(jax.checkpoint(visit), start, steps)
        return out.astype(q.dtype)

    return attend


# --- A chunk against a cache ----------------------------------------------------------------------


def extend(
    policy: LayerPolicy,
    config: ScoreConfig,
    layout: caches.Layout,
    stored_pos: Int[Array, "B S"],
    positions: Int[Array, "B T"],
    *,
    context_axis: str | None = None,
    implementation: str | None = None,
) -> tuple[Extend, Int[Array, "B S"]]:
    """Attention of new tokens over what the cache holds and over themselves; and the new `pos`.

    Positions rise by one along a row and continue what the row has read. A row that begins below 0
    is padded: those tokens see nothing and are not stored.
    """
    if context_axis is not None and not policy.context_parallel:
        raise InputError(
            f"{policy.name} selects among all tokens of a row, which must be on one device; "
            f"spread rows over devices, or use a policy of positions"
        )
    if isinstance(layout, caches.PreRotated):
        return decode.extend(policy, config, layout, positions), stored_pos
    if isinstance(layout, caches.SlotCache):
        return slots.extend(policy, config, layout, positions), stored_pos
    if isinstance(layout, caches.CompressedPrompt):
        return slots.extend_compressed(config, layout, stored_pos, positions)
    shards = ContextShards(context_axis, positions.shape[1])
    all_positions = shards.all(positions)
    to_slots = caches.destinations(layout, all_positions)
    new_pos = caches.write_pos(stored_pos, all_positions, to_slots)

    def over_positions(part: Policy):
        if all_positions.shape[1] == 1:
            return decode.over_slots(part, config, layout, new_pos, positions)
        over = _over_all if None in (part.window, part.num_sinks) else _over_window
        return over(part, config, layout, positions, shards, implementation)

    if isinstance(policy, sparse.SparsePolicy):
        read = sparse.reader(policy, config, layout, positions, over_positions)
    else:
        attend = by_head(FULL if policy.needs_prompt else policy, config, over_positions)

        def read(q, k, v, before, kv, layer):
            after = kv.k[layer], kv.v[layer]
            state = slots.last_queries(kv.state, q, layer) if policy.needs_prompt else kv.state
            return attend(q, k, v, before.k[layer], before.v[layer], *after), state

    def step(q, k, v, kv, layer):
        k, v = shards.all(k), shards.all(v)
        after = kv._replace(
            k=caches.write(kv.k, k, layer, to_slots), v=caches.write(kv.v, v, layer, to_slots)
        )
        out, state = read(q, k, v, kv, after, layer)
        return out, after._replace(state=state)

    return step, new_pos


def prepare_decoding(
    policy: LayerPolicy, config: ScoreConfig, cache: caches.Cache, *, length: int, room: int
) -> caches.Cache:
    """The cache as one token after another reads it fastest, at the end of a prompt of at most
    `length` tokens; `room` more may come. Only policies that need a prompt then read chunks.
    """
    if policy.needs_prompt:
        return policy.compress_prompt(config, cache, length=length, room=room)
    return decode.prerotate(policy, config, cache)


def _over_window(policy, config, layout, positions, shards, implementation):
    """A chunk over the last `window` stored tokens, itself, and the first `num_sinks`."""
    chunk = shards.all(positions)
    width, count = policy.window, policy.num_sinks
    recent = chunk[:, :1] + jnp.arange(-width, 0, dtype=chunk.dtype)[None]
    recent_slots = jnp.clip(layout.slot(recent), 0, layout.slots - 1)

    def window_of(new, before, after):
        # Where nothing is overwritten all of it is read after the chunk is written: an array that
        # is read on both sides of its own change is copied, with all layers of it, in every layer.
        old = _rows(after if isinstance(layout, caches.LinearCache) else before, recent_slots)
        return jnp.concatenate([old.astype(new.dtype), new], 1)

    def keys(k, v, before_k, before_v, after_k, after_v):
        far_k, far_v = after_k[:, :count].astype(k.dtype), after_v[:, :count].astype(v.dtype)
        return window_of(k, before_k, after_k), window_of(v, before_v, after_v), far_k, far_v

    return _attention(
        policy, config, Placement(config, chunk), positions, jnp.concatenate([recent, chunk], 1),
        _first_positions(len(chunk), count), count, keys, key_start=recent[:, 0],
        query_offset=width + shards.first, implementation=implementation,
    )  # fmt: skip


def _over_all(policy, config, layout, positions, shards, implementation):
    """A chunk over a cache that keeps everything in order."""
    slot_pos = _first_positions(len(positions), layout.slots)
    count = layout.slots if policy.num_sinks is None else policy.num_sinks

    def keys(k, v, before_k, before_v, after_k, after_v):
        del before_k, before_v
        all_k, all_v = after_k.astype(k.dtype), after_v.astype(v.dtype)
        return all_k, all_v, all_k[:, :count], all_v[:, :count]

    return _attention(
        policy, config, Placement(config, shards.all(positions)), positions, slot_pos,
        slot_pos[:, :count], count, keys, key_start=jnp.zeros(len(positions), jnp.int32),
        query_offset=positions[:, 0], implementation=implementation,
    )  # fmt: skip


# --- The kernel -----------------------------------------------------------------------------------


def _attention(
    policy, config, placement, positions, key_pos, far_pos, count, keys, *,
    key_start, query_offset, implementation, segments=None,
) -> Callable[..., Array]:  # fmt: skip
    """The function of q, arrays and ALiBi's slopes that attends to `keys(*arrays)`, which are k and
    v at `key_pos` and those of the `count` first tokens at `far_pos`.
    """
    branches = Branches(policy, placement, positions, key_pos, far_pos)

    def attend(q, *arrays):
        *arrays, slopes = arrays
        k, v, far_k, far_v = keys(*arrays)
        near_q, near_k = branches.near(q, k)
        fixed = {
            "num_global": count,
            "window_size": k.shape[1] if policy.window is None else policy.window,
            "implementation": implementation,
            **config.for_kernel(slopes),
        }
        by_row: dict = {"query": near_q, "key": near_k, "value": v}  # everything with a batch axis
        if count:
            by_row["query_global"], by_row["key_global"] = branches.far(q, far_k)
            by_row["value_global"] = far_v
        if slopes is not None and count:
            by_row["global_distance"] = kernels.GlobalDistance(
                branches.far_q_pos, branches.far_k_pos, branches.far_scale
            )
        if jnp.ndim(query_offset) == 0:
            return _outputs(
                **by_row, **fixed, key_start=key_start, query_offset=query_offset,
                segment_ids=segments,
            )  # fmt: skip
        # Rows of unequal length: each has its own offset, and the kernel takes one.
        return jax.vmap(
            lambda row, start, offset: _outputs(
                **jax.tree.map(lambda x: x[None] if jnp.ndim(x) else x, row),
                **fixed, key_start=start, query_offset=offset,
            )[0],
            in_axes=(jax.tree.map(lambda x: 0 if jnp.ndim(x) else None, by_row), 0, 0),
        )(by_row, key_start, query_offset)  # fmt: skip

    return attend


def _outputs(query: Array, key: Array, value: Array, **options: Any) -> Array:
    out = kernels.lambda_attention(query, key, value, **options)
    assert isinstance(out, jax.Array)  # no residuals
    return out


def _first_positions(batch: int, count: int) -> Int[Array, "B R"]:
    return jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))


def _rows(x: Array, rows: Int[Array, "B R"]) -> Array:
    """x [B, S, K, H] at these rows. take_along_axis would look up every channel by itself."""
    return x[jnp.arange(len(rows))[:, None], rows]
