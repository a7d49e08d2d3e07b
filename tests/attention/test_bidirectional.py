"""Attention in both directions equals one dense softmax over all tokens of a text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.attention import bidirectional, reference
from lminf.attention.policy import Full
from lminf.kernels.common import masks
from tests.attention import cases


class BothWays(Full):
    """Full without causality: an oracle through the dense reference."""

    def in_window(self, q, k):
        return jnp.broadcast_to(jnp.asarray(True), jnp.broadcast_shapes(q.shape, k.shape))

    visible = in_window


POSITIONS = jnp.asarray(cases.padded())
# Two texts, then padding, in a row; the other row is one text.
SEGMENTS = jnp.asarray([[1] * 9 + [2] * 12 + [masks.PADDING] * 3, [1] * 24], jnp.int32)
PACKED = jnp.asarray([[*range(9), *range(12), *range(3)], [*range(24)]], jnp.int32)


@pytest.mark.parametrize(
    ("encoding", "positions", "segments", "soft_cap"),
    [("partial", POSITIONS, None, 2.0), ("rotary", PACKED, SEGMENTS, None)],
)
def test_outputs_and_gradients_are_those_of_a_dense_softmax(
    monkeypatch, encoding, positions, segments, soft_cap
):
    monkeypatch.setattr(bidirectional, "BLOCK", 7)  # the last block is shorter
    config = cases.scoring(encoding, soft_cap=soft_cap)
    q, k, v = cases.arrays(group=2)

    def dense(q, k, v):
        return reference.reference(
            BothWays(), config, q, k, v, positions=positions, segments=segments
        )

    @cases.compiled
    def run(q, k, v):
        blocked = bidirectional.prefill(config, positions, segments=segments)
        return [cases.with_gradients(form)(q, k, v, jnp.cos(q)) for form in (blocked, dense)]

    (out, gradients), (expected, expected_gradients) = run(q, k, v)
    np.testing.assert_allclose(out, expected, atol=cases.ATOL)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_alibi_reads_a_text_the_same_from_both_ends():
    config = cases.scoring("alibi")
    positions = jnp.broadcast_to(jnp.arange(cases.TOKENS, dtype=jnp.int32), POSITIONS.shape)
    q, k, v = map(jnp.asarray, cases.arrays(group=1))

    @cases.compiled
    def run(q, k, v):
        attend = bidirectional.prefill(config, positions)
        return attend(q, k, v), attend(*(jnp.flip(x, 1) for x in (q, k, v)))

    forward, backward = run(q, k, v)
    np.testing.assert_allclose(forward, jax.numpy.flip(backward, 1), atol=cases.ATOL)
