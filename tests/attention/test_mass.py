"""Attention that keys received: the blocked sums against dense weights and the LSE of a kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from lminf.attention import mass
from lminf.attention.policies import Lambda
from tests.attention import cases

WINDOW = Lambda(window=9, sinks=2)


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
    slopes = jnp.linspace(0.1, 0.9, q.shape[2])
    options = {"q_pos": at, "k_pos": at, "seen": WINDOW.visible, "scale": 0.3}
    capped = options | {"soft_cap": 2.0, "slopes": slopes}

    @cases.compiled
    def run(q, k, v):
        lse = attended(q, k, v, at)
        return [
            (form(q, k, lse, **plain), form(q, k, lse, **capped))
            for form, plain, capped in (
                (mass.columns, options | {"block": block}, capped | {"block": block}),
                (mass.reference, options, capped),
            )
        ]

    for found, expected in zip(*run(q, k, v), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_with_the_lse_of_all_keys_every_query_gives_one():
    q, k, v = cases.arrays(2)
    at = jnp.asarray(cases.padded((4, 4)))

    @cases.compiled
    def run(q, k, v):
        return mass.columns(
            q, k, attended(q, k, v, at), q_pos=at, k_pos=at, seen=WINDOW.visible, scale=0.3
        )

    found = np.asarray(run(q, k, v))
    assert found.shape == (cases.BATCH, 4, cases.TOKENS)
    np.testing.assert_allclose(found.sum(-1), cases.TOKENS - 4, rtol=1e-5)  # padding gives nothing
    assert not found[:, :, :4].any()  # and gets nothing
    np.testing.assert_allclose(mass.by_key_head(jnp.asarray(found), 2)[0, 1], found[0, 2:].sum(0))


def test_memory_is_one_block_of_weights():
    def temporary_bytes(keys):
        def run(q, k, lse, q_pos, k_pos):
            return mass.columns(
                q, k, lse, q_pos=q_pos, k_pos=k_pos, seen=lambda q, k: k <= q, scale=1.0
            )

        shapes = ((1, 256, 4, 8), (1, keys, 2, 8), (1, 4, 256), (1, 256), (1, keys))
        kinds = (jnp.float32,) * 3 + (jnp.int32,) * 2
        arrays = [jax.ShapeDtypeStruct(*one) for one in zip(shapes, kinds, strict=True)]
        program = cases.compiled(run).lower(*arrays).compile()
        return program.memory_analysis().temp_size_in_bytes

    # Both hold a block; the longer one holds its keys and sums besides.
    block = 256 * 256 * 4 * 4
    assert temporary_bytes(8192) < temporary_bytes(1024) + block
