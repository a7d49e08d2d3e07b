"""LooGLE's published files: long documents with questions of short and long dependency.

Source: Li et al. 2024, arXiv:2311.04939. Fields: input, title, qa_pairs (a list of Q, A and S, or
its text, or `none` for summaries), output. Answers and summaries are scored by Rouge-L, of the
several scores of the release; a cloze, whose A is an object of masks and what they hide, by the
share of its masks; orders of timelines have metrics.order_deviation.
"""

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lminf.errors import InputError
from lminf.evals import metrics
from lminf.evals.suites import published
from lminf.evals.suites.published import PublishedTask, Question, Record


@dataclass(frozen=True)
class LooGLE(PublishedTask):
    """Answers and summaries scored by Rouge-L, clozes by the share of their masks."""

    match: Literal["exact", "partial"] = "exact"  # partial: a word of what a mask hides is enough

    name = "loogle"
    max_new_tokens = 300

    def questions(self) -> list[Question]:
        fields = ("input", "title", "qa_pairs", "output")
        return [
            question
            for record in published.read_records(self.path, "LooGLE", fields)
            for question in self._of(record)
        ]

    def _of(self, record: Record) -> list[Question]:
        context = f"{record['title']}\n\n{record['input']}"
        if record["qa_pairs"] == "none":
            return [Question("", context, "\n\nWrite a summary of the text above.\nSummary:",
                             str(record["output"]))]  # fmt: skip
        return [self._asked(context, pair) for pair in self._pairs(record["qa_pairs"])]

    def _asked(self, context: str, pair: Mapping[str, Any]) -> Question:
        if hidden := pair["A"] if isinstance(pair["A"], dict) else None:
            request = (
                f"\n\nEvery <mask-n> of the following sentences hides a person, place or "
                f"organisation of the text above; equal masks hide the same.\n{pair['Q']}\nSay "
                f'what they hide in a JSON object, such as {{"<mask-0>": "Jane Roe"}}.\nAnswer:'
            )
            return Question(
                "", context, request, {mask: str(name) for mask, name in hidden.items()}
            )
        request = f"\n\nAnswer the question from the text above.\nQuestion: {pair['Q']}\nAnswer:"
        return Question("", context, request, str(pair["A"]))

    def _pairs(self, written: Any) -> list[dict[str, Any]]:
        try:
            pairs = ast.literal_eval(written) if isinstance(written, str) else written
            if all("Q" in pair and "A" in pair for pair in pairs):
                return pairs
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pass
        raise InputError(
            f"{self.path} holds qa_pairs that are no list of Q and A ({str(written)[:60]!r}); "
            f"it is not of LooGLE, or of another version of it"
        )

    def parse(self, completion: str) -> str:
        return completion

    def score(self, answer: str, instance: Any) -> float:
        if not isinstance(instance.answer, Mapping):
            return metrics.rouge_l(answer, instance.answer)
        named = parse_masks(answer)
        right = [
            name == named.get(mask) if self.match == "exact"
            else bool(set(name.split()) & set(named.get(mask, "").split()))
            for mask, name in instance.answer.items()
        ]  # fmt: skip
        return sum(right) / len(right)


def parse_masks(completion: str) -> dict[str, str]:
    """What an answer says that masks hide: the first object of it that can be read."""
    for written in re.findall(r"\{[^{}]*\}", completion):
        for read in (json.loads, ast.literal_eval):
            try:
                parsed = read(written)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                continue
            if isinstance(parsed, dict):
                return {str(mask): str(name) for mask, name in parsed.items()}
    return {}
