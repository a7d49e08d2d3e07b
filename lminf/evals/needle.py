"""What passkeys and key-value pairs share: one line of a long prompt holds the number asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lminf.evals.score import Interval, first_integer, success_rate

ANSWER_TOKENS = 10  # enough for a space and five digits in any tokenizer; the budget of YaRN's test


@dataclass(frozen=True)
class Needle:
    """An instance: a prompt and the number that it asks for."""

    prompt: str
    answer: int
    depth: float  # share of the other text that stands before the needle
    tokens: int  # of the whole prompt
    start: int  # tokens before the line of the needle

    def in_window(self, window: int | None) -> bool:
        """Whether a window of so many tokens (None: all) holds the needle's line until the answer
        is complete.
        """
        return window is None or self.tokens + ANSWER_TOKENS - self.start <= window


class NeedleTask:
    """The part of a `Task` that does not depend on how the prompts are made."""

    scope, diffusion = "low", "low"  # lminf.evals.suites.suite_task says of what
    levels = ("depth", (0.0, 0.25, 0.5, 0.75, 1.0))
    max_new_tokens = ANSWER_TOKENS
    stop: Sequence[str] = ()

    def prompt(self, instance: Needle) -> str:
        return instance.prompt

    def choices(self, instance: Needle) -> Sequence[str]:
        return ()

    def parse(self, completion: str) -> int | None:
        return first_integer(completion)

    def score(self, answer: Any, instance: Needle) -> float:
        return float(answer == instance.answer)

    def rates(self, completions: Sequence[str], instances: Sequence[Needle]) -> Mapping[str, float]:
        return {}

    def aggregate(self, scores: Sequence[float]) -> Interval:
        return success_rate(round(sum(scores)), len(scores))
