"""One token per row: over the slots of a cache as it was read, or over one with rotated keys.

Under most policies the near keys seem where they are, and in a ring of w slots position p lies in
slot p - w * lap: the slots of two tokens differ by their distance, or by w less. So a key rotated
to its slot meets the query at its true distance if the query is rotated to its own slot s, for keys
in slots up to s, or to s + w, for those that the lap before left. Nothing is rotated again while a
token is kept, which was a fifth of a decoding step on a CPU (SmolLM2-135M, 4,096 tokens), and
angles stay those of slot numbers however long the stream. The first tokens, which a policy may
place elsewhere too, stay un-rotated in their slots.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lminf.attention import cache as caches
from lminf.attention import rope
from lminf.attention import scores as scores_
from lminf.attention.policy import LayerPolicy, Policy, head_policies
from lminf.attention.scores import Branches, Placement, ScoreConfig


def over_slots(policy: Policy, config, layout, slot_pos: Int[Array, "B S"], positions):
    """The function that reads all slots, of which one holds the token itself, for one layer."""
    count = layout.slots if policy.num_sinks is None else policy.num_sinks
    # In both layouts the slots of the first positions are the first slots.
    branches = Branches(
        policy, Placement(config, positions), positions, slot_pos, slot_pos[:, :count]
    )
    to, at = positions[:, :, None], slot_pos[:, None]
    seen = (policy.visible(to, at) & (at >= 0))[:, None, None]
    is_near = policy.in_window(to, at)[:, None, None, :, :count]

    def biased(scores, slopes, q_at, k_at, scale):
        if slopes is None:
            return scores
        key_heads = scores.shape[1]
        return scores - scores_.alibi_bias(slopes, key_heads, q_at, k_at[:, None], scale)

    def attend(q, k, v, before_k, before_v, stored_k, stored_v, slopes):
        del k, v, before_k, before_v
        scores = scores_.scaled(config, *branches.near(q, stored_k))
        scores = biased(scores, slopes, positions, slot_pos, 1.0)
        if count:
            beyond = scores_.scaled(config, *branches.far(q, stored_k[:, :count]))
            beyond = biased(
                beyond, slopes, branches.far_q_pos, branches.far_k_pos, branches.far_scale
            )
            first = jnp.where(is_near, scores[..., :count], beyond)
            scores = jnp.concatenate([first, scores[..., count:]], -1)
        weights = scores_.softmax(config, scores, seen)
        return scores_.mix(weights.astype(stored_v.dtype), stored_v)

    return attend


# --- Keys rotated once ----------------------------------------------------------------------------


def prerotate(policy: LayerPolicy, config: ScoreConfig, cache: caches.Cache) -> caches.Cache:
    """The cache with its ring's keys rotated; itself, where a rotation would not stay right.

    It would not where keys all along the text are placed twice, where the schedule changes with the
    length of the text, and where a policy keeps its own.
    """
    layout, encoding = cache.layout, config.encoding
    if not policy.context_parallel or not isinstance(layout, caches.PositionLayout):
        return cache
    if not isinstance(encoding, rope.Rotary) or isinstance(encoding.scaling, rope.DynamicNTK):
        return cache
    if any(part.num_sinks is None for part in head_policies(policy)):
        return cache
    rotated = caches.PreRotated(layout)
    first = rotated.num_sinks
    by = rope.rotation(encoding, jnp.arange(first, layout.slots, dtype=jnp.int32)[None])
    ring = jax.vmap(lambda k: rope.rotate(k, by, encoding.layout))(cache.k[:, :, first:])
    return caches.Cache(cache.k.at[:, :, first:].set(ring), cache.v, cache.pos, rotated)


def extend(
    policy: LayerPolicy,
    config: ScoreConfig,
    layout: caches.PreRotated,
    stored_pos: Int[Array, "B S"],
    positions: Int[Array, "B 1"],
):
    """`attend.extend` of one token per row over a cache of rotated keys."""
    ring, num_sinks = layout.layout, layout.num_sinks
    placement = Placement(config, positions)
    slots = caches.destinations(ring, positions)
    new_pos = caches.write_pos(stored_pos, positions, slots)
    to, at = positions[:, :, None], new_pos[:, None]
    all_slots = jnp.arange(layout.slots, dtype=jnp.int32)[None]
    sink_slots = all_slots[:, :num_sinks]
    by_slot, by_sink = placement.rotation(slots), placement.rotation(sink_slots)
    by_lap = None
    if isinstance(ring, caches.SinkRingCache):
        by_lap = placement.rotation(slots + ring.window)
    this_lap = (all_slots <= slots)[:, None, None, None, num_sinks:]

    def of_ring(q, k):
        if by_lap is None:
            return scores_.scaled(config, placement.rotate(q, by_slot), k)
        laps = placement.rotate(q, by_slot), placement.rotate(q, by_lap)
        both = scores_.scaled(config, _side_by_side(*laps, k.shape[2]), k)
        return jnp.where(this_lap, *jnp.split(both, 2, axis=2))

    def make(part: Policy):
        seen = (part.visible(to, at) & (at >= 0))[:, None, None]
        is_near = part.in_window(to, at)[:, None, None, :, :num_sinks]
        gain, far = part.query_gain(positions), part.far_positions()
        by_far_q = placement.rotation(far.query(positions), far.scale)
        by_far_k = placement.rotation(far.key(sink_slots), far.scale)

        def of_sinks(q, k):
            near = placement.rotate(q, by_slot), placement.rotate(k, by_sink)
            beyond = placement.rotate(q, by_far_q), placement.rotate(k, by_far_k)
            return jnp.where(
                is_near, scores_.scaled(config, *near), scores_.scaled(config, *beyond)
            )

        def attend(q, k, v, slopes):
            del slopes  # of ALiBi, which has no rotations
            q = q if gain is None else q * gain[..., None, None].astype(q.dtype)
            scores = of_ring(q, k[:, num_sinks:])
            if num_sinks:
                scores = jnp.concatenate([of_sinks(q, k[:, :num_sinks]), scores], -1)
            return scores_.mix(scores_.softmax(config, scores, seen).astype(v.dtype), v)

        return attend

    attend = scores_.by_head(policy, config, make)

    def step(q, k, v, kv: caches.KVState, layer):
        placed = jnp.where((slots < num_sinks)[..., None, None], k, placement.rotate(k, by_slot))
        all_k = caches.write(kv.k, placed, layer, slots)
        all_v = caches.write(kv.v, v, layer, slots)
        return attend(q, all_k[layer], all_v[layer]), kv._replace(k=all_k, v=all_v)

    return step, new_pos


def _side_by_side(one, other, key_heads: int):
    """The query heads of two [B, 1, N, H] as one [B, 1, 2N, H]: by key head, `one`'s, `other`'s."""
    grouped = [x.reshape(*x.shape[:2], key_heads, -1, x.shape[3]) for x in (one, other)]
    both = jnp.concatenate(grouped, 3)
    return both.reshape(*both.shape[:2], -1, both.shape[4])
