"""What the tasks of the suites share: instances, prompts that fill a budget, coordinates.

A task of a suite is a frozen dataclass whose fields have defaults: `SingleNeedle(depth=0.5)`. Its
class says how its score is to be read:

    scope       how much of the text an answer needs
    diffusion   how hard that is to find and to extract
    levels      a field, and its values at which it is measured unless that field is given

Scope and diffusion are the coordinates of Goldman et al. 2024, arXiv:2407.00402.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np

from lminf import ranges
from lminf.errors import InputError
from lminf.evals.score import Interval, mean_score, success_rate
from lminf.evals.task import Budget

Level: TypeAlias = Literal["low", "high"]
# Whether a model writes its answer, or that of the options is taken which it finds likeliest. The
# prompt is then read once for each of them, but a model that cannot answer freely can be measured.
Answers: TypeAlias = Literal["written", "likeliest"]


@dataclass(frozen=True)
class Item:
    """An instance: what is asked, and what is right."""

    prompt: str
    answer: Any
    tokens: int  # of the prompt, in the unit of its budget
    cut: int = 0  # characters left out of the middle of a published context
    options: Sequence[str] = ()  # continuations of the prompt, one of which is right


class SuiteTask:
    """The part of a `Task` that does not depend on how its prompts are made."""

    name: str
    scope: ClassVar[Level]
    diffusion: ClassVar[Level]
    levels: ClassVar[tuple[str, tuple[Any, ...]] | None] = None
    answers: Answers = "written"
    stop: Sequence[str] = ("\n",)

    def __post_init__(self):
        ranges.check(self)

    def instances(self, budget: Budget, *, count: int, key: Sequence[int]) -> list[Item]:
        """Each instance has a random stream of its own, so that cells with the same key have the
        same draws whatever else differs.
        """
        try:
            return [self.item(budget, np.random.default_rng((*key, n))) for n in range(count)]
        except InputError as error:
            level = f":{self.levels[0]}={getattr(self, self.levels[0])}" if self.levels else ""
            raise InputError(f"{self.name}{level}: {error}") from error

    def item(self, budget: Budget, random: np.random.Generator) -> Item:
        """One instance whose prompt fills the budget."""
        raise NotImplementedError

    def prompt(self, instance: Item) -> str:
        return instance.prompt

    def choices(self, instance: Item) -> Sequence[str]:
        return instance.options if self.answers == "likeliest" else ()

    def score(self, answer: Any, instance: Item) -> float:
        return float(answer == instance.answer)

    def aggregate(self, scores: Sequence[float]) -> Interval:
        """Wilson's interval where every answer is right or wrong; else the bootstrap's."""
        if all(value in (0, 1) for value in scores):
            return success_rate(round(sum(scores)), len(scores))
        return mean_score(scores)


class Filled(NamedTuple):
    """The longest prompt that fits."""

    prompt: str
    parts: int  # that it is made of
    tokens: int


def fill(
    budget: Budget,
    prompt: Callable[[int], str],
    *,
    part: str,
    least: int = 0,
    most: int | None = None,
) -> Filled:
    """The prompt of as many parts as fit: one more would not, or there is none (`most`).

    The tokenizer is asked a handful of times: parts are of about one length, so the number that
    fits is interpolated. `part` names one in the refusal of a budget below `least` of them.
    """
    text = prompt(least)
    first = tokens = budget.count(text)
    if tokens > budget.size:
        raise InputError(
            f"a prompt with {_counted(least, part)} takes {tokens} {budget.unit}, more than "
            f"the length {budget.size}; ask for a length of at least {tokens}"
        )
    best, beyond = Filled(text, least, tokens), None  # beyond: (count, tokens) known not to fit
    while beyond is None or beyond[0] - best.parts > 1:
        if best.parts == most:
            break
        if beyond is not None:
            slope = (beyond[1] - best.tokens) / (beyond[0] - best.parts)
        else:
            slope = (best.tokens - first) / max(best.parts - least, 1)
        step = int((budget.size - best.tokens) / slope) if slope > 0 else 8
        guess = best.parts + max(step, 1)
        if beyond is not None:
            guess = min(guess, beyond[0] - 1)
        if most is not None:
            guess = min(guess, most)
        text = prompt(guess)
        tokens = budget.count(text)
        if tokens <= budget.size:
            best = Filled(text, guess, tokens)
        else:
            beyond = guess, tokens
    return best


def _counted(count: int, part: str) -> str:
    return f"{count or 'no'} {part}{'' if count == 1 else 's'}"


def place(total: int, depth: float) -> int:
    """The index that has the share `depth` of `total` things before it; below `total`."""
    return min(int(depth * total), max(total - 1, 0))
