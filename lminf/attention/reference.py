"""Attention as one dense softmax over all pairs, in O(T S) memory: what every other form is tested
on. `logits` is what that softmax is taken of, for looking at.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lminf.attention import scores
from lminf.attention.policy import LayerPolicy, Policy
from lminf.attention.scores import Branches, HeadTerms, Placement, ScoreConfig
from lminf.kernels.common import masks


def reference(
    policy: LayerPolicy,
    config: ScoreConfig,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"] | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of a text over itself, as `attend.prefill`; zero for a query that sees nothing."""
    same_text, placement = None, Placement(config, positions, segments)
    if segments is not None:
        same_text = segments[:, :, None] == segments[:, None, :]
        same_text &= (segments != masks.PADDING)[:, :, None]
    return scores.by_head(
        policy, config, lambda part: dense(part, config, placement, positions, positions, same_text)
    )(q, k, v, sinks=sinks)


def dense(
    policy: Policy,
    config: ScoreConfig,
    placement: Placement,
    q_pos: Int[Array, "B T"],
    k_pos: Int[Array, "B S"],
    same_text: Bool[Array, "B T S"] | None = None,
    num_far: int | None = None,
) -> Callable[[Array, Array, Array, HeadTerms], Array]:
    """The function of q, k, v and HeadTerms that attends under one softmax, every rotation
    computed once. Only the first `num_far` keys are ever far; None: all may be.
    """
    logits_of, seen = _logits_of(policy, config, placement, q_pos, k_pos, num_far)
    seen = seen if same_text is None else seen & same_text

    def attend(q, k, v, heads):
        weights, lse = scores.softmax(logits_of(q, k, heads.slopes), seen[:, None])
        return heads.past_sinks(scores.mix(weights.astype(v.dtype), v), lse)

    return attend


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
    logits_of, seen = _logits_of(policy, config, Placement(config, q_pos), q_pos, k_pos)
    return jnp.where(seen[:, None], logits_of(q, k, config.slopes(q.shape[2])), -jnp.inf)


def _logits_of(policy, config, placement, q_pos, k_pos, num_far=None):
    """The function of q, k and slopes to the logits [B, N, T, S] of pairs that are near or far as
    the policy says, and which of them are seen, [B, T, S].
    """
    query_pos, key_pos, far_pos = q_pos[:, :, None], k_pos[:, None, :], k_pos[:, :num_far]
    count, branches = far_pos.shape[1], Branches(policy, placement, q_pos, k_pos, far_pos)
    is_near = policy.in_window(query_pos, key_pos[..., :count])[:, None]
    near_distance = (query_pos - key_pos)[:, None]
    far_q_pos, far_k_pos, scale = branches.far_distance
    far_distance = far_q_pos[:, None, :, None] - far_k_pos[:, None, None]

    def logits_of(q, k, slopes):
        near = scores.logits(config, *branches.near(q, k), slopes=slopes, distance=near_distance)
        if not count:
            return near
        far = scores.logits(
            config, *branches.far(q, k[:, :count]), slopes=slopes,
            distance=far_distance.astype(jnp.float32) * scale,
        )  # fmt: skip
        first = jnp.where(is_near, near[..., :count], far)
        return first if count == k.shape[1] else jnp.concatenate([first, near[..., count:]], -1)

    return logits_of, policy.visible(query_pos, key_pos) & (key_pos >= 0) & (query_pos >= 0)
