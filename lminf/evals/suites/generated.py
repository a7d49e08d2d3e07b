"""Base classes of generated tasks: instances from a random stream, prompts that fill a budget."""

import abc
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lminf.errors import InputError
from lminf.evals.score import Interval, of_groups
from lminf.evals.suites.suite_task import Instance, SuiteTask
from lminf.evals.task import Budget


class GeneratedTask(SuiteTask):
    """A task whose fields have defaults and whose instances are sampled one by one."""

    @abc.abstractmethod
    def make_instance(self, budget: Budget, random: np.random.Generator) -> Instance:
        """One instance whose prompt fills the budget."""

    def instances(self, budget: Budget, *, count: int, key: Sequence[int]) -> list[Instance]:
        """Each instance has a random stream of its own, so that cells with the same key have the
        same draws whatever else differs.
        """
        return self._drawn(lambda random: [self.make_instance(budget, random)], count, key)

    def _drawn(
        self, items: Callable[[np.random.Generator], list[Instance]], texts: int, key: Sequence[int]
    ) -> list[Instance]:
        try:
            streams = (np.random.default_rng((*key, text)) for text in range(texts))
            return [item for stream in streams for item in items(stream)]
        except InputError as error:
            level = f":{self.levels[0]}={getattr(self, self.levels[0])}" if self.levels else ""
            raise InputError(f"{self.name}{level}: {error}") from error


class SharedTextTask(GeneratedTask):
    """A task that asks `questions` of every text, which a model can read once for all of them.

    Answers to questions of one text are no independent samples. The interval accounts for that.
    """

    questions: int

    @abc.abstractmethod
    def make_instances(self, budget: Budget, random: np.random.Generator) -> list[Instance]:
        """The questions of one text, each as an instance; the longest prompt fills the budget."""

    def make_instance(self, budget: Budget, random: np.random.Generator) -> Instance:
        return self.make_instances(budget, random)[0]

    def instances(self, budget: Budget, *, count: int, key: Sequence[int]) -> list[Instance]:
        """Each text has a random stream of its own; the last may be asked fewer questions."""
        texts = -(-count // self.questions)
        return self._drawn(lambda random: self.make_instances(budget, random), texts, key)[:count]

    def aggregate(self, scores: Sequence[float]) -> Interval:
        if self.questions == 1:
            return super().aggregate(scores)
        return of_groups(scores, self.questions)


class FilledPrompt(NamedTuple):
    """The longest prompt that fits."""

    prompt: str
    parts: int  # that it is made of
    tokens: int


def fill(
    budget: Budget,
    prompt: Callable[[int], str],
    *,
    part: str,
    min_parts: int = 0,
    max_parts: int | None = None,
) -> FilledPrompt:
    """The prompt of as many parts as fit: one more would not, or there is none (`max_parts`).

    The tokenizer is asked a handful of times: parts are of about one length, so the number that
    fits is interpolated. `part` names one in the refusal of a budget below `min_parts` of them.
    """
    text = prompt(min_parts)
    first = tokens = budget.count(text)
    if tokens > budget.size:
        raise InputError(
            f"a prompt with {_counted(min_parts, part)} takes {tokens} {budget.unit}, more than "
            f"the length {budget.size}; ask for a length of at least {tokens}"
        )
    best = FilledPrompt(text, min_parts, tokens)
    beyond = None  # (count, tokens) known not to fit
    while beyond is None or beyond[0] - best.parts > 1:
        if best.parts == max_parts:
            break
        if beyond is not None:
            slope = (beyond[1] - best.tokens) / (beyond[0] - best.parts)
        else:
            slope = (best.tokens - first) / max(best.parts - min_parts, 1)
        step = int((budget.size - best.tokens) / slope) if slope > 0 else 8
        guess = best.parts + max(step, 1)
        if beyond is not None:
            guess = min(guess, beyond[0] - 1)
        if max_parts is not None:
            guess = min(guess, max_parts)
        text = prompt(guess)
        tokens = budget.count(text)
        if tokens <= budget.size:
            best = FilledPrompt(text, guess, tokens)
        else:
            beyond = guess, tokens
    return best


def _counted(count: int, part: str) -> str:
    return f"{count or 'no'} {part}{'' if count == 1 else 's'}"


def index_at_depth(total: int, depth: float) -> int:
    """The index below `total` that has the share `depth` of the parts before it."""
    return min(int(depth * total), max(total - 1, 0))
