"""Attention on arrays: one function for every policy, the same through a cache."""

import jax.numpy as jnp
import numpy as np
import pytest

import lminf
from lminf.attention.policies.eviction import TOVA
from lminf.attention.scores import ScoreConfig
from lminf.errors import InputError
from tests.attention import cases, oracle, test_sparse
from tests.attention.cases import ATOL

TOKENS, PROMPT = 40, 24
POLICIES = {
    "full": lminf.Full(),
    "lm_infinite": lminf.LMInfinite(6, 3),
    "streaming": lminf.Streaming(6, 3),
    "self_extend": lminf.SelfExtend(6, 2),
    "per_head": lminf.PerHead((lminf.LMInfinite(7, 2), lminf.Streaming(4, 3))),
    **test_sparse.POLICIES,
    "h2o": lminf.H2O(12, turn=4),
    "tova": TOVA(12, turn=4),
}
GROUPS = 8  # tokens of a chunk: a multiple of every group that selects or evicts together


def run(function, *options, **more):
    arrays = cases.arrays(3, tokens=TOKENS)
    return np.asarray(cases.compiled(lambda *x: function(*x, *options, **more))(*arrays))


@pytest.mark.parametrize(
    "name", [n if n in ("lm_infinite", "infllm") else pytest.param(n, marks=pytest.mark.slow)
             for n in POLICIES if n != "topk"],
)  # fmt: skip
def test_a_text_in_chunks_is_the_text_at_once(name):
    """Top-k aside, where the last token of every call selects."""
    policy = POLICIES[name]
    size = policy.evict_every or GROUPS
    chunked = run(lminf.attend_stepwise, policy, chunks=[size] * (TOKENS // size))
    np.testing.assert_allclose(chunked, run(lminf.attend, policy), atol=ATOL)


@pytest.mark.parametrize(
    "name", [n if n == "streaming" else pytest.param(n, marks=pytest.mark.slow) for n in POLICIES]
)
def test_decoding_after_a_prompt_is_decoding_over_the_cache_as_it_was_read(name):
    policy = POLICIES[name]
    size = policy.evict_every or GROUPS
    chunks = [*[size] * (PROMPT // size), *[1] * (TOKENS - PROMPT)]
    plain = run(lminf.attend_stepwise, policy, chunks=chunks)
    ready = run(lminf.attend_stepwise, policy, chunks=chunks, prompt=PROMPT)
    np.testing.assert_allclose(ready, plain, atol=ATOL)


def test_every_option_is_the_formulas():
    at, encoding = cases.padded((0, 5), TOKENS), lminf.Rotary(100.0, 4, "interleaved")
    config = ScoreConfig(encoding, 0.3, 2.0)
    found = run(
        lminf.attend, "lm_infinite:window=6,sinks=3", encoding=encoding,
        positions=jnp.asarray(at), scale=0.3, soft_cap=2.0, implementation="xla",
    )  # fmt: skip
    policy = POLICIES["lm_infinite"]
    arrays = cases.arrays(3, tokens=TOKENS)
    expected = oracle.attention(policy, config, *arrays, q_pos=at, k_pos=at)
    np.testing.assert_allclose(found, expected, atol=ATOL)


@pytest.mark.parametrize(
    ("function", "policy", "options", "message"),
    [
        (lminf.attend, lminf.SirLLM(12, turn=4), {}, "goes by what a model makes of its tokens"),
        (lminf.attend, "per_layer:policies=(full,full)", {}, "give the policy of one"),
        (lminf.attend_stepwise, lminf.Full(), {"chunks": [16]}, "chunks sum to 16 of 40 tokens"),
        (lminf.attend_stepwise, lminf.SnapKV(20, 4), {"chunks": [40]}, "say where that is with"),
        (lminf.attend_stepwise, lminf.Full(), {"chunks": [40], "prompt": 9}, "ends none of the"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(function, policy, options, message):
    arrays = cases.arrays(1, tokens=TOKENS)
    with pytest.raises(InputError, match=message):
        function(*arrays, policy, **options)
