"""Attention for any policy and any encoding: the dense reference, and the forms that models run.

    reference   one dense softmax over all pairs; O(T S) memory; what every other form is tested on
    whole       a text at once: kernels.lambda_attention
    through     a chunk against a cache: kernels.lambda_attention, or for one token the slots

`whole` and `through` are asked once per forward pass, compute every rotation there, and return the
function that each layer calls, so angles are not recomputed per layer.

Both also run inside shard_map with a text's (or chunk's) tokens spread over a mesh axis,
`context_axis`: each device attends from its own tokens to those of all. Of a whole text, a policy
with a window fetches just the window's keys from its neighbours and the first keys from whoever has
them; full attention passes keys round a ring; the others gather all keys, as packed rows do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

import kernels
from kernels.common import masks
from lminf.attention import cache as caches
from lminf.attention import rope
from lminf.attention.policies import ByContent, LayerPolicy, PerHead, Policy
from lminf.attention.spread import Spread
from lminf.errors import InputError

Whole: TypeAlias = Callable[[Array, Array, Array], Array]  # (q, k, v) -> out, all [B, T, heads, H]
# (q, k, v, held, layer) -> out, held
Through: TypeAlias = Callable[[Array, Array, Array, caches.Held, Any], tuple[Array, caches.Held]]

MASKED = -1e30  # finite: a row with nothing to see must not become NaN


@dataclass(frozen=True)
class Scoring:
    """How a model turns a query and a key into a score, apart from which pairs it scores."""

    encoding: rope.Encoding
    scale: float
    soft_cap: float | None

    def slopes(self, num_heads: int) -> Float[Array, " N"] | None:
        if isinstance(self.encoding, rope.Alibi):
            return jnp.asarray(self.encoding.slopes(num_heads))
        return None


# --- The reference --------------------------------------------------------------------------------


def reference(
    policy: LayerPolicy,
    scoring: Scoring,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_pos: Int[Array, "B T"],
    k_pos: Int[Array, "B S"],
    q_segments: Int[Array, "B T"] | None = None,
    k_segments: Int[Array, "B S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attention output; zero for a query that sees nothing.

    A position below 0 marks an empty slot or padding, as the segment masks.PADDING does.
    """
    to, at = q_pos[:, :, None], k_pos[:, None, :]
    length = length_read(scoring, q_pos, q_segments)
    same_text = (at >= 0) & (to >= 0)
    if q_segments is not None and k_segments is not None:
        same_text &= q_segments[:, :, None] == k_segments[:, None, :]
        same_text &= (q_segments != masks.PADDING)[:, :, None]

    def dense(part: Policy, q, k, v, slopes):
        scores = _policy_scores(part, scoring, slopes, q, k, q_pos, k_pos, length)
        seen = (part.visible(to, at) & same_text)[:, None, None]
        weights = softmax(scoring, scores, seen)
        return mix(weights.astype(v.dtype), v)

    return by_head(policy, dense, scoring)(q, k, v)


def logits(
    policy: Policy,
    scoring: Scoring,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    *,
    q_pos: Int[Array, "B T"],
    k_pos: Int[Array, "B S"],
) -> Float[Array, "B N T S"]:
    """What the reference's softmax is taken of, -inf for what is not seen: for looking at."""
    length = length_read(scoring, q_pos, None)
    slopes = scoring.slopes(q.shape[2])
    scores = _capped(scoring, _policy_scores(policy, scoring, slopes, q, k, q_pos, k_pos, length))
    to, at = q_pos[:, :, None], k_pos[:, None, :]
    seen = policy.visible(to, at) & (at >= 0) & (to >= 0)
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    return scores.reshape(scores.shape[0], -1, *scores.shape[3:])


