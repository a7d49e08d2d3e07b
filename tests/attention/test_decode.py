"""Decoding over a cache of rotated keys: the numbers of the cache as it was read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.attention import attend, cache, decode, rope, scores
from lminf.attention.policy import (
    Full,
    Lambda,
    LeakyReRoPE,
    LMInfinite,
    PerHead,
    ReRoPE,
    SelfExtend,
    Streaming,
    Window,
)
from tests.attention import cases

POLICIES = {
    "full": Full(),
    "window": Window(5),
    "lambda": Lambda(6, 3),
    "lm_infinite": LMInfinite(5, 3),
    "lm_infinite_distance": LMInfinite(6, 3, distance=4),
    "streaming": Streaming(5, 3),
    "rerope_log": ReRoPE(5, log_from=9),
    "self_extend": SelfExtend(5, 2),
    "leaky_beyond": LeakyReRoPE(40, 4),
    "per_head_all": PerHead((SelfExtend(5, 2), LMInfinite(6, 3))),
    "per_head": PerHead((LMInfinite(7, 2), Streaming(4, 3))),
}
READ = 9  # tokens before the first one written


def written(policy, scoring, positions, *, rotated, spare=0):
    """(q, k, v) -> outputs of the tokens after READ, each a step over the cache; or of two and one
    more a step, where that one is another token and is taken back.
    """
    together = 3 if spare else 1

    def run(q, k, v):
        shape = cache.CacheShape(*positions.shape, q.shape[2], *k.shape[2:], k.dtype)
        empty = cache.create(policy, shape, layers=1)
        step, pos = attend.extend(policy, scoring, empty.layout, empty.pos, positions[:, :READ])
        _, held = step(q[:, :READ], k[:, :READ], v[:, :READ], empty.kv, 0)
        stored = dataclasses.replace(empty, k=held.k, v=held.v, pos=pos)
        if rotated:
            stored = decode.prerotate(policy, scoring, stored, spare=spare)
            assert isinstance(stored.layout, cache.PreRotated)
            stored = stored.for_decoding()

        def some(carry, tokens):
            (held, pos), (at, *new) = carry, tokens
            step, pos = attend.extend(policy, scoring, stored.layout, pos, at)
            out, held = step(*new, held, 0)
            return (held, pos), out[:, :2]

        steps = (positions.shape[1] - READ - together) // max(spare, 1) + 1
        columns = READ + np.arange(steps)[:, None] * max(spare, 1) + np.arange(together)
        other = columns.copy()
        other[:, 1:] = np.where(np.arange(1, together) == spare, 0, columns[:, 1:])
        tokens = [positions[:, columns], *(x[:, other] for x in (q, k, v))]
        _, outs = jax.lax.scan(some, (stored.kv, stored.pos), [x.swapaxes(0, 1) for x in tokens])
        return outs.swapaxes(1, 2).reshape(-1, *outs.shape[1:2], *outs.shape[3:])

    return run


# Each policy twice and each encoding several times, of the product.
COVER = [
    (policy, encoding, (1, 3)[(i + j) % 2])
    for i, policy in enumerate(POLICIES)
    for j, encoding in enumerate(("rotary", "partial", "yarn", "alibi", "none"))
    if (i + j) % 3
    and (policy, encoding) != ("per_head", "alibi")
    and (policy, encoding) != ("per_head_all", "alibi")
]


# Of these the fast lane has every encoding, both kinds of ring and one that keeps everything.
FAST = ("full", "lm_infinite", "per_head")


@pytest.mark.parametrize(
    ("policy", "encoding", "group"),
    [
        pytest.param(*case, marks=[] if case[0] in FAST and case[2] == 3 else pytest.mark.slow)
        for case in COVER
    ],
)
def test_tokens_decoded_over_rotated_keys_are_those_of_the_cache_itself(policy, encoding, group):
    arrays = cases.arrays(group)
    positions = jnp.asarray(cases.padded(pads=(0, 4)))
    scoring = cases.scoring(encoding, soft_cap=20.0 if group == 3 else None)
    both = [
        cases.compiled(written(POLICIES[policy], scoring, positions, rotated=rotated))(*arrays)
        for rotated in (False, True)
    ]
    np.testing.assert_allclose(both[1], both[0], atol=cases.ATOL)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "encoding", "group"), COVER[::4])
def test_tokens_that_are_taken_back_leave_no_trace(policy, encoding, group):
    """Two and a false one at a time, over rings that wrap around."""
    arrays, positions = cases.arrays(group), jnp.asarray(cases.padded(pads=(0, 4)))
    scoring = cases.scoring(encoding, soft_cap=20.0 if group == 3 else None)
    alone, together = (
        cases.compiled(written(POLICIES[policy], scoring, positions, rotated=spare > 0,
                               spare=spare))(*arrays)
        for spare in (0, 2)
    )  # fmt: skip
    np.testing.assert_allclose(together, alone[: len(together)], atol=cases.ATOL)


def test_a_cache_stays_as_it_is_where_a_rotation_would_not_stay_right():
    dynamic = rope.Rotary(100.0, 8, "half", rope.DynamicNTK(2.0, 12))
    longrope = rope.Rotary(100.0, 8, "half", rope.LongRoPE((1.0,) * 4, (2.0,) * 4, 12, 2.0))
    for policy, encoding in (
        (PerHead((Full(), ReRoPE(5))), cases.HALF),
        (Full(), dynamic),
        (Full(), longrope),
        (POLICIES["per_head"], cases.ENCODINGS["alibi"]),
    ):
        empty = cache.create(policy, cache.CacheShape(1, 8, 1, 1, 8, jnp.float32), layers=1)
        scoring = scores.ScoreConfig(encoding, 1.0, None)
        assert decode.prerotate(policy, scoring, empty) is empty
