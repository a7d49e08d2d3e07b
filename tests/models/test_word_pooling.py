"""Word pooling against its three parts in NumPy, one word after another and without padding."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.errors import InputError
from lminf.models import spec
from lminf.models.word_pooling import NextWords, WordPooling
from tests.models import specs

SPEC = spec.llama(
    vocab_size=7, width=16, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=24,
    trained_length=16, tied=False,
)  # fmt: skip
POOLING = WordPooling(SPEC, slots=2, encoder_layers=1, decoder_layers=1, stop=6)
RNG = np.random.default_rng(0)
PARAMS = jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.asarray(
        (path[-1].key == "scale") + 0.3 * RNG.normal(size=x.shape), jnp.float32
    ),
    jax.eval_shape(POOLING.init, key=jax.random.key(0)),
)
LENGTHS = np.array([[3, 1, 4, 2], [1, 2, 4, 3]])  # of words of at most four units
WORDS = np.where(np.arange(4) < LENGTHS[..., None], RNG.integers(0, 6, (2, 4, 4)), -1).astype(
    np.int32
)


@jax.jit
def parts_of(params, words):
    """(vectors, states, logits of the words after each of them) of all words but the last."""
    vectors = POOLING.encode(params, words[:, :-1])
    states = POOLING.read(params, vectors)
    return vectors, states, POOLING.logits(params, states, words[:, 1:])


def transformer(params, x, seen, positions):
    """Llama in float64: x [T, D] where `seen` [T, T] says which others each vector sees."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

    def rotate(x):
        angles = np.outer(positions, 10_000.0 ** -(np.arange(4) / 4))[:, None]
        first, second = x[..., :4], x[..., 4:]
        return np.concatenate([first * np.cos(angles) - second * np.sin(angles),
                               second * np.cos(angles) + first * np.sin(angles)], -1)  # fmt: skip

    for layer in range(len(params["layers"]["attention"]["wq"])):
        p = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
        y = norm(x, p["attention_norm"]["scale"])
        q, k, v = (np.einsum("td,dnh->tnh", y, p["attention"][name]) for name in ("wq", "wk", "wv"))
        q, k = rotate(q), rotate(k)
        scores = np.einsum("tnh,sh->nts", q, k[:, 0]) / np.sqrt(8)
        weights = np.exp(scores - scores.max(-1, keepdims=True)) * seen
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("nts,sh->tnh", weights, v[:, 0])
        x = x + np.einsum("tnh,nhd->td", out, p["attention"]["wo"])
        y = norm(x, p["mlp_norm"]["scale"])
        gate, up = y @ p["mlp"]["w_gate"], y @ p["mlp"]["w_up"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ p["mlp"]["w_down"]
    return norm(x, params["final_norm"]["scale"])


def backbone(vectors):
    """Of one row: `vectors` [W, p, D], block by block."""
    count, size, width = vectors.shape
    word = np.repeat(np.arange(count), size)
    return transformer(
        PARAMS["backbone"], vectors.reshape(-1, width), word[None] <= word[:, None], word
    ).reshape(vectors.shape)


def test_the_parts_are_those_of_the_paper_word_by_word_without_padding():
    vectors, states, logits = parts_of(PARAMS, WORDS)
    embed, head, slots = (np.asarray(x, np.float64) for x in (
        PARAMS["backbone"]["embed"], PARAMS["backbone"]["head"], PARAMS["slots"]))  # fmt: skip
    for row in range(2):
        of_words = []
        for word, length in zip(WORDS[row, :-1], LENGTHS[row, :-1], strict=True):
            x = np.concatenate([slots, embed[word[:length]]])
            everything = np.ones((len(x), len(x)))
            of_words.append(transformer(PARAMS["encoder"], x, everything, np.arange(len(x)))[:2])
        np.testing.assert_allclose(vectors[row], of_words, atol=1e-5)
        of_row = backbone(np.array(of_words))
        np.testing.assert_allclose(states[row], of_row, atol=1e-5)
        for place, length in enumerate(LENGTHS[row, 1:]):
            units = WORDS[row, place + 1, :length]
            x = np.concatenate([of_row[place], embed[units]])
            causal = np.tri(len(x))
            found = transformer(PARAMS["decoder"], x, causal, np.arange(len(x)))[1:] @ head.T
            np.testing.assert_allclose(logits[row, place, : length + 1], found, atol=1e-5)


def test_of_an_identity_encoder_the_backbone_is_a_model_of_blocks_of_units():
    """p = c: a unit sees those of its own word and of earlier ones."""
    embed = np.asarray(PARAMS["backbone"]["embed"])
    full = np.random.default_rng(1).integers(0, 6, (1, 5, 2))
    states = jax.jit(POOLING.read)(PARAMS, jnp.asarray(embed[full]))
    np.testing.assert_allclose(states[0], backbone(embed[full][0].astype(np.float64)), atol=1e-5)


@pytest.mark.slow
def test_more_room_for_units_changes_nothing():
    wide = np.pad(WORDS, ((0, 0), (0, 0), (0, 3)), constant_values=-1)
    expected, found = parts_of(PARAMS, WORDS), parts_of(PARAMS, wide)
    for one, other in zip(expected[:2], found[:2], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    there = np.arange(5) <= LENGTHS[:, 1:, None]
    np.testing.assert_allclose(expected[2][there], np.asarray(found[2])[:, :, :5][there], atol=1e-5)


@pytest.mark.parametrize("changed", [1, 2])
def test_a_word_changes_nothing_that_predicts_it_or_earlier_words(changed):
    other = WORDS.copy()
    other[:, changed] = [[5, 5, 5, -1], [0, -1, -1, -1]]
    (_, before, first), (_, after, second) = (parts_of(PARAMS, words) for words in (WORDS, other))
    np.testing.assert_array_equal(before[:, :changed], after[:, :changed])
    # Its own first unit too, and all units of earlier words.
    np.testing.assert_array_equal(first[:, : changed - 1], second[:, : changed - 1])
    np.testing.assert_array_equal(first[:, changed - 1, 0], second[:, changed - 1, 0])
    assert np.abs(before[:, changed:] - after[:, changed:]).min(-1).max(-1).min() > 1e-5


@pytest.mark.slow
def test_words_end_once_and_the_loss_is_the_mean_over_their_units():
    targets = np.asarray(POOLING.targets(jnp.asarray(WORDS)))
    for word, length, target in zip(
        WORDS.reshape(-1, 4), LENGTHS.ravel(), targets.reshape(-1, 5), strict=True
    ):
        assert target.tolist() == [*word[:length], 6, *[-1] * (4 - length)]
    logits = np.asarray(parts_of(PARAMS, WORDS)[2], np.float64)
    nats = [
        np.log(np.exp(logits[row, word, place]).sum()) - logits[row, word, place, target]
        for row in range(2) for word in range(3)
        for place, target in enumerate(targets[row, word + 1]) if target >= 0
    ]  # fmt: skip
    loss = jax.jit(NextWords(POOLING))(PARAMS, {}, {"words": WORDS})
    np.testing.assert_allclose(loss, np.mean(nats), rtol=1e-5)


@pytest.mark.slow
def test_what_is_written_unit_by_unit_is_the_likeliest_when_read_at_once():
    """With a stop that is likely, so that words of several lengths are written."""
    head = PARAMS["backbone"]["head"]
    params = {**PARAMS, "backbone": {**PARAMS["backbone"], "head": head.at[6].multiply(3.0)}}
    rows = np.random.default_rng(3).integers(0, 6, (24, 3, 4)).astype(np.int32)
    written = POOLING.generate(params, jnp.asarray(rows))
    read = np.concatenate([rows, np.asarray(written)[:, None]], 1)
    best = np.asarray(parts_of(params, read)[2][:, -1]).argmax(-1)
    lengths = (np.asarray(written) >= 0).sum(-1)
    assert len(set(lengths)) > 2
    for units, likeliest, length in zip(written, best, lengths, strict=True):
        np.testing.assert_array_equal(units[:length], likeliest[:length])
        assert length == 4 or likeliest[length] == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dataclasses.replace(POOLING, stop=7), "stop=7 of a vocabulary of 7 units; give"),
        (lambda: dataclasses.replace(POOLING, slots=0), r"WordPooling\.slots is 0"),
        (lambda: dataclasses.replace(POOLING, spec=specs.MIXED), "with experts or learnt sinks"),
        (
            partial(POOLING.modules["backbone"].apply, {"params": PARAMS["backbone"]},
                    jnp.asarray(WORDS[:, 0]), positions=jnp.asarray(WORDS[:, 0]),
                    segments=jnp.asarray(WORDS[:, 0])),
            "one text a row on one device; leave segments out",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