def _policy_scores(part: Policy, scoring, slopes, q, k, q_pos, k_pos, length):
    """`_scores` of every pair, placed near or far as the policy says."""
    gain = part.query_gain(q_pos)
    if gain is not None:
        q = q * gain[..., None, None].astype(q.dtype)
    far = part.far()
    near = _scores(scoring, slopes, q, k, q_pos, k_pos, 1.0, length)
    beyond = _scores(scoring, slopes, q, k, far.at_q(q_pos), far.at_k(k_pos), far.scale, length)
    is_near = part.near(q_pos[:, :, None], k_pos[:, None, :])
    return jnp.where(is_near[:, None, None], near, beyond)


# Queries of one key head are rows of one product. Named apart, [B, K, G, T, S] comes out of it in
# another order and is copied, which takes longer than both products (512 queries, 2,048 keys).


def dot(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> Float[Array, "B K G T S"]:
    rows = rows_of_key_heads(q, k.shape[2])
    flat = rows.reshape(*rows.shape[:2], -1, rows.shape[4])
    scores = jnp.einsum("bkrh,bskh->bkrs", flat, k, preferred_element_type=jnp.float32)
    return scores.reshape(*rows.shape[:4], -1)


def mix(weights: Float[Array, "B K G T S"], v: Float[Array, "B S K H"]) -> Float[Array, "B T N H"]:
    rows = weights.reshape(*weights.shape[:2], -1, weights.shape[4])
    out = jnp.einsum("bkrs,bskh->bkrh", rows, v)
    out = out.reshape(*weights.shape[:4], -1).transpose(0, 3, 1, 2, 4)
    return out.reshape(*out.shape[:2], -1, out.shape[4])


def rows_of_key_heads(q: Float[Array, "B T N H"], key_heads: int) -> Float[Array, "B K G T H"]:
    return q.reshape(*q.shape[:2], key_heads, -1, q.shape[3]).transpose(0, 2, 3, 1, 4)


def _scores(
    scoring, slopes, q, k, q_at, k_at, scale, length, product=dot
) -> Float[Array, "B K G T S"]:
    """Scaled scores with every pair placed at (q_at, k_at) * scale, before the soft cap."""
    if isinstance(scoring.encoding, rope.Rotary):
        rotary = scoring.encoding
        by_q = rope.rotation(rotary, q_at, scale=scale, length=length)
        by_k = rope.rotation(rotary, k_at, scale=scale, length=length)
        q, k = rope.rotate(q, by_q, rotary.layout), rope.rotate(k, by_k, rotary.layout)
    scores = product(q, k) * jnp.float32(scoring.scale)
    if slopes is not None:
        distance = (q_at[:, :, None] - k_at[:, None, :]).astype(jnp.float32) * scale
        steep = slopes.reshape(k.shape[2], -1)
        scores = scores - steep[None, :, :, None, None] * distance[:, None, None]
    return scores


def softmax(
    scoring: Scoring, scores: Float[Array, "B K G T S"], seen: Bool[Array, "B #K #G T S"]
) -> Float[Array, "B K G T S"]:
    """Weights of the values, float32; all zero for a query that sees nothing."""
    scores = jnp.where(seen, _capped(scoring, scores), MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    weights = jnp.where(seen, weights, 0.0)
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total == 0, 1.0, total)


def _capped(scoring, scores: Float[Array, "..."]) -> Float[Array, "..."]:
    if scoring.soft_cap is None:
        return scores
    return scoring.soft_cap * jnp.tanh(scores / scoring.soft_cap)


# --- A text at once -------------------------------------------------------------------------------


def whole(
    policy: LayerPolicy,
    scoring: Scoring,
    positions: Int[Array, "B T"],
    *,
    segments: Int[Array, "B T"] | None = None,
    context_axis: str | None = None,
    implementation: str | None = None,
) -> Whole:
    """Attention of a text over itself.

    Positions rise by one along a row, from 0 or below (never above: the first tokens must be
    there), or along each segment, from 0. Tokens below 0 are padding, as those in segment
    masks.PADDING are: they see nothing and are not seen.
    """
    if isinstance(policy, ByContent):
        return _whole_through(policy, scoring, positions, segments, context_axis)
    spread = Spread(context_axis, positions.shape[1])

    def reader(part: Policy):
        if context_axis is not None and segments is None:
            if part.bounded:
                return _whole_in_reach(part, scoring, positions, spread, implementation)
            if part.near_width is None and part.far_count == 0:
                return _whole_in_a_ring(part, scoring, positions, spread, implementation)
        return _whole(part, scoring, positions, segments, spread, implementation)

    readers = {part: reader(part) for part in parts(policy)}
    return by_head(policy, lambda part, *arrays: readers[part](*arrays), scoring)


def _whole_through(policy: ByContent, scoring, positions, segments, context_axis):
    """One call of the step that also reads in chunks, so that both are the same function."""
    if segments is not None:
        raise InputError(
            f"{policy.name} chooses within one text, but packed rows hold several; give each text "
            f"its own row"
        )
    batch, tokens = positions.shape

    def run(q, k, v):
        layout = policy.layout(tokens)
        kv_heads, width = k.shape[2:]
        sizes = caches.Sizes(batch, layout.slots, q.shape[2], kv_heads, width, k.dtype)
        empty = caches.empty(
            layout, layers=1, batch=batch, kv_heads=kv_heads, head_dim=width, dtype=k.dtype,
            extra=policy.extra(sizes),
        )  # fmt: skip
        step, _ = through(policy, scoring, layout, empty.pos, positions, context_axis=context_axis)
        return step(q, k, v, empty.held, jnp.int32(0))[0]

    return run


def _whole(policy, scoring, positions, segments, spread, implementation):
    key_pos = spread.all(positions)
    batch, tokens = key_pos.shape
    count = tokens if policy.far_count is None else min(policy.far_count, tokens)
    length = length_read(scoring, key_pos, segments)
    place = _Placement(policy, scoring, positions, key_pos, length)
    if segments is None:
        # Far keys are the tokens at positions 0.. of each row: behind the padding, if any.
        far_pos = jnp.broadcast_to(jnp.arange(count, dtype=key_pos.dtype), (batch, count))
        rows = jnp.clip(far_pos - key_pos[:, :1], 0, tokens - 1)
        key_start = key_pos[:, 0]
    else:
        # Every segment has first tokens of its own: the kernel picks them out of all.
        far_pos, rows, key_start = key_pos, None, None
        own = jnp.where(positions < 0, masks.PADDING, segments)
        segments = kernels.SegmentIds(own, spread.all(own))
    far = place.far(far_pos)

    def run(q, k, v, slopes):
        k, v = spread.all(k), spread.all(v)
        far_k, far_v = (k, v) if rows is None else (_rows(k, rows), _rows(v, rows))
        return _lambda_attention(
            place, far, q, k, v, far_k, far_v, slopes, count,
            key_start=key_start, query_offset=spread.first, segments=segments,
            implementation=implementation,
        )  # fmt: skip

    return run


def _whole_in_reach(policy, scoring, positions, spread, implementation):
    """Of a text spread over devices: the window's keys from the left, and the first of all."""
    batch, tokens = positions.shape
    reach = min(policy.near_width - 1, spread.total - tokens)  # keys that stand on other devices
    count = min(policy.far_count, spread.total)
    key_pos = positions[:, :1] + jnp.arange(-reach, tokens, dtype=positions.dtype)[None]
    length = length_read(scoring, spread.all(positions))
    place = _Placement(policy, scoring, positions, key_pos, length)
    far_pos = jnp.broadcast_to(jnp.arange(count, dtype=positions.dtype), (batch, count))
    far = place.far(far_pos)
    rows = far_pos - positions[:, :1]
    held = ((rows >= 0) & (rows < tokens))[..., None, None]

    def first(x):
        own = _rows(x, jnp.clip(rows, 0, tokens - 1))
        return spread.sum(jnp.where(held, own, jnp.zeros((), x.dtype)))

    def run(q, k, v, slopes):
        return _lambda_attention(
            place, far, q, spread.with_left(k, reach), spread.with_left(v, reach), first(k),
            first(v), slopes, count, key_start=key_pos[:, 0], query_offset=reach, segments=None,
            implementation=implementation,
        )  # fmt: skip

    return run


def _whole_in_a_ring(policy, scoring, positions, spread, implementation):
    """Of a text spread over devices: the keys of one device after another, as they come round."""
    length = length_read(scoring, spread.all(positions))
    place = _Placement(policy, scoring, positions, positions, length)

    def run(q, k, v, slopes):
        near_q, near_k = place.near(q, k)
        fixed = {"num_global": 0, "window_size": spread.total, "scale": scoring.scale,
                 "logits_soft_cap": scoring.soft_cap, "implementation": implementation,
                 "return_residuals": True}  # fmt: skip
        if slopes is not None:
            fixed["alibi_slopes"] = slopes

        def visit(carry, away):
            k, v, out, lse = carry
            # Keys from beyond the last device are of later tokens, which nobody here sees.
            offset = jnp.where(away <= spread.index, away, away - spread.devices) * q.shape[1]
            part, part_lse = kernels.lambda_attention(
                near_q, k, v, query_offset=offset, key_start=positions[:, 0] - offset, **fixed
            )
            out, lse = _merged(out, lse, part.astype(jnp.float32), part_lse)
            return (spread.from_left(k), spread.from_left(v), out, lse), None

        empty = jnp.full((q.shape[0], q.shape[2], q.shape[1]), -jnp.inf, jnp.float32)
        start = near_k, v, jnp.zeros((*q.shape[:3], v.shape[3]), jnp.float32), empty
        steps = jnp.arange(spread.devices, dtype=jnp.int32)
        (_, _, out, _), _ = jax.lax.scan(jax.checkpoint(visit), start, steps)
        return out.astype(q.dtype)

    return run


def _merged(out, lse, other, other_lse):
    """Two softmaxes over different keys as the one over both; empty ones weigh nothing."""
    top = jnp.maximum(lse, other_lse)
    top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0.0, top))
    weights = jnp.exp(lse - top), jnp.exp(other_lse - top)
    total = weights[0] + weights[1]
    some = jnp.where(total == 0, 1.0, total)
    share = [(weight / some).swapaxes(1, 2)[..., None] for weight in weights]
    merged = jnp.where(total == 0, -jnp.inf, top + jnp.log(some))
    return out * share[0] + other * share[1], merged


