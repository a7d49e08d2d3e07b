"""Λ-attention for Hopper: which blocks its programs walk, which they mask, what is refused.

The kernel itself runs on no CPU; tests/kernels/aot compiles it for an H100.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lminf import kernels
from lminf.kernels.common import compat, numerics
from lminf.kernels.common.masks import SegmentIds
from lminf.kernels.lambda_attention import gpu_steps, mosaic_gpu

BLOCK = gpu_steps.BLOCK_Q


def plan_of(queries, keys, window, rows, block_kv):
    return gpu_steps.Plan(
        queries, keys, rows, window,
        heads=1, key_heads=1, width=64, value_width=64, block_kv=block_kv, stages=2, unit=1.0,
    )  # fmt: skip


def dense_masks(plan, place):
    """(near [T, S], far [T, R]) by the definition."""
    i = np.arange(plan.queries)[:, None] + place.query_offset
    j, r = np.arange(plan.keys)[None], np.arange(plan.globals)[None]
    near = (i - j >= 0) & (i - j < plan.window) & (place.key_start + j >= 0)
    return near, place.key_start + i - r >= plan.window


def check_walks(plan, place):
    """Programs reach every visible pair once and no other, and neither blocks nor masks in vain."""
    dense = dense_masks(plan, place)
    reached = [np.zeros(mask.shape, int) for mask in dense]
    size = plan.block_kv
    for block in range(-(-plan.queries // BLOCK)):
        steps = gpu_steps.Walk(*map(int, gpu_steps.walk(plan, block, place)))
        assert 0 <= steps.far_plain <= steps.far <= steps.plain <= steps.masked <= steps.steps
        all_rows = block * BLOCK + np.arange(BLOCK, dtype=np.int32)[:, None]
        rows = all_rows[all_rows < plan.queries][:, None]
        for step in range(steps.steps):
            is_far = step < steps.far
            at = (step if is_far else steps.first + step - steps.far) * size
            keys = at + np.arange(size, dtype=np.int32)[None]
            mask, counts = dense[is_far], reached[is_far]
            columns = keys[0][keys[0] < mask.shape[1]]
            visible = mask[rows, columns[None]]
            whole = len(columns) == size and visible.all()
            assert visible.any()
            if step < steps.far_plain or steps.plain <= step < steps.masked:
                assert whole
            else:
                assert not whole
                limits = jax.tree.map(int, gpu_steps.limits(plan, is_far, place))
                found = np.asarray(gpu_steps.seen(limits, all_rows, keys))[: len(rows)]
                assert not found[:, len(columns) :].any()
                np.testing.assert_array_equal(found[:, : len(columns)], visible)
            counts[rows, columns[None]] += visible
    for mask, counts in zip(dense, reached, strict=True):
        np.testing.assert_array_equal(counts, mask)


@settings(deadline=None, max_examples=40)
@given(
    queries=st.integers(1, 400),
    keys=st.integers(1, 700),
    window=st.one_of(st.integers(1, 800), st.just(2**30)),
    rows=st.integers(0, 300),
    block_kv=st.sampled_from([64, 128]),
    key_start=st.integers(-200, 50),
    query_offset=st.integers(-50, 500),
)
def test_programs_walk_what_the_dense_mask_shows(
    queries, keys, window, rows, block_kv, key_start, query_offset
):
    plan = plan_of(queries, keys, window, rows, block_kv)
    check_walks(plan, gpu_steps.Place(key_start, query_offset))


def test_a_long_window_is_mostly_unmasked():
    """Window 4096 and 100 globals: 2 of 34 blocks have the window's edges, one the globals."""
    plan = plan_of(16384, 16384, 4096, 100, 128)
    place = gpu_steps.Place(0, 0)
    steps = gpu_steps.Walk(*map(int, gpu_steps.walk(plan, 100, place)))
    assert steps.steps == 34
    assert steps.masked - steps.plain == 31


@functools.partial(jax.jit, static_argnums=(0, 1))
def take_step(plan, is_masked, limits, rows, query, key, value, state):
    """The running softmax (acc, maximum, total) with one more block of keys."""
    acc, maximum, total = state
    scores = query @ key.T
    if is_masked:
        scores = jnp.where(gpu_steps.seen(limits, *rows), scores, gpu_steps.masked_score(plan))
    weights, decay, maximum, total = gpu_steps.weigh(plan, scores, maximum, total)
    return acc * decay[:, None] + weights @ value, maximum, total


