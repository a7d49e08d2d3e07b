"""Λ-attention for a TPU: walks against brute force, numbers in the interpreter, lowering."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from lminf import kernels
from lminf.kernels import SegmentIds
from lminf.kernels.lambda_attention import mosaic_tpu, tpu_spans
from lminf.kernels.lambda_attention.operands import Rules
from tests.kernels import test_lambda_attention as shared

# Small blocks: some of the window's are clear, some on its edges, and the last ones incomplete.
SMALL = mosaic_tpu.Config(block_q=8, block_k=8)


@st.composite
def plans(draw):
    """A plan, the query offset and the keys' start."""
    keys, queries = draw(st.integers(1, 40)), draw(st.integers(1, 30))
    offset = draw(st.integers(-8, 40))
    window = draw(st.sampled_from([1, 7, 8, 9, 20, 2**31 - 1]))
    known = draw(st.sampled_from([offset, None]))
    rules = Rules(window, 40, 1.0, None, None, None, query_offset=known)
    plan = tpu_spans.Plan(
        rules,
        heads=2,
        key_heads=1,
        queries=queries,
        keys=keys,
        globals=draw(st.sampled_from([1, 8, 11, 40])),
        block_q=draw(st.sampled_from([4, 8])),
        block_k=draw(st.sampled_from([4, 8])),
        block_g=4,
    )
    return plan, offset, draw(st.integers(-20, 50))


def walk(outer: int, steps: int, span_of, size: int, count: int) -> list[tuple[int, int]]:
    """The pairs (outer block, block visited) of a walk, as the grid would make them."""
    # Always of one shape: every other would be compiled anew.
    first, step = (np.arange(16, dtype=np.int32).reshape(shape) for shape in ((16, 1), (1, 16)))
    assert max(outer, steps) <= 16
    span = span_of(first)
    block = np.asarray(span.block(step, size, count))[:outer, :steps]
    assert ((block >= 0) & (block < count)).all()  # also where there is nothing to visit
    visited = np.asarray(span.visits(step, size))[:outer, :steps]
    return [(int(a), int(block[a, t])) for a, t in zip(*np.nonzero(visited), strict=True)]


