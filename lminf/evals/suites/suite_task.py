"""The base class of all suite tasks: instances with their answers, difficulty, aggregation.

A task of a suite is a frozen dataclass, `SingleNeedle(depth=0.5)`, that derives from GeneratedTask
(generated.py) or PublishedTask (published.py). Its class says how its score is to be read:

    scope       how much of the text an answer needs
    diffusion   how hard that is to find and to extract
    levels      a field, and its values at which it is measured unless that field is given

Scope and diffusion are the coordinates of Goldman et al. 2024, arXiv:2407.00402.
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from lminf import ranges
from lminf.errors import InputError
from lminf.evals.score import Interval, mean_score, success_rate
from lminf.evals.task import Budget

Level: TypeAlias = Literal["low", "high"]
# Whether a model writes its answer, or that of the options is taken which it finds likeliest. The
# prompt is then read once for each of them, but a model that cannot answer freely can be measured.
Answers: TypeAlias = Literal["written", "likeliest"]


@dataclass(frozen=True)
class Instance:
    """A prompt with its reference answer."""

    prompt: str
    answer: Any
    tokens: int  # of the prompt, in the unit of its budget
    cut: int = 0  # characters left out of the middle of a published context
    options: Sequence[str] = ()  # continuations of the prompt, one of which is right


class SuiteTask(abc.ABC):
    """The part of a `Task` that does not depend on where its prompts come from."""

    name: str
    scope: ClassVar[Level]
    diffusion: ClassVar[Level]
    levels: ClassVar[tuple[str, tuple[Any, ...]] | None] = None
    answers: Answers = "written"
    stop: Sequence[str] = ("\n",)

    def __new__(cls, *args: Any, **fields: Any):
        attributes = ("name", "max_new_tokens", "scope", "diffusion")
        missing = [f"method {each!r}" for each in sorted(cls.__abstractmethods__)]
        missing += [f"attribute {each!r}" for each in attributes if not hasattr(cls, each)]
        if missing:
            raise InputError(
                f"the task {cls.__qualname__} of {cls.__module__} has no {' and no '.join(missing)}"
                f"; give them to its class"
            )
        return super().__new__(cls)

    def __post_init__(self):
        ranges.check(self)

    @abc.abstractmethod
    def instances(self, budget: Budget, *, count: int, key: Sequence[int]) -> list[Instance]:
        """As `Task.instances`."""

    @abc.abstractmethod
    def parse(self, completion: str) -> Any:
        """As `Task.parse`."""

    def prompt(self, instance: Instance) -> str:
        return instance.prompt

    def choices(self, instance: Instance) -> Sequence[str]:
        return instance.options if self.answers == "likeliest" else ()

    def score(self, answer: Any, instance: Instance) -> float:
        return float(answer == instance.answer)

    def rates(self, completions: Sequence[str], instances: Sequence[Any]) -> Mapping[str, float]:
        return {}

    def aggregate(self, scores: Sequence[float]) -> Interval:
        """Wilson's interval where every answer is right or wrong; else the bootstrap's."""
        if all(value in (0, 1) for value in scores):
            return success_rate(round(sum(scores)), len(scores))
        return mean_score(scores)
