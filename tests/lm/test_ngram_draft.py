"""The draft of a corpus's counts: what it proposes, and that greedy answers stay the same."""

import jax
import numpy as np
import pytest

from lminf.errors import InputError
from lminf.lm.drafts import parse_draft
from lminf.ngram import build
from lminf.ngram.encoding import Encoding
from tests.lm.test_speculative import NEW, PROMPTS, plain_tokens, rounds_of

CORPUS = ["the cat sat on the mat", "the cow sat on the moor", "a cat sat by the mat", "Z"]


def built(folder, tokenizer, texts, *, digest=None):
    documents = [tokenizer.encode(text) if isinstance(text, str) else text for text in texts]
    corpus = build.of_documents(
        documents, tokenizer="bytes", tokenizer_digest=digest or tokenizer.digest
    )
    build.build(corpus, folder, encoding=Encoding(1, "id"), memory_bytes=1 << 30)
    return parse_draft(f"ngram:{folder}", model="smollm2", load=lambda name: pytest.fail(name))


def followed(text, count):
    """What is read off the corpus, character by character; "\0" stands between documents."""
    corpus, written = "\0" + "\0".join(CORPUS) + "\0", ""
    while len(written) < count:
        ends = [(text + written)[start:] for start in range(len(text + written))]
        end = next((end for end in ends if end in corpus), None)
        if end is None:
            break
        after = [corpus[i + len(end)] for i in range(len(corpus)) if corpus.startswith(end, i)]
        most = max(set(after), key=after.count)
        if most == "\0" or 2 * after.count(most) <= len(after):
            break
        written += most
    return written


def test_what_followed_more_than_half_of_the_time_is_proposed(lm, tmp_path):
    draft = built(tmp_path / "index", lm.tokenizer, CORPUS)(lm)
    texts = ["I know the ca", "cow s", "the cat sat b", "qqq", "the ma", "xx Z", "o", "the c"]
    tokens = [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]
    tokens[2] = np.insert(tokens[2], 1, [256, 255])  # ids that a byte of the index does not hold
    found = draft.propose(tokens, 9, key=jax.random.key(0)).tokens
    written = ["".join(map(chr, row[row >= 0])) for row in found]
    assert written == [followed(text, 9) for text in [*texts[:2], "e cat sat b", *texts[3:]]]
    assert written[:2] == ["t sat on ", "at on the"]
    assert written[3] == written[5] == written[7] == ""


@pytest.mark.slow
def test_greedy_answers_stay_the_same(lm, tmp_path, small_steps):
    """The corpus holds the model's own answers, with tokens of which some are wrong."""
    plain = plain_tokens(lm, PROMPTS)
    wrong = np.where(np.arange(NEW) % 7 == 6, 65, plain)
    draft = built(tmp_path / "index", lm.tokenizer, list(np.minimum(wrong, 254)))(lm)
    rounds, tokens = rounds_of(lm, PROMPTS, draft)
    np.testing.assert_array_equal(tokens, plain)
    assert 0 < sum(each.accepted for each in rounds) < sum(each.drafted for each in rounds)


def test_an_index_of_another_tokenizer_is_refused_with_both_named(lm, tmp_path):
    made = built(tmp_path / "index", lm.tokenizer, CORPUS, digest="1" * 64)
    message = "was built with the tokenizer bytes, and smollm2 has another one"
    with pytest.raises(InputError, match=message):
        made(lm)
    for folder in ("", tmp_path / "none"):
        with pytest.raises(InputError, match=r"names no index of `lminf ngram build`; write ngram"):
            parse_draft(f"ngram:{folder}", model="smollm2", load=lambda name: None)
    (tmp_path / "index" / "progress.json").write_text("{}")
    with pytest.raises(InputError, match="unfinished; run the same `lminf ngram build` again"):
        parse_draft(f"ngram:{tmp_path / 'index'}", model="smollm2", load=lambda name: None)
