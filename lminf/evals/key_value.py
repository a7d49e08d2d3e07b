"""Key-value retrieval: a long list of keys with their values, and a question about one of them.

Every line looks like every other, so unlike a passkey the answer cannot be told from its
surroundings: only the key says which line is meant. Source of the task: Liu et al. 2024,
arXiv:2307.03172, whose pairs are random identifiers in JSON; ours are five digits in a sentence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lminf.errors import InputError
from lminf.evals.passkey import Encode
from lminf.evals.score import Interval, first_integer, success_rate
from lminf.evals.task import Budget

TASK = "Below is a list of keys and their values. Remember them."
LINE = "The value of key {key} is {value}."
QUESTION = "What is the value of key {key}? The value of key {key} is"
ANSWER_TOKENS = 10  # enough for a space and five digits in any tokenizer


@dataclass(frozen=True)
class Sample:
    prompt: str
    value: int
    depth: float  # share of the lines that stand before the one asked for
    tokens: int  # of the whole prompt
    key_at: int  # tokens before the line asked for

    def correct(self, completion: str) -> bool:
        """Whether the first integer in the completion is the value."""
        return first_integer(completion) == self.value


def draw(
    encode: Encode, *, length: int, count: int, seed: int | Sequence[int], depth: float
) -> list[Sample]:
    """`count` prompts of at most `length` tokens, the same for the same seed."""
    if not 0 <= depth <= 1:
        raise InputError(f"depth={depth} of the line asked for; give 0 (the first) to 1 (the last)")
    random = np.random.default_rng(seed)
    return [_sample(encode, random, length, depth) for _ in range(count)]


@dataclass(frozen=True)
class KeyValue:
    """Key-value retrieval as a task of lminf.evals.runner."""

    depth: float  # share of the lines before the one asked for

    name = "key_value"
    max_new_tokens = ANSWER_TOKENS
    stop = ()

    def instances(self, budget: Budget, *, count: int, key: Sequence[int]) -> list[Sample]:
        return draw(budget.encode, length=budget.size, count=count, seed=key, depth=self.depth)

    def prompt(self, instance: Sample) -> str:
        return instance.prompt

    def parse(self, completion: str) -> int | None:
        return first_integer(completion)

    def score(self, answer: int | None, instance: Sample) -> float:
        return float(answer == instance.value)

    def aggregate(self, scores: Sequence[float]) -> Interval:
        return success_rate(round(sum(scores)), len(scores))


def _sample(encode: Encode, random: np.random.Generator, length: int, depth: float) -> Sample:
    """Every line has five-digit numbers, so that a few of them tell how long a line is."""

    def text(lines, line_index):
        listing = [LINE.format(key=key, value=value) for key, value in lines]
        return "\n".join([TASK, *listing, QUESTION.format(key=lines[line_index][0])])

    # Distinct keys; as many as could ever fit, since a line has more than two tokens.
    keys = random.permutation(np.arange(10_000, 100_000))[: max(length // 2, 2)]
    values = random.integers(10_000, 100_000, len(keys))
    lines = [(int(key), int(value)) for key, value in zip(keys, values, strict=True)]
    short, longer = (len(encode(text(lines[:n], 0))) for n in (1, 2))
    count = 1 + (length - short) // (longer - short)
    while count > 0 and len(encode(text(lines[:count], 0))) > length:
        count -= 1
    if count < 1:
        raise InputError(
            f"a prompt of length={length} tokens has no room for a key and its value; "
            f"ask for length>={short}"
        )
    line_index = min(int(depth * count), count - 1)
    prompt, (key, value) = text(lines[:count], line_index), lines[line_index]
    before = prompt[: prompt.index(LINE.format(key=key, value=value))]
    return Sample(prompt, value, line_index / count, len(encode(prompt)), len(encode(before)))
