"""Published files of benchmarks that are also generated here: Needle Threading, BestAnswer,
TSort, LongIns, M4LE; and SuperGPQA's multiple choice.

Their sources are named in needle_threading.py, ada_leval.py, long_ins.py and m4le.py; SuperGPQA: Du
et al. 2025, arXiv:2502.14739.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from lminf.errors import InputError
from lminf.evals import metrics
from lminf.evals.suites import ada_leval, published
from lminf.evals.suites.needle_threading import UUID, UUID_TOKENS
from lminf.evals.suites.published import PublishedTask, Question
from lminf.evals.suites.suite_task import Answers
from lminf.ranges import Range

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class NeedleThreadingFile(PublishedTask):
    """A split of Needle Threading, scored by the share of the expected values."""

    name = "needle_threading_file"
    max_new_tokens = 25 * UUID_TOKENS

    def questions(self) -> list[Question]:
        fields = ("haystack", "keys", "values", "question")
        return [
            Question("", record["haystack"], f"\n{record['question'].rstrip(' ')}",
                     self._expected(record["haystack"], str(record["values"])))
            for record in published.read_records(self.path, "Needle Threading", fields)
        ]  # fmt: skip

    def _expected(self, haystack: str, values: str) -> list[str]:
        """Of a thread the values that are no key themselves: its end."""
        keys = set(re.findall(rf'"({UUID.pattern})":', haystack))
        expected = [value for value in UUID.findall(values) if value not in keys]
        if not expected:
            raise InputError(f"{self.path} has a record without the value that is expected")
        return expected

    def parse(self, completion: str) -> list[str]:
        return UUID.findall(completion)

    def score(self, answer: Sequence[str], instance: Any) -> float:
        expected = instance.answer
        return len(set(answer[: len(expected)]) & set(expected)) / len(expected)


@dataclass(frozen=True)
class BestAnswerFile(ada_leval.CandidateLabel, PublishedTask):
    """Ada-LEval's BestAnswer: the label of the accepted answer of a question in a forum."""

    name = "best_answer_file"
    max_new_tokens = 32

    def questions(self) -> list[Question]:
        fields = ("question", "all_answers", "answer")
        return [
            Question(
                f"{record['question']}\n\nBelow are candidate answers to this question.\n",
                "".join(f"\nA{n}:\n{text}\n" for n, text in enumerate(record["all_answers"], 1)),
                "\nWhich is the most helpful one? Answer with its label, such as A2.\nAnswer:",
                (int(str(record["answer"]).lstrip("A")), len(record["all_answers"])),
            )
            for record in published.read_records(self.path, "Ada-LEval", fields)
        ]


@dataclass(frozen=True)
class TSortFile(ada_leval.SegmentOrder, PublishedTask):
    """Ada-LEval's TSort: the order of the segments, asked for with the prompts of the release."""

    too_long: Literal["middle", "refuse"] = "refuse"  # without its middle no order can be told

    name = "tsort_file"
    max_new_tokens = 32

    def questions(self) -> list[Question]:
        return [
            Question("", record["prompt"], "", self._order(record["answer"]))
            for record in published.read_records(self.path, "Ada-LEval", ("prompt", "answer"))
        ]

    def _order(self, written: Any) -> tuple[int, ...]:
        order = ada_leval.parse_order(str(written))
        if order is None:
            raise InputError(f"{self.path} has {written!r} as an answer, which is no order of four")
        return order


@dataclass(frozen=True)
class LongInsFile(PublishedTask):
    """LongIns: the numbers of the questions answered wrongly, in brackets, scored by set F1."""

    name = "long_ins_file"
    max_new_tokens = 256

    def questions(self) -> list[Question]:
        return [
            Question(
                f"{record.get('task_prompt', '')}\n\nBelow are numbered questions with answers, "
                f"some of which are wrong.\n",
                record["Data"],
                "\nList the numbers of all questions whose answer is wrong in brackets, such as "
                "[0, 3].\nWrong:",
                frozenset(record["error"]),
            )
            for record in published.read_records(self.path, "LongIns", ("Data", "error"))
        ]

    def parse(self, completion: str) -> frozenset[int]:
        return metrics.numbers_in(" ".join(re.findall(r"\[(.*?)\]", completion)))

    def score(self, answer: frozenset[int], instance: Any) -> float:
        return metrics.set_f1(answer, instance.answer)


