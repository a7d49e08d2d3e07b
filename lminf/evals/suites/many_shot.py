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

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, TypeAlias

import numpy as np

from lminf.errors import InputError
from lminf.evals.suites import prose
from lminf.evals.suites.generated import GeneratedTask, fill
from lminf.evals.suites.ruler import Share
from lminf.evals.suites.suite_task import Answers, Instance
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
Order: TypeAlias = Literal["shuffled", "grouped"]


class Example(NamedTuple):
    """A sentence that mentions a tool of its label."""

    label: int
    tool: str
    text: str


@dataclass(frozen=True)
class ManyShot(GeneratedTask):
    """The label of a sentence, from labelled examples in the prompt."""

    labels: Annotated[int, Range(min=2, max=500)] = 28
    order: Order = "grouped"
    depth: Share = 0.5  # of the label asked for among the labels, where they are grouped
    text: str | None = None  # a file to take words from; none: the interpreter's documentation
    answers: Answers = "written"

    name = "many_shot"
    scope, diffusion = "high", "low"
    levels = ("depth", (0.0, 0.25, 0.5, 0.75, 1.0))
    max_new_tokens = 10

    def make_instance(self, budget: Budget, random: np.random.Generator) -> Instance:
        names = sample_labels(random, self.labels)
        tools = sample_tools(random, self.labels, self.text)
        query_label = min(int(self.depth * self.labels), self.labels - 1)
        if self.order == "shuffled":
            query_label = 0  # where it stands is drawn with the rounds
        drawn, examples = sample_examples(random, tools), []

        def prompt(count: int) -> str:
            examples.extend(itertools.islice(drawn, max(count - len(examples), 0)))
            # Of the first round, which every prompt has.
            tool = next(each.tool for each in examples if each.label == query_label)
            listed = order_examples(examples[:count], self.order)
            return format_examples(listed, names) + format_question(tool)

        filled = fill(budget, prompt, part="example", min_parts=self.labels)
        options = tuple(f" {name}" for name in names)
        return Instance(filled.prompt, names[query_label], filled.tokens, options=options)

    def parse(self, completion: str) -> str | None:
        match = LABEL.search(completion.lower())
        return match[0] if match else None


def sample_labels(random: np.random.Generator, count: int) -> list[str]:
    """Different invented words of three syllables."""
    names: dict[str, None] = {}
    while len(names) < count:
        drawn = zip(random.choice(list(CONSONANTS), 3), random.choice(list(VOWELS), 3), strict=True)
        names["".join(c + v for c, v in drawn)] = None
    return list(names)


def sample_tools(random: np.random.Generator, labels: int, text: str | None) -> list[list[str]]:
    """Different words for every label, none of them a word of the phrases."""
    known = [word for word in prose.words(text) if word not in PHRASE_WORDS]
    if len(known) < labels * TOOLS:
        raise InputError(
            f"{text or 'the documentation of Python'} has {len(known)} words of four to nine "
            f"letters, but labels={labels} need {labels * TOOLS}; give fewer, or a longer text"
        )
    drawn = iter(random.choice(known, labels * TOOLS, replace=False))
    return [[str(next(drawn)) for _ in range(TOOLS)] for _ in range(labels)]


def sample_examples(
    random: np.random.Generator, tools: Sequence[Sequence[str]]
) -> Iterator[Example]:
    """Rounds without end, of one example of each label in a drawn order."""
    while True:
        for label in map(int, random.permutation(len(tools))):
            tool = tools[label][int(random.integers(TOOLS))]
            phrase = PHRASES[int(random.integers(len(PHRASES)))]
            yield Example(label, tool, phrase.format(tool=tool))


def order_examples(examples: Sequence[Example], order: Order) -> list[Example]:
    """The examples in the order in which a prompt shows them."""
    return sorted(examples, key=lambda each: each.label) if order == "grouped" else list(examples)


def format_examples(examples: Sequence[Example], names: Sequence[str]) -> str:
    """The examples as text, with the names of their labels."""
    return "\n".join(f"Sentence: {each.text}\nLabel: {names[each.label]}" for each in examples)


def format_question(tool: str) -> str:
    """The unlabelled sentence at the end of a prompt."""
    return f"\nSentence: {QUESTION.format(tool=tool)}\nLabel:"
