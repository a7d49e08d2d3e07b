"""Slots for blocks: what is fetched follows the last use; how many there are changes no result."""

import dataclasses
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.attention import block_cache, cache
from lminf.attention.policies.infllm import InfLLM
from lminf.errors import InputError
from tests.attention import cases

BLOCKS, SLOTS, ASKED, WIDTH = 12, 5, 3, 2
STORE = np.arange(2 * BLOCKS * WIDTH, dtype=np.float32).reshape(2, BLOCKS, WIDTH, 1, 1)


def calls(seed):
    """Different blocks for two rows, call after call, not all of them wanted."""
    random = np.random.default_rng(seed)
    for _ in range(40):
        # Some blocks are popular, as those of a question are.
        chances = random.dirichlet(np.full(BLOCKS, 0.4), 2) + 1e-3
        wanted = [random.choice(BLOCKS, ASKED, False, p / p.sum()) for p in chances]
        yield np.array(wanted, np.int32), random.random((2, ASKED)) < 0.8


@cases.compiled
def ask(held, wanted, some):
    store = jnp.asarray(STORE)
    return block_cache.ask(
        held, jnp.int32(1), wanted, some, lambda row, block: (store[row, block], -store[row, block])
    )


def nothing():
    """Slots of two layers and two rows."""
    held = block_cache.empty(
        batch=2, slots=SLOTS, block=WIDTH, kv_heads=1, head_dim=1, dtype=jnp.float32
    )
    return jax.tree.map(lambda x: jnp.stack([x, x]), held)


def blocks_in(held, row):
    return set(np.asarray(held.block[1, row]).tolist()) - {block_cache.EMPTY}


@pytest.mark.parametrize("seed", range(2))
def test_one_block_at_a_time_is_a_list_of_the_last_used(seed):
    held, rows = nothing(), (OrderedDict(), OrderedDict())
    fetched = [0, 0]
    for wanted, some in calls(seed):
        _, _, held = ask(held, wanted[:, :1], some[:, :1])
        for row, lru in enumerate(rows):
            if some[row, 0]:
                block = int(wanted[row, 0])
                fetched[row] += block not in lru
                lru[block] = None
                lru.move_to_end(block)
                if len(lru) > SLOTS:
                    lru.popitem(last=False)
            assert blocks_in(held, row) == set(lru)
    np.testing.assert_array_equal(held.fetched, [[0, 0], fetched])


@pytest.mark.parametrize("seed", range(2))
def test_several_at_a_time_are_given_and_only_those_missing_are_fetched(seed):
    held, fetched = nothing(), np.zeros(2, int)
    last_use = np.full((2, BLOCKS), -1)
    for call, (wanted, some) in enumerate(calls(seed)):
        before = [blocks_in(held, row) for row in range(2)]
        k, v, held = ask(held, wanted, some)
        rows = np.arange(2)[:, None]
        np.testing.assert_array_equal(np.asarray(k)[some], STORE[rows, wanted][some])
        np.testing.assert_array_equal(np.asarray(v)[some], -STORE[rows, wanted][some])
        for row in range(2):
            asked = set(wanted[row][some[row]].tolist())
            fetched[row] += len(asked - before[row])
            last_use[row, list(asked)] = call
            after = blocks_in(held, row)
            assert asked <= after <= before[row] | asked
            assert len(after) == min(SLOTS, len(before[row] | asked))
            gone = last_use[row, list((before[row] | asked) - after)]
            assert not len(gone) or gone.max() <= last_use[row, list(after)].min()
    np.testing.assert_array_equal(held.fetched, [[0, 0], fetched])


TOKENS, CALLS = 40, (16, 8, *[1] * 16)
POLICY = InfLLM(window=8, sinks=3, topk=2, block=4, repr_topk=2, exec_block=4)


@pytest.mark.parametrize("pads", [(0, 5)])
def test_how_many_blocks_are_at_hand_changes_no_bit(pads):
    at, scoring = cases.padded(pads, TOKENS), cases.scoring("rotary")
    policies = [dataclasses.replace(POLICY, resident=n) for n in (None, 2, 3, 10)]

    @cases.compiled
    def run(*arrays):
        return [
            cases.chunks(policy, scoring, at, CALLS, implementation=None, capacity=TOKENS)(*arrays)
            for policy in policies
        ]

    arrays = cases.arrays(3, tokens=TOKENS)
    (plain, *_), *others = run(*arrays)
    for out, *_ in others:
        np.testing.assert_array_equal(out, plain)
    few, more, enough = (held.state["resident"].fetched.sum() for *_, held in others)
    assert few > more > enough > 0
    # With room for all of them each block is fetched once.
    assert enough <= 2 * POLICY._max_blocks(TOKENS)


def test_slots_are_counted_among_the_bytes():
    sizes = cache.CacheShape(1, 64, 4, 2, 8, jnp.float32)

    def kept(policy):
        return sum(x.nbytes for x in jax.tree.leaves(policy.init_state(sizes)))

    more = kept(dataclasses.replace(POLICY, resident=6)) - kept(POLICY)
    assert more == 2 * 6 * 4 * 2 * 8 * 4 + 2 * 6 * 4 + 4


def test_fewer_slots_than_blocks_looked_up_are_one_sentence():
    with pytest.raises(InputError, match="resident=1 blocks cannot hold the topk=2 that are"):
        dataclasses.replace(POLICY, resident=1)
