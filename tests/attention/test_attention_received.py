"""Attention that keys received: the blocked sums against dense weights and the LSE of a kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf import kernels
from lminf.attention import rope, scores, sparse
from lminf.attention.policy import Lambda
from tests.attention import cases

WINDOW = Lambda(window=9, sinks=2)


def scoring(soft_cap=None):
    return scores.ScoreConfig(rope.NoEncoding(), 0.3, soft_cap)


def all_weights(config, q, k, lse, *, q_pos, k_pos, seen):
    """`received_by_key` from all weights at once; O(T S) memory."""
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    products = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    products = products.reshape(q.shape[0], q.shape[2], q.shape[1], -1) * jnp.float32(config.scale)
    to, at = q_pos[:, :, None], k_pos[:, None, :]
    if config.soft_cap is not None:
        products = config.soft_cap * jnp.tanh(products / config.soft_cap)
    visible = (seen(to, at) & (to >= 0) & (at >= 0))[:, None]
    # A query that sees nothing has lse = -inf.
    weights = jnp.exp(products - lse[..., None].astype(jnp.float32))
    return jnp.where(visible, weights, 0.0).sum(2)


def attended(q, k, v, at):
    """The LSE of attention under WINDOW over rows that begin with padding."""
    found = kernels.lambda_attention(
        q, k, v, num_global=2, window_size=9, key_start=at[:, 0], query_global=q,
        key_global=k[:, 4:6], value_global=v[:, 4:6], scale=0.3, return_residuals=True,
        implementation="xla",
    )  # fmt: skip
    return found.lse


@pytest.mark.parametrize("block", [5, 64])
def test_sums_over_blocks_of_keys_are_those_of_all_weights(block):
    q, k, v = cases.arrays(3)
    at = jnp.asarray(cases.padded((4, 4)))
    options = {"q_pos": at, "k_pos": at, "seen": WINDOW.visible}

    @cases.compiled
    def run(q, k, v):
        lse = attended(q, k, v, at)
        return [
            [form(scoring(cap), q, k, lse, **options, **more) for cap in (None, 2.0)]
            for form, more in ((sparse.received_by_key, {"block": block}), (all_weights, {}))
        ]

    for found, expected in zip(*run(q, k, v), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_with_the_lse_of_all_keys_every_query_gives_one():
    q, k, v = cases.arrays(2)
    at = jnp.asarray(cases.padded((4, 4)))

    @cases.compiled
    def run(q, k, v):
        return sparse.received_by_key(
            scoring(), q, k, attended(q, k, v, at), q_pos=at, k_pos=at, seen=WINDOW.visible
        )

    found = np.asarray(run(q, k, v))
    assert found.shape == (cases.BATCH, 4, cases.TOKENS)
    np.testing.assert_allclose(found.sum(-1), cases.TOKENS - 4, rtol=1e-5)  # padding gives nothing
    assert not found[:, :, :4].any()  # and gets nothing


def test_memory_is_one_block_of_weights():
    def temporary_bytes(keys):
        def run(q, k, lse, q_pos, k_pos):
            return sparse.received_by_key(
                scoring(), q, k, lse, q_pos=q_pos, k_pos=k_pos, seen=lambda q, k: k <= q
            )

        shapes = ((1, 256, 4, 8), (1, keys, 2, 8), (1, 4, 256), (1, 256), (1, keys))
        kinds = (jnp.float32,) * 3 + (jnp.int32,) * 2
        arrays = [jax.ShapeDtypeStruct(*one) for one in zip(shapes, kinds, strict=True)]
        program = cases.compiled(run).lower(*arrays).compile()
        return program.memory_analysis().temp_size_in_bytes

    # Both hold a block; the longer one holds its keys and sums besides.
    block = 256 * 256 * 4 * 4
    assert temporary_bytes(8192) < temporary_bytes(1024) + block
