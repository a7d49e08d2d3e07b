"""Attention for any policy and any encoding, in the forms that models run.

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
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import kernels
from kernels.common import masks
from lminf.attention import cache as caches
from lminf.attention import dense, rope
from lminf.attention.policies import ByContent, LayerPolicy, Policy
from lminf.attention.spread import Spread
from lminf.errors import InputError

Whole: TypeAlias = Callable[[Array, Array, Array], Array]  # (q, k, v) -> out, all [B, T, heads, H]
# (q, k, v, held, layer) -> out, held
Through: TypeAlias = Callable[[Array, Array, Array, caches.Held, Any], tuple[Array, caches.Held]]


# --- A text at once -------------------------------------------------------------------------------


def whole(
    policy: LayerPolicy,
    scoring: dense.Scoring,
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

    readers = {part: reader(part) for part in dense.parts(policy)}
    return dense.by_head(policy, lambda part, *arrays: readers[part](*arrays), scoring)


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
    length = dense.length_read(scoring, key_pos, segments)
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
    length = dense.length_read(scoring, spread.all(positions))
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
    length = dense.length_read(scoring, spread.all(positions))
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
    scoring: dense.Scoring,
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

    readers = {part: reader(part) for part in dense.parts(policy)}
    read = dense.by_head(policy, lambda part, *arrays: readers[part](*arrays), scoring)

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
    place = _Placement(policy, scoring, positions, slot_pos, dense.length_read(scoring, positions))
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
        return dense.mix_of_one(
            dense.softmax(scoring, scores, seen).astype(stored_v.dtype), stored_v
        )

    return read


def _over_window(policy, scoring, layout, positions, spread, implementation):
    """A chunk over the last `near_width` stored tokens, itself, and the first `far_count`."""
    chunk = spread.all(positions)
    batch = chunk.shape[0]
    width, count = policy.near_width, policy.far_count
    recent = chunk[:, :1] + jnp.arange(-width, 0, dtype=chunk.dtype)[None]
    recent_slots = jnp.clip(layout.slot(recent), 0, layout.slots - 1)
    key_pos = jnp.concatenate([recent, chunk], 1)
    place = _Placement(policy, scoring, positions, key_pos, dense.length_read(scoring, chunk))
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
    length = dense.length_read(scoring, spread.all(positions))
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

    def __init__(self, policy: Policy, scoring: dense.Scoring, q_pos, k_pos, length):
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
        plain = dense.Scoring(rope.NoEncoding(), self.scoring.scale, None)
        if slopes is None:
            return dense.scores_at(
                plain, None, q, k, self.q_pos, self.k_pos, 1.0, None, dense.dot_of_one
            )
        q_at, k_at, scale = (
            (self.far_q_pos, self.far_k_pos, self.far_scale)
            if far
            else (self.q_pos, self.k_pos, 1.0)
        )
        return dense.scores_at(plain, slopes, q, k, q_at, k_at, scale, None, dense.dot_of_one)

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


def _rows(x: Float[Array, "B S K H"], rows: Int[Array, "B R"]) -> Float[Array, "B R K H"]:
    # Whole rows at a time: take_along_axis would look up every channel by itself.
    return x[jnp.arange(len(rows))[:, None], rows]
