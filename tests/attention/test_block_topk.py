"""MoBA in one call: values and gradients of its sorted rows against one dense masked softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.attention import attend, rope, scores
from lminf.attention.policies import block_topk
from lminf.attention.policies.block_topk import MoBA
from lminf.errors import InputError
from tests.attention import cases
from tests.attention.cases import ATOL, WIDTH

TOKENS = 40


def dense(policy, config, positions, q, k, v):
    """The mask that the choice makes, [B, N, T, S], and one softmax under it."""
    placement = scores.Placement(config, positions)
    q, k = placement.at(q, positions), placement.at(k, positions)
    count = TOKENS // policy.block
    numbers = jnp.arange(count, dtype=jnp.int32)[None, None]
    of_block = positions[..., None] // policy.block == numbers
    of_block = (of_block & (positions >= 0)[..., None]).astype(jnp.float32)
    means = jnp.einsum("bskh,bsn->bnkh", k, of_block) / policy.block
    gate = jax.lax.stop_gradient(scores.dot(q, means))
    own = positions // policy.block
    gate = jnp.where((numbers < own[..., None])[:, None], gate, -jnp.inf)
    best, block_ids = jax.lax.top_k(gate, min(policy.topk - 1, count))
    chosen = jax.nn.one_hot(jnp.where(jnp.isneginf(best), -1, block_ids), count).sum(-2)
    seen = jnp.einsum("bhtn,bsn->bhts", chosen, of_block) > 0
    to, at = positions[:, :, None], positions[:, None]
    causal = (at >= 0) & (at <= to)
    seen |= (causal & (own[:, :, None] == own[:, None]))[:, None]
    seen &= causal[:, None]
    return scores.attention(config, q, k, v, seen).out


@pytest.mark.parametrize(
    "policy",
    [MoBA(block=8, topk=3), pytest.param(MoBA(block=16, topk=2), marks=pytest.mark.slow)],
    ids=str,
)
def test_a_text_and_its_gradients_are_the_dense_masked_softmax(policy):
    positions = jnp.asarray(cases.padded((0, 5), TOKENS))
    config, arrays = cases.scoring("partial_yarn", soft_cap=4.0), cases.arrays(3, tokens=TOKENS)
    ct = np.random.default_rng(1).normal(size=arrays[0].shape).astype(np.float32)

    @cases.compiled
    def run(*arrays):
        sparse = attend.prefill(policy, config, positions)
        return [
            cases.with_gradients(form)(*arrays)
            for form in (sparse, lambda *x: dense(policy, config, positions, *x))
        ]

    found, expected = run(*arrays, ct)
    for left, right in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert float(jnp.abs(right).max()) > 0.1
        np.testing.assert_allclose(left, right, atol=4 * ATOL, rtol=0)


def test_rows_hold_every_pair_in_a_list_of_its_block():
    block_ids = jnp.asarray(np.random.default_rng(0).integers(-1, 5, (2, 3, 2, 7, 2)), jnp.int32)
    routed = cases.compiled(lambda block_ids: block_topk.route(block_ids, 5, 4))(block_ids)
    routed = jax.tree.map(np.asarray, routed)
    pairs = np.asarray(block_ids).reshape(2, 3, -1)
    for b, k in np.ndindex(2, 3):
        for pair, block in enumerate(pairs[b, k]):
            row = routed.row[b, k, pair]
            if block >= 0:
                assert routed.pair[b, k, row] == pair
                assert routed.block_ids[b, k, row // 4] == block
            else:
                assert row >= routed.pair.shape[2]


def test_rotations_that_change_with_the_length_are_refused():
    config = scores.ScoreConfig(
        rope.Rotary(100.0, WIDTH, "half", rope.DynamicNTK(2.0, 8)), 1.0, None
    )
    at = jnp.arange(16, dtype=jnp.int32)[None]
    with pytest.raises(InputError, match="DynamicNTK rotates keys anew as the text grows"):
        jax.eval_shape(
            attend.prefill(MoBA(block=4, topk=2), config, at),
            *(jax.ShapeDtypeStruct((1, 16, 2, WIDTH), jnp.float32),) * 3,
        )
