"""LooGLE's published files: long documents with questions of short and long dependency.

Source: Li et al. 2024, arXiv:2311.04939. Fields: input, title, qa_pairs (a list of Q, A and S, or
its text, or `none` for summaries), output. Scored by Rouge-L, of the several scores of the release;
orders of timelines have metrics.order_deviation.
"""

import ast
from dataclasses import dataclass
from typing import Any

from lminf.errors import InputError
from lminf.evals import metrics
from lminf.evals.suites import published
from lminf.evals.suites.published import PublishedTask, Question, Record


@dataclass(frozen=True)
class LooGLE(PublishedTask):
    """Answers and summaries of a file, by Rouge-L."""

    name = "loogle"
    max_new_tokens = 300

    def questions(self) -> list[Question]:
        fields = ("input", "title", "qa_pairs", "output")
        return [
            question
            for record in published.records(self.path, "LooGLE", fields)
            for question in self._of(record)
        ]

    def _of(self, record: Record) -> list[Question]:
        context = f"{record['title']}\n\n{record['input']}"
        if record["qa_pairs"] == "none":
            return [Question("", context, "\n\nWrite a summary of the text above.\nSummary:",
                             str(record["output"]))]  # fmt: skip
        return [
            Question("", context, f"\n\nAnswer the question from the text above.\nQuestion: "
                     f"{pair['Q']}\nAnswer:", str(pair["A"]))
            for pair in self._pairs(record["qa_pairs"])
        ]  # fmt: skip

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
        return metrics.rouge_l(answer, instance.answer)
