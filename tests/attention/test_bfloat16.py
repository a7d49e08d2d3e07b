"""Policies by content in bfloat16, caches included: within its rounding of float32, whose choices
they make where scores are far enough apart.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from lminf.attention.policies.eviction import H2O, TOVA
from lminf.attention.policies.prompt_compression import SnapKV, ThinK
from tests.attention import cases, test_prompt_compression, test_sparse

TOKENS = test_sparse.TOKENS
POLICIES = {
    **test_sparse.POLICIES,
    "h2o": H2O(16, sinks=2, recent=2, turn=4),
    "tova": TOVA(16, recent=2, turn=4),
    "snapkv": SnapKV(9, window=5, pooling=1),
    "think": ThinK(0.5, recent=5),
}


def far_apart(tokens):
    """q, k, v: the last channel, which nothing rotates, ranks every head's keys, by fours."""
    q, k, v = cases.arrays(3, tokens=tokens)
    q, k = 0.2 * q, 0.2 * k
    fours = np.linspace(-4, 4, tokens).reshape(1, -1, 4, 1)
    fours = np.broadcast_to(fours, (len(k), tokens // 4, 4, k.shape[2]))
    rng = np.random.default_rng(3)
    q[..., -1] = 2
    k[..., -1] = rng.permuted(rng.permutation(fours, axis=1), axis=2).reshape(k.shape[:3])
    return [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_bfloat16_stays_within_its_rounding(name):
    policy, scoring = POLICIES[name], cases.scoring("partial")
    tokens = cases.TOKENS if name in ("snapkv", "think") else TOKENS
    half = far_apart(tokens)
    exact = [x.astype(jnp.float32) for x in half]
    if name in ("snapkv", "think"):
        run = functools.partial(test_prompt_compression.written, policy, scoring, size=1)
        found, expected = run(half), run(exact)
    else:
        prompt = (4,) * 4 if policy.evict_every else (16,)
        calls = (*prompt, *[1] * (tokens - 16))
        read = test_sparse.read(policy, scoring, calls, cases.padded((0, 4), tokens))
        found, expected = cases.compiled(lambda *both: [read(*x) for x in both])(half, exact)
    assert found.dtype == jnp.bfloat16
    assert np.abs(np.asarray(expected)).max() > 0.5  # far above what is let pass
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=2e-2, rtol=0)
