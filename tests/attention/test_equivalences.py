"""Policies that become one another, and the published closed form of LM-Infinite."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from lminf.attention import rope
from lminf.attention.policy import (
    Full,
    Lambda,
    LeakyReRoPE,
    LMInfinite,
    ReRoPE,
    SelfExtend,
    Streaming,
    Window,
)
from tests.attention import cases, oracle
from tests.attention.cases import POLICIES, TOKENS, WIDTH

W, G = 5, 3
POSITIONS = cases.padded((0, 0))
ENCODINGS = ("rotary", "alibi", "none")
COMPARED = (
    Full(),
    Window(W),
    Lambda(W, G),
    Streaming(W, G),
    LMInfinite(W, G),
    LMInfinite(W, G, distance=W - 1),
    LMInfinite(W, 0),
    LMInfinite(W, TOKENS),
    ReRoPE(W),
    LeakyReRoPE(W, 1),
    LeakyReRoPE(W, 10**6),
    SelfExtend(W, 1),
)


@functools.cache
def outputs():
    """Output of every policy under every encoding, from one compiled graph."""
    q, k, v = cases.arrays(3)
    runs = list(itertools.product(COMPARED, ENCODINGS))

    @cases.compiled
    def run(q, k, v):
        at = jnp.asarray(POSITIONS)
        return [cases.reference(p, cases.scoring(e), at)(q, k, v) for p, e in runs]

    return dict(zip(runs, map(np.asarray, run(q, k, v)), strict=True))


def same(a, b, encoding, atol=1e-6):
    found = outputs()
    np.testing.assert_allclose(found[a, encoding], found[b, encoding], atol=atol, rtol=0)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_lm_infinite_without_sinks_is_a_window(encoding):
    same(LMInfinite(W, 0), Window(W), encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_lm_infinite_that_keeps_everything_is_rerope(encoding):
    same(LMInfinite(W, TOKENS), ReRoPE(W), encoding)


def test_without_positions_every_lambda_mask_is_one():
    same(Streaming(W, G), LMInfinite(W, G), "none")
    same(Lambda(W, G), LMInfinite(W, G), "none")


@pytest.mark.parametrize("encoding", ["rotary", "alibi"])
def test_leaky_rerope_lies_between_full_and_rerope(encoding):
    same(LeakyReRoPE(W, 1), Full(), encoding)
    same(LeakyReRoPE(W, 10**6), ReRoPE(W), encoding, atol=1e-4)  # (d - w)/10^6 of a token


@pytest.mark.parametrize("encoding", ["rotary", "alibi"])
def test_self_extend_with_groups_of_one_is_full(encoding):
    same(SelfExtend(W, 1), Full(), encoding)


@pytest.mark.parametrize("limit", [None, W - 1])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_lm_infinite_is_one_softmax_over_clipped_distances(encoding, limit):
    """The paper's definition, pair by pair in float64: no branches, no rotations by position."""
    policy = LMInfinite(W, G, distance=limit)
    q, k, v = cases.arrays(3)
    ceiling = W if limit is None else limit
    theta = 100.0 ** (-np.arange(WIDTH // 2) / (WIDTH // 2))
    for i in (0, W - 1, W, W + 1, TOKENS - 1):
        for head in range(q.shape[2]):
            logits, values = [], []
            for j in range(i + 1):
                if not (i - j < W or j < G):
                    continue
                apart = min(i - j, ceiling) if i - j >= W else i - j
                a, b = q[0, i, head].astype(float), k[0, j, head // 3].astype(float)
                if encoding == "rotary":
                    cos, sin, half = np.cos(apart * theta), np.sin(apart * theta), WIDTH // 2
                    a = np.r_[a[:half] * cos - a[half:] * sin, a[half:] * cos + a[:half] * sin]
                logit = a @ b * WIDTH**-0.5
                if encoding == "alibi":
                    logit -= oracle.alibi_slope(head, q.shape[2], 8.0) * apart
                logits.append(logit)
                values.append(v[0, j, head // 3])
            weights = np.exp(np.array(logits) - max(logits))
            expected = weights @ np.array(values) / weights.sum()
            np.testing.assert_allclose(outputs()[policy, encoding][0, i, head], expected, atol=3e-6)


# --- Branches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [p for n, p in POLICIES.items() if not n.startswith("per_head")])
def test_each_causal_pair_is_near_or_far_or_unseen(policy):
    """Near and far are disjoint and make up what is visible, and nothing lies in the future."""
    i, j = np.meshgrid(np.arange(40), np.arange(40), indexing="ij")
    q, k = jnp.asarray(i), jnp.asarray(j)
    near, visible = (np.asarray(f(q, k)) for f in (policy.in_window, policy.visible))
    width = 10**9 if policy.window is None else policy.window
    count = 10**9 if policy.num_sinks is None else policy.num_sinks
    far = (i - j >= width) & (j < count)
    assert not (near & far).any()
    assert ((near | far) == visible).all()
    assert not visible[j > i].any()
    np.testing.assert_array_equal(near, (j <= i) & (i - j < width))
    expected, distance = oracle.visible_and_distance(policy, i, j)
    np.testing.assert_array_equal(visible, expected)
    place = policy.far_positions()
    seeming = np.asarray(place.query(jnp.asarray(i))) - np.asarray(place.key(jnp.asarray(j)))
    np.testing.assert_allclose((seeming * place.scale)[far], distance[far], rtol=1e-12)


# --- Rotary scalings ------------------------------------------------------------------------------

SAME_AS_PLAIN = [
    rope.Linear(1.0),
    rope.NTKAware(1.0),
    rope.YaRN(1.0, 4096),
    rope.Llama3(1.0, 1.0, 4.0, 4096),
]


@pytest.mark.parametrize("scaling", SAME_AS_PLAIN, ids=lambda s: type(s).__name__)
def test_a_scaling_by_one_changes_nothing(scaling):
    plain = rope.Unscaled().frequencies(10_000.0, 64)
    np.testing.assert_allclose(scaling.frequencies(10_000.0, 64), plain, rtol=1e-14)
    assert scaling.temperature == 1.0
