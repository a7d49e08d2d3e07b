import re

import pytest

from lminf.errors import InputError
from lminf.evals.key_value import KeyValue
from lminf.evals.task import Budget
from tests.evals.test_passkey import by_bytes, by_words

ASKED = re.compile(r"What is the value of key (\d+)\? The value of key \1 is$")


def draw(encode, *, length=300, count=1, seed=0, depth=0.5):
    return KeyValue(depth).instances(Budget(length, encode, "tokens"), count=count, key=(seed,))


@pytest.mark.parametrize("encode", [by_bytes, by_words])
@pytest.mark.parametrize("length", [300, 1200])
def test_a_prompt_asks_for_one_of_its_lines(encode, length):
    lines = re.compile(r"The value of key (\d{5}) is (\d{5})\.")
    for depth in (0.0, 0.4, 1.0):
        for sample in draw(encode, length=length, count=2, seed=1, depth=depth):
            assert length - 60 < sample.tokens == len(encode(sample.prompt)) <= length
            pairs = lines.findall(sample.prompt)
            assert len({key for key, _ in pairs}) == len(pairs)  # each key once
            asked = ASKED.search(sample.prompt)
            assert asked
            keys = [key for key, _ in pairs]
            place = keys.index(asked[1])
            assert int(pairs[place][1]) == sample.answer
            assert place == min(int(depth * len(keys)), len(keys) - 1)
            before = sample.prompt[: sample.prompt.index(f"The value of key {asked[1]}")]
            assert sample.start == len(encode(before))
            task = KeyValue(depth)
            assert task.score(task.parse(f" {sample.answer}. The"), sample) == 1
            assert task.score(task.parse(f" {sample.answer + 1}."), sample) == 0


def test_prompts_are_the_same_for_the_same_seed_and_differ_within_it():
    drawn = [
        [s.prompt for s in draw(by_words, length=300, count=3, seed=seed, depth=0.5)]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"length": 20}, "length=20 tokens has no room for a key and its value; ask for length>="),
        ({"depth": 1.5}, "depth=1.5 of the line asked for; give 0"),
    ],
)
def test_impossible_prompts_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        draw(by_words, **wrong)
