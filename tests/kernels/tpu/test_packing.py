"""Segments for the TPU kernels of Λ-attention: ranges and walks against brute force."""

import dataclasses

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from lminf.kernels import SegmentIds
from lminf.kernels.common import masks
from lminf.kernels.lambda_attention import tpu_packing, tpu_spans
from lminf.kernels.lambda_attention.operands import Branch, Operands, Places, Rules
from tests.kernels.tpu.test_lambda_attention import plans, walk


@st.composite
def packings(draw):
    """A plan with segments, their ids (two rows), and the query offset."""
    plan, offset, _ = draw(plans())
    runs = st.lists(st.tuples(st.booleans(), st.integers(1, 40)), min_size=40, max_size=40)
    ids = [
        np.repeat([-1 if empty else i for i, (empty, _) in enumerate(found)], [n for _, n in found])
        for found in (draw(runs), draw(runs))
    ]
    count = draw(st.sampled_from([1, 3, 40]))
    rules = dataclasses.replace(plan.rules, num_global=count)
    most = tpu_packing.most_globals(rules, plan.keys)
    return (
        dataclasses.replace(plan, rules=rules, packed=2, globals=most),
        np.stack([x[: plan.keys] for x in ids]),
        offset,
    )


def edge_case(*, window, num_global, lengths, offset, queries):
    """As `packings`: two equal rows of segments of these lengths."""
    ids = np.repeat(np.arange(len(lengths)), lengths)
    rules = Rules(window, num_global, 1.0, None, None, None)
    most = tpu_packing.most_globals(rules, len(ids))
    plan = tpu_spans.Plan(rules, 2, 1, queries, len(ids), most, 8, 8, 4, packed=2)
    return plan, np.stack([ids, ids]), offset


@pytest.mark.slow
@hypothesis.settings(max_examples=25)
@hypothesis.given(packings())
# Globals that only queries beyond the keys see; several segments that begin in one block.
@hypothesis.example(edge_case(window=7, num_global=3, lengths=[5], offset=8, queries=6))
@hypothesis.example(edge_case(window=1, num_global=3, lengths=[2, *[4] * 6], offset=0, queries=26))
def test_segments_are_ranges_and_walked_once(case):
    plan, ids, offset = case
    kv = jnp.asarray(ids, jnp.int32)
    row = offset + np.arange(plan.queries)
    q = kv[:, np.clip(row, 0, plan.keys - 1)]
    # Rows that say which key they are, to see in which order they are gathered.
    names = jnp.arange(plan.keys, dtype=jnp.float32)[None, :, None, None]
    names = jnp.broadcast_to(names, (2, plan.keys, 1, 1))
    branch = Branch(jnp.zeros((2, plan.queries, 1, 1)), names, names)
    nowhere = Places(jnp.zeros(2, jnp.int32), jnp.int32(offset), SegmentIds(q, kv), None, None)
    gathered, where = tpu_packing.pack(plan, Operands(branch, branch, None), nowhere)
    assert gathered.far is not None

    distance = row[:, None] - np.arange(plan.keys)[None]
    same = (np.asarray(q)[:, :, None] == ids[:, None]) & (ids != -1)[:, None]
    rank = np.arange(plan.keys)[None] - np.asarray(masks.run_starts(kv))
    near = same & (distance >= 0) & (distance < plan.rules.window)
    far = same & (distance >= plan.rules.window) & (rank < plan.rules.num_global)[:, None]
    for side, seen, key, ranges in zip(
        plan.sides, (far, near), (gathered.far.key, names), where.ranges, strict=True
    ):
        first, end = (np.asarray(x)[:, 0] for x in ranges)
        for batch in range(2):
            key_of = np.asarray(key)[batch, :, 0, 0].astype(int)
            at = np.arange(side.rows)[None]
            shown = (at >= first[batch][:, None]) & (at < end[batch][:, None])
            found = np.zeros_like(seen[batch])
            for i, r in zip(*np.nonzero(shown[: plan.queries]), strict=True):
                assert not found[i, key_of[r]]
                found[i, key_of[r]] = True
            np.testing.assert_array_equal(found, seen[batch])
            _assert_walked(plan, side, np.asarray(where.scalars), batch, shown)


def _assert_walked(plan, side, scalars, batch, shown):
    """Walks both ways visit the blocks that are shown, each once, and know which are clear."""
    blocks = np.zeros((plan.query_blocks, side.blocks, plan.block_q, side.block), bool)
    for i, r in zip(*np.nonzero(shown), strict=True):
        blocks[i // plan.block_q, r // side.block, i % plan.block_q, r % side.block] = True
    needed = set(zip(*np.nonzero(blocks.any((2, 3))), strict=True))
    pairs = walk(
        plan.query_blocks, side.key_steps,
        lambda i: side.keys_of(scalars, batch, np.minimum(i, plan.query_blocks - 1)),
        side.block, side.blocks,
    )  # fmt: skip
    assert len(pairs) == len(set(pairs))
    assert needed <= set(pairs)
    for i, j in pairs:
        assert bool(side.clear(scalars, batch, i, j)) == blocks[i, j].all()
    backwards = walk(
        side.blocks, side.query_steps,
        lambda j: side.queries_of(scalars, batch, np.minimum(j, side.blocks - 1)),
        plan.block_q, plan.query_blocks,
    )  # fmt: skip
    assert len(backwards) == len(set(backwards))
    assert {(j, i) for i, j in needed} <= set(backwards)