# --- A chunk against a cache ----------------------------------------------------------------------


def through(
    policy: LayerPolicy,
    scoring: Scoring,
    layout: caches.Layout,
    stored_pos: Int[Array, "B S"],
    positions: Int[Array, "B T"],
    *,
    context_axis: str | None = None,
    implementation: str | None = None,
) -> tuple[Through, Int[Array, "B S"]]:
    """Attention of new tokens over what the cache holds and over themselves; and the new `pos`.

    Positions rise by one along a row and continue what the row has read. A row that begins below 0
    is padded: those tokens see nothing and are not stored.
    """
    if isinstance(policy, ByContent):
        if context_axis is not None:
            raise InputError(
                f"{policy.name} reads for itself, which needs all tokens of a row on one device; "
                f"spread rows over devices, or use a policy of positions"
            )
        return policy.through(scoring, layout, stored_pos, positions)
    # Slots are of such policies alone; of settled ones, lminf.attention.settled takes care.
    assert isinstance(layout, caches.ByPosition)
    spread = Spread(context_axis, positions.shape[1])
    all_positions = spread.all(positions)
    slots = caches.destinations(layout, all_positions)
    new_pos = caches.write_pos(stored_pos, all_positions, slots)
    one = all_positions.shape[1] == 1

    def reader(part: Policy):
        if one:
            return _over_slots(part, scoring, layout, new_pos, positions)
        if part.bounded:
            return _over_window(part, scoring, layout, positions, spread, implementation)
        return _over_all(part, scoring, layout, positions, spread, implementation)

    readers = {part: reader(part) for part in parts(policy)}
    read = by_head(policy, lambda part, *arrays: readers[part](*arrays), scoring)

    def step(q, k, v, held, layer):
        k, v = spread.all(k), spread.all(v)
        before = held.k[layer], held.v[layer]
        stored_k = caches.write(held.k, k, layer, slots)
        stored_v = caches.write(held.v, v, layer, slots)
        after = stored_k[layer], stored_v[layer]
        return read(q, k, v, *before, *after), held._replace(k=stored_k, v=stored_v)

    return step, new_pos


