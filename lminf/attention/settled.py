"""Caches as writing reads them: each key in the ring rotated once, to the number of its slot.

Under most policies the near keys seem where they are, and in a ring of w slots position p lies in
slot p - w * lap: the slots of two tokens differ by their distance, or by w less. So a key turned to
its slot meets the query at its true distance if the query is turned to its own slot s, for keys in
slots up to s, or to s + w, for those that the lap before left. Nothing is rotated again while a
token is kept, which was a fifth of a decoding step on a CPU (SmolLM2-135M, 4,096 tokens), and
angles stay those of slot numbers however long the stream. The first tokens, which a policy may
place elsewhere too, stay un-rotated in their slots.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lminf.attention import attend, cache, dense, policies, rope


def settle(
    policy: policies.LayerPolicy, scoring: dense.Scoring, stored: cache.Cache
) -> cache.Cache:
    """The cache with its keys settled; itself, where a rotation would not stay right.

    It would not where keys all along the text are placed twice, where the schedule changes with the
    length of the text, and where a policy reads for itself.
    """
    layout, encoding = stored.layout, scoring.encoding
    if isinstance(policy, policies.ByContent) or not isinstance(layout, cache.ByPosition):
        return stored
    if not isinstance(encoding, rope.Rotary) or isinstance(encoding.scaling, rope.DynamicNTK):
        return stored
    if any(part.far_count is None for part in dense.parts(policy)):
        return stored
    settled = cache.Settled(layout)
    slots = jnp.arange(settled.first, layout.slots, dtype=jnp.int32)[None]
    by = rope.rotation(encoding, slots)
    ring = jax.vmap(lambda k: rope.rotate(k, by, encoding.layout))(stored.k[:, :, settled.first :])
    k = stored.k.at[:, :, settled.first :].set(ring)
    return cache.Cache(k, stored.v, stored.pos, settled)


def through(
    policy: policies.LayerPolicy,
    scoring: dense.Scoring,
    layout: cache.Settled,
    stored_pos: Int[Array, "B S"],
    positions: Int[Array, "B 1"],
) -> tuple[attend.Through, Int[Array, "B S"]]:
    """`attend.through` of one token per row over a settled cache."""
    encoding, ring = scoring.encoding, layout.layout
    assert isinstance(encoding, rope.Rotary)  # or it would not be settled
    slots = cache.destinations(ring, positions)
    new_pos = cache.write_pos(stored_pos, positions, slots)
    to, at = positions[:, :, None], new_pos[:, None]
    all_slots = jnp.arange(layout.slots, dtype=jnp.int32)[None]
    first_slots = all_slots[:, : layout.first]

    def to_turn(places, scale: float = 1.0):
        return rope.rotation(encoding, places, scale=scale)

    def turned(x, by):
        return rope.rotate(x, by, encoding.layout)

    def score(q, k):
        return dense.dot_of_one(q, k) * jnp.float32(scoring.scale)

    by_slot, by_first = to_turn(slots), to_turn(first_slots)
    by_lap = None if isinstance(ring, cache.Append) else to_turn(slots + ring.window)
    this_lap = (all_slots <= slots)[:, None, None, None, layout.first :]

    def of_ring(q, k):
        if by_lap is None:
            return score(turned(q, by_slot), k)
        both = score(_side_by_side(turned(q, by_slot), turned(q, by_lap), k.shape[2]), k)
        return jnp.where(this_lap, *jnp.split(both, 2, axis=2))

    def reader(part: policies.Policy):
        seen = (part.visible(to, at) & (at >= 0))[:, None, None]
        is_near = part.near(to, at)[:, None, None, :, : layout.first]
        gain, far = part.query_gain(positions), part.far()
        by_far_q = to_turn(far.at_q(positions), far.scale)
        by_far_k = to_turn(far.at_k(first_slots), far.scale)

        def of_first(q, k):
            near = score(turned(q, by_slot), turned(k, by_first))
            return jnp.where(is_near, near, score(turned(q, by_far_q), turned(k, by_far_k)))

        def read(q, k, v, slopes):
            del slopes  # of ALiBi, which has no rotations
            q = q if gain is None else q * gain[..., None, None].astype(q.dtype)
            scores = of_ring(q, k[:, layout.first :])
            if layout.first:
                scores = jnp.concatenate([of_first(q, k[:, : layout.first]), scores], -1)
            return dense.mix_of_one(dense.softmax(scoring, scores, seen).astype(v.dtype), v)

        return read

    readers = {part: reader(part) for part in dense.parts(policy)}
    read = dense.by_head(policy, lambda part, *arrays: readers[part](*arrays), scoring)

    def step(q, k, v, held: cache.Held, layer: Any):
        placed = jnp.where((slots < layout.first)[..., None, None], k, turned(k, by_slot))
        all_k = cache.write(held.k, placed, layer, slots)
        all_v = cache.write(held.v, v, layer, slots)
        return read(q, all_k[layer], all_v[layer]), held._replace(k=all_k, v=all_v)

    return step, new_pos


def _side_by_side(one, other, key_heads: int):
    """The query heads of two [B, 1, N, H] as one [B, 1, 2N, H]: by key head, `one`'s, `other`'s."""
    grouped = [x.reshape(*x.shape[:2], key_heads, -1, x.shape[3]) for x in (one, other)]
    both = jnp.concatenate(grouped, 3)
    return both.reshape(*both.shape[:2], -1, both.shape[4])
