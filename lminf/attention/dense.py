"""Attention with its scores as an array: the reference, and parts of it that other forms share.

`reference` is one dense softmax over all pairs, in O(T S) memory: what every other form is tested
on. `logits` is what that softmax is taken of, for looking at.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels.common import masks
from lminf.attention import rope
from lminf.attention.policies import LayerPolicy, PerHead, Policy
from lminf.errors import InputError

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
    scores = capped(scoring, _policy_scores(policy, scoring, slopes, q, k, q_pos, k_pos, length))
    to, at = q_pos[:, :, None], k_pos[:, None, :]
    seen = policy.visible(to, at) & (at >= 0) & (to >= 0)
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    return scores.reshape(scores.shape[0], -1, *scores.shape[3:])


def _policy_scores(part: Policy, scoring, slopes, q, k, q_pos, k_pos, length):
    """`scores_at` of every pair, placed near or far as the policy says."""
    gain = part.query_gain(q_pos)
    if gain is not None:
        q = q * gain[..., None, None].astype(q.dtype)
    far = part.far()
    near = scores_at(scoring, slopes, q, k, q_pos, k_pos, 1.0, length)
    beyond = scores_at(scoring, slopes, q, k, far.at_q(q_pos), far.at_k(k_pos), far.scale, length)
    is_near = part.near(q_pos[:, :, None], k_pos[:, None, :])
    return jnp.where(is_near[:, None, None], near, beyond)


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


# --- Scores, and values mixed by them -------------------------------------------------------------


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


def scores_at(
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
    scoring: Scoring, scores: Float[Array, "B K G T S"], seen: Bool[Array, " B #K #G T S"]
) -> Float[Array, "B K G T S"]:
    """Weights of the values, float32; all zero for a query that sees nothing."""
    scores = jnp.where(seen, capped(scoring, scores), MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    weights = jnp.where(seen, weights, 0.0)
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total == 0, 1.0, total)


def capped(scoring: Scoring, scores: Float[Array, "..."]) -> Float[Array, "..."]:
    """Scores under the model's soft cap, where it has one."""
    if scoring.soft_cap is None:
        return scores
    return scoring.soft_cap * jnp.tanh(scores / scoring.soft_cap)
