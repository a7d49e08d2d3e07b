"""LongBench-Write's lengths: a text of so many words is asked for, and its length is scored.

Source: Bai et al. 2024, arXiv:2408.07055. Quality, which the paper has a model judge, is in
lminf.evals.writing_quality. The requests that are generated are our own; they do not fill their
budget.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from lminf.errors import InputError
from lminf.evals import metrics
from lminf.evals.suites import published
from lminf.evals.suites.generated import GeneratedTask, fill
from lminf.evals.suites.published import PublishedTask, Question, Record
from lminf.evals.suites.suite_task import Instance
from lminf.evals.task import Budget
from lminf.ranges import Range

FORMS = ("report", "story", "guide", "speech", "diary", "letter", "lecture", "review")
TOPICS = (
    "the harbour of a small town", "a winter at a research station", "how bread is baked",
    "the repair of an old clock", "a library and its readers", "bees and their keepers",
    "a journey by night train", "the rules of a village game", "rivers and their bridges",
    "the first year of a theatre", "a garden on a roof", "maps that were wrong",
)  # fmt: skip
TOKENS_PER_WORD = 4  # of an answer's limit: twice the words, at two tokens a word
CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
FULL_WIDTH = re.compile(r"[\u3000-\u303f\uff00-\uffef]")  # the punctuation beside it
Words = Annotated[int, Range(min=0, max=10**6)]


def count_words(text: str) -> int:
    """The number of Chinese characters and of words between them."""
    spaced = FULL_WIDTH.sub(" ", CHINESE.sub(" ", text))
    return len(CHINESE.findall(text)) + len(spaced.split())


@dataclass(frozen=True)
class LongWrite(GeneratedTask):
    """A text of a requested number of words, scored by its length."""

    words: Annotated[int, Range(min=10, max=100_000)] = 500

    name = "long_write"
    scope, diffusion = "high", "low"
    levels = ("words", (250, 1000, 4000))
    stop = ()

    @property
    def max_new_tokens(self) -> int:
        return TOKENS_PER_WORD * self.words

    def make_instance(self, budget: Budget, random: np.random.Generator) -> Instance:
        form, topic = str(random.choice(FORMS)), str(random.choice(TOPICS))
        request = f"Write a {form} of {self.words} words about {topic}.\n\n"
        filled = fill(
            budget, lambda count: count * request, part="request", min_parts=1, max_parts=1
        )
        return Instance(request, self.words, filled.tokens)

    def parse(self, completion: str) -> int:
        return count_words(completion)

    def score(self, answer: int, instance: Instance) -> float:
        return metrics.length_score(answer, instance.answer)


@dataclass(frozen=True)
class LongBenchWrite(PublishedTask):
    """The requests of a published file with the words that each asks for, scored by length.

    The paper groups them by words, from `min_words` to below `max_words`: 0 to 500, to 2000, to
    4000, to 20000. A file of LongWrite-Ruler in the same form is read too. Requests are never cut.
    """

    min_words: Words = 0
    max_words: Words = 20_000

    name = "longbench_write"
    scope, diffusion = "high", "low"

    @property
    def max_new_tokens(self) -> int:
        return TOKENS_PER_WORD * max(question.answer for question in self.questions())

    def questions(self) -> list[Question]:
        records = published.read_records(self.path, "LongBench-Write", ("prompt", "length"))
        lengths = [_words(record, self.path) for record in records]
        questions = [
            Question(f"{record['prompt']}\n\n", "", "", words)
            for record, words in zip(records, lengths, strict=True)
            if self.min_words <= words < self.max_words
        ]
        if not questions:
            raise InputError(
                f"{self.path} has no request of {self.min_words} to {self.max_words} words; its "
                f"requests are of {min(lengths)} to {max(lengths)}"
            )
        return questions

    def parse(self, completion: str) -> int:
        return count_words(completion)

    def score(self, answer: int, instance: Any) -> float:
        return metrics.length_score(answer, instance.answer)


def _words(record: Record, path: str) -> int:
    words = record["length"]
    if type(words) is not int or words < 1:
        raise InputError(f"{path} asks for a text of {words!r} words; give a number above 0")
    return words
