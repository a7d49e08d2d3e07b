"""Many-shot in-context learning with many labels: what each label means must be read from examples.

Every label is an invented word, and stands for a trade that its examples mention by one of its
tools. The question has a tool that an example of its label has, so the examples tell the label and
nothing else does.

    order=shuffled   examples in rounds, one of each label a round, in a drawn order
    order=grouped    the examples of a label next to each other; `depth` says where those asked for
                     stand

Source of the form: Li et al. 2024, arXiv:2404.02060 (LongICLBench), whose six sets have 28 to 174
labels and one to five rounds of examples; their grouped order shows the effect of position.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from lminf.errors import InputError
from lminf.evals.suites import prose
from lminf.evals.suites.generated import GeneratedTask, fill
from lminf.evals.suites.ruler import Share
from lminf.evals.suites.suite_task import Answers, Item
from lminf.evals.task import Budget
from lminf.ranges import Range

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
TOOLS = 3  # words of a label
PHRASES = (
    "She asked them about the {tool} this morning.",
    "We could not find a {tool} anywhere.",
    "They will bring the {tool} on Monday.",
    "He has been waiting for a new {tool}.",
)
PHRASE_WORDS = {word.strip(".") for phrase in PHRASES for word in phrase.split()}
QUESTION = "Everyone here has heard of the {tool}."
LABEL = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class ManyShot(GeneratedTask):
    """The label of a sentence."""

    labels: Annotated[int, Range(min=2, max=500)] = 28
    order: Literal["shuffled", "grouped"] = "grouped"
    depth: Share = 0.5  # of the label asked for among the labels, where they are grouped
    text: str | None = None  # a file to take words from; none: the interpreter's documentation
    answers: Answers = "written"

    name = "many_shot"
    scope, diffusion = "high", "low"
    levels = ("depth", (0.0, 0.25, 0.5, 0.75, 1.0))
    max_new_tokens = 10

    def item(self, budget: Budget, random: np.random.Generator) -> Item:
        names = drawn_labels(random, self.labels)
        tools = self._tools(random)
        query_label = min(int(self.depth * self.labels), self.labels - 1)
        if self.order == "shuffled":
            query_label = 0  # where it stands is drawn with the rounds
        examples: list[tuple[int, str, str]] = []  # label, tool and sentence, in rounds

        def grow(count: int) -> None:
            while len(examples) < count:
                for label in random.permutation(self.labels):
                    tool = tools[label][int(random.integers(TOOLS))]
                    phrase = PHRASES[int(random.integers(len(PHRASES)))]
                    examples.append((int(label), tool, phrase.format(tool=tool)))

        def prompt(count: int) -> str:
            grow(count)
            shown = examples[:count]
            if self.order == "grouped":
                shown = sorted(shown, key=lambda example: example[0])
            lines = "\n".join(
                f"Sentence: {text}\nLabel: {names[label]}" for label, _, text in shown
            )
            # Of the first round, which every prompt has.
            tool = next(tool for label, tool, _ in examples if label == query_label)
            return f"{lines}\nSentence: {QUESTION.format(tool=tool)}\nLabel:"

        filled = fill(budget, prompt, part="example", least=self.labels)
        options = tuple(f" {name}" for name in names)
        return Item(filled.prompt, names[query_label], filled.tokens, options=options)

    def _tools(self, random: np.random.Generator) -> list[list[str]]:
        """Different words for every label, none of them a word of the phrases."""
        known = [word for word in prose.words(self.text) if word not in PHRASE_WORDS]
        if len(known) < self.labels * TOOLS:
            raise InputError(
                f"{self.text} has {len(known)} words of four to nine letters, but labels="
                f"{self.labels} need {self.labels * TOOLS}; give fewer labels, or a longer text"
            )
        drawn = iter(random.choice(known, self.labels * TOOLS, replace=False))
        return [[str(next(drawn)) for _ in range(TOOLS)] for _ in range(self.labels)]

    def parse(self, completion: str) -> str | None:
        match = LABEL.search(completion.lower())
        return match[0] if match else None


def drawn_labels(random: np.random.Generator, count: int) -> list[str]:
    """Different invented words of three syllables."""
    names: dict[str, None] = {}
    while len(names) < count:
        drawn = zip(random.choice(list(CONSONANTS), 3), random.choice(list(VOWELS), 3), strict=True)
        names["".join(c + v for c, v in drawn)] = None
    return list(names)
