"""Tasks of RULER's kinds over the whole prompt: common words, and a question about one document.

    common_words   the words that are listed most often
    document_qa    the word that is left out of a sentence which stands in one of many documents

Source: Hsieh et al. 2024, arXiv:2404.06654. Its questions are SQuAD's and HotpotQA's; ours are made
of the prose at hand, with one answer each.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from lminf.errors import InputError
from lminf.evals import metrics
from lminf.evals.suites import prose
from lminf.evals.suites.generated import GeneratedTask, fill, index_at_depth
from lminf.evals.suites.ruler import Share, sample_words
from lminf.evals.suites.suite_task import Answers, Instance
from lminf.evals.task import Budget
from lminf.ranges import Range

OTHERS = 7  # words of the list that a model chooses from beside the common one


@dataclass(frozen=True)
class CommonWords(GeneratedTask):
    """The most frequent words of a numbered list; every other word is there less often."""

    common: Annotated[int, Range(min=1, max=100)] = 5  # words to find
    times: Annotated[int, Range(min=2, max=1000)] = 12  # that each of them is listed
    other_times: Annotated[int, Range(min=1, max=999)] = 3  # that each other one is
    text: str | None = None  # a file to take words from; none: the interpreter's documentation
    answers: Answers = "written"

    name = "common_words"
    scope, diffusion = "high", "high"
    levels = ("common", (1, 5, 10))

    def __post_init__(self):
        super().__post_init__()
        if self.other_times >= self.times:
            raise InputError(
                f"common_words lists common words times={self.times} times and others "
                f"other_times={self.other_times} times; give other_times below times"
            )
        if self.answers == "likeliest" and self.common > 1:
            raise InputError(
                f"common_words:answers=likeliest chooses one word, of common={self.common}; give "
                f"common=1"
            )

    @property
    def max_new_tokens(self) -> int:
        return 12 * self.common

    def make_instance(self, budget: Budget, random: np.random.Generator) -> Instance:
        words = sample_words(random, len(prose.words(self.text)), self.text)
        common, rare = words[: self.common], words[self.common :]
        order: list[float] = []

        def prompt(count: int) -> str:
            """`count` other words, each its times."""
            listed = common * self.times + [
                w for w in rare[:count] for _ in range(self.other_times)
            ]
            order.extend(random.random(max(len(listed) - len(order), 0)))
            mixed = [word for _, word in sorted(zip(order, listed, strict=False))]
            lines = " ".join(f"{number}. {word}" for number, word in enumerate(mixed, 1))
            return (
                "Below is a numbered list of words. Some of them appear more often than others. "
                f"Memorize the ones that appear most often.\n{lines}\n"
                f"What are the {self.common} most common words in the list above? The "
                f"{self.common} most common words in the list are:"
            )

        filled = fill(budget, prompt, part="other word", min_parts=1, max_parts=len(rare))
        prose.check_filled(filled, len(rare), self.text, budget)
        options = random.permutation([*common, *rare[: min(filled.parts, OTHERS)]])
        return Instance(
            filled.prompt, common, filled.tokens, options=[f" {word}" for word in options]
        )

    def parse(self, completion: str) -> str:
        return completion

    def score(self, answer: str, instance: Instance) -> float:
        return metrics.string_match_all(answer, instance.answer)


BLANK = "_____"


@dataclass(frozen=True)
class DocumentQA(GeneratedTask):
    """The word left out of a sentence, which stands whole in one of the documents."""

    depth: Share = 0.5  # share of the documents before that one
    text: str | None = None

    name = "document_qa"
    scope, diffusion = "low", "low"
    levels = ("depth", (0.0, 0.25, 0.5, 0.75, 1.0))
    max_new_tokens = 12

    def make_instance(self, budget: Budget, random: np.random.Generator) -> Instance:
        documents = prose.paragraphs(self.text)
        order = random.permutation(len(documents))
        source, sentence, word = self._question(documents, order, random)
        fillers = [documents[index] for index in order if documents[index] != source]
        cloze = re.sub(rf"\b{word}\b", BLANK, sentence, count=1)

        def prompt(count: int) -> str:
            """`count` documents, one of them that of the question."""
            shown = list(fillers[: count - 1])
            shown.insert(index_at_depth(count, self.depth), source)
            listing = "\n".join(f"Document {number}: {d}" for number, d in enumerate(shown, 1))
            return (
                f"Read the documents and complete the sentence, which is in one of them.\n{listing}"
                f"\nSentence: {cloze}\nThe missing word, written in the place of {BLANK}, is"
            )

        filled = fill(budget, prompt, part="document", min_parts=1, max_parts=len(documents))
        prose.check_filled(filled, len(documents), self.text, budget)
        return Instance(filled.prompt, word, filled.tokens)

    def _question(
        self, documents: Sequence[str], order: np.ndarray, random: np.random.Generator
    ) -> tuple[str, str, str]:
        """A document, a sentence of it, and a word that the document has there alone."""
        for index in map(int, order):
            lines = prose.SENTENCE_END.split(documents[index])
            sentence = lines[int(random.integers(len(lines)))]
            words = [w for w in prose.WORD.findall(sentence) if len(w) >= 6]
            rare = [w for w in words if documents[index].count(w) == 1]
            if rare and prose.MIN_CHARS <= len(sentence) <= prose.MAX_CHARS:
                return documents[index], sentence, rare[int(random.integers(len(rare)))]
        raise InputError(f"no sentence of {self.text} has a word to ask for; give a longer text")

    def parse(self, completion: str) -> str | None:
        match = re.search(r"[A-Za-z]+", completion)
        return match[0].lower() if match else None
