"""Attention for any policy and any encoding, in the forms that models run.

    prefill     a whole sequence: kernels.lambda_attention
    extend      a chunk with a cache: kernels.lambda_attention, or for one token the slots

Both are called once per forward pass, compute every rotation there, and return the function that
each layer calls, so angles are not recomputed per layer. Policies that select, evict or compress
process a sequence through their cache, in one call, so that prefill and extend are one function.

Both also run inside shard_map with a sequence's (or chunk's) tokens sharded over a mesh axis,
`context_axis`: each device attends from its queries to the keys of all. A cache is sharded by its
slots, and one layer of it is gathered at a time. In a prefill, a policy with a window fetches only
the window's keys from its neighbours (a halo) and the sinks from the device that has them; full
attention is ring attention; the others gather all keys, as packed rows do.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lminf import kernels
from lminf.attention import cache as caches
from lminf.attention import decode, reference, scores, sparse
from lminf.attention.context_parallel import ContextShards, shares_slots
from lminf.attention.policy import FULL, LayerPolicy, Policy
from lminf.attention.scores import Branches, Placement, ScoreConfig, by_head
from lminf.errors import InputError
from lminf.kernels.common import masks

# Both take sinks=, a learnt logit of each query head (scores.HeadTerms).
# (q, k, v) -> out [B, T, heads, H]; with layer_index= where the policy has layer_thresholds.
Prefill: TypeAlias = Callable[..., Array]
# (q, k, v, kv, row of kv) -> out, kv; with layer_index= where the policy has layer_thresholds.
Extend: TypeAlias = Callable[..., tuple[Array, caches.KVState]]


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
        everything = part.window is None and part.num_sinks == 0
        if everything and context_axis is not None and segments is None:
            return _ring_attention(part, config, positions, shards, implementation)
        return _over_sequence(part, config, positions, segments, shards, implementation)

    return config.gained(by_head(policy, config, make), positions)


def _prefill_through_cache(policy, config, positions, segments, context_axis):
    if segments is not None:
        raise InputError(
            f"{policy.name} chooses within one text, but packed rows hold several; give each text "
            f"its own row"
        )

    def run(q, k, v, **options):
        (batch, tokens, heads, width), kv_heads = q.shape, k.shape[2]
        shape = caches.CacheShape(batch, tokens, heads, kv_heads, width, k.dtype)
        empty = caches.create(policy, shape, layers=1)
        step, _ = extend(
            policy, config, empty.layout, empty.pos, positions, context_axis=context_axis
        )
        return step(q, k, v, empty.kv, jnp.int32(0), **options)[0]

    return run


def _over_sequence(policy, config, positions, segments, shards, implementation):
    all_pos = shards.all(positions)
    batch, total = all_pos.shape
    count = total if policy.num_sinks is None else min(policy.num_sinks, total)
    # Far keys are the tokens at positions 0.. of each row: behind the padding, if any. Every
    # segment has first tokens of its own: the kernel picks them out of all.
    key_pos, far_pos, query_offset = all_pos, caches.first_positions(batch, count), shards.first
    halo = policy.bounded and shards.axis is not None and segments is None
    segment_ids = None
    if segments is not None:
        far_pos, ids = key_pos, jnp.where(positions < 0, masks.PADDING, segments)
        segment_ids = kernels.SegmentIds(ids, shards.all(ids))
    elif halo:  # of the keys on other devices only the window's
        query_offset = min(policy.window - 1, total - shards.tokens)
        offsets = jnp.arange(-query_offset, shards.tokens, dtype=positions.dtype)
        key_pos = positions[:, :1] + offsets[None]

    def keys(k, v):
        near = [shards.with_halo(x, query_offset) if halo else shards.all(x) for x in (k, v)]
        if segments is not None:
            return *near, *near
        if halo:
            return *near, *(shards.rows(x, far_pos - positions[:, :1]) for x in (k, v))
        rows = jnp.clip(far_pos - key_pos[:, :1], 0, total - 1)
        return *near, *(caches.rows(x, rows) for x in near)

    return _attention(
        policy, config, Placement(config, all_pos, segments), positions, key_pos, far_pos, keys,
        count=count, query_offset=query_offset, segments=segment_ids, implementation=implementation,
    )  # fmt: skip


def _ring_attention(policy, config, positions, shards, implementation):
    """Ring attention: the keys of one device after another."""
    placement = Placement(config, shards.all(positions))
    branches = Branches(policy, placement, positions, positions, positions[:, :0])

    def attend(q, k, v, heads):
        near_q, near_k = branches.near(q, k)

        def visit(carry, away):
            k, v, out, lse = carry
            # Keys from beyond the last device are of later tokens, which nobody here sees.
            offset = jnp.where(away <= shards.index, away, away - shards.devices) * q.shape[1]
            part = kernels.lambda_attention(
                near_q, k, v, num_global=0, window_size=shards.total, query_offset=offset,
                key_start=positions[:, 0] - offset, implementation=implementation,
                return_residuals=True, **config.for_kernel(heads._replace(sinks=None)),
            )  # fmt: skip
            assert isinstance(part, kernels.Residuals)
            merged = scores.merge((out, lse), part)
            return (shards.from_left(k), shards.from_left(v), *merged), None

        lse = jnp.full((q.shape[0], q.shape[2], q.shape[1]), -jnp.inf, jnp.float32)
        start = near_k, v, jnp.zeros((*q.shape[:3], v.shape[3]), jnp.float32), lse
        steps = jnp.arange(shards.devices, dtype=jnp.int32)
        (_, _, out, lse), _ = jax.lax.scan(jax.checkpoint(visit), start, steps)
        return heads.past_sinks(out, lse).astype(q.dtype)

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
        step = decode.extend(policy, config, layout, positions)
        return config.gained(step, positions), stored_pos
    if isinstance(layout, caches.SlotCache):
        step, new_pos = policy.extend(config, layout, stored_pos, positions)
        return config.gained(step, positions), new_pos
    shards = ContextShards(context_axis, positions.shape[1])
    all_pos = shards.all(positions)
    to_slots = layout.destinations(all_pos)
    new_pos = caches.write_pos(stored_pos, all_pos, to_slots)

    def over_positions(part: Policy):
        if all_pos.shape[1] == 1:
            # Of all slots, one holds the token itself. The first positions are the first slots.
            attend = reference.dense(
                part, config, _placement(config, layout, positions), positions, new_pos,
                num_far=part.num_sinks,
            )  # fmt: skip
            return lambda q, k, v, before_k, before_v, *stored: attend(q, *stored)
        return _over_cache(part, config, layout, positions, shards, implementation)

    if isinstance(policy, sparse.SparsePolicy):
        read = sparse.reader(policy, config, layout, positions, over_positions)
    else:
        attend = by_head(FULL if policy.needs_prompt else policy, config, over_positions)

        def read(q, k, v, old_kv, kv, layer, *, sinks=None):
            stored = [x[layer] for x in (old_kv.k, old_kv.v, kv.k, kv.v)]
            out = attend(q, k, v, *stored, sinks=sinks)
            return out, policy.observe_queries(kv.state, q, layer)

    def step(q, k, v, kv, layer, **options):
        k, v = shards.all(k), shards.all(v)
        written = kv._replace(
            k=caches.write(kv.k, k, layer, to_slots), v=caches.write(kv.v, v, layer, to_slots)
        )
        out, state = read(q, k, v, kv, written, layer, **options)
        return out, written._replace(state=state)

    def over_shares(q, k, v, kv, layer, **options):
        """`step` over one layer, gathered from all devices, of which each keeps its share."""
        whole = [shards.all(x[layer])[None] for x in (kv.k, kv.v)]
        out, new = step(q, k, v, kv._replace(k=whole[0], v=whole[1]), jnp.int32(0), **options)
        k, v = (x.at[layer].set(shards.own(y[0])) for x, y in ((kv.k, new.k), (kv.v, new.v)))
        return out, new._replace(k=k, v=v)

    run = over_shares if shares_slots(layout, shards.devices) else step
    return config.gained(run, positions), new_pos


def prepare_decoding(
    policy: LayerPolicy, config: ScoreConfig, cache: caches.Cache, *, length: int, room: int
) -> caches.Cache:
    """The cache as one token after another reads it fastest, at the end of a prompt of at most
    `length` tokens; `room` more may come. Only policies that need a prompt then read chunks.
    """
    if policy.needs_prompt:
        return policy.compress_prompt(config, cache, length=length, room=room)
    return decode.prerotate(policy, config, cache)


def _placement(config, layout, positions):
    """Of new tokens and those in the cache."""
    return Placement(config, positions, table=layout.slots if layout.keeps_all else 0)


def _over_cache(policy, config, layout, positions, shards, implementation):
    """A chunk over a cache: over all of it, which is then in order, or over the last `window`
    stored tokens, itself, and the first `num_sinks`.
    """
    chunk, width, count = shards.all(positions), policy.window, policy.num_sinks
    if policy.bounded:
        recent = chunk[:, :1] + jnp.arange(-width, 0, dtype=chunk.dtype)[None]
        recent_slots = jnp.clip(layout.slot(recent), 0, layout.slots - 1)
        key_pos, query_offset = jnp.concatenate([recent, chunk], 1), width + shards.first
    else:
        recent_slots, count = None, layout.slots if count is None else count
        key_pos, query_offset = caches.first_positions(len(chunk), layout.slots), positions[:, 0]

    def near(new, before, after):
        if recent_slots is None:
            return after
        # Where nothing is overwritten all of it is read after the chunk is written: an array that
        # is read on both sides of its own change is copied, with all layers of it, in every layer.
        old = caches.rows(after if layout.keeps_all else before, recent_slots)
        return jnp.concatenate([old.astype(new.dtype), new], 1)

    def keys(k, v, before_k, before_v, after_k, after_v):
        after_k, after_v = after_k.astype(k.dtype), after_v.astype(v.dtype)
        far = after_k[:, :count], after_v[:, :count]
        return near(k, before_k, after_k), near(v, before_v, after_v), *far

    return _attention(
        policy, config, _placement(config, layout, chunk), positions, key_pos,
        caches.first_positions(len(chunk), count), keys, count=count, query_offset=query_offset,
        implementation=implementation,
    )  # fmt: skip


# --- The kernel -----------------------------------------------------------------------------------


def _attention(
    policy, config, placement, positions, key_pos, far_pos, keys, *,
    count, query_offset, implementation, segments=None,
) -> Callable[..., Array]:  # fmt: skip
    """The function of q, arrays and HeadTerms that attends to `keys(*arrays)`, which are k and
    v at `key_pos` and those of the `count` first tokens at `far_pos`.
    """
    branches = Branches(policy, placement, positions, key_pos, far_pos)
    key_start = 0 if segments is not None else key_pos[:, 0]

    def attend(q, *arrays):
        *arrays, heads = arrays
        k, v, far_k, far_v = keys(*arrays)
        near_q, near_k = branches.near(q, k)
        by_row: dict = {"query": near_q, "key": near_k, "value": v}  # everything with a batch axis
        if count:
            by_row["query_global"], by_row["key_global"] = branches.far(q, far_k)
            by_row["value_global"] = far_v
        if heads.slopes is not None and count:
            by_row["global_distance"] = branches.far_distance

        def run(by_row, key_start, query_offset):
            out = kernels.lambda_attention(
                **by_row, num_global=count, segment_ids=segments, key_start=key_start,
                window_size=k.shape[1] if policy.window is None else policy.window,
                query_offset=query_offset, implementation=implementation,
                **config.for_kernel(heads),
            )  # fmt: skip
            assert isinstance(out, jax.Array)  # no residuals
            return out

        if jnp.ndim(query_offset) == 0:
            return run(by_row, key_start, query_offset)
        # Rows of unequal length: each has its own offset, and the kernel takes one.
        return jax.vmap(
            lambda row, *places: run(
                jax.tree.map(lambda x: x[None] if jnp.ndim(x) else x, row), *places
            )[0],
            in_axes=(jax.tree.map(lambda x: 0 if jnp.ndim(x) else None, by_row), 0, 0),
        )(by_row, key_start, query_offset)  # fmt: skip

    return attend