def _over_slots(policy, scoring, layout, slot_pos, positions):
    """One token per row over all slots, itself included: what decoding runs."""
    slots = layout.slots
    count = slots if policy.far_count is None else policy.far_count
    place = _Placement(policy, scoring, positions, slot_pos, length_read(scoring, positions))
    # In both layouts the slots of the first positions are the first slots.
    far = place.far(slot_pos[:, :count])
    seen = policy.visible(positions[:, :, None], slot_pos[:, None]) & (slot_pos[:, None] >= 0)
    seen = seen[:, None, None]
    is_near = policy.near(positions[:, :, None], slot_pos[:, None])[:, None, None]

    def read(q, k, v, before_k, before_v, stored_k, stored_v, slopes):
        del k, v, before_k, before_v
        scores = place.scores(*place.near(q, stored_k), slopes)
        if count:
            beyond = place.scores(*far(q, stored_k[:, :count]), slopes, far=True)
            first = jnp.where(is_near[..., :count], scores[..., :count], beyond)
            scores = jnp.concatenate([first, scores[..., count:]], -1)
        return mix_of_one(softmax(scoring, scores, seen).astype(stored_v.dtype), stored_v)

    return read


# A product for each key head would first copy the cache, transposed, in every layer. Side by side
# the heads are one product over the rows as they lie, and its zeros cost less than that copy: 0.8
# of the time for 1 key head, 0.57 for 3, 0.35 for 8, 0.56 for 32 (4,106 slots, two cores).


