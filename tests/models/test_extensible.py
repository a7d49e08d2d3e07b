"""Extensible Tokenization: which states are picked, and what the frozen model reads."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.errors import InputError
from lminf.models import decoder, heads
from lminf.models.extensible import ExtensibleTokenizer, first_layer_params, module_of
from tests.models import specs

SPEC = specs.shallow(specs.GEMMA, 2)  # scaled embeddings, norms with an offset, windows
FROZEN = specs.parameters(SPEC)
TOKENIZER = ExtensibleTokenizer(SPEC, layers=1, chunk=8)
encode, read, nll_of = (jax.jit(f, static_argnums=i) for f, i in (
    (TOKENIZER.encode, 3), (TOKENIZER.read, ()), (TOKENIZER.nll, 3)))  # fmt: skip
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, SPEC.vocab_size, (2, 24)), jnp.int32)


def test_the_pick_is_every_kth_state_of_a_chunk_counted_from_one():
    picked = [8 * chunk + 3 * j - 1 for chunk in (0, 1) for j in (1, 2)]
    assert sorted({*TOKENIZER.kept_positions(16, 3)} - {7, 15}) == picked
    np.testing.assert_array_equal(TOKENIZER.kept_positions(16, 3), [2, 5, 7, 10, 13, 15])
    np.testing.assert_array_equal(TOKENIZER.kept_positions(11, 4), [3, 7, 10])
    np.testing.assert_array_equal(TOKENIZER.kept_positions(16, 8), [7, 15])
    assert len(TOKENIZER.kept_positions(0, 4)) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TOKENIZER.kept_positions(16, 1), "a ratio of 1 tokens to an embed.* give 2 to 8"),
        (lambda: TOKENIZER.kept_positions(16, 9), "a ratio of 9 tokens to an embed.*chunks of 8"),
        (lambda: ExtensibleTokenizer(SPEC, 3, 8), "the first 3 layers of a model of 2 layers"),
        (lambda: ExtensibleTokenizer(specs.MIXED, 1, 8), "the first 1 layers of a mixture of ex"),
        (lambda: ExtensibleTokenizer(SPEC, 1, 1), r"ExtensibleTokenizer\.chunk is 1"),
        (lambda: TOKENIZER.nll({}, {}, TOKENS[:, :8], 2), "rows of 8 tokens for chunks of 8; give"),
        (lambda: TOKENIZER.nll({}, {}, TOKENS[:, :20], 2), "rows of 20 tokens for chunks of 8"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@partial(jax.jit, static_argnums=0)
def states_of(spec, params, tokens=None, embeds=None):
    """Hidden states of a decoder called as everywhere else."""
    given = tokens if embeds is None else embeds
    positions = jnp.broadcast_to(jnp.arange(given.shape[1], dtype=jnp.int32), given.shape[:2])
    return module_of(spec).apply(
        {"params": params}, tokens, embeds=embeds, positions=positions
    )[0]  # fmt: skip


@pytest.mark.slow
def test_embeddings_are_picked_states_of_the_first_layers_chunk_by_chunk():
    params = TOKENIZER.init(FROZEN)
    first = first_layer_params(FROZEN, 1) | params
    found = encode(params, FROZEN, TOKENS[:, :22], 4)
    expected = []
    for start, stop in ((0, 8), (8, 16), (16, 22)):
        o = states_of(TOKENIZER.encoder.spec, first, TOKENS[:, start:stop])
        o = np.concatenate([np.full_like(o[:, :1], np.nan), o], 1)  # counted from 1
        expected += [o[:, 4], o[:, min(8, stop - start)]]
    np.testing.assert_allclose(found, np.stack(expected, 1), atol=1e-5)
    sizes = [float(jnp.sqrt(jnp.mean(jnp.square(x)))) for x in (
        found, decoder.embed_tokens(SPEC, FROZEN, TOKENS))]  # fmt: skip
    assert 0.5 < sizes[0] / sizes[1] < 2  # a fresh tokenizer's are of the size of embeddings


@pytest.mark.slow
def test_without_a_context_the_model_is_itself_and_raw_and_compressed_inputs_mix():
    params = TOKENIZER.init(FROZEN)
    nothing = jnp.zeros((2, 0, SPEC.width))
    alone = read(FROZEN, nothing, TOKENS)
    np.testing.assert_array_equal(alone, states_of(SPEC, FROZEN, TOKENS))
    past = encode(params, FROZEN, TOKENS[:, :16], 4)
    raw = decoder.embed_tokens(SPEC, FROZEN, TOKENS)
    mixed = jnp.concatenate([raw[:, :3], past, raw[:, 16:]], 1)
    by_hand = states_of(SPEC, FROZEN, embeds=mixed)
    given = read(FROZEN, mixed[:, :-8], TOKENS[:, 16:])
    np.testing.assert_allclose(given, by_hand, atol=1e-5)


@pytest.mark.slow
def test_two_streams_are_the_chunks_one_by_one():
    params = TOKENIZER.init(FROZEN)
    nll = nll_of(params, FROZEN, TOKENS, 4)
    assert nll.shape == (2, 16)
    for chunk in (1, 2):
        start = 8 * chunk
        past = encode(params, FROZEN, TOKENS[:, :start], 4)
        hidden = read(FROZEN, past, TOKENS[:, start : start + 7])
        logits = np.asarray(heads.lm(SPEC, FROZEN, hidden[:, past.shape[1] - 1 :]), np.float64)
        targets = np.asarray(TOKENS[:, start : start + 8, None])
        expected = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets, 2)[..., 0]
        np.testing.assert_allclose(nll[:, start - 8 : start], expected, atol=1e-4)
