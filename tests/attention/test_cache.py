"""Which positions a cache holds, where, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lminf.attention import cache
from lminf.attention.policy import (
    Full,
    LMInfinite,
    PerHead,
    ReRoPE,
    SelfExtend,
    Streaming,
    Window,
)
from tests.attention import cases

WIDEST = 16  # chunks of the property test are padded to it, so that one shape is compiled


@settings(max_examples=25)
@given(
    sinks=st.integers(0, 12),
    window=st.integers(1, 20),
    chunks=st.lists(st.integers(1, WIDEST), min_size=1, max_size=8),
    padding=st.integers(0, 9),
)
def test_a_ring_holds_the_first_and_the_last_tokens(sinks, window, chunks, padding):
    layout = cache.SinkRingCache(sinks, window)
    held, read = np.full(layout.slots, cache.EMPTY), -padding
    for size in chunks:
        chunk = np.full((1, WIDEST), -7, np.int32)  # a position below 0 is not stored
        chunk[0, WIDEST - size :] = np.arange(read, read + size)
        slots = np.asarray(layout.destinations(jnp.asarray(chunk)))[0]
        stored = slots < layout.slots
        assert len(set(slots[stored])) == stored.sum()  # two writes to one slot have no order
        assert (slots[~stored] == layout.slots).all()
        held[slots[stored]] = chunk[0, stored]
        read += size
        last = set(range(max(read - window, 0), read))
        first = set(range(min(sinks, max(read, 0))))
        assert set(held[held >= 0]) == first | last
        np.testing.assert_array_equal(held[: len(first)], sorted(first))


@settings(max_examples=25)
@given(sinks=st.integers(0, 12), window=st.integers(1, 20), start=st.integers(0, 2**31 - 50))
def test_any_window_of_positions_has_a_slot_for_each(sinks, window, start):
    layout = cache.SinkRingCache(sinks, window)
    positions = np.arange(start, start + WIDEST, dtype=np.int32)[None]
    slots = np.asarray(layout.slot(jnp.asarray(positions)))[0]
    assert ((slots >= 0) & (slots < layout.slots)).all()
    assert ((slots < sinks) == (positions[0] < sinks)).all()
    later = slots[positions[0] >= sinks]
    assert all(len(set(later[i : i + window])) == len(later[i : i + window]) for i in range(8))


@pytest.mark.parametrize(
    ("policy", "layout"),
    [
        (Full(), cache.SinkRingCache(100)),
        (Window(7), cache.SinkRingCache(0, 7)),
        (LMInfinite(7, 3), cache.SinkRingCache(3, 7)),
        (ReRoPE(7), cache.SinkRingCache(100)),
        (PerHead((LMInfinite(7, 3), Streaming(5, 4))), cache.SinkRingCache(4, 7)),
        (PerHead((LMInfinite(7, 3), SelfExtend(5, 4))), cache.SinkRingCache(100)),
    ],
)
def test_the_layout_is_the_smallest_that_a_policy_runs_on(policy, layout):
    assert cache.layout_for(policy, 100) == layout
    assert policy.bounded == (not layout.keeps_all)


def test_reading_fills_slots_row_by_row_and_layer_by_layer():
    """Chunks that wrap around the ring and one longer than it; rows that begin with padding."""
    layout, tokens = cache.SinkRingCache(2, 5), 22
    at = cases.padded((0, 4), tokens)
    k = np.broadcast_to(at[:, :, None, None], (2, tokens, 1, 3)).astype(np.float32)

    @cases.compiled
    def run(stored, at, k):
        seen = []
        for start, stop in ((0, 3), (3, 6), (6, 7), (7, 20), (20, 22)):  # 13 tokens > 5 slots
            slots = layout.destinations(at[:, start:stop])
            pos = cache.write_pos(stored.pos, at[:, start:stop], slots)
            new_k = cache.write(stored.k, k[:, start:stop], 1, slots)
            new_v = cache.write(stored.v, -k[:, start:stop], 1, slots)
            stored = cache.Cache(new_k, new_v, pos, layout)
            seen.append(stored)
        return seen

    shape = cache.CacheShape(2, tokens, 1, 1, 3, jnp.float32)
    empty = cache.create(LMInfinite(5, 2), shape, layers=2)
    assert (np.asarray(empty.pos) == -1).all()
    for stop, stored in zip((3, 6, 7, 20, 22), run(empty, at, k), strict=True):
        assert jax.tree.structure(stored) == jax.tree.structure(empty)
        assert [x.shape for x in jax.tree.leaves(stored)] == [(2, 2, 7, 1, 3)] * 2 + [(2, 7)]
        assert not np.asarray(stored.k)[0].any()  # the other layer
        for row in range(2):
            read = int(at[row, stop - 1]) + 1
            kept = [p for p in range(max(read, 0)) if p < 2 or p >= read - 5]
            found = np.asarray(stored.pos[row])
            assert sorted(found[found >= 0]) == kept
            assert (found >= 0).sum() == len(kept)
            # Every slot holds the key of the position that it names; empty ones hold nothing.
            held = np.where(found < 0, 0, found)[:, None]
            np.testing.assert_array_equal(stored.k[1, row, :, 0], np.tile(held, (1, 3)))
            np.testing.assert_array_equal(stored.v[1, row, :, 0], np.tile(-held, (1, 3)))


def test_memory_is_what_the_policy_can_see_however_long_the_text():
    policy, capacity = LMInfinite(window=4096, sinks=10), 10**9
    stored = jax.eval_shape(
        lambda: cache.create(
            policy, cache.CacheShape(1, capacity, 9, 3, 64, jnp.bfloat16), layers=30
        )
    )
    assert stored.k.size * 2 + stored.v.size * 2 == (4096 + 10) * 30 * 2 * 3 * 64 * 2
    assert stored.pos.shape == (1, 4106)


def test_a_cache_is_stored_in_its_own_dtype():
    shape = cache.CacheShape(1, 9, 1, 1, 2, jnp.bfloat16)

    @cases.compiled
    def run(at, k):
        empty = cache.create(LMInfinite(2, 1), shape, layers=1)
        return cache.write(empty.k, k, 0, empty.layout.destinations(at))

    written = run(np.zeros((1, 1), np.int32), np.full((1, 1, 1, 2), 257, np.float32))
    assert written.dtype == jnp.bfloat16
    assert np.asarray(written, np.float32)[0, 0, 0, 0, 0] == 256


@pytest.mark.slow
@pytest.mark.parametrize("by_head", [False, True])
def test_bfloat16_is_written_as_float32_is_and_so_are_its_gradients(by_head):
    """A slot past the end drops its row."""
    random = np.random.default_rng(0)
    stored, new = random.normal(size=(3, 2, 6, 2, 4)), random.normal(size=(2, 3, 2, 4))
    slots = jnp.asarray([[4, 0, 6], [1, 5, 3]], jnp.int32)
    if by_head:
        slots = jnp.stack([slots, slots[:, ::-1]], -1)
    factor = jnp.asarray(random.integers(-4, 5, stored.shape), jnp.float32)  # exact in bfloat16

    def written(dtype):
        def loss(stored, new):
            out = cache.write(stored, new, 1, slots)
            return (out.astype(jnp.float32) * factor).sum(), out

        arrays = [jnp.asarray(x, jnp.bfloat16).astype(dtype) for x in (stored, new)]
        return jax.tree.leaves(jax.grad(loss, (0, 1), has_aux=True)(*arrays))

    for found, expected in zip(written(jnp.bfloat16), written(jnp.float32), strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found.astype(jnp.float32), expected)
