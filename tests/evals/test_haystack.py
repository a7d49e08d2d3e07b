"""Documents with key-value sentences, and the measures on them; log-probabilities are made up."""

import re

import numpy as np
import pytest

from lminf.errors import InputError
from lminf.evals import copy_gain, margin
from lminf.evals.haystack import WORDS, haystack, value_tokens

TEXT = np.random.default_rng(0).integers(97, 123, 3000).astype(np.int32)  # bytes of letters
DEPTHS = (0.05, 0.4, 0.8)
EVERY = np.ones(3, bool)
SENTENCE = re.compile(r"\nThe value of key (\d{5}) is (\w+)\.\n")


def by_bytes(text):
    return list(text.encode())


def draw(key=(0,), **changed):
    asked = {"length": 1000, "depths": DEPTHS, "space": copy_gain.SPACE, "key": key} | changed
    return haystack(TEXT, by_bytes, **asked)


def test_a_document_is_the_text_with_a_sentence_at_each_depth():
    document = draw(bos=[256])
    assert len(document.tokens) == 1000
    assert document.tokens[0] == 256
    text = bytes(document.tokens[1:].astype(np.uint8)).decode()
    found = list(SENTENCE.finditer(text))
    assert [1 + match.start() for match in found] == list(document.starts) == [50, 400, 800]
    assert [1 + match.end() for match in found] == list(document.ends)
    rest = SENTENCE.sub("", text)
    assert rest.encode() == bytes(TEXT[: len(rest)].astype(np.uint8))
    for match, question, value in zip(found, document.questions, document.values, strict=True):
        asked = bytes(question.astype(np.uint8)).decode()
        assert asked.endswith(f"key {match[1]}? The value of key {match[1]} is ")
        assert value == ord(match[2][0])
    present, absent = set(document.values), set(document.absent)
    assert present | absent == {ord(word[0]) for word in WORDS}
    assert not present & absent


def test_no_two_documents_ask_for_the_same_keys():
    """Pseudo-replication: an audit found ten depths that asked the same two keys."""
    documents = [draw(key=(0, length, number)) for length in (1, 2) for number in range(6)]
    keys = [tuple(map(int, question)) for each in documents for question in each.questions]
    assert len(set(keys)) == len(keys) == 36
    assert np.array_equal(draw().tokens, draw().tokens)


def test_values_are_drawn_anew():
    first = [int(draw(key=(seed,)).values[0]) for seed in range(40)]
    assert len(set(first)) > 15  # of 26


def test_the_values_of_a_tokenizer_are_those_that_one_token_tells_apart():
    lead, answers = value_tokens(lambda text: [7, 3 if text == " apple" else ord(text[1])])
    assert lead == [7]
    assert answers["apple"] == 3
    assert len(answers) == 26


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"length": 2900, "depths": (0.1, 0.11)}, "depth 0.110 of 2900 tokens leaves 0 tokens"),
        ({"length": 4000}, "the text has 3000"),
        ({"depths": tuple(np.linspace(0, 0.9, 26))}, "26 depths, .* tells 26 values apart"),
    ],
)
def test_impossible_documents_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        draw(**wrong)


def test_a_passage_comes_again_after_the_document_and_all_but_its_cue_is_scored():
    document = draw()
    tokens, last = copy_gain.tails(document, by_bytes)
    for tail, end in zip(tokens, document.ends, strict=True):
        passage = document.tokens[end + copy_gain.GAP :][: copy_gain.CUE + copy_gain.COPIED]
        assert bytes(tail.astype(np.uint8)) == b"\n\n" + bytes(passage[:-1].astype(np.uint8))
    # Logs that say which token they are asked for: row, place and token.
    logs = np.arange(3 * last * 256, dtype=np.float64).reshape(3, last, 256)
    scored = [
        document.tokens[end + copy_gain.GAP + copy_gain.CUE :][: copy_gain.COPIED]
        for end in document.ends
    ]
    expected = [
        np.mean([logs[row, place, token] for place, token in enumerate(passage)])
        for row, passage in enumerate(scored)
    ]
    np.testing.assert_allclose(copy_gain.log_prob(logs, document), expected)


def test_margins_and_rank_by_hand():
    document = draw()
    logs = np.full((3, 1, 256), -5.0)
    one, two, three = document.values
    logs[0, 0, [one, two, three]] = -1, -2, -4  # right and certain
    logs[1, 0, [one, two, three]] = -1, -2, -2  # among the document's values, and the wrong one
    found = margin.margins(logs, document, EVERY)
    np.testing.assert_allclose(found.needle, [4, 3, 0])
    np.testing.assert_allclose(found.key_value, [-1 + 3, -2 + 1.5, 0])
    np.testing.assert_allclose(found.rank, [1, 2.5, 2])


def test_a_value_that_is_still_seen_is_none_of_the_others():
    """It would be likelier than all forgotten ones, which would have negative margins."""
    document = draw()
    logs = np.full((3, 1, 256), -5.0)
    logs[:, 0, document.values[2]] = 0.0  # in the window, and copied whatever is asked
    found = margin.margins(logs, document, np.array([True, True, False]))
    np.testing.assert_allclose(found.key_value, [0, 0])
    np.testing.assert_allclose(found.needle, [0, 0])
    np.testing.assert_allclose(found.rank, [1.5, 1.5])
    (alone,) = margin.margins(logs, document, np.array([False, False, True])).key_value
    assert alone == 0


def test_what_is_forgotten_has_margins_of_zero_and_middle_ranks():
    """Over documents, since values are drawn: any fixed preference of the model cancels."""
    preference = np.random.default_rng(1).normal(size=256)
    found = [
        margin.margins(np.broadcast_to(preference, (3, 1, 256)), draw(key=(seed,)), EVERY)
        for seed in range(400)
    ]
    for values, expected in (
        ([each.needle.mean() for each in found], 0),
        ([each.key_value.mean() for each in found], 0),
        ([each.rank.mean() for each in found], 2),
    ):
        assert abs(np.mean(values) - expected) < 4 * np.std(values) / 20 + 1e-9
