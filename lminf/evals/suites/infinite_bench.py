"""∞Bench's published files: fields id, context, input, answer and options, a file a task.

Source: Zhang et al. 2024, arXiv:2402.13718. The file's name says the task. Scores are the
release's: a number or a word that must be named, a letter, F1, Rouge-L, or the share of results
before the first wrong one. Its summaries are scored by Rouge-Lsum; ours by Rouge-L.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lminf.evals import metrics
from lminf.evals.suites import published
from lminf.evals.suites.published import PublishedTask, Question, Record

Scorer = Callable[[str, list[str]], float]
MARKS = str.maketrans(dict.fromkeys("\n:\"'.,?!{}`", " "))
NUMBER = re.compile(r"\d+\.\d+|\d+")


def first_number(completion: str, right: list[str]) -> float:
    match = NUMBER.search(completion)
    return float(match is not None and float(match[0]) == float(right[0]))


def last_number(completion: str, right: list[str]) -> float:
    words = completion.translate(MARKS).split()
    return float(bool(words) and words[-1] == right[0])


def contains_word(completion: str, right: list[str]) -> float:
    return float(right[0].upper() in completion.translate(MARKS).upper().split())


def option_letter(completion: str, right: list[str]) -> float:
    return float(metrics.letter_in(completion) == right[0])


def f1(completion: str, right: list[str]) -> float:
    return max(metrics.token_f1(completion, text) for text in right)


def f1_zh(completion: str, right: list[str]) -> float:
    return max(metrics.character_f1(completion, text) for text in right)


def rouge(completion: str, right: list[str]) -> float:
    return max(metrics.rouge_l(completion, text) for text in right)


def correct_prefix(completion: str, right: list[str]) -> float:
    """The share of the results before the first wrong one."""
    numbers = re.findall(r"\d+", completion)
    same = [one == two for one, two in zip(numbers, right, strict=False)]
    return (same.index(False) if False in same else len(same)) / len(right)


# Scorer and most tokens of an answer, as the release has them. It allows 30,000 for math_calc.
TASKS: Mapping[str, tuple[Scorer, int]] = {
    "passkey": (first_number, 6),
    "number_string": (first_number, 12),
    "kv_retrieval": (contains_word, 50),
    "longbook_sum_eng": (rouge, 1200),
    "longbook_choice_eng": (option_letter, 40),
    "longbook_qa_eng": (f1, 40),
    "longbook_qa_chn": (f1_zh, 40),
    "longdialogue_qa_eng": (contains_word, 40),
    "math_find": (first_number, 3),
    "math_calc": (correct_prefix, 30_000),
    "code_run": (last_number, 5),
    "code_debug": (option_letter, 5),
}


@dataclass(frozen=True)
class InfiniteBench(PublishedTask):
    """A task of ∞Bench, scored as in its release."""

    name = "infinite_bench"

    @property
    def _kind(self) -> tuple[Scorer, int]:
        return published.lookup(Path(self.path).stem, TASKS, self.path, "∞Bench")

    @property
    def max_new_tokens(self) -> int:
        return self._kind[1]

    def questions(self) -> list[Question]:
        fields = ("context", "input", "answer", "options")
        return [
            Question("", record["context"], self._asked(record), self._right(record))
            for record in published.read_records(self.path, "∞Bench", fields)
        ]

    def _asked(self, record: Record) -> str:
        options = published.format_options(record["options"]) if record["options"] else ""
        how = "\nAnswer with the letter of the right option." if options else ""
        return f"\n\n{record['input']}{options}{how}\nAnswer:"

    def _right(self, record: Record) -> list[str]:
        right = published.text_list(record, "answer", self.path)
        if self._kind[0] is option_letter and right[0] in record["options"]:
            return [chr(65 + record["options"].index(right[0]))]
        return right

    def parse(self, completion: str) -> str:
        return completion

    def score(self, answer: str, instance: Any) -> float:
        return self._kind[0](answer, instance.answer)
