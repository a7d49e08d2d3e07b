"""LongIns: a list of short questions with answers, some of them wrong; which ones are wrong?

    form=gist   one instruction before all questions
    form=list   the same instruction with every question
    form=limt   every question with an instruction of its own kind

Source: Gavin et al. 2024, arXiv:2406.17588. Its questions are those of instruction data sets; ours
are arithmetic and spelling, whose answers can be computed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from lminf.evals import metrics
from lminf.evals.suites.generated import GeneratedTask, fill
from lminf.evals.suites.suite_task import Instance
from lminf.evals.task import Budget
from lminf.ranges import Range

LETTERS = "abcdefghijklmnopqrstuvwxyz"
QuestionAnswers = tuple[str, str, str]  # a question, its right answer, a wrong one


def addition(random: np.random.Generator) -> QuestionAnswers:
    one, two = (int(n) for n in random.integers(2, 50, 2))
    return f"{one} + {two}", str(one + two), str(one + two + int(random.choice([-2, -1, 1, 2])))


def subtraction(random: np.random.Generator) -> QuestionAnswers:
    one, two = int(random.integers(50, 99)), int(random.integers(2, 40))
    return f"{one} - {two}", str(one - two), str(one - two + int(random.choice([-2, -1, 1, 2])))


def next_letter(random: np.random.Generator) -> QuestionAnswers:
    index = int(random.integers(1, 25))
    return LETTERS[index], LETTERS[index + 1], LETTERS[index - 1]


def larger_number(random: np.random.Generator) -> QuestionAnswers:
    one, two = (int(n) for n in random.choice(np.arange(10, 100), 2, replace=False))
    return f"{one}, {two}", str(max(one, two)), str(min(one, two))


def parity(random: np.random.Generator) -> QuestionAnswers:
    number = int(random.integers(10, 100))
    right, wrong = ("even", "odd") if number % 2 == 0 else ("odd", "even")
    return str(number), right, wrong


# The instruction of each kind of question, and what makes one.
KINDS: dict[str, Callable[[np.random.Generator], QuestionAnswers]] = {
    "Add the two numbers.": addition,
    "Subtract the second number from the first.": subtraction,
    "Give the letter that follows this letter in the alphabet.": next_letter,
    "Give the larger of the two numbers.": larger_number,
    "Say whether the number is odd or even.": parity,
}


@dataclass(frozen=True)
class LongIns(GeneratedTask):
    """The numbers of the questions whose answers are wrong, as a set."""

    form: Literal["gist", "list", "limt"] = "gist"
    every: Annotated[int, Range(min=2, max=1000)] = 10  # one of so many answers is wrong

    name = "long_ins"
    scope, diffusion = "high", "low"
    levels = ("form", ("gist", "list", "limt"))
    max_new_tokens = 256

    def make_instance(self, budget: Budget, random: np.random.Generator) -> Instance:
        kinds = list(KINDS)
        common = kinds[int(random.integers(len(kinds)))]
        lines: list[tuple[str, bool]] = []
        wrong = 0  # the number of the wrong one in the latest block

        def grow(count: int) -> None:
            nonlocal wrong
            for number in range(len(lines) + 1, count + 1):
                kind = kinds[int(random.integers(len(kinds)))] if self.form == "limt" else common
                question, right, false = KINDS[kind](random)
                if (number - 1) % self.every == 0:  # a block begins
                    wrong = number + int(random.integers(self.every))
                is_wrong = number == wrong
                instruction = "" if self.form == "gist" else f"{kind} "
                answer = false if is_wrong else right
                lines.append((f"{number}. {instruction}{question} Answer: {answer}", is_wrong))

        def prompt(count: int) -> str:
            grow(count)
            shown = "\n".join(line for line, _ in lines[:count])
            about = (
                f"The instruction of all questions is: {common}\n" if self.form == "gist" else ""
            )
            return (
                f"Below are numbered questions with answers, some of which are wrong.\n{about}"
                f"{shown}\nList the numbers of all questions whose answer is wrong, separated by "
                f"commas.\nWrong:"
            )

        filled = fill(budget, prompt, part="question", min_parts=self.every)
        answer = frozenset(
            n for n, (_, is_wrong) in enumerate(lines[: filled.parts], 1) if is_wrong
        )
        return Instance(filled.prompt, answer, filled.tokens)

    def parse(self, completion: str) -> frozenset[int]:
        return metrics.numbers_in(completion)

    def score(self, answer: Any, instance: Instance) -> float:
        return metrics.set_f1(answer, instance.answer)
