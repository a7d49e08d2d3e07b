"""One token per row by kernels.lambda_decode, or a few, over a cache whose keys are rotated.

Where near and far keys seem to be does not depend on the query. So at the end of a prompt the last
`window` keys are rotated to their positions, head by head as the kernel reads them, and the sinks,
which may be all keys, to where they seem. Nothing is rotated again while a token is kept, which was
a fifth of a decoding step on a CPU (SmolLM2-135M, 4,096 tokens).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lminf import kernels
from lminf.attention import cache as caches
from lminf.attention import rope, scores
from lminf.attention.policy import LayerPolicy, PerHead, Policy, head_policies
from lminf.attention.scores import Branches, HeadTerms, Placement, ScoreConfig
from lminf.kernels.decode import cache as rolling


def prerotate(
    policy: LayerPolicy, config: ScoreConfig, cache: caches.Cache, *, spare: int = 0
) -> caches.Cache:
    """The cache with its keys rotated; itself, where a rotation would not stay right. The last
    `spare` tokens that it then reads may be taken back: its ring has as many slots more.

    It would not where the schedule changes with the length of the text, where ALiBi's far distances
    differ by head, where some heads have all keys near and some have all far, and where a policy
    selects, evicts or compresses.
    """
    layout, encoding, parts = cache.layout, config.encoding, head_policies(policy)
    windows: list[Any] = [part.window for part in parts]
    counts: list[Any] = [part.num_sinks for part in parts]
    dynamic = isinstance(encoding, rope.Rotary) and encoding.scaling.follows_length
    by_head = isinstance(encoding, rope.Alibi) and len(parts) > 1
    if not policy.context_parallel or not isinstance(layout, caches.SinkRingCache):
        return cache
    if dynamic or by_head or (None in windows and None in counts):
        return cache
    if None in windows:
        window, spare = layout.slots, 0
    else:
        window = max(windows)
        window = min(window + spare, layout.slots) if layout.keeps_all else window + spare
    sinks = layout.slots if None in counts else max(counts)
    rotated = caches.PreRotated(window, sinks, ring=None not in counts, spare=spare)
    last = cache.pos.max(1, keepdims=True)  # [B, 1]
    ring_pos = rotated.ring_positions(last)
    ring_slots = jnp.clip(layout.slot(ring_pos), 0, layout.slots - 1)
    placement = Placement(config, last)
    by_ring = placement.rotation(ring_pos)
    place_sinks = _placed(policy, config, placement, caches.first_positions(len(last), sinks))

    def ring_of(k, v):
        k, v = (caches.rows(x, ring_slots) for x in (k, v))
        return [x.swapaxes(1, 2) for x in (placement.rotate(k, by_ring), v)]

    def sinks_of(k, v):
        k, v = k[:, :sinks], v[:, :sinks]
        return [x.swapaxes(1, 2) for x in (place_sinks(k, k)[3], v)]

    def every_layer(part):
        """[L, B, K, X, H] of rows [B, X, K, H]."""
        return tuple(jax.lax.map(lambda kv: part(*kv), (cache.k, cache.v)))

    main, second = rotated.ordered(ring_of, sinks_of)
    state = every_layer(second)
    if layout.keeps_all:
        # In place, layer by layer: it may fill the memory.
        def change(layer, kv):
            new = main(*(x[layer] for x in kv))
            return [x.at[layer].set(y.reshape(x.shape[1:])) for x, y in zip(kv, new, strict=True)]

        k, v = jax.lax.fori_loop(0, len(cache.k), change, [cache.k, cache.v])
    else:
        k, v = (x.reshape(*x.shape[:2], -1, *cache.k.shape[3:]) for x in every_layer(main))
    return caches.Cache(k, v, cache.pos, rotated, state)


def extend(
    policy: LayerPolicy,
    config: ScoreConfig,
    layout: caches.PreRotated,
    positions: Int[Array, "B T"],
) -> Callable[..., tuple[Array, caches.KVState]]:
    """The step of every layer over a cache of rotated keys: for one token per row, or for several,
    which then visit all slots. Rows may end in padding.
    """
    place = _placed(policy, config, Placement(config, positions), positions)
    parts = policy.policies if isinstance(policy, PerHead) else head_policies(policy)
    windows = [min(part.window or layout.window, layout.window) for part in parts]
    counts = [layout.sinks if part.num_sinks is None else part.num_sinks for part in parts]
    counts = jnp.broadcast_to(jnp.array(counts, jnp.int32)[None], (len(positions), len(counts)))
    length = jnp.maximum(positions[:, 0], 0)  # of what was read before
    new = (positions >= 0).sum(1, dtype=jnp.int32)
    far, rank = parts[0].far_positions(), jnp.arange(layout.sinks, dtype=jnp.int32)[None]

    def one(near_q, far_q, cache, heads, layer):
        options = config.for_kernel(heads)
        if heads.slopes is not None:
            options["global_distance"] = kernels.GlobalDistance(
                far.query(positions), far.key(rank), far.scale
            )
        if isinstance(policy, PerHead):
            options |= {"head_window": windows, "global_count": counts}
        out = kernels.lambda_decode(
            near_q[:, 0], cache, layer=layer, query_global=far_q[:, 0], **options
        )
        assert isinstance(out, jax.Array)  # no residuals
        return out[:, None]

    def several(near_q, far_q, cache, heads, layer):
        cache = cache.of(jnp.asarray(layer, jnp.int32))
        query_pos = positions[:, None, :, None]
        ring_pos = layout.ring_positions(positions.max(1, keepdims=True))
        distance = query_pos - ring_pos[:, None, None]
        window = jnp.array(windows, jnp.int32)[None, :, None, None]
        seen = (distance >= 0) & (distance < window) & (ring_pos >= 0)[:, None, None]
        options = {"lists": True, "slopes": heads.slopes}
        near = scores.attention(
            config, near_q, cache.k_ring, cache.v_ring, seen, distance=distance, **options
        )
        if not layout.sinks:
            return heads.past_sinks(near.out, near.lse)
        seen = query_pos - rank[None, None] >= window
        seen &= rank[None, None] < counts[:, :, None, None]
        distance = far.query(positions)[:, None, :, None] - far.key(rank)[:, None, None]
        distance = distance.astype(jnp.float32) * far.scale
        beyond = scores.attention(
            config, far_q, cache.k_global, cache.v_global, seen, distance=distance, **options
        )
        return heads.past_sinks(*scores.merge(near[:2], beyond[:2]))

    attend = one if positions.shape[1] == 1 and not layout.spare else several

    def step(q, k, v, kv: caches.KVState, layer, sinks=None):
        near_q, near_k, far_q, far_k = place(q, k)
        lengths = jnp.broadcast_to(length[None], (len(kv.k), len(length)))
        (ring_k, ring_v), (sinks_k, sinks_v) = layout.ordered((kv.k, kv.v), kv.state)
        cache = kernels.RollingCache(sinks_k, sinks_v, ring_k, ring_v, lengths)
        cache = rolling.append(cache, near_k, v, key_global=far_k, count=new, layer=layer)
        out = attend(near_q, far_q, cache, HeadTerms(config.slopes(q.shape[2]), sinks), layer)
        ring, first = (cache.k_ring, cache.v_ring), (cache.k_global, cache.v_global)
        (k, v), state = layout.ordered(ring, first)
        return out.astype(q.dtype), caches.KVState(k, v, state)

    return step


def _placed(policy, config, placement, positions):
    """The function of q and k at these positions to both, near and then far, head by head."""

    def make(part: Policy):
        branches = Branches(part, placement, positions, positions, positions)
        return lambda q, k, slopes: (*branches.near(q, k), *branches.far(q, k))

    return scores.by_head(policy, config, make)
