"""What a benchmark task answers, and the budget its prompts must fit.

A task is a frozen dataclass whose fields, a number or text each, are its coordinates:
`Passkey(depth=0.1)` and `Passkey(depth=0.9)` are two cells of one table. lminf.evals.runner asks a
language model and makes the rows; a task never sees the model.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from lminf.evals.score import Interval
from lminf.lm.budget import Budget

InstanceT = TypeVar("InstanceT")


class Task(Protocol[InstanceT]):
    """One kind of question. Deterministic: the same budget and key give the same instances."""

    @property
    def name(self) -> str:
        """As rows call it."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """The most tokens of an answer."""
        ...

    @property
    def stop(self) -> Sequence[str]:
        """Texts that end an answer."""
        ...

    def instances(self, budget: Budget, *, count: int, key: Sequence[int]) -> Sequence[InstanceT]:
        """`count` instances whose prompts fit the budget. More of them begin with the same ones.

        `key` seeds a numpy generator; the runner gives every cell a key of its own.
        """
        ...

    def prompt(self, instance: InstanceT) -> str:
        """What the model reads. It is never cut: a task whose prompts do not fit refuses."""
        ...

    def choices(self, instance: InstanceT) -> Sequence[str]:
        """Continuations of the prompt, of which the likeliest is the answer; none: the model
        writes its answer.
        """
        ...

    def parse(self, completion: str) -> Any:
        """The answer in what the model wrote or chose; None if there is none."""
        ...

    def score(self, answer: Any, instance: InstanceT) -> float:
        """How good an answer is, in [0, 1]."""
        ...

    def rates(
        self, completions: Sequence[str], instances: Sequence[InstanceT]
    ) -> Mapping[str, float]:
        """What a row reports of a cell beside its score, by column: shares of the completions."""
        ...

    def aggregate(self, scores: Sequence[float]) -> Interval:
        """The mean of the scores of a cell with its 95 % interval."""
        ...
