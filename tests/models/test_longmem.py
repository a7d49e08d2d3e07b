"""LongMem: retrieval by brute force, the gate at its ends, and what a segment sees of others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.errors import InputError
from lminf.models.longmem import Bank, LongMem, memory_attention
from tests.models import specs

SPEC = specs.LLAMA
FROZEN = specs.parameters(SPEC)
SIZES = {"memory_layer": 1, "capacity": 16, "retrieved": 8, "chunk": 2}
LONGMEM = LongMem(SPEC, **SIZES)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, SPEC.vocab_size, (2, 16)), jnp.int32)


def drawn(slots, filled, seed=0):
    """Queries [2, 3, 4, 8] and a bank of two key heads."""
    random = np.random.default_rng(seed)
    q, k, v = (random.normal(size=(2, size, heads, 8)).astype(np.float32)
               for size, heads in ((3, 4), (slots, 2), (slots, 2)))  # fmt: skip
    return q, Bank(jnp.asarray(k), jnp.asarray(v), jnp.int32(filled))


def brute_force(q, bank, chunk, retrieved, scale):
    """Row by row, token by token, head by head."""
    out = np.zeros(q.shape)
    k, v, empty = np.asarray(bank.k), np.asarray(bank.v), bank.k.shape[1] - int(bank.filled)
    for b, t, n in np.ndindex(q.shape[:3]):
        keys, values = k[b, empty:, n // 2], v[b, empty:, n // 2]
        means = keys.reshape(-1, chunk, 8).mean(1) @ q[b, t, n]
        best = np.argsort(-means)[: retrieved // chunk]
        inside = np.concatenate([np.arange(chunk * i, chunk * (i + 1)) for i in best])
        weights = np.exp(scale * keys[inside] @ q[b, t, n])
        out[b, t, n] = weights @ values[inside] / weights.sum()
    return out


@pytest.mark.parametrize(
    ("filled", "chunk", "retrieved"),
    [(8, 2, 4), *(pytest.param(*sizes, marks=pytest.mark.slow)
                  for sizes in ((12, 4, 4), (12, 1, 12), (4, 2, 8)))],
)  # fmt: skip
def test_memory_is_the_softmax_over_the_chunks_of_the_nearest_mean_keys(filled, chunk, retrieved):
    """One case, of chunks of one and all retrieved, is the softmax over the whole memory; another
    has less in memory than is to be retrieved."""
    q, bank = drawn(12, filled)
    found = memory_attention(jnp.asarray(q), bank, chunk=chunk, retrieved=retrieved, scale=0.4)
    np.testing.assert_allclose(found, brute_force(q, bank, chunk, retrieved, 0.4), atol=1e-5)


def test_the_bank_keeps_the_newest():
    bank = Bank(jnp.zeros((1, 4, 1, 1)), jnp.zeros((1, 4, 1, 1)), jnp.int32(0))
    for first, filled, kept in ((1, 2, [0, 0, 1, 2]), (3, 4, [1, 2, 3, 4]), (5, 4, [3, 4, 5, 6])):
        new = jnp.array([first, first + 1.0]).reshape(1, 2, 1, 1)
        bank = bank.append(new, -new)
        assert int(bank.filled) == filled
        np.testing.assert_array_equal(bank.k.ravel(), kept)
        np.testing.assert_array_equal(bank.v.ravel(), -bank.k.ravel())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ({"memory_layer": 2}, "memory_layer=2 of a model of 4 layers; give an odd number below"),
        ({"memory_layer": 5}, "memory_layer=5 of a model of 4 layers"),
        ({"retrieved": 3}, "retrieved=3 and capacity=16 in chunks of 2; give multiples"),
        ({"retrieved": 18}, "retrieved=18 of capacity=16 tokens; give at most all"),
        ({"chunk": 0}, r"LongMem\.chunk is 0"),
        ({"spec": specs.shallow(SPEC, 3)}, "llama with 3 layers has none"),
        ({"spec": specs.OSS}, "gpt_oss with 4 layers has none"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        LongMem(**{"spec": SPEC, **SIZES, **make})


def test_segments_of_no_whole_chunks_are_refused():
    with pytest.raises(InputError, match="a segment of 3 tokens in chunks of 2; give a multiple"):
        LONGMEM.read({}, {}, LONGMEM.empty(2), TOKENS[:, :3])
    with pytest.raises(InputError, match="rows of 16 tokens in segments of 6; give a multiple"):
        LONGMEM.nll({}, {}, TOKENS, 6)


@pytest.fixture(scope="module")
def read():
    """(hidden states of a segment of 8 after the bank of another one, or of none; its bank)"""
    run = jax.jit(LONGMEM.read)
    side = jax.tree.map(lambda x: x, dict(LONGMEM.init(FROZEN)))
    _, bank = run(side, FROZEN, LONGMEM.empty(2), TOKENS[:, :8])

    def after(beta=0.0, empty=False, values=None):
        held = LONGMEM.empty(2) if empty else bank
        held = held if values is None else held._replace(v=values)
        betas = jnp.full_like(side["beta"], beta)
        return run({**side, "beta": betas}, FROZEN, held, TOKENS[:, 8:])[0]

    return after, bank


@pytest.mark.slow
def test_the_gate_goes_from_local_attention_alone_to_memory_alone(read):
    after, bank = read
    local = after(empty=True)
    np.testing.assert_array_equal(local, after(beta=9.0, empty=True))  # nothing to weigh
    np.testing.assert_allclose(after(beta=-60.0), local, atol=1e-5)
    np.testing.assert_allclose(after(beta=-60.0, values=bank.v + 5), local, atol=1e-5)
    assert np.abs(after() - local).max() > 1e-3
    # Of memory alone the first token, which has none beside it, is as changed as the last one.
    changed = np.abs(after(beta=60.0, values=bank.v + 5) - after(beta=60.0)).max(-1)
    assert changed.min() > 1e-3


@pytest.mark.slow
def test_a_segment_is_not_changed_by_later_ones_nor_by_other_rows():
    side = LONGMEM.init(FROZEN)
    nll = jax.jit(lambda tokens: LONGMEM.nll(side, FROZEN, tokens, 4))
    before = np.asarray(nll(TOKENS))
    later = np.asarray(nll(TOKENS.at[:, 12:].add(1) % SPEC.vocab_size))
    np.testing.assert_allclose(later[:, :11], before[:, :11], atol=1e-6)
    assert np.abs(later[:, 12:] - before[:, 12:]).max() > 1e-3
    other = np.asarray(nll(TOKENS.at[1].set(3)))
    np.testing.assert_allclose(other[0], before[0], atol=1e-6)
    earlier = np.asarray(nll(TOKENS.at[:, 0].add(1) % SPEC.vocab_size))
    assert np.abs(earlier[:, 4:] - before[:, 4:]).max() > 1e-4  # through the bank alone


@pytest.mark.slow
def test_side_layers_add_to_what_the_models_layers_add():
    """With side layers that add nothing, the side network is the model."""
    side = LONGMEM.init(FROZEN)
    still = {n: {m: jnp.zeros_like(x) if m in ("wo", "w_down") else x for m, x in part.items()}
             for n, part in side["layers"].items()}  # fmt: skip
    positions = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), TOKENS.shape)

    @jax.jit
    def both(side):
        states = LONGMEM.model.apply({"params": FROZEN}, TOKENS, positions=positions)[0]
        return LONGMEM.read(side, FROZEN, LONGMEM.empty(2), TOKENS)[0], states

    hidden, states = both({**side, "layers": still})
    np.testing.assert_allclose(hidden, states, atol=1e-4)
