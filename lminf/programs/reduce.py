"""Contexts reduced to a budget, behind one interface: `reduce(context, question, budget)`.

    Truncation    cuts off the end, the start or the middle
    BM25          keeps the chunks that share rare words with the question

A model then reads `context + question`, and the budget is of both. A context that fits is kept as
it is. Those of lminf.programs.reduce_by_model ask a model what to keep, lminf.programs.scm keeps
turns of a conversation, and lminf.programs.compressed gives embeddings, or keys and values, in the
place of a text.
"""

import abc
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, Protocol, TypeAlias, Unpack

import numpy as np
from jaxtyping import Array, Float

from lminf import ranges
from lminf.config import closest
from lminf.errors import InputError
from lminf.lm import bm25
from lminf.lm.budget import Budget
from lminf.lm.protocol import GenerateOptions, TextGenerator
from lminf.ranges import Range

Count: TypeAlias = Annotated[int, Range(min=1, max=2**31 - 1)]
WORD = re.compile(r"\s*\S+(?:\s+$)?")  # with the space before it: a text's words joined are it


class Embeddings(NamedTuple):
    """What a model reads in the place of a context's tokens, at the positions from 0 on."""

    values: Float[Array, "M D"]


class KeyValues(NamedTuple):
    """What a layer of a model attends to in the place of a context's tokens; un-rotated keys."""

    k: Float[Array, "S K H"]
    v: Float[Array, "S K H"]


Reduced: TypeAlias = str | Embeddings | KeyValues


class Reducer(Protocol):
    """One way to make a context smaller."""

    @property
    def name(self) -> str:
        """As rows call it."""
        ...

    def reduce(self, context: str, question: str, budget: Budget) -> Reduced:
        """What is read before the question in the context's place. It and the question take at
        most the budget, of which an embedding, or a key and its value, is one unit.
        """
        ...


def room_for_context(context: str, question: str, budget: Budget) -> int:
    """The units that the budget has beside the question; refuses what cannot be reduced."""
    if not context.strip():
        raise InputError("the context is empty; ask the question without reducing anything")
    if not question:
        raise InputError("the question is empty; give what is asked about the context")
    needed = budget.count(question)
    if needed >= budget.size:
        raise InputError(
            f"the question takes {needed} {budget.unit} and the budget is {budget.size}, which "
            f"leaves no room for the context; give a budget of at least {needed + 1}"
        )
    return budget.size - needed


class TextReducer(abc.ABC):
    """A Reducer whose result is a text; a subclass gives it a name."""

    def reduce(self, context: str, question: str, budget: Budget) -> str:
        """As `Reducer.reduce`."""
        room_for_context(context, question, budget)
        if budget.holds(context + question):
            return context
        return self.shorten(context, question, budget)

    @abc.abstractmethod
    def shorten(self, context: str, question: str, budget: Budget) -> str:
        """The shorter text of a context that does not fit."""


def longest_fitting(text_of: Callable[[int], str], most: int, question: str, budget: Budget) -> str:
    """`text_of(n)` of the largest n up to `most` that fits together with the question; texts get
    longer with n, and `text_of(0)` is empty.
    """
    fits, too_long = 0, most + 1
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if budget.holds(text_of(middle) + question):
            fits = middle
        else:
            too_long = middle
    return text_of(fits)


def best_parts(parts: Sequence[str], ranking: Sequence[int], question: str, budget: Budget) -> str:
    """As many of the first parts of the ranking as fit, in the order of the text."""

    def best(count: int) -> str:
        return "".join(parts[index] for index in sorted(ranking[:count]))

    return longest_fitting(best, len(parts), question, budget)


def chunks(text: str, words: int) -> list[str]:
    """The text in pieces of so many words; joined they are the text."""
    split = WORD.findall(text)
    return ["".join(split[start : start + words]) for start in range(0, len(split), words)]


@dataclass(frozen=True)
class Truncation(TextReducer):
    """The context without its end, start or middle, to the character that still fits."""

    cut: Literal["end", "start", "middle"]

    def __post_init__(self):
        if self.cut not in (sides := ("end", "start", "middle")):
            raise InputError(f"truncation of the {self.cut!r}; {closest(self.cut, sides)}")

    @property
    def name(self) -> str:
        return f"truncation of the {self.cut}"

    def shorten(self, context: str, question: str, budget: Budget) -> str:
        def kept(count: int) -> str:
            first = {"end": count, "start": 0, "middle": -(-count // 2)}[self.cut]
            return context[:first] + context[len(context) - (count - first) :]

        return longest_fitting(kept, len(context) - 1, question, budget)


@dataclass(frozen=True)
class BM25(TextReducer):
    """The chunks of so many words that score highest for the question, by Okapi BM25
    (lminf.lm.bm25).
    """

    words: Count = 32
    k1: Annotated[float, Range(min=0)] = 1.2
    b: Annotated[float, Range(min=0, max=1)] = 0.75

    name = "bm25"

    def __post_init__(self):
        ranges.check(self)

    def shorten(self, context: str, question: str, budget: Budget) -> str:
        parts = chunks(context, self.words)
        scores = bm25.scores(parts, question, k1=self.k1, b=self.b)
        ranking = np.argsort(-scores, kind="stable")
        return best_parts(parts, ranking.tolist(), question, budget)


# --- Answers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """Answers each prompt from its reduced context, as evaluations ask it to."""

    model: TextGenerator
    reducer: TextReducer
    budget: Budget
    split: Callable[[str], tuple[str, str]]  # of a prompt into context and question

    def generate(self, prompts: Sequence[str], **options: Unpack[GenerateOptions]) -> list[str]:
        """What the model writes after each reduced context and its question."""
        reduced = []
        for context, question in map(self.split, prompts):
            reduced.append(self.reducer.reduce(context, question, self.budget) + question)
        return self.model.generate(reduced, **options)
