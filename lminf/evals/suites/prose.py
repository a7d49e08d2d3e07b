"""Filler text of generated prompts: the documentation in the interpreter's library, or a file.

The text is read where it is installed and is not part of this repository. It differs with the
version of Python, which the digest of the prompts in every row tells. It takes seconds to collect,
once a process, and holds 172,230 tokens of SmolLM2 under Python 3.11, in articles of a few
paragraphs; where the order of a long text matters, a book is better.
"""

import functools
import itertools
import re
from collections.abc import Sequence

from lminf.data import sources
from lminf.errors import InputError
from lminf.evals.suites.generated import FilledPrompt
from lminf.evals.task import Budget

SENTENCE_END = re.compile(r"(?<=[.!?]) +(?=[A-Z])")
MIN_CHARS, MAX_CHARS = 25, 300  # characters of a sentence that reads as one
WORD = re.compile(r"\b[a-z]{4,9}\b")


@functools.cache
def articles(path: str | None) -> Sequence[Sequence[str]]:
    """The paragraphs of prose of each article, or of the whole file, each on one line and there
    once: no lists, tables, headings or code.
    """
    seen: set[str] = set()
    selected = []
    for text in [sources.read_text(path)] if path else sources.python_prose():
        blocks = re.split(r"\n\s*\n", text)
        lines = [" ".join(block.split()) for block in blocks if block[:1].isupper()]
        prose = [line for line in dict.fromkeys(lines) if len(line) >= 80 and line[-1] in ".!?"]
        selected.append(tuple(line for line in prose if line not in seen))
        seen.update(prose)
    if len(seen) < 8:
        raise InputError(
            f"{path} has {len(seen)} paragraphs of prose, which are set apart by blank lines, "
            f"begin with a capital and end with a full stop; give a text of at least 8"
        )
    return tuple(selected)


@functools.cache
def paragraphs(path: str | None) -> Sequence[str]:
    """The paragraphs of all articles."""
    return tuple(itertools.chain(*articles(path)))


@functools.cache
def indices_with_next(path: str | None) -> Sequence[int]:
    """The indices of the paragraphs that are not the last of their article."""
    first = 0
    indices: list[int] = []
    for article in articles(path):
        indices += range(first, first + len(article) - 1)
        first += len(article)
    return tuple(indices)


@functools.cache
def sentences(path: str | None) -> Sequence[str]:
    """The sentences of the paragraphs, in order."""
    split = [each for line in paragraphs(path) for each in SENTENCE_END.split(line)]
    return tuple(
        each for each in split if MIN_CHARS <= len(each) <= MAX_CHARS and each[-1] in ".!?"
    )


@functools.cache
def words(path: str | None) -> Sequence[str]:
    """The different lower-case words of four to nine letters, in the order of the alphabet."""
    return tuple(sorted({word for line in paragraphs(path) for word in WORD.findall(line)}))


def cycle_from(parts: Sequence[str], start: int, count: int) -> list[str]:
    """`count` parts from index `start` on; after the last comes the first again."""
    return [parts[(start + index) % len(parts)] for index in range(count)]


def check_filled(filled: FilledPrompt, max_parts: int, path: str | None, budget: Budget) -> None:
    """Refuses a prompt of all parts that the text has: it may be shorter than was asked for, and a
    text is not repeated where its order or its parts are the question.
    """
    if filled.parts == max_parts:
        raise InputError(
            f"{path or 'the documentation of Python'} does not fill a prompt of {budget.size} "
            f"{budget.unit}; ask for a shorter length, or give a longer text with text=FILE"
        )
