"""Attention as one dense softmax over all pairs, in O(T S) memory: what every other form is tested
on. `logits` is what that softmax is taken of, for looking at.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf.attention import scores as scores_
from lminf.attention.policy import LayerPolicy, Policy
from lminf.attention.scores import Placement, ScoreConfig
from lminf.kernels.common import masks


def reference(
    policy: LayerPolicy,
    config: ScoreConfig,
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
    placement = Placement(config, q_pos, q_segments)
    same_text = (at >= 0) & (to >= 0)
    if q_segments is not None and k_segments is not None:
        same_text &= q_segments[:, :, None] == k_segments[:, None, :]
        same_text &= (q_segments != masks.PADDING)[:, :, None]

    def dense(part: Policy):
        def attend(q, k, v, slopes):
            found = _policy_scores(part, config, placement, slopes, q, k, q_pos, k_pos)
            seen = (part.visible(to, at) & same_text)[:, None, None]
            return scores_.mix(scores_.softmax(config, found, seen).astype(v.dtype), v)

        return attend

    return scores_.by_head(policy, config, dense)(q, k, v)


def logits(
    policy: Policy,
    config: ScoreConfig,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    *,
    q_pos: Int[Array, "B T"],
    k_pos: Int[Array, "B S"],
) -> Float[Array, "B N T S"]:
    """What the reference's softmax is taken of, -inf for what is not seen: for looking at."""
    placement, slopes = Placement(config, q_pos), config.slopes(q.shape[2])
    found = config.capped(_policy_scores(policy, config, placement, slopes, q, k, q_pos, k_pos))
    to, at = q_pos[:, :, None], k_pos[:, None, :]
    seen = policy.visible(to, at) & (at >= 0) & (to >= 0)
    found = jnp.where(seen[:, None, None], found, -jnp.inf)
    return found.reshape(found.shape[0], -1, *found.shape[3:])


def _policy_scores(part: Policy, config, placement, slopes, q, k, q_pos, k_pos):
    """Scores of every pair, placed near or far as the policy says: [B, K, G, T, S]."""
    gain = part.query_gain(q_pos)
    if gain is not None:
        q = q * gain[..., None, None].astype(q.dtype)

    def placed(q_at, k_at, scale):
        found = scores_.scaled(config, placement.at(q, q_at, scale), placement.at(k, k_at, scale))
        if slopes is None:
            return found
        return found - scores_.alibi_bias(slopes, k.shape[2], q_at, k_at[:, None], scale)

    far = part.far_positions()
    near = placed(q_pos, k_pos, 1.0)
    beyond = placed(far.query(q_pos), far.key(k_pos), far.scale)
    is_near = part.in_window(q_pos[:, :, None], k_pos[:, None, :])
    return jnp.where(is_near[:, None, None], near, beyond)