def replay(plan, place, near, far):
    """(out, LSE) of one head by the programs' own steps, masks and sums, in plain JAX."""

    def rows_of(x, start, count):  # as the copy engine: zeros past the end
        return np.pad(x, ((0, 2 * BLOCK), (0, 0)))[start : start + count]

    outs, lses = [], []
    for block in range(-(-plan.queries // BLOCK)):
        steps = gpu_steps.Walk(*map(int, gpu_steps.walk(plan, block, place)))
        query_rows = block * BLOCK + np.arange(BLOCK, dtype=np.int32)[:, None]
        state = (
            np.zeros((BLOCK, plan.value_width), np.float32),
            np.full(BLOCK, gpu_steps.initial_maximum(plan), np.float32),
            np.zeros(BLOCK, np.float32),
        )
        for step in range(steps.steps):
            is_far = step < steps.far
            at = (step if is_far else steps.first + step - steps.far) * plan.block_kv
            query, key, value = far if is_far else near
            state = take_step(
                plan,
                not (step < steps.far_plain or steps.plain <= step < steps.masked),
                jax.tree.map(np.asarray, gpu_steps.limits(plan, is_far, place)),
                (query_rows, at + np.arange(plan.block_kv, dtype=np.int32)[None]),
                rows_of(query, block * BLOCK, BLOCK),
                rows_of(key, at, plan.block_kv),
                rows_of(value, at, plan.block_kv),
                state,
            )
        acc, maximum, total = state
        inverse, lse = jax.jit(gpu_steps.finish)(maximum, total)
        outs.append(np.asarray(acc) * np.asarray(inverse)[:, None])
        lses.append(np.asarray(lse))
    return np.concatenate(outs)[: plan.queries], np.concatenate(lses)[: plan.queries]


@pytest.mark.parametrize("scale", [0.1, 3.0])  # units on both sides of 1
@pytest.mark.parametrize("key_start", [0, -70])
def test_the_steps_give_the_numbers_of_the_reference(scale, key_start):
    """Rows of keys that are padding leave some queries with nothing to see."""
    queries, keys, globals_, window, width = 140, 150, 20, 30, 8
    rng = np.random.default_rng(0)
    query, key, value, query_global, key_global, value_global = (
        rng.standard_normal((rows, width)).astype(np.float32)
        for rows in (queries, keys, keys, queries, globals_, globals_)
    )

    def lift(x):
        return jnp.asarray(x[None, :, None])

    reference = jax.jit(
        functools.partial(
            kernels.lambda_attention, num_global=globals_, window_size=window, query_offset=5,
            scale=scale, key_start=key_start, return_residuals=True, implementation="reference",
        )
    )  # fmt: skip
    expected = reference(
        *map(lift, (query, key, value)), query_global=lift(query_global),
        key_global=lift(key_global), value_global=lift(value_global),
    )  # fmt: skip
    plan = gpu_steps.Plan(
        queries, keys, globals_, window,
        heads=1, key_heads=1, width=width, value_width=width, block_kv=64, stages=2,
        unit=scale * numerics.LOG2_E,
    )  # fmt: skip
    out, lse = replay(
        plan, gpu_steps.Place(key_start, 5), (query, key, value),
        (query_global, key_global, value_global),
    )  # fmt: skip
    assert np.isneginf(np.asarray(lse)).any() == (key_start < 0)
    np.testing.assert_allclose(out, expected.out[0, :, 0], atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(lse, expected.lse[0, 0], atol=2e-5, rtol=1e-5)


def shapes(dtype=jnp.bfloat16, width=64):
    return [jax.ShapeDtypeStruct((2, 256, heads, width), dtype) for heads in (4, 2, 2)]


def attempt(inputs, **options):
    attend = functools.partial(
        kernels.lambda_attention, num_global=4, window_size=32, implementation="mosaic_gpu",
        **options,
    )  # fmt: skip
    return jax.eval_shape(attend, *inputs)


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(compat, "cuda_version", lambda: 13000)
    with compat.lowering_for(90):
        yield


@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("logits_soft_cap", {"logits_soft_cap": 20.0}),
        ("sinks", {"sinks": jnp.zeros(4)}),
        ("alibi_slopes", {"alibi_slopes": jnp.ones(4)}),
        ("segment_ids", {"segment_ids": SegmentIds(*jnp.zeros((2, 2, 256), int))}),
        ("scale=0", {"scale": 0.0}),
        ("float32", {"dtype": jnp.float32}),
        ("96", {"width": 96}),
        ("shared memory", {"config": mosaic_gpu.Config(256, 4)}),
        ("config is", {"config": 7}),
    ],
)
def test_refuses_by_name(on_hopper, reason, options):
    inputs = shapes(**{k: options.pop(k) for k in ("dtype", "width") if k in options})
    with pytest.raises(ExceptionGroup) as raised:
        attempt(inputs, **options)
    assert reason in str(raised.value.exceptions[0])


def test_gives_outputs_and_lse_of_the_right_shape(on_hopper):
    out, lse = attempt(shapes(), return_residuals=True)
    assert (out.shape, out.dtype, lse.shape) == ((2, 256, 4, 64), jnp.bfloat16, (2, 4, 256))


def test_needs_a_hopper_gpu():
    with pytest.raises(ExceptionGroup) as raised:
        attempt(shapes())
    assert "compute capability 90, and found none" in str(raised.value.exceptions[0])
    with compat.lowering_for(100), pytest.raises(ExceptionGroup) as raised:
        attempt(shapes())
    assert "compute capability 100" in str(raised.value.exceptions[0])


@pytest.mark.parametrize(
    ("cuda", "refused"), [(12060, False), (12080, True), (12090, True), (13000, False)]
)
def test_refuses_the_cuda_releases_that_miscompile_masks(on_hopper, monkeypatch, cuda, refused):
    monkeypatch.setattr(compat, "cuda_version", lambda: cuda)
    if not refused:
        attempt(shapes())
        return
    with pytest.raises(ExceptionGroup) as raised:
        attempt(shapes())
    assert "12.8.0 to 12.9.0" in str(raised.value.exceptions[0])