@pytest.mark.slow
@hypothesis.settings(max_examples=50)
@hypothesis.given(plans())
def test_walks_visit_what_is_seen_once(case):
    plan, offset, start = case
    scalars = np.array([offset, start], np.int32)
    row = offset + np.arange(plan.query_blocks * plan.block_q)[:, None]
    for side in plan.sides:
        key = np.arange(side.blocks * side.block)[None]
        window = plan.rules.window
        if isinstance(side, tpu_spans.Near):
            seen = (row - key >= 0) & (row - key < window)
            seen &= (key + start >= 0) & (key < plan.keys)
        else:
            seen = (row + start - key >= window) & (key < plan.globals)

        pairs = walk(
            plan.query_blocks, side.key_steps,
            functools.partial(side.keys_of, scalars, 0), side.block, side.blocks,
        )  # fmt: skip
        assert len(pairs) == len(set(pairs))
        found = np.zeros_like(seen)
        clear = {
            pair: bool(side.clear(scalars, 0, *pair)) for pair in pairs[:: 1 + len(pairs) // 8]
        }
        for i, j in pairs:
            at = np.s_[
                i * plan.block_q : (i + 1) * plan.block_q, j * side.block : (j + 1) * side.block
            ]
            found[at] = seen[at]
            if (i, j) in clear:  # some of them: each is a dozen small computations
                mask = np.asarray(side.visible(scalars, 0, i, j)).T
                np.testing.assert_array_equal(mask, seen[at])
                assert clear[i, j] == mask.all()
        np.testing.assert_array_equal(found, seen)

        backwards = walk(
            side.blocks, side.query_steps,
            functools.partial(side.queries_of, scalars, 0), plan.block_q, plan.query_blocks,
        )  # fmt: skip
        assert len(backwards) == len(set(backwards))
        needed = zip(*np.nonzero(seen[: plan.queries]), strict=True)
        assert {(j // side.block, i // plan.block_q) for i, j in needed} <= set(backwards)


def small(
    *, batch=1, heads=2, key_heads=1, queries=19, keys=30, rows=3, sinks=False, **options
):  # fmt: skip
    given = {
        "query": shared.normal(0, batch, queries, heads, 8),
        "key": shared.normal(1, batch, keys, key_heads, 8),
        "value": shared.normal(2, batch, keys, key_heads, shared.VALUE_WIDTH),
    }
    if rows:
        given["query_global"] = shared.normal(3, batch, queries, heads, 8)
        given["key_global"] = shared.normal(4, batch, rows, key_heads, 8)
        given["value_global"] = shared.normal(5, batch, rows, key_heads, shared.VALUE_WIDTH)
    if sinks:
        given["sinks"] = shared.normal(6, heads)
    return given, {"num_global": rows, "query_offset": keys - queries} | options


def check(monkeypatch, given, options, dtype=np.float32, **tolerances):
    monkeypatch.setattr(shared, "BATCH", given["query"].shape[0])  # of the cotangents
    found = shared.results(given, implementation="mosaic_tpu", config=SMALL, dtype=dtype, **options)
    shared.assert_close(found, shared.oracle(given, **options), **tolerances)


def test_values(interpreter):
    """Two heads on one key head, globals, a sink, clear and masked blocks, an odd last block."""
    assert_values(*small(sinks=True, window_size=18))


def assert_values(given, options):
    found, right = (
        jax.jit(
            functools.partial(
                kernels.lambda_attention, **options, return_residuals=True,
                implementation=name, config=config,
            )
        )(**given)
        for name, config in (("mosaic_tpu", SMALL), ("reference", None))
    )  # fmt: skip
    np.testing.assert_allclose(found.out, right.out, atol=2e-6)
    np.testing.assert_allclose(found.lse, right.lse, atol=2e-6)


@pytest.mark.slow
def test_gradients_on_two_cores(two_cores, monkeypatch):
    given, options = small(sinks=True, window_size=18)
    check(monkeypatch, given, options)


def packed(*rows, **options):
    """Operands of rows of segments, whose last ones ask, and the options of the call."""
    ids = jnp.array(rows, jnp.int32)
    given, options = small(batch=ids.shape[0], keys=ids.shape[1], **options)
    at = jnp.arange(given["query"].shape[1]) + options["query_offset"]
    at = jnp.clip(at, 0, ids.shape[1] - 1)
    return given, options | {"segment_ids": SegmentIds(ids[:, at], ids)}


# Segments that show their globals and ones too short to, padding in front, between and behind.
MIXED = [4] * 2 + [-1] * 3 + [0] * 11 + [7] + [2] * 12 + [-1]
OTHER = [-1] + [5] * 20 + [3] * 9


@pytest.mark.slow
def test_segments(interpreter):
    """Two rows of the batch, each with globals to gather."""
    assert_values(*packed(MIXED, OTHER, heads=1, queries=7, rows=30, num_global=2, window_size=4))


CASES = {
    "segments": packed(MIXED, OTHER, sinks=True, rows=30, num_global=2, window_size=4),
    "segments, blocks that all see": packed(
        [1] * 5 + [2] * 35, heads=1, queries=35, rows=0, num_global=11, window_size=18
    ),
    "segments, every far key": packed(
        OTHER, heads=1, rows=30, num_global=30, window_size=5, query_offset=jnp.int32(11)
    ),
    "segments without globals, soft cap": packed(
        MIXED, rows=0, window_size=2**31 - 1, logits_soft_cap=2.0
    ),
    "segments, queries past the keys": packed(
        OTHER, heads=1, rows=30, num_global=3, window_size=5, query_offset=20
    ),
    "window of one, as many globals as keys": small(rows=30, window_size=1),
    "no globals, causal": small(rows=0, window_size=2**31 - 1, scale=0.3),
    "soft cap, one query head for each key head": small(
        key_heads=2, window_size=9, logits_soft_cap=2.0
    ),
    "rows that see nothing": small(
        sinks=True, window_size=6, query_offset=jnp.int32(5), key_start=jnp.array([-12], jnp.int32)
    ),
    "far along": small(
        window_size=17, query_offset=jnp.int32(11), key_start=jnp.array([23], jnp.int32)
    ),
    "queries past the keys": small(window_size=5, query_offset=20),
    "listed globals, hidden in front and behind": small(
        batch=2, rows=20, window_size=5, sinks=True, global_positions=shared.listed(2, 20, most=30)
    ),
    "a list for each key head, no keys": small(
        batch=2,
        heads=4,
        key_heads=2,
        keys=0,
        rows=20,
        window_size=0,
        query_offset=0,
        key_start=jnp.array([0, 9], jnp.int32),
        global_positions=shared.listed(2, 2, 20, most=30),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_options(interpreter, monkeypatch, case):
    given, options = CASES[case]
    check(monkeypatch, given, options)


@pytest.mark.slow
def test_segments_under_vmap(interpreter):
    """One text after the other: their walks differ."""
    given, options = packed(MIXED, OTHER, heads=1, queries=7, rows=30, num_global=2, window_size=4)
    ids = options.pop("segment_ids")

    def attend(name, config, given, ids):
        return kernels.lambda_attention(
            **{n: x[None] for n, x in given.items()}, **options, implementation=name,
            config=config, segment_ids=SegmentIds(ids.q[None], ids.kv[None]),
        )  # fmt: skip

    found, right = (
        jax.jit(jax.vmap(functools.partial(attend, name, config)))(given, ids)
        for name, config in (("mosaic_tpu", SMALL), ("reference", None))
    )
    np.testing.assert_allclose(found, right, atol=2e-6)


@pytest.mark.slow
def test_bfloat16(interpreter, monkeypatch):
    given, options = small(window_size=18)
    given = {n: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for n, x in given.items()}
    check(monkeypatch, given, options, dtype=jnp.bfloat16, value=1e-2, gradient=1e-2)


@pytest.mark.slow
def test_two_runs_agree(interpreter):
    given, options = small(window_size=18, heads=1)
    attend = jax.jit(
        functools.partial(
            kernels.lambda_attention, implementation="mosaic_tpu", config=SMALL, **options
        )
    )
    np.testing.assert_array_equal(attend(**given), attend(**given))


def test_lowers_for_a_tpu_without_one():
    """Values and gradients are Mosaic calls and nothing else has the size of the scores."""
    shapes = [jax.ShapeDtypeStruct((1, 1000, n, 128), jnp.bfloat16) for n in (4, 2, 2)]

    def loss(*arrays):
        attend = functools.partial(
            kernels.lambda_attention, num_global=100, window_size=300, implementation="mosaic_tpu"
        )
        return attend(*arrays).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes).lower(
        lowering_platforms=("tpu",)
    ).as_text()  # fmt: skip
    for name in ("forward", "d_query", "d_key_near", "d_key_far"):
        assert f"lambda_{name}" in text
    assert "1000x1000" not in text


def test_refusals_name_the_reason():
    given, options = small(rows=0, window_size=5)
    attend = functools.partial(
        kernels.lambda_attention,
        **{name: jnp.asarray(x) for name, x in given.items()},
        implementation="mosaic_tpu",
    )
    for changed, word in (
        ({"alibi_slopes": jnp.ones(2)}, "ALiBi"),
        ({"scale": -1.0}, "scale=-1.0"),
        ({"config": shared.SMALL}, "config is a"),
    ):
        with pytest.raises(ExceptionGroup) as refusal:
            attend(**(options | changed))
        assert word in str(refusal.value.exceptions[0])
