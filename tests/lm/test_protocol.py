"""The verbs of a LanguageModel: the models agree with their own probabilities."""

import numpy as np
import pytest

from lminf.errors import InputError
from lminf.lm.protocol import LanguageModel
from lminf.lm.scripted import Scripted
from lminf.ngram import build
from lminf.ngram.encoding import Encoding
from lminf.ngram.model import InfiniGramLM

PROMPTS = ["The grass is", "Here we go. There and"]
CONTINUATIONS = [" green.", " back again. The sun"]


# The model itself compiles for seconds: its verbs beyond the score are in the slow lane.
@pytest.fixture(params=[pytest.param("lm", marks=pytest.mark.slow), "scripted", "infinigram"])
def model(request, lm, tmp_path) -> LanguageModel:
    if request.param == "infinigram":
        texts = [p + c for p, c in zip(PROMPTS, CONTINUATIONS, strict=True)]
        return infinigram(tmp_path, lm.tokenizer, texts)
    return lm if request.param == "lm" else Scripted(lambda prompt: " green. The sky")


def infinigram(folder, tokenizer, texts) -> InfiniGramLM:
    corpus = build.of_documents(
        [tokenizer.encode(text) for text in texts],
        tokenizer="bytes", tokenizer_digest=tokenizer.digest,
    )  # fmt: skip
    index = build.build(corpus, folder / "index", encoding=Encoding(2, "id"), memory_bytes=1 << 20)
    return InfiniGramLM(index, tokenizer)


@pytest.mark.slow
def test_a_score_is_the_sum_of_next_log_probabilities(lm):
    for prompt, continuation in zip(PROMPTS, CONTINUATIONS, strict=True):
        (found,) = lm.score([prompt], [continuation])
        tokens, start = lm.encode(prompt + continuation)[0], len(lm.encode(prompt)[0])
        expected = sum(
            float(lm.next([tokens[:index]])[0, tokens[index]])
            for index in range(start, len(tokens))
        )
        assert found.log_prob == pytest.approx(expected, abs=1e-4)
        assert found.tokens == len(tokens) - start


def test_what_a_model_writes_is_its_greedy_continuation(model):
    (text,) = model.generate(PROMPTS[:1], max_new_tokens=6)
    if text and model.count_tokens(PROMPTS[0] + text) == model.count_tokens(PROMPTS[0]) + 6:
        assert model.score(PROMPTS[:1], [text])[0].greedy
    (other,) = model.score(PROMPTS[:1], [" zzzz"])
    assert not other.greedy
    assert other.log_prob < 0


def test_next_is_a_distribution(model):
    log_probs = model.next(PROMPTS)
    assert np.exp(log_probs).sum(-1) == pytest.approx(1.0, abs=1e-4)
    assert len(log_probs) == len(PROMPTS)


def test_a_batch_is_answered_as_each_prompt_alone(model):
    together = model.generate(PROMPTS, max_new_tokens=5)
    assert together == [model.generate([p], max_new_tokens=5)[0] for p in PROMPTS]
    vectors = model.embed(PROMPTS)
    alone = np.concatenate([model.embed([prompt]) for prompt in PROMPTS])
    np.testing.assert_allclose(vectors, alone, rtol=2e-4, atol=2e-5)


def test_spaces_at_the_end_of_a_prompt_belong_to_the_continuation(lm):
    with_space, without = lm.score(["The grass is ", "The grass is"], ["green", " green"])
    assert with_space == without


def test_an_empty_text_is_refused(model):
    with pytest.raises(InputError, match="empty"):
        model.score(["The"], [""])
    with pytest.raises(InputError, match="empty"):
        model.embed([""])
