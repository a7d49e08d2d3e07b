"""Key-value retrieval: a long list of keys with their values, and a question about one of them.

Every line looks like every other, so unlike a passkey the answer cannot be told from its
surroundings: only the key says which line is meant. Source of the task: Liu et al. 2024,
arXiv:2307.03172, whose pairs are random identifiers in JSON; ours are five digits in a sentence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lminf.errors import InputError
from lminf.evals.needle import Needle, NeedleTask
from lminf.evals.task import Budget

TASK = "Below is a list of keys and their values. Remember them."
LINE = "The value of key {key} is {value}."
QUESTION = "What is the value of key {key}? The value of key {key} is"


@dataclass(frozen=True)
class KeyValue(NeedleTask):
    """Key-value retrieval as a task of lminf.evals.runner."""

    depth: float  # share of the lines before the one asked for

    name = "key_value"

    def __post_init__(self):
        if not 0 <= self.depth <= 1:
            raise InputError(
                f"depth={self.depth} of the line asked for; give 0 (the first) to 1 (the last)"
            )

    def instances(self, budget: Budget, *, count: int, key: Sequence[int]) -> list[Needle]:
        random = np.random.default_rng(key)
        return [self._instance(budget, random) for _ in range(count)]

    def _instance(self, budget: Budget, random: np.random.Generator) -> Needle:
        """Every line has five-digit numbers, so that a few of them tell how long a line is."""

        def text(lines, line_index):
            listing = [LINE.format(key=key, value=value) for key, value in lines]
            return "\n".join([TASK, *listing, QUESTION.format(key=lines[line_index][0])])

        # Distinct keys; as many as could ever fit, since a line has more than two tokens.
        keys = random.permutation(np.arange(10_000, 100_000))[: max(budget.size // 2, 2)]
        values = random.integers(10_000, 100_000, len(keys))
        lines = [(int(key), int(value)) for key, value in zip(keys, values, strict=True)]
        short, longer = (budget.count(text(lines[:n], 0)) for n in (1, 2))
        count = 1 + (budget.size - short) // (longer - short)
        while count > 0 and budget.count(text(lines[:count], 0)) > budget.size:
            count -= 1
        if count < 1:
            raise InputError(
                f"a prompt of length={budget.size} tokens has no room for a key and its value; "
                f"ask for length>={short}"
            )
        line_index = min(int(self.depth * count), count - 1)
        prompt, (key, value) = text(lines[:count], line_index), lines[line_index]
        head = prompt[: prompt.index(LINE.format(key=key, value=value))]
        return Needle(prompt, value, line_index / count, budget.count(prompt), budget.count(head))
