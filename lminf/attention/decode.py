"""One token per row by kernels.lambda_decode, over a cache whose keys are rotated.

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
from lminf.attention.scores import Placement, ScoreConfig
from lminf.kernels.decode import cache as rolling


def prerotate(policy: LayerPolicy, config: ScoreConfig, cache: caches.Cache) -> caches.Cache:
    """The cache with its keys rotated; itself, where a rotation would not stay right.

    It would not where the schedule changes with the length of the text, where ALiBi's far distances
    differ by head, where some heads have all keys near and some have all far, and where a policy
    selects, evicts or compresses.
    """
    layout, encoding, parts = cache.layout, config.encoding, head_policies(policy)
    windows: list[Any] = [part.window for part in parts]
    counts: list[Any] = [part.num_sinks for part in parts]
    dynamic = isinstance(encoding, rope.Rotary) and isinstance(encoding.scaling, rope.DynamicNTK)
    by_head = isinstance(encoding, rope.Alibi) and len(parts) > 1
    if not policy.context_parallel or not isinstance(layout, caches.SinkRingCache):
        return cache
    if dynamic or by_head or (None in windows and None in counts):
        return cache
    window = min(layout.slots if None in windows else max(windows), layout.slots)
    sinks = layout.slots if None in counts else max(counts)
    last = cache.pos.max(1, keepdims=True)  # [B, 1]
    ring_pos = last - (last - jnp.arange(window, dtype=jnp.int32)[None]) % window  # of slot p % w
    ring_slots = jnp.clip(layout.slot(ring_pos), 0, layout.slots - 1)
    placement = Placement(config, last)
    by_ring = placement.rotation(ring_pos)
    sink_pos = jnp.broadcast_to(jnp.arange(sinks, dtype=jnp.int32)[None], (len(last), sinks))
    place_sinks = _by_part(policy, config, placement, sink_pos, "key")

    def ring_of(k, v):
        k, v = (caches.rows(x, ring_slots) for x in (k, v))
        return [x.swapaxes(1, 2) for x in (placement.rotate(k, by_ring), v)]

    def sinks_of(k, v):
        return [x.swapaxes(1, 2) for x in (place_sinks(k[:, :sinks]), v[:, :sinks])]

    def every_layer(part):
        """[L, B, K, X, H] of rows [B, X, K, H]."""
        return dict(zip("kv", jax.lax.map(lambda kv: part(*kv), (cache.k, cache.v)), strict=True))

    rotated = caches.PreRotated(window, sinks, ring=None not in counts)
    main, other = (ring_of, sinks_of) if rotated.ring else (sinks_of, ring_of)
    state = every_layer(other)
    if layout.keeps_all:
        # In place, layer by layer: it may fill the memory.
        def change(layer, kv):
            new = main(*(x[layer] for x in kv))
            return [x.at[layer].set(y.reshape(x.shape[1:])) for x, y in zip(kv, new, strict=True)]

        k, v = jax.lax.fori_loop(0, len(cache.k), change, [cache.k, cache.v])
    else:
        k, v = (x.reshape(*x.shape[:2], -1, *cache.k.shape[3:]) for x in every_layer(main).values())
    return caches.Cache(k, v, cache.pos, rotated, state)


def extend(
    policy: LayerPolicy,
    config: ScoreConfig,
    layout: caches.PreRotated,
    positions: Int[Array, "B 1"],
) -> Callable[..., tuple[Array, caches.KVState]]:
    """The step of every layer, for one token per row, over a cache of rotated keys."""
    placement, parts = Placement(config, positions), head_policies(policy)
    by_position = placement.rotation(positions)
    near_query = _by_part(policy, config, placement, positions, None)
    far_query = _by_part(policy, config, placement, positions, "query")
    far_key = _by_part(policy, config, placement, positions, "key")
    length = jnp.maximum(positions[:, 0], 0)  # of what was read before
    new = (positions[:, 0] >= 0).astype(jnp.int32)

    def step(q, k, v, kv: caches.KVState, layer):
        layers, batch = kv.k.shape[:2]
        slopes = config.slopes(q.shape[2])
        options = config.for_kernel(slopes)
        if slopes is not None:
            (part,) = parts
            far, rank = part.far_positions(), jnp.arange(layout.sinks, dtype=jnp.int32)[None]
            options["global_distance"] = kernels.GlobalDistance(
                far.query(positions), far.key(rank), far.scale
            )
        if isinstance(policy, PerHead):
            parts_ = [(part.window, part.num_sinks) for part in policy.policies]
            options["head_window"] = [
                layout.window if width is None else min(width, layout.window) for width, _ in parts_
            ]
            counts = [layout.sinks if count is None else count for _, count in parts_]
            counts = jnp.array(counts, jnp.int32)[None]
            options["global_count"] = jnp.broadcast_to(counts, (batch, counts.shape[1]))
        lengths = jnp.broadcast_to(length[None], (layers, batch))
        main, other = (kv.k, kv.v), (kv.state["k"], kv.state["v"])
        ring, far = (main, other) if layout.ring else (other, main)
        cache = kernels.RollingCache(*far, *ring, lengths)
        cache = rolling.append(
            cache, placement.rotate(k, by_position), v, key_global=far_key(k), count=new,
            layer=layer,
        )  # fmt: skip
        out = kernels.lambda_decode(
            near_query(q)[:, 0], cache, layer=layer, query_global=far_query(q)[:, 0], **options
        )
        assert isinstance(out, jax.Array)  # no residuals
        ring, far = (cache.k_ring, cache.v_ring), (cache.k_global, cache.v_global)
        main, other = (ring, far) if layout.ring else (far, ring)
        return out[:, None], caches.KVState(main[0], main[1], {"k": other[0], "v": other[1]})

    return step


def _by_part(policy, config, placement, positions, of: str | None):
    """The function that places x [B, X, heads, H] head by head where the parts' far queries or
    keys seem to be; None: queries where they are.
    """

    def make(part: Policy):
        far, gain = part.far_positions(), part.query_gain(positions) if of != "key" else None
        pos, scale = (positions, 1.0) if of is None else (getattr(far, of)(positions), far.scale)
        by = placement.rotation(pos, scale)

        def placed(x, slopes):
            del slopes
            x = x if gain is None else x * gain[..., None, None].astype(x.dtype)
            return placement.rotate(x, by)

        return placed

    return scores.by_head(policy, config, make)