# The release's score of each task of M4LE: whether an answer contains a right one, is one, the F1
# of its parts between commas, the recall of Rouge-L, or BLEU of Chinese or of English.
M4LE = {
    **dict.fromkeys(("arxiv", "pubmed", "booksum", "cnnnews", "wikihow", "bigpatent_global_sum"),
                    "recall"),
    **dict.fromkeys(("triviaqa", "newsqa", "duorc", "nq-open", "c3", "dureader", "hotpotqa", "wow",
                     "bigpatent_global_cls", "drcd_explicit-single", "drcd_semantic-single"),
                    "contains"),
    **dict.fromkeys(("wikitext-103", "wiki2019zh", "mnds-news_explicit-single",
                     "thucnews_explicit-single", "mnds-news_semantic-multiple",
                     "thucnews_semantic-multiple"), "equals"),
    **dict.fromkeys(("marc", "online-shopping", "mnds-news_explicit-multiple",
                     "thucnews_explicit-multiple"), "parts"),
    **{f"{name}-{languages}": f"bleu_{languages[-2:]}"
       for name in ("open-subtitles", "news-commentary", "tedtalks")
       for languages in ("en2zh", "zh2en")},
}  # fmt: skip
# Where the release ends the answers to questions, beside the end of a line.
M4LE_ENDS = {
    **dict.fromkeys(("triviaqa", "newsqa", "duorc", "nq-open", "hotpotqa"), "."),
    **dict.fromkeys(("c3", "dureader", "drcd_semantic-single"), "。"),
    "wow": ",", "drcd_explicit-single": "，", "bigpatent_global_cls": ":",
}  # fmt: skip


@dataclass(frozen=True)
class M4LEFile(PublishedTask):
    """A task of M4LE, with the release's prompts. Its Chinese summaries are not scored here. The
    BLEU of a translation is of that text by itself, where the release has one BLEU for all.
    """

    bucket: Annotated[int, Range(min=1, max=10**6)] | None = None  # words; none: all of the file

    name = "m4le_file"

    @property
    def _kind(self) -> str:
        return published.lookup(Path(self.path).stem, M4LE, self.path, "M4LE as it is scored here")

    @property
    def _translates(self) -> bool:
        return self._kind.startswith("bleu")

    @property
    def max_new_tokens(self) -> int:
        return 1024 if self._translates else 128

    @property
    def stop(self) -> Sequence[str]:
        return () if self._translates else ("\n",)

    def questions(self) -> list[Question]:
        fields = ("instruction", "input", "answers", "length_bucket")
        records = [
            record for record in published.read_records(self.path, "M4LE", fields)
            if self.bucket in (None, record["length_bucket"])
        ]  # fmt: skip
        if not records:
            raise InputError(f"{self.path} has no instance of the bucket {self.bucket}")
        if self._translates:
            metrics.bleu("", "", tokenize="13a")  # refuses here, before a model has translated
        return [
            Question(f"{record['instruction']}\n", record["input"], "",
                     published.text_list(record, "answers", self.path))
            for record in records
        ]  # fmt: skip

    def parse(self, completion: str) -> str:
        end = M4LE_ENDS.get(Path(self.path).stem)
        return (completion.split(end)[0] if end else completion).strip()

    def score(self, answer: str, instance: Any) -> float:
        right, kind = instance.answer, self._kind
        if kind == "contains":
            return float(any(text.lower() in answer.lower() for text in right))
        if kind == "equals":
            normalised = answer.lower().rstrip(".。")
            return float(any(text.lower().rstrip(".。") == normalised for text in right))
        if kind == "parts":
            return metrics.set_f1(_parts(answer), _parts(right[0]))
        if kind == "recall":
            return max(metrics.rouge_l_recall(answer, text) for text in right)
        tokenize = "zh" if kind == "bleu_zh" else "13a"
        return max(metrics.bleu(answer, text, tokenize=tokenize) for text in right)


def _parts(text: str) -> set[str]:
    """What stands between commas in the first sentence."""
    return {part.strip() for part in re.split("[,，]", re.split("[.。]", text)[0]) if part.strip()}


@dataclass(frozen=True)
class SuperGPQA(PublishedTask):
    """SuperGPQA: multiple choice with up to ten options, scored by the letter of the answer."""

    discipline: str | None = None  # none: all of the file
    answers: Answers = "written"

    name = "super_gpqa"
    scope, diffusion = "low", "high"
    max_new_tokens = 32

    def questions(self) -> list[Question]:
        fields = ("question", "options", "answer_letter", "discipline")
        records = published.read_records(self.path, "SuperGPQA", fields)
        known = dict.fromkeys(str(record["discipline"]) for record in records)
        if self.discipline is not None and self.discipline not in known:
            raise InputError(
                f"{self.path} has no discipline {json.dumps(self.discipline)}; it has "
                f"{', '.join(known)}"
            )
        return [
            Question(
                "Answer the question with the letter of the right option.\n\n",
                record["question"],
                f"{published.format_options(record['options'])}\nAnswer:",
                (published.letter(record, "answer_letter", letters, self.path), len(letters)),
                [f" {letter}" for letter in letters],
            )
            for record in records
            if self.discipline in (None, record["discipline"])
            for letters in [LETTERS[: len(record["options"])]]
        ]

    def parse(self, completion: str) -> str:
        return completion

    def score(self, answer: str, instance: Any) -> float:
        letter, options = instance.answer
        return float(metrics.letter_in(answer, LETTERS[:options]) == letter)
