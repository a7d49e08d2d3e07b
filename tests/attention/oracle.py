"""Attention from the formulas of the papers, in NumPy float64; shares no line with lminf.

A policy is a visible set and a distance delta(i, j); a rotary score is Re sum_c q_c conj(k_c)
exp(i delta theta_c), so nothing is ever placed at a position.
"""

import functools

import numpy as np

from lminf.attention import policy as p
from lminf.attention import rope


def visible_and_distance(policy, i, j):
    """Which pairs (query position i, key position j) see each other, and how far away they seem."""
    kind, d = type(policy), i - j
    w = np.inf if policy.window is None else policy.window
    causal, near = d >= 0, (d >= 0) & (d < w)
    if kind in (p.Full, p.Window):
        return near, d
    if kind in (p.Lambda, p.LMInfinite, p.Streaming):
        far = {
            p.Lambda: lambda: d,
            p.LMInfinite: lambda: w if policy.distance is None else policy.distance,
            p.Streaming: lambda: np.minimum(i, policy.sinks + w - 1) - j,
        }
        return near | (causal & (j < policy.sinks)), np.where(near, d, far[kind]())
    far = {
        p.ReRoPE: lambda: w,
        p.LeakyReRoPE: lambda: w + (d - w) / policy.stretch,
        p.SelfExtend: lambda: i // policy.group + w - w / policy.group - j // policy.group,
    }
    return causal, np.where(near, d, far[kind]())


def gain(policy, i):
    """Factor on the products of the query at i."""
    if getattr(policy, "log_from", None) is not None:
        return np.maximum(1, np.log(np.maximum(i, 0) + 1) / np.log(policy.log_from))
    return np.ones_like(i, float)


def attention(policy, scoring, q, k, v, *, q_pos, k_pos, q_segments=None, k_segments=None):
    """[B, T, N, H]; zero where nothing is seen. Policies of heads: PerHead."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    q_pos, k_pos = (np.asarray(x, np.int64) for x in (q_pos, k_pos))
    group = q.shape[2] // k.shape[2]
    out = np.zeros(q.shape[:3] + v.shape[3:])
    for head in range(q.shape[2]):
        at = head // group
        part = policy.policies[at] if isinstance(policy, p.PerHead) else policy
        i, j = q_pos[:, :, None], k_pos[:, None, :]
        seen, distance = visible_and_distance(part, i, j)
        seen = seen & (i >= 0) & (j >= 0)
        if q_segments is not None:
            a, b = np.asarray(q_segments)[:, :, None], np.asarray(k_segments)[:, None, :]
            seen &= (a == b) & (a != -1)
        scores = _products(scoring.encoding, q[:, :, head], k[:, :, at], distance)
        scores = scores * gain(part, q_pos)[..., None] * scoring.scale
        if isinstance(scoring.encoding, rope.Alibi):
            scores -= alibi_slope(head, q.shape[2], scoring.encoding.max_bias) * distance
        if scoring.soft_cap is not None:
            scores = scoring.soft_cap * np.tanh(scores / scoring.soft_cap)
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e9))
        total = weights.sum(-1, keepdims=True)
        out[:, :, head] = weights / np.where(total == 0, 1, total) @ v[:, :, at]
    return out


def _products(encoding, q, k, distance):
    if not isinstance(encoding, rope.Rotary):
        return np.einsum("bth,bsh->bts", q, k)
    dim, pairs = encoding.dim, np.arange(encoding.dim // 2)
    theta = rates(encoding)
    if encoding.layout == "half":
        real, imaginary = pairs, pairs + dim // 2
    else:
        real, imaginary = 2 * pairs, 2 * pairs + 1
    by_q = q[..., real] + 1j * q[..., imaginary]
    by_k = k[..., real] + 1j * k[..., imaginary]
    turn = np.exp(1j * distance[..., None] * theta)
    turned = np.einsum("btc,bsc,btsc->bts", by_q, by_k.conj(), turn).real
    rest = np.einsum("bth,bsh->bts", q[..., dim:], k[..., dim:])
    return turned * encoding.scaling.temperature**2 + rest


@functools.cache
def rates(encoding):
    """rad/token; the schedules have tests of their own."""
    return encoding.scaling.frequencies(encoding.base, encoding.dim)


def alibi_slope(head: int, heads: int, max_bias: float) -> float:
    """The published rule: 2^(-max_bias (h+1)/n), n the power of two below; odd ones of 2n after."""
    below = 1 << (heads.bit_length() - 1)
    if below == heads or head < below:
        return 2.0 ** (-max_bias * (head + 1) / below)
    return 2.0 ** (-max_bias * (2 * (head - below) + 1) / (2 * below))
