"""LongBench's published files: 21 data sets of version 1, multiple choice of version 2.

Source: Bai et al. 2024, arXiv:2308.14508; version 2: Bai et al. 2025, arXiv:2412.15204. Fields of
version 1: input, context, answers, length, dataset, language, all_classes, _id. Metrics and lengths
of answers are the release's. Its prompts are read from the release's dataset2prompt.json where
`prompts` names that file; without it each category has one sentence of ours. Words of Chinese
answers are characters here, which the release cuts by jieba.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lminf.atomic import read_bytes
from lminf.errors import InputError
from lminf.evals import metrics
from lminf.evals.suites import published
from lminf.evals.suites.published import PublishedTask, Question
from lminf.evals.suites.suite_task import Answers


class DataSet(NamedTuple):
    """What the release says of one data set."""

    metric: str
    max_new_tokens: int
    template: str
    first_line: bool = False  # only the first line of an answer counts


QA = "{context}\n\nAnswer the question from the text above in as few words as you can.\nQuestion: {input}\nAnswer:"  # noqa: E501
SUMMARY = "{context}\n\nWrite a summary of the text above.\nSummary:"
QUERY = "{context}\n\nAnswer the query from the meeting above in a few sentences.\nQuery: {input}\nAnswer:"  # noqa: E501
SHOTS = "{context}\n{input}"
CODE = "{context}{input}"
PLACE = "{context}\n\nWhich paragraph above is this the summary of?\n{input}\nAnswer with its name, such as Paragraph 1: Paragraph"  # noqa: E501
COUNT = "{context}\n\nHow many different paragraphs are above, where some stand several times? Answer with the number alone.\nAnswer:"  # noqa: E501

DATASETS: Mapping[str, DataSet] = {
    "narrativeqa": DataSet("f1", 128, QA),
    "qasper": DataSet("f1", 128, QA),
    "multifieldqa_en": DataSet("f1", 64, QA),
    "multifieldqa_zh": DataSet("f1_zh", 64, QA),
    "hotpotqa": DataSet("f1", 32, QA),
    "2wikimqa": DataSet("f1", 32, QA),
    "musique": DataSet("f1", 32, QA),
    "dureader": DataSet("rouge_zh", 128, QA),
    "gov_report": DataSet("rouge", 512, SUMMARY),
    "qmsum": DataSet("rouge", 512, QUERY),
    "multi_news": DataSet("rouge", 512, SUMMARY),
    "vcsum": DataSet("rouge_zh", 512, SUMMARY),
    "trec": DataSet("class", 64, SHOTS, first_line=True),
    "triviaqa": DataSet("f1", 32, SHOTS, first_line=True),
    "samsum": DataSet("rouge", 128, SHOTS, first_line=True),
    "lsht": DataSet("class", 64, SHOTS, first_line=True),
    "passage_count": DataSet("number", 32, COUNT),
    "passage_retrieval_en": DataSet("number", 32, PLACE),
    "passage_retrieval_zh": DataSet("number", 32, PLACE),
    "lcc": DataSet("code", 64, CODE),
    "repobench-p": DataSet("code", 64, CODE),
}


class Answer(NamedTuple):
    """The reference answers, of which one is enough, and the labels of a classification."""

    texts: Sequence[str]
    classes: Sequence[str]


METRICS: Mapping[str, Callable[[str, str, Sequence[str]], float]] = {
    "f1": lambda completion, right, _: metrics.token_f1(completion, right),
    "f1_zh": lambda completion, right, _: metrics.character_f1(completion, right),
    "rouge": lambda completion, right, _: metrics.rouge_l(completion, right),
    "rouge_zh": lambda completion, right, _: metrics.character_rouge_l(completion, right),
    "class": metrics.classified,
    "number": lambda completion, right, _: metrics.number_share(completion, _number(right)),
    "code": lambda completion, right, _: metrics.code_similarity(completion, right),
}


def _number(text: str) -> int:
    """Of `Paragraph 12` or `12`."""
    return int("".join(filter(str.isdigit, text)) or -1)


@dataclass(frozen=True)
class LongBench(PublishedTask):
    """A data set of LongBench, scored by its metric. Files of LongBench-E have the same form."""

    prompts: str | None = None  # the release's dataset2prompt.json; none: our own sentences

    name = "longbench"

    @property
    def dataset(self) -> DataSet:
        return published.lookup(self._name, DATASETS, self.path, "LongBench")

    @property
    def _name(self) -> str:
        return Path(self.path).stem.removesuffix("_e")

    @property
    def max_new_tokens(self) -> int:
        return self.dataset.max_new_tokens

    def questions(self) -> list[Question]:
        fields = ("input", "context", "answers", "all_classes")
        head, tail = self._template().split("{context}", 1)
        return [
            Question(
                head.replace("{input}", record["input"]), record["context"],
                tail.replace("{input}", record["input"]),
                Answer(published.text_list(record, "answers", self.path),
                       record["all_classes"] or ()),
            )
            for record in published.read_records(self.path, "LongBench", fields)
        ]  # fmt: skip

    def _template(self) -> str:
        if self.prompts is None:
            return self.dataset.template
        try:
            template = json.loads(read_bytes(Path(self.prompts)).decode())[self._name]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.prompts} has no prompt for {self._name} ({error}); give "
                f"dataset2prompt.json of LongBench's release"
            ) from error
        if "{context}" not in template:
            raise InputError(f"the prompt for {self._name} in {self.prompts} has no {{context}}")
        return template

    def parse(self, completion: str) -> str:
        return completion.lstrip("\n").split("\n")[0] if self.dataset.first_line else completion

    def score(self, answer: str, instance: Any) -> float:
        """The best over the texts that are right."""
        right: Answer = instance.answer
        metric = METRICS[self.dataset.metric]
        return max(metric(answer, text, right.classes) for text in right.texts)


@dataclass(frozen=True)
class LongBenchV2(PublishedTask):
    """LongBench v2: multiple choice about a long text, scored by the letter of the answer."""

    answers: Answers = "written"

    name = "longbench_v2"
    max_new_tokens = 32

    def questions(self) -> list[Question]:
        choices = [f"choice_{letter}" for letter in "ABCD"]
        fields = ("question", "context", "answer", *choices)
        return [
            Question(
                "Read the text and answer the question.\n\n", record["context"],
                f"\n\nQuestion: {record['question']}"
                f"{published.format_options([record[choice] for choice in choices])}\n"
                f"Answer with the letter of the right option.\nThe correct answer is (",
                published.letter(record, "answer", "ABCD", self.path), "ABCD",
            )
            for record in published.read_records(self.path, "LongBench v2", fields)
        ]  # fmt: skip

    def parse(self, completion: str) -> str | None:
        return metrics.letter_in(completion)
