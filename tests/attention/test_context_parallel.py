"""Attention with the tokens of a row spread over a mesh axis."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lminf.attention import attend, rope, scores
from lminf.attention.policy import Full, LMInfinite, PerHead, ReRoPE, SelfExtend, Window
from tests.attention import cases

ROTARY = rope.Rotary(dim=8, base=100.0, layout="half")
SCORING = scores.ScoreConfig(ROTARY, scale=0.4, soft_cap=None)
B, T, N, K, H = 2, 16, 4, 2, 8


def operands():
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(
        jax.random.normal(key, (B, T, heads, H)) for key, heads in zip(keys, (N, K, K), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "packed"),
    [
        (LMInfinite(window=5, sinks=2), False),
        (LMInfinite(window=5, sinks=2), True),
        (LMInfinite(window=11, sinks=6), False),  # over two neighbours, and sinks on two
        (Window(40), False),
        (Full(), False),
        (ReRoPE(window=3), False),
        (PerHead((Full(), Window(3))), False),
        (Full(), True),
        (SelfExtend(group=2, window=4), False),
        (SelfExtend(group=2, window=4), True),
    ],
    ids=str,
)
def test_a_row_on_four_devices_is_the_row_on_one(policy, packed):
    first = jnp.array([5, 9])  # tokens of each row's first text; the second row's is longer
    along = jnp.arange(T, dtype=jnp.int32)[None].repeat(B, 0)
    segments = (along >= first[:, None]).astype(jnp.int32) if packed else None
    # Apart from packed rows, the second row begins with padding.
    padded = along - jnp.array([[0], [3]])
    positions = padded if segments is None else along - segments * first[:, None]
    weights = jax.random.normal(jax.random.key(1), (B, T, N, H))

    def attended(q, k, v, positions, segments, axis=None):
        run = attend.prefill(policy, SCORING, positions, segments=segments, context_axis=axis)
        return run(q, k, v)

    mesh = jax.make_mesh((4,), ("context",), axis_types=(AxisType.Auto,))
    share = P(None, "context")
    spread = jax.shard_map(
        lambda *arrays: attended(*arrays, axis="context"), mesh=mesh,
        in_specs=(share,) * 4 + (None if segments is None else share,), out_specs=share,
        check_vma=False,
    )  # fmt: skip

    def out_and_gradients(run):
        def loss(operands):
            out = run(*operands, positions, segments)
            return (out * weights).sum(), out

        grads, out = cases.compiled(jax.grad(loss, has_aux=True))(operands())
        return jax.tree.map(np.asarray, (out, grads))

    jax.tree.map(
        lambda found, expected: np.testing.assert_allclose(found, expected, atol=2e-5),
        out_and_gradients(spread),
        out_and_gradients(attended),
    )


@pytest.mark.slow
def test_a_window_moves_no_more_than_the_window():
    """Neighbours exchange the window's keys, and nobody gathers those of the whole text."""
    mesh = jax.make_mesh((4,), ("context",), axis_types=(AxisType.Auto,))
    share = P(None, "context")

    def attended(q, k, v, positions):
        run = attend.prefill(
            LMInfinite(window=3, sinks=2), SCORING, positions, context_axis="context"
        )
        return run(q, k, v)

    spread = jax.shard_map(
        attended, mesh=mesh, in_specs=(share,) * 4, out_specs=share, check_vma=False
    )
    text = jax.jit(spread).lower(*operands(), jnp.zeros((B, T), jnp.int32)).as_text()
    moved = re.findall(r'"?stablehlo\.(all_gather|collective_permute)"?.*?-> tensor<([^>]*)>', text)
    shapes = {shape for kind, shape in moved if "f32" in shape}
    assert shapes == {f"{B}x2x{K}x{H}xf32"}  # w - 1 keys, and as many values
