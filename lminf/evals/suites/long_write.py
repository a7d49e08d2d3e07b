"""LongBench-Write's lengths: a text of so many words is asked for, and its length is scored.

Source: Bai et al. 2024, arXiv:2408.07055. Quality, which the paper has a model judge, is not
scored. The requests are our own; they do not fill their budget.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from lminf.evals import metrics
from lminf.evals.suites.generated import GeneratedTask, fill
from lminf.evals.suites.suite_task import Item
from lminf.evals.task import Budget
from lminf.ranges import Range

FORMS = ("report", "story", "guide", "speech", "diary", "letter", "lecture", "review")
TOPICS = (
    "the harbour of a small town", "a winter at a research station", "how bread is baked",
    "the repair of an old clock", "a library and its readers", "bees and their keepers",
    "a journey by night train", "the rules of a village game", "rivers and their bridges",
    "the first year of a theatre", "a garden on a roof", "maps that were wrong",
)  # fmt: skip


@dataclass(frozen=True)
class LongWrite(GeneratedTask):
    """The length of what is written, beside the number of words that was asked for."""

    words: Annotated[int, Range(min=10, max=100_000)] = 500

    name = "long_write"
    scope, diffusion = "high", "low"
    levels = ("words", (250, 1000, 4000))
    stop = ()

    @property
    def max_new_tokens(self) -> int:
        """Enough for twice the words, at two tokens a word."""
        return 4 * self.words

    def item(self, budget: Budget, random: np.random.Generator) -> Item:
        form, topic = str(random.choice(FORMS)), str(random.choice(TOPICS))
        request = f"Write a {form} of {self.words} words about {topic}.\n\n"
        filled = fill(budget, lambda count: count * request, part="request", least=1, most=1)
        return Item(request, self.words, filled.tokens)

    def parse(self, completion: str) -> int:
        return len(completion.split())

    def score(self, answer: int, instance: Item) -> float:
        return metrics.length_score(answer, instance.answer)