def dot_of_one(q: Float[Array, "B 1 N H"], k: Float[Array, "B S K H"]):
    """`dot` of one query per row: each head's query in its key head's columns of one wide row."""
    batch, slots, key_heads, _ = k.shape
    own = np.repeat(np.eye(key_heads, dtype=bool), q.shape[2] // key_heads, axis=0)  # [N, K]
    wide = jnp.where(own[None, :, :, None], q[:, 0, :, None], jnp.zeros((), q.dtype))
    scores = jnp.einsum(
        "bnc,bsc->bns", wide.reshape(batch, q.shape[2], -1), k.reshape(batch, slots, -1),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return scores.reshape(batch, key_heads, -1, 1, slots)


def mix_of_one(weights: Float[Array, "B K G 1 S"], v: Float[Array, "B S K H"]):
    """`mix` of one query per row: every head mixes all columns, and keeps its key head's."""
    batch, slots, key_heads, width = v.shape
    rows = weights.reshape(batch, -1, slots)
    out = jnp.einsum("bns,bsc->bnc", rows, v.reshape(batch, slots, -1))
    out = out.reshape(batch, key_heads, -1, key_heads, width)
    own = jnp.stack([out[:, head, :, head] for head in range(key_heads)], 1)
    return own.reshape(batch, 1, -1, width)


def _over_window(policy, scoring, layout, positions, spread, implementation):
    """A chunk over the last `near_width` stored tokens, itself, and the first `far_count`."""
    chunk = spread.all(positions)
    batch = chunk.shape[0]
    width, count = policy.near_width, policy.far_count
    recent = chunk[:, :1] + jnp.arange(-width, 0, dtype=chunk.dtype)[None]
    recent_slots = jnp.clip(layout.slot(recent), 0, layout.slots - 1)
    key_pos = jnp.concatenate([recent, chunk], 1)
    place = _Placement(policy, scoring, positions, key_pos, length_read(scoring, chunk))
    far = place.far(jnp.broadcast_to(jnp.arange(count, dtype=positions.dtype), (batch, count)))

    def window_of(new, before, after):
        # Where nothing is overwritten all of it is read after the chunk is written: an array that
        # is read on both sides of its own change is copied, with all layers of it, in every layer.
        old = _rows(after if isinstance(layout, caches.Append) else before, recent_slots)
        return jnp.concatenate([old.astype(new.dtype), new], 1)

    def read(q, k, v, before_k, before_v, after_k, after_v, slopes):
        window_k, window_v = window_of(k, before_k, after_k), window_of(v, before_v, after_v)
        far_k, far_v = after_k[:, :count].astype(k.dtype), after_v[:, :count].astype(v.dtype)
        return _lambda_attention(
            place, far, q, window_k, window_v, far_k, far_v, slopes, count,
            key_start=recent[:, 0], query_offset=width + spread.first, segments=None,
            implementation=implementation,
        )  # fmt: skip

    return read


def _over_all(policy, scoring, layout, positions, spread, implementation):
    """A chunk over a cache that keeps everything in order."""
    batch = positions.shape[0]
    in_order = jnp.arange(layout.slots, dtype=positions.dtype)
    slot_pos = jnp.broadcast_to(in_order, (batch, layout.slots))
    count = layout.slots if policy.far_count is None else policy.far_count
    length = length_read(scoring, spread.all(positions))
    place = _Placement(policy, scoring, positions, slot_pos, length)
    far = place.far(slot_pos[:, :count])

    def read(q, k, v, before_k, before_v, after_k, after_v, slopes):
        del before_k, before_v
        all_k, all_v = after_k.astype(k.dtype), after_v.astype(v.dtype)
        return _lambda_attention(
            place, far, q, all_k, all_v, all_k[:, :count], all_v[:, :count], slopes, count,
            key_start=jnp.zeros(batch, positions.dtype), query_offset=positions[:, 0],
            segments=None, implementation=implementation,
        )  # fmt: skip

    return read


# --- Shared parts ---------------------------------------------------------------------------------


class _Placement:
    """Every rotation of one forward pass, computed once, and applied in each layer."""

    def __init__(self, policy: Policy, scoring: Scoring, q_pos, k_pos, length):
        self.policy, self.scoring, self.q_pos, self.k_pos = policy, scoring, q_pos, k_pos
        self.length = length
        self.gain = policy.query_gain(q_pos)
        self._q, self._k = self._rotation(q_pos, 1.0), self._rotation(k_pos, 1.0)
        self.far_scale = policy.far().scale
        self.far_q_pos = policy.far().at_q(q_pos)

    def near(self, q, k):
        return self._rotate(self._gained(q), self._q), self._rotate(k, self._k)

    def far(self, far_pos: Int[Array, "B F"]):
        """The function that places q and the keys at `far_pos` for the far branch."""
        self.far_k_pos = self.policy.far().at_k(far_pos)
        by_q = self._rotation(self.far_q_pos, self.far_scale)
        by_k = self._rotation(self.far_k_pos, self.far_scale)
        return lambda q, k: (self._rotate(self._gained(q), by_q), self._rotate(k, by_k))

    def scores(self, q, k, slopes, *, far: bool = False) -> Float[Array, "B K G 1 S"]:
        """Scores of one query per row and keys, both placed already."""
        plain = Scoring(rope.NoEncoding(), self.scoring.scale, None)
        if slopes is None:
            return _scores(plain, None, q, k, self.q_pos, self.k_pos, 1.0, None, dot_of_one)
        q_at, k_at, scale = (
            (self.far_q_pos, self.far_k_pos, self.far_scale)
            if far
            else (self.q_pos, self.k_pos, 1.0)
        )
        return _scores(plain, slopes, q, k, q_at, k_at, scale, None, dot_of_one)

    def _gained(self, q):
        return q if self.gain is None else q * self.gain[..., None, None].astype(q.dtype)

    def _rotation(self, positions, scale):
        if not isinstance(self.scoring.encoding, rope.Rotary):
            return None
        return rope.rotation(self.scoring.encoding, positions, scale=scale, length=self.length)

    def _rotate(self, x, by):
        encoding = self.scoring.encoding
        return rope.rotate(x, by, encoding.layout) if isinstance(encoding, rope.Rotary) else x


def _lambda_attention(
    place, far, q, k, v, far_k, far_v, slopes, count, *,
    key_start, query_offset, segments, implementation,
) -> Array:  # fmt: skip
    near_q, near_k = place.near(q, k)
    width = k.shape[1] if place.policy.near_width is None else place.policy.near_width
    fixed = {
        "num_global": count,
        "window_size": width,
        "scale": place.scoring.scale,
        "logits_soft_cap": place.scoring.soft_cap,
        "implementation": implementation,
    }
    if slopes is not None:
        fixed["alibi_slopes"] = slopes
    by_row: dict = {"query": near_q, "key": near_k, "value": v}  # everything with a batch axis
    if count:
        by_row["query_global"], by_row["key_global"] = far(q, far_k)
        by_row["value_global"] = far_v
    if slopes is not None and count:
        by_row["global_distance"] = kernels.GlobalDistance(
            place.far_q_pos, place.far_k_pos, place.far_scale
        )
    if segments is not None:
        return _outputs(**by_row, **fixed, segment_ids=segments, query_offset=query_offset)
    if jnp.ndim(query_offset) == 0:
        return _outputs(**by_row, **fixed, key_start=key_start, query_offset=query_offset)
    # Rows of unequal length: each has its own offset, and the kernel takes one.
    return jax.vmap(
        lambda row, start, offset: _outputs(
            **jax.tree.map(lambda x: x[None] if jnp.ndim(x) else x, row),
            **fixed, key_start=start, query_offset=offset,
        )[0],
        in_axes=(jax.tree.map(lambda x: 0 if jnp.ndim(x) else None, by_row), 0, 0),
    )(by_row, key_start, query_offset)  # fmt: skip


def _outputs(query, key, value, **options) -> Array:
    out = kernels.lambda_attention(query, key, value, **options)
    assert isinstance(out, jax.Array)  # residuals are not asked for
    return out


def parts(policy: LayerPolicy) -> tuple[Policy, ...]:
    """The different policies of a layer's heads."""
    return tuple(dict.fromkeys(policy.policies)) if isinstance(policy, PerHead) else (policy,)


def by_head(policy: LayerPolicy, attend, scoring: Scoring):
    """`run(q, *arrays)` calling `attend(part, q, *arrays, slopes)` for the heads of each part.

    `arrays` have their key/value heads on axis 2, as q has its query heads.
    """

    def run(q, *arrays):
        slopes = scoring.slopes(q.shape[2])
        if not isinstance(policy, PerHead):
            return attend(policy, q, *arrays, slopes)
        group = q.shape[2] // len(policy.policies)
        out: list = [None] * q.shape[2]
        for part in parts(policy):
            heads = [i for i, chosen in enumerate(policy.policies) if chosen == part]
            queries = np.array([i * group + j for i in heads for j in range(group)])
            taken = [x[:, :, np.array(heads)] for x in arrays]
            steep = None if slopes is None else slopes[queries]
            some = attend(part, q[:, :, queries], *taken, steep)
            for index, head in enumerate(queries):
                out[head] = some[:, :, index]
        return jnp.stack(out, 2)

    return run


def _rows(x: Float[Array, "B S K H"], rows: Int[Array, "B R"]) -> Float[Array, "B R K H"]:
    # Whole rows at a time: take_along_axis would look up every channel by itself.
    return x[jnp.arange(len(rows))[:, None], rows]


def length_read(scoring: Scoring, positions, segments=None) -> Int[Array, "B 1"] | None:
    """Tokens of each row once these positions are read, which dynamic rotary scaling follows."""
    encoding = scoring.encoding
    if not isinstance(encoding, rope.Rotary) or not isinstance(encoding.scaling, rope.DynamicNTK):
        return None
    if segments is not None:
        raise InputError(
            "DynamicNTK follows the length of a row, but packed rows hold texts of several "
            "lengths; give each text its own row or use NTKAware"
        )
    return positions.max(-1, keepdims=True) + 1
