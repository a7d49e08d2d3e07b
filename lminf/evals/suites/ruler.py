"""Tasks of RULER's kinds, generated here: several needles in prose, and variables to trace.

    niah_multikey      one of several lines that look alike is asked for
    niah_multivalue    one key has several values, and all are asked for
    niah_multiquery    several of the keys are asked for
    variable_tracking  which variables have a value, through chains of assignments

The forms are the paper's; prose, words and sentences are our own, so scores are not comparable with
its tables. Source: Hsieh et al. 2024, arXiv:2404.06654.
"""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from lminf.errors import InputError
from lminf.evals import metrics
from lminf.evals.suites import prose
from lminf.evals.suites.generated import GeneratedTask, SharedTextTask, fill
from lminf.evals.suites.suite_task import Answers, Instance
from lminf.evals.task import Budget
from lminf.ranges import Range

NUMBER_TOKENS = 10  # seven digits, where every one is a token, and the marks between numbers
Several = Annotated[int, Range(min=1, max=100)]
Share = Annotated[float, Range(min=0, max=1)]

TASK = "Some special magic numbers are hidden within the following text. Remember them.\n"
QUESTION = (
    "\nWhat are all the special magic numbers for {keys} mentioned in the text? "
    "The special magic numbers for {keys} mentioned in the text are"
)
LINE = "One of the special magic numbers for {key} is: {value}."


def insert_in_prose(
    lines: Sequence[str], shares: Sequence[float], text: str | None, start: float
) -> Callable[[int], str]:
    """A function: so many sentences of prose as one text, with the lines at these shares of it."""
    filler = prose.sentences(text)

    def make(count: int) -> str:
        parts = prose.cycle_from(filler, int(start * len(filler)), count)
        order = sorted(range(len(lines)), key=lambda index: -shares[index])
        for index in order:  # from the last, so that the places of the others stay
            parts.insert(round(shares[index] * count), lines[index])
        return " ".join(parts)

    return make


class Needles(SharedTextTask):
    """Sentences with a key and a number, hidden in prose; a subclass samples them."""

    text: str | None
    questions: int = 1

    @property
    def expected(self) -> int:
        """The number of numbers in an answer."""
        return 1

    @property
    def max_new_tokens(self) -> int:
        return NUMBER_TOKENS * self.expected + 4

    @abc.abstractmethod
    def needles(self, random: np.random.Generator) -> tuple[list[tuple[str, int]], list[list[str]]]:
        """Keys with their numbers, and the keys that each question asks for; the first pair answers
        the first question.
        """

    def depths(self, random: np.random.Generator, count: int) -> list[float]:
        return list(random.random(count))

    def make_instances(self, budget: Budget, random: np.random.Generator) -> list[Instance]:
        pairs, queries = self.needles(random)
        shares = self.depths(random, len(pairs))
        hidden = [LINE.format(key=key, value=value) for key, value in pairs]
        body = insert_in_prose(hidden, shares, self.text, random.random())
        questions = [QUESTION.format(keys=" and ".join(keys)) for keys in queries]
        longest = max(questions, key=budget.count)
        filled = fill(budget, lambda count: TASK + body(count) + longest, part="sentence")
        shared = filled.prompt.removesuffix(longest)
        return [
            Instance(
                prompt, [value for key, value in pairs if key in keys], budget.count(prompt),
                options=[f" {value}" for _, value in pairs],
            )
            for keys, question in zip(queries, questions, strict=True)
            for prompt in [shared + question]
        ]  # fmt: skip

    def parse(self, completion: str) -> str:
        return completion

    def score(self, answer: str, instance: Instance) -> float:
        return metrics.string_match_all(answer, [str(number) for number in instance.answer])


@dataclass(frozen=True)
class MultiKey(Needles):
    """The number of one key, among distractors with other keys."""

    depth: Share = 0.5  # of the line that the first question asks for; others stand anywhere
    keys: Several = 4
    questions: Several = 1  # asked of one text, each for another key
    text: str | None = None  # a file of prose; none: the interpreter's documentation
    answers: Answers = "written"

    name = "niah_multikey"
    scope, diffusion = "low", "low"
    levels = ("depth", (0.0, 0.25, 0.5, 0.75, 1.0))

    def __post_init__(self):
        super().__post_init__()
        if self.questions > self.keys:
            raise InputError(
                f"niah_multikey: {self.questions} questions of {self.keys} keys; give at most as "
                f"many questions as keys"
            )

    def needles(self, random: np.random.Generator) -> tuple[list[tuple[str, int]], list[list[str]]]:
        keys = sample_words(random, self.keys, self.text)
        pairs = list(zip(keys, sample_numbers(random, self.keys), strict=True))
        return pairs, [[key] for key in keys[: self.questions]]

    def depths(self, random: np.random.Generator, count: int) -> list[float]:
        return [self.depth, *super().depths(random, count)[1:]]


