"""The ∞-gram as a language model, and mixtures with a neural one."""

import dataclasses

import numpy as np
import pytest

from lminf.data import bpe
from lminf.errors import InputError
from lminf.lm.protocol import LanguageModel
from lminf.ngram.model import InfiniGramLM, Mixture, MixtureWeights, fit_weights
from tests import stated_ranges
from tests.lm import test_protocol
from tests.ngram import cases

TEXTS = ["The grass is green. The sky is blue.", "Here we go. There and back again."]


@pytest.fixture
def infinigram(tmp_path, lm) -> InfiniGramLM:
    return test_protocol.infinigram(tmp_path, lm.tokenizer, TEXTS)


def followers(context):
    """Byte -> share, of what follows the longest end of the context that occurs; 256 is an end."""
    shards = "\0".join(["", *TEXTS, ""])
    for start in range(len(context) + 1):
        end = context[start:]
        after = [shards[i + len(end)] for i in range(len(shards) - len(end))
                 if shards.startswith(end, i)]  # fmt: skip
        if not end:  # every place, the first separator among them
            after = list(shards)
        if after:
            return {256 if c == "\0" else ord(c): after.count(c) / len(after) for c in set(after)}
    raise AssertionError


def test_the_next_byte_is_what_followed_in_the_corpus(infinigram):
    prompts = ["The ", "Where the sky is", "zzz", "back again.", "e"]
    probs = np.exp(infinigram.next(prompts))
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-6)
    for prompt, row in zip(prompts, probs, strict=True):
        expected = followers(prompt)
        assert set(np.flatnonzero(row)) == set(expected)
        np.testing.assert_allclose([row[t] for t in expected], list(expected.values()), rtol=1e-6)


def test_it_keeps_the_protocol(infinigram):
    assert isinstance(infinigram, LanguageModel)
    assert infinigram.generate(["The sky"], max_new_tokens=99) == [" is blue."]
    assert infinigram.generate(["The sky"], max_new_tokens=99, stop=["b"]) == [" is "]
    (score,) = infinigram.score(["The sky"], [" is blue."])
    assert score == (0.0, 9, True)
    (score,) = infinigram.score(["The "], ["sky"])  # the space is of the continuation
    assert score.log_prob == pytest.approx(np.log(2 / 3 * 1 / 2))
    with pytest.raises(InputError, match="empty"):
        infinigram.score(["The"], [""])
    with pytest.raises(InputError, match="empty"):
        infinigram.embed([""])
    vectors = infinigram.embed(["aab", "ab"])
    np.testing.assert_allclose(vectors[0, [97, 98]], np.array([2, 1]) / 5**0.5, rtol=1e-6)


@pytest.mark.slow
def test_a_mixture_is_the_weighted_mean_of_both(infinigram, lm):
    weights = MixtureWeights(sparse=0.75, non_sparse=0.25)
    mixture = Mixture(lm, infinigram, weights)
    prompts = ["The sky", "The "]  # one byte follows; two do
    neural, counted = np.exp(lm.next(prompts)), np.exp(infinigram.next(prompts))
    expected = [0.75 * counted[0] + 0.25 * neural[0], 0.25 * counted[1] + 0.75 * neural[1]]
    np.testing.assert_allclose(np.exp(mixture.next(prompts)), expected, atol=1e-6)
    (score,), text = mixture.score(["The sky"], [" is"]), "The sky is"
    alone = [mixture.next([text[:i]])[0][ord(text[i])] for i in range(7, 10)]
    assert score.log_prob == pytest.approx(sum(alone), abs=1e-4)
    other = dataclasses.replace(lm, tokenizer=bpe.cut(bpe.train(TEXTS, 258), 258))
    with pytest.raises(InputError, match="have different tokenizers"):
        Mixture(other, infinigram, weights)


def test_fitted_weights_are_the_likeliest():
    random = np.random.default_rng(0)
    neural = random.uniform(0.01, 0.3, 400)
    sparse = random.random(400) < 0.5
    right = random.random(400) < np.where(sparse, 0.8, 0.3)
    infgram = np.where(right, np.where(sparse, 1.0, 0.4), 0.0)
    found = fit_weights(infgram, sparse, neural)

    def nll(at_sparse, other):
        return MixtureWeights(at_sparse, other).nll(infgram, sparse, neural).mean()

    grid = np.linspace(0, 0.99, 100)
    best = min(((a, b) for a in grid for b in grid), key=lambda pair: nll(*pair))
    assert (found.sparse, found.non_sparse) == pytest.approx(best, abs=0.011)
    assert nll(found.sparse, found.non_sparse) <= nll(*best)
    assert found.sparse > found.non_sparse
    assert fit_weights(neural, np.ones(400, bool), 2 * neural) == MixtureWeights(0.0, 0.0)


def test_weights_outside_their_range_are_refused():
    assert stated_ranges.without_range(MixtureWeights) == []
    for field, value in stated_ranges.outside(MixtureWeights):
        with pytest.raises(InputError, match=rf"MixtureWeights\.{field} is "):
            dataclasses.replace(MixtureWeights(0.5, 0.5), **{field: value})


def test_an_index_of_another_tokenizer_is_refused(tmp_path, lm):
    index = cases.made(tmp_path, cases.documents(0))
    with pytest.raises(InputError, match="built with the tokenizer drawn, and not"):
        InfiniGramLM(index, lm.tokenizer)
