import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lminf import checkpoints
from lminf.errors import InputError
from lminf.evals import passkey
from lminf.evals.needle import Needle
from lminf.evals.passkey import Passkey
from lminf.evals.task import Budget


def by_bytes(text):
    return text.encode()


def by_words(text):
    """Words with the space before them, marks and line breaks, single digits: like most BPE."""
    return re.findall(r" ?[A-Za-z]+|[0-9]|\n+|[^A-Za-z0-9\n]", text)


def with_bos(text):
    return ["<s>", *by_words(text)]


def merging_lines(text):
    """A tokenizer whose tokens straddle the places where pieces of the prompt meet."""
    return re.findall(r"[.?][ \n]+[A-Z][a-z]+|\n+|[0-9]+| ?[A-Za-z]+|.", text)


def draw(generator, encode, *, length, count, seed, depth=None):
    budget = Budget(length, encode, "tokens")
    return Passkey(generator, depth).instances(budget, count=count, key=(seed,))


TOKENIZERS = [by_bytes, by_words, with_bos, merging_lines]
lengths = st.integers(400, 3000)
depths = st.floats(0, 1)


@pytest.mark.parametrize("encode", TOKENIZERS)
@settings(max_examples=15, deadline=None)
@given(length=lengths, depth=depths)
def test_a_landmark_prompt_has_the_length_asked_for(encode, length, depth):
    sample = passkey.landmark(encode, length=length, key=12345, depth=depth)
    assert sample.tokens == len(encode(sample.prompt)) <= length
    # A tokenizer that joins ".\nThe" can make one length unreachable.
    assert sample.tokens >= length - (encode is merging_lines)


@pytest.mark.parametrize("encode", TOKENIZERS)
@settings(max_examples=15, deadline=None)
@given(length=lengths, depth=depths)
def test_an_lm_infinite_prompt_is_less_than_one_copy_short(encode, length, depth):
    sample = passkey.lm_infinite(encode, length=length, key=12345, depth=depth)
    assert sample.tokens == len(encode(sample.prompt)) <= length
    longer = sample.prompt.replace(passkey.FILLER, f"{passkey.FILLER} {passkey.FILLER}", 1)
    if passkey.FILLER in sample.prompt:
        assert len(encode(longer)) > length


@pytest.mark.parametrize("generator", [passkey.lm_infinite, passkey.landmark])
def test_the_key_stands_where_it_was_asked_to(generator):
    for depth in (0.0, 0.25, 0.5, 0.9, 1.0):
        sample = generator(by_words, length=2000, key=54321, depth=depth)
        assert sample.depth == pytest.approx(depth, abs=0.02)
        before = sample.prompt[: sample.prompt.index(passkey.KEY_LINE.format(key=54321))]
        assert sample.start == pytest.approx(len(by_words(before)), abs=1)
        assert sample.start / sample.tokens == pytest.approx(depth, abs=0.04)


def test_prompts_read_as_the_papers_have_them():
    expected = (
        f"{passkey.TASK} {passkey.FILLER} The pass key is 54321. Remember it. 54321 is the pass "
        f"key. {passkey.FILLER} What is the pass key? The pass key is"
    )
    length = len(by_words(expected))
    for room in (length, length + 20):
        assert passkey.lm_infinite(by_words, length=room, key=54321, depth=0.5).prompt == expected
    sample = passkey.landmark(by_words, length=160, key=54321, depth=0.5)
    task, before, key_line, after, question = sample.prompt.split("\n")
    assert (task, question) == (passkey.TASK, passkey.QUESTION)
    assert key_line == "The pass key is 54321. Remember it. 54321 is the pass key."
    endless = f"{passkey.FILLER} " * 10
    assert before
    assert endless.startswith(before)
    assert endless.startswith(after)


def test_drawn_keys_depend_on_the_seed_and_not_on_the_length():
    def keys(**changes):
        asked = {"length": 600, "count": 20, "seed": 3} | changes
        return [sample.answer for sample in draw("landmark", by_words, **asked)]

    assert keys() == keys(length=900) == keys(depth=0.5)
    assert keys() != keys(seed=4)
    assert all(10_000 <= key <= 99_999 for key in keys())
    assert keys(count=5) == keys()[:5]


def test_drawn_depths_are_spread_over_the_text():
    found = [s.depth for s in draw("landmark", by_words, length=900, count=200, seed=0)]
    assert np.mean(found) == pytest.approx(0.5, abs=0.08)
    assert min(found) < 0.05
    assert max(found) > 0.95


def test_the_tokenizer_is_not_asked_once_per_token():
    asked = []

    def counting(text):
        asked.append(len(text))
        return by_words(text)

    passkey.landmark(counting, length=8000, key=12345, depth=0.5)
    assert sum(size > 1000 for size in asked) <= 5


def test_no_room_for_the_question_is_said_plainly():
    with pytest.raises(InputError, match=r"length=40 .* ask for length>=\d+"):
        passkey.lm_infinite(by_words, length=40, key=12345, depth=0.5)
    with pytest.raises(InputError, match=r"depth=1.5"):
        draw("landmark", by_words, length=400, count=1, seed=0, depth=1.5)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (" 54321.", True),
        ("54321", True),
        (" the number 54321, as was said", True),
        (" 543219", False),
        (" 5432", False),
        (" 12345, no, 54321", False),
        (" unknown", False),
        ("", False),
    ],
)
def test_the_first_integer_of_a_completion_is_the_answer(completion, right):
    task, needle = Passkey(), Needle(prompt="", answer=54321, depth=0.5, tokens=0, start=0)
    assert task.score(task.parse(completion), needle) == right


@pytest.mark.slow
@pytest.mark.parametrize("length", [200, 600, 1700, 3300, 8192, 16384])
def test_prompts_of_the_default_model_have_their_length(length, default_tokenizer):
    encode = default_tokenizer.encode
    for sample in draw("landmark", encode, length=length, count=8, seed=0):
        assert len(encode(sample.prompt)) == sample.tokens == length
    copy = len(encode(f" {passkey.FILLER}"))
    for sample in draw("lm_infinite", encode, length=length, count=8, seed=0):
        assert length - copy < len(encode(sample.prompt)) == sample.tokens <= length


@pytest.fixture(scope="module")
def default_tokenizer():
    return checkpoints.load("smollm2-135m-instruct").tokenizer
