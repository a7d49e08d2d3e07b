"""Ada-LEval's two tasks over any prose: the order of four segments, and the passage that follows.

    tsort        four consecutive segments of a text, shuffled, to be put in order
    best_answer  which of many labelled passages follows a given one

Beside the accuracy of written answers, rows have the paper's instruction following rate: the share
of answers in which the extraction finds an order or a label.

Source: Wang et al. 2024, arXiv:2404.06480. Its TSort reads books and its BestAnswer questions of a
forum with their accepted answers. Here the accepted answer is the paragraph that follows in the
text, and the distractors are other paragraphs, the nearest ones first.
"""

import abc
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lminf.evals.suites import prose
from lminf.evals.suites.generated import GeneratedTask, fill
from lminf.evals.suites.ruler import Share
from lminf.evals.suites.suite_task import Answers, Instance, SuiteTask
from lminf.evals.task import Budget

SEGMENTS = 4
HINT = 40  # words of the text before the segments, and after them
ORDERS = ["".join(order) for order in itertools.permutations("1234")]


def parse_order(completion: str) -> tuple[int, ...] | None:
    """The order of four that an answer gives: a JSON list, or else the one permutation of 1 to 4
    that its digits spell. None: it gives none, or several.
    """
    for text in re.findall(r"\[[^\[\]]*\]", completion):
        try:
            listed = json.loads(text)
        except ValueError:
            continue
        if all(isinstance(n, int) for n in listed) and sorted(listed) == [1, 2, 3, 4]:
            return tuple(listed)
    digits = "".join(re.findall(r"\d", completion))
    spelled = {order for order in ORDERS if order in digits}
    return tuple(map(int, spelled.pop())) if len(spelled) == 1 else None


def parse_label(completion: str, candidates: int) -> int | None:
    """The label that an answer mentions last, such as 12 for A12; else a bare number, from the
    highest down. None: there is none.
    """
    labels = [int(n) for n in re.findall(r"A(\d+)", completion) if 1 <= int(n) <= candidates]
    if labels:
        return labels[-1]
    numbers = {int(n) for n in re.findall(r"\d+", completion)}
    return max((n for n in numbers if 1 <= n <= candidates), default=None)


class AdaLEvalTask(SuiteTask):
    """A task scored by the order or the label that is extracted from an answer."""

    def parse(self, completion: str) -> str:
        return completion  # which numbers are labels depends on the instance

    @abc.abstractmethod
    def extract(self, completion: str, instance: Any) -> Any:
        """The order or the label in an answer; None if there is none."""

    @abc.abstractmethod
    def target(self, instance: Any) -> Any:
        """The order or the label that is right."""

    def score(self, answer: str, instance: Any) -> float:
        return float(self.extract(answer, instance) == self.target(instance))

    def rates(self, completions: Sequence[str], instances: Sequence[Any]) -> Mapping[str, float]:
        if self.answers == "likeliest":
            return {}
        extracted = map(self.extract, completions, instances)
        followed = sum(each is not None for each in extracted)
        return {"instruction_following_rate": followed / len(completions)}


class SegmentOrder(AdaLEvalTask):
    """TSort, generated or published: the order of four segments."""

    def extract(self, completion: str, instance: Any) -> tuple[int, ...] | None:
        return parse_order(completion)

    def target(self, instance: Any) -> tuple[int, ...]:
        return instance.answer


class CandidateLabel(AdaLEvalTask):
    """BestAnswer, generated or published: the label of one of the candidates."""

    def extract(self, completion: str, instance: Any) -> int | None:
        return parse_label(completion, instance.answer[1])

    def target(self, instance: Any) -> int:
        return instance.answer[0]


@dataclass(frozen=True)
class TSort(SegmentOrder, GeneratedTask):
    """The order of the segments as a JSON list: the numbers of the first to the last."""

    text: str | None = None  # a file of prose; none: the interpreter's documentation
    answers: Answers = "written"

    name = "tsort"
    scope, diffusion = "high", "high"
    max_new_tokens = 16

    def make_instance(self, budget: Budget, random: np.random.Generator) -> Instance:
        words = " ".join(prose.paragraphs(self.text)).split()
        most = (len(words) - 2 * HINT) // SEGMENTS
        start = int(random.integers(len(words)))
        order = [int(index) for index in random.permutation(SEGMENTS)]  # of what is shown

        def piece(first: int, count: int) -> str:
            return " ".join(prose.cycle_from(words, start + first, count))

        def prompt(size: int) -> str:
            """Segments of `size` words."""
            shown = [
                f"[Segment {number}]: {piece(HINT + index * size, size)}"
                for number, index in enumerate(order, 1)
            ]
            return "\n\n".join([
                "Below are four consecutive segments of a text in mixed order, and the words "
                "before and after them. Sort the segments into the order of the text.",
                f"[Before]: {piece(0, HINT)}", *shown,
                f"[After]: {piece(HINT + SEGMENTS * size, HINT)}",
                "Give the order as a JSON list of the segments' numbers, such as [2, 4, 1, 3]."
                "\nAnswer:",
            ])  # fmt: skip

        filled = fill(budget, prompt, part="word", min_parts=1, max_parts=most)
        prose.check_filled(filled, most, self.text, budget)
        answer = tuple(order.index(place) + 1 for place in range(SEGMENTS))
        options = tuple(f" [{', '.join(each)}]" for each in ORDERS)
        return Instance(filled.prompt, answer, filled.tokens, options=options)


@dataclass(frozen=True)
class BestAnswer(CandidateLabel, GeneratedTask):
    """The label of the passage that follows the one given."""

    depth: Share | None = None  # share of the candidates before it; none: drawn
    text: str | None = None
    answers: Answers = "written"

    name = "best_answer"
    scope, diffusion = "high", "high"
    max_new_tokens = 12

    def make_instance(self, budget: Budget, random: np.random.Generator) -> Instance:
        paragraphs = prose.paragraphs(self.text)
        query = int(random.choice(prose.indices_with_next(self.text)))
        near = sorted(range(len(paragraphs)), key=lambda index: abs(index - query - 0.5))
        distractors = [index for index in near if index not in (query, query + 1)]
        ranks = random.random(len(distractors))  # the order in which they are shown
        drawn = random.random()
        depth = drawn if self.depth is None else self.depth

        def shown(count: int) -> list[int]:
            mixed = [
                index for _, index in sorted(zip(ranks[: count - 1], distractors, strict=False))
            ]
            mixed.insert(min(int(depth * count), count - 1), query + 1)
            return mixed

        def prompt(count: int) -> str:
            listing = "\n\n".join(
                f"A{number}: {paragraphs[index]}" for number, index in enumerate(shown(count), 1)
            )
            return (
                f"Passage: {paragraphs[query]}\n\nOne of the following candidates is the passage "
                f"that follows this one in its text.\n\n{listing}\n\nPassage: {paragraphs[query]}\n"
                f"Answer with the label of the candidate that follows it, such as A2.\nAnswer:"
            )

        filled = fill(budget, prompt, part="candidate", min_parts=2, max_parts=len(distractors) + 1)
        prose.check_filled(filled, len(distractors) + 1, self.text, budget)
        answer = shown(filled.parts).index(query + 1) + 1, filled.parts
        # Complete lines: what A1 begins, A12 goes on with, and is never likelier.
        options = tuple(f" A{label}\n" for label in range(1, filled.parts + 1))
        return Instance(filled.prompt, answer, filled.tokens, options=options)