@dataclass(frozen=True)
class MultiValue(Needles):
    """All numbers of one key."""

    values: Several = 4  # of a key
    questions: Several = 1  # asked of one text, each for a key of its own
    text: str | None = None

    name = "niah_multivalue"
    scope, diffusion = "high", "low"
    levels = ("values", (2, 4, 8))

    @property
    def expected(self) -> int:
        return self.values

    def needles(self, random: np.random.Generator) -> tuple[list[tuple[str, int]], list[list[str]]]:
        keys = sample_words(random, self.questions, self.text)
        numbers = sample_numbers(random, self.values * self.questions)
        pairs = [(keys[index // self.values], number) for index, number in enumerate(numbers)]
        return pairs, [[key] for key in keys]


@dataclass(frozen=True)
class MultiQuery(Needles):
    """The numbers of several keys."""

    queries: Several = 4
    text: str | None = None

    name = "niah_multiquery"
    scope, diffusion = "high", "low"
    levels = ("queries", (2, 4, 8))

    @property
    def expected(self) -> int:
        return self.queries

    def needles(self, random: np.random.Generator) -> tuple[list[tuple[str, int]], list[list[str]]]:
        keys = sample_words(random, self.queries, self.text)
        return list(zip(keys, sample_numbers(random, self.queries), strict=True)), [keys]


@dataclass(frozen=True)
class VariableTracking(GeneratedTask):
    """The variables assigned a value, directly or through a chain of assignments."""

    hops: Annotated[int, Range(min=1, max=25)] = 4  # assignments after the first of a chain
    chains: Annotated[int, Range(min=1, max=20)] = 2  # one of which is asked for
    text: str | None = None

    name = "variable_tracking"
    scope, diffusion = "low", "high"
    levels = ("hops", (1, 2, 4))

    @property
    def max_new_tokens(self) -> int:
        return 8 * (self.hops + 1)

    def make_instance(self, budget: Budget, random: np.random.Generator) -> Instance:
        names = sample_variable_names(random, self.chains * (self.hops + 1))
        chains = [names[i :: self.chains] for i in range(self.chains)]
        numbers = sample_numbers(random, self.chains)
        lines, shares = [], []
        for chain, number in zip(chains, numbers, strict=True):
            values = [str(number), *(f"VAR {name}" for name in chain)]
            lines += [f"VAR {name} = {value}." for name, value in zip(chain, values, strict=False)]
            shares += sorted(random.random(len(chain)))
        body = insert_in_prose(lines, shares, self.text, random.random())
        question = (
            f"\nFind all variables that are assigned the value {numbers[0]} in the text above. "
            f"The {len(chains[0])} variables that are assigned the value {numbers[0]} are:"
        )
        task = "Track the chains of variable assignments hidden in the following text.\n"
        filled = fill(budget, lambda count: task + body(count) + question, part="sentence")
        return Instance(filled.prompt, chains[0], filled.tokens)

    def parse(self, completion: str) -> str:
        return completion

    def score(self, answer: str, instance: Instance) -> float:
        return metrics.string_match_all(answer, instance.answer)


# --- What is drawn --------------------------------------------------------------------------------


def sample_words(random: np.random.Generator, count: int, text: str | None) -> list[str]:
    """Different words of the text."""
    return [str(word) for word in random.choice(prose.words(text), count, replace=False)]


def sample_numbers(random: np.random.Generator, count: int) -> list[int]:
    """Different numbers of seven digits."""
    numbers: dict[int, None] = {}
    while len(numbers) < count:
        numbers[int(random.integers(1_000_000, 10_000_000))] = None
    return list(numbers)


def sample_variable_names(random: np.random.Generator, count: int) -> list[str]:
    """Different names of five capital letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(map(chr, random.integers(ord("A"), ord("Z") + 1, 5)))] = None
    return list(names)
