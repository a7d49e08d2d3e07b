"""A model whose weights, activations and caches are bfloat16, under policies by content."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.attention.policies.eviction import SirLLM
from lminf.attention.policies.infllm import InfLLM
from lminf.attention.policies.prompt_compression import ThinK

TEXT = "a text of more than forty bytes, which is read in chunks of sixteen"
POLICIES = [
    InfLLM(8, sinks=3, topk=2, block=4, repr_topk=2, exec_block=4),
    SirLLM(16, sinks=2, turn=4),
    ThinK(0.5, recent=5),
]


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_losses_are_those_of_float32_to_its_rounding_and_it_writes(lm, policy, small_steps):
    weights = jax.tree.map(lambda x: x.astype(jnp.bfloat16), lm.params)
    half = dataclasses.replace(lm, params=weights, policy=policy, dtype=jnp.bfloat16)
    assert half.init_caches(batch=1, capacity=16)[0].k.dtype == jnp.bfloat16
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), weights)
    whole = dataclasses.replace(lm, params=exact, policy=policy)
    prompt = 32 if policy.needs_prompt else None
    found, expected = (model.nll(TEXT, prompt=prompt).token_nll for model in (half, whole))
    # Two layers of rounding to 8 bits: seen, 0.04 nats at most.
    np.testing.assert_allclose(found, expected, atol=0.08)
    assert half.generate(TEXT, max_new_tokens=6)
