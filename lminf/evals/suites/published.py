"""Tasks whose questions are in a published file: reading records, and fitting them to a budget.

A file is given by its path, as in `longbench:path=qasper.jsonl`, and stays where it is. Contexts
that are too long lose their middle, as LongBench has it, or are refused; rows count the prompts
cut. The prompts are our own sentences unless a file holds whole prompts, so scores are near
published ones and not equal to them.
"""

import abc
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from lminf.atomic import read_bytes
from lminf.errors import InputError, refusing
from lminf.evals.suites.generated import fill
from lminf.evals.suites.suite_task import Instance, SuiteTask
from lminf.evals.task import Budget

Record: TypeAlias = Mapping[str, Any]


class Question(NamedTuple):
    """One of a file: its prompt is prefix + context + suffix."""

    prefix: str
    context: str  # of which the middle can be left out
    suffix: str
    answer: Any
    options: Sequence[str] = ()


@dataclass(frozen=True)
class PublishedTask(SuiteTask):
    """Questions of a file. The same ones are asked at every length."""

    path: str
    too_long: Literal["middle", "refuse"] = "middle"

    scope, diffusion = "high", "high"
    stop = ()

    @abc.abstractmethod
    def questions(self) -> Sequence[Question]:
        """All of the file, in its order."""

    def instances(self, budget: Budget, *, count: int, key: Sequence[int]) -> list[Instance]:
        questions = _questions_of(self)
        if count > len(questions):
            raise InputError(
                f"{self.path} holds {len(questions)} questions, fewer than the {count} instances "
                f"asked for; ask for at most {len(questions)}"
            )
        # By the seed alone, of which a runner makes the key of every cell.
        order = np.random.default_rng(key[0]).permutation(len(questions))
        return [self._fitted(budget, questions[index]) for index in order[:count]]

    def _fitted(self, budget: Budget, question: Question) -> Instance:
        prefix, context, suffix, answer, options = question
        text = prefix + context + suffix
        if (tokens := budget.count(text)) <= budget.size:
            return Instance(text, answer, tokens, options=options)
        if self.too_long == "refuse":
            raise InputError(
                f"a prompt of {self.path} takes {tokens} {budget.unit}, more than the length "
                f"{budget.size}; ask for a length of at least {tokens}, or leave out "
                f"too_long=refuse, and the middle of its context is left out"
            )

        def shortened(kept: int) -> str:
            head, tail = context[: kept - kept // 2], context[len(context) - kept // 2 :]
            return prefix + head + tail + suffix

        filled = fill(budget, shortened, part="character of its context", max_parts=len(context))
        cut = len(context) - filled.parts
        return Instance(filled.prompt, answer, filled.tokens, cut, options)


@functools.lru_cache(maxsize=8)
def _questions_of(task: PublishedTask) -> Sequence[Question]:
    advice = "a field is of another type than the published ones; fetch it again"
    with refusing(task.path, kind=f"file of {task.name}", advice=advice):
        questions = task.questions()
        for number, question in enumerate(questions, 1):
            if not isinstance(question.context, str):
                kind = type(question.context).__name__
                raise InputError(
                    f"question {number} of {task.path} has {kind} for a text; {advice}"
                )
        return questions


# --- Files ----------------------------------------------------------------------------------------


def read_records(path: str, benchmark: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The records of a .jsonl file, or of a .json file with a list of them or with an object whose
    values they are; each has the fields. Anything else is refused in one sentence.
    """
    content = _parsed(Path(path), benchmark)
    if isinstance(content, dict):
        content = list(content.values())
    if not isinstance(content, list) or not content:
        raise InputError(f"{path} holds no list of records, as the files of {benchmark} do")
    for number, record in enumerate(content, 1):
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise InputError(f"record {number} of {path} is {kind} and not an object")
        if missing := [name for name in fields if name not in record]:
            raise InputError(
                f"record {number} of {path} has no field {missing[0]!r} (it has "
                f"{', '.join(map(repr, list(record)[:8]))}): it is not of {benchmark}, or of "
                f"another version of it"
            )
    return content


def _parsed(path: Path, benchmark: str) -> Any:
    if path.suffix not in (".json", ".jsonl"):
        raise InputError(
            f"{path} is no .json or .jsonl file; give a file of {benchmark} in one of these forms"
        )
    try:
        text = read_bytes(path).decode("utf-8-sig")
        if path.suffix == ".json":
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON in UTF-8 ({error}); fetch it again") from error


def text_list(record: Record, field: str, path: str) -> list[str]:
    """The text or texts of a field."""
    value = record[field]
    listed = value if isinstance(value, list) else [value]
    if not listed or not all(isinstance(each, (str, int, float)) for each in listed):
        raise InputError(f"{path} holds {value!r} as {field!r}, not a text or a list of texts")
    return [str(each) for each in listed]


def letter(record: Record, field: str, letters: str, path: str) -> str:
    """The letter of the right option, of as many as there are."""
    if record[field] not in tuple(letters):
        raise InputError(
            f"{path} holds {record[field]!r} as {field!r}, which is none of the options "
            f"{', '.join(letters)}; it is damaged, or of another version"
        )
    return record[field]


def lookup(name: str, known: Mapping[str, Any], path: str, benchmark: str) -> Any:
    """What the table says of a data set; a name that it lacks is refused."""
    if name not in known:
        raise InputError(
            f"{path} is of the data set {name!r}, which {benchmark} does not have; it has "
            f"{', '.join(known)}"
        )
    return known[name]


def format_options(options: Sequence[str]) -> str:
    """The options on lines of their own, from (A) on."""
    return "".join(f"\n({chr(65 + index)}) {text}" for index, text in enumerate(options))
