"""Asks language models the instances of tasks: one row a cell, every answer kept as it comes.

A cell is a task, a length and a number of instances. Answers are recorded one by one, so a run that
was stopped asks only what is missing; a cell's row follows once all its instances are answered.
"""

import dataclasses
import hashlib
import itertools
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from lminf.errors import InputError
from lminf.evals.task import Budget, Task
from lminf.lm.protocol import LanguageModel, TextGenerator

Row: TypeAlias = dict[str, Any]  # column -> str, int, float, bool or None


@dataclass(frozen=True)
class Cell:
    """What one row measures."""

    task: Task
    length: int  # the budget of a prompt, in its unit
    count: int  # instances

    @property
    def coordinates(self) -> Row:
        """The columns that tell this cell from others: the task, its fields, the length."""
        fields: Any = self.task  # the protocol does not say that it is a dataclass
        return {"task": self.task.name, **dataclasses.asdict(fields), "length": self.length}

    def key(self, seed: int) -> tuple[int, int]:
        """The key of its instances: of its own, so that cells are independent samples, but the
        same for cells that differ in `paired` fields.
        """
        drawn = {k: v for k, v in self.coordinates.items() if k not in self.task.paired}
        return seed, zlib.crc32(repr(drawn).encode())


@dataclass(frozen=True)
class Subject:
    """A language model under test, and what its rows say of it."""

    model: TextGenerator
    columns: Mapping[str, Any]  # that tell it from others, such as its model and policy
    # Further columns of a row, from its length and instances.
    facts: Callable[[int, Sequence[Any]], Mapping[str, Any]] = lambda length, instances: {}

    def identity(self, cell: Cell) -> Row:
        """The columns that tell a row, or an answer, from others."""
        return {**self.columns, **cell.coordinates}

    def select(self, cell: Cell, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Those of some rows or answers that are of this subject and cell."""
        identity = self.identity(cell).items()
        return [row for row in rows if all(row.get(name) == value for name, value in identity)]


class Question(NamedTuple):
    """An instance as it is asked."""

    cell: Cell
    instance: Any
    prompt: str
    digest: str  # of the prompt


def measure(
    subjects: Sequence[Subject],
    cells: Sequence[Cell],
    *,
    budget: Callable[[int], Budget],
    seed: int,
    rows: Sequence[Mapping[str, Any]] = (),
    answers: Sequence[Mapping[str, Any]] = (),
    record: Callable[[Row], None] = lambda answer: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Row]:
    """A row for every subject and cell: the subject's columns, the cell's coordinates, `unit`,
    `instances`, the mean `score` with its 95 % interval `low` to `high`, `prompts_digest`,
    `seconds` and the subject's facts.

    `rows` and `answers` are those of earlier calls (of this generator, and as given to `record`);
    they are not measured again. Neighbouring cells of one task and length are asked in one call of
    the model, which can read once what their prompts share. `progress` is told how many units of
    prompts are done, and of how many, counted by their budgets.
    """
    for cell in cells:
        _questions(cell, budget(cell.length), seed, count=1)  # refuses before anything is read
    groups = [list(group) for _, group in itertools.groupby(cells, key=_asked_together)]
    work = [
        [
            (subject, [cell for cell in group if not subject.select(cell, rows)])
            for subject in subjects
        ]
        for group in groups
    ]
    total = sum(cell.length * cell.count for each in work for _, group in each for cell in group)
    done = 0

    def advance(questions: Sequence[Question]) -> None:
        nonlocal done
        done += sum(question.cell.length for question in questions)
        progress(done, total)

    for each in work:
        missing = dict.fromkeys(cell for _, group in each for cell in group)
        drawn = {
            cell: _questions(cell, budget(cell.length), seed, count=cell.count) for cell in missing
        }
        for subject, group in each:
            known = {
                (cell, answer["prompt_digest"]): answer
                for cell in group
                for answer in subject.select(cell, answers)
            }
            questions = [question for cell in group for question in drawn[cell]]
            unknown = [each for each in questions if (each.cell, each.digest) not in known]
            advance([each for each in questions if (each.cell, each.digest) in known])
            for question, answer in _ask(subject, unknown, record, advance):
                known[question.cell, question.digest] = answer
            for cell in group:
                yield _row(subject, cell, budget(cell.length), drawn[cell], known)


def _asked_together(cell: Cell) -> tuple[Any, ...]:
    return cell.task.name, cell.length, cell.task.max_new_tokens, tuple(cell.task.stop)


def _questions(cell: Cell, budget: Budget, seed: int, *, count: int) -> list[Question]:
    instances = cell.task.instances(budget, count=count, key=cell.key(seed))
    prompts = [cell.task.prompt(instance) for instance in instances]
    return [
        Question(cell, instance, prompt, _digest(prompt))
        for instance, prompt in zip(instances, prompts, strict=True)
    ]


def _ask(
    subject: Subject,
    questions: Sequence[Question],
    record: Callable[[Row], None],
    advance: Callable[[Sequence[Question]], None],
) -> list[tuple[Question, Row]]:
    """Every question with its answer, which has been recorded as soon as it was there."""
    answered, started = [], time.perf_counter()
    # Two equal prompts of a cell have one answer.
    distinct = list({(each.cell, each.digest): each for each in questions}.values())

    def keep(question: Question, completion: str) -> None:
        nonlocal started
        task, now = question.cell.task, time.perf_counter()
        answer = {
            **subject.identity(question.cell),
            "prompt_digest": question.digest,
            "completion": completion,
            "score": task.score(task.parse(completion), question.instance),
            "seconds": now - started,
        }
        started = now
        record(answer)
        advance([question])
        answered.append((question, answer))

    free = []
    for question in distinct:
        if choices := question.cell.task.choices(question.instance):
            keep(question, _likeliest(subject, question, choices))
        else:
            free.append(question)
    if free:
        task = free[0].cell.task
        subject.model.generate(
            [question.prompt for question in free], max_new_tokens=task.max_new_tokens,
            stop=task.stop, on_answer=lambda index, text: keep(free[index], text),
        )  # fmt: skip
    return answered


def _likeliest(subject: Subject, question: Question, choices: Sequence[str]) -> str:
    if not isinstance(subject.model, LanguageModel):
        raise InputError(
            f"{question.cell.task.name} compares the probabilities of answers, which "
            f"{dict(subject.columns)} does not give; ask a model that has the verb score"
        )
    scores = subject.model.score([question.prompt] * len(choices), choices)
    return max(zip(choices, scores, strict=True), key=lambda pair: pair[1].log_prob)[0]


def _row(
    subject: Subject,
    cell: Cell,
    budget: Budget,
    questions: Sequence[Question],
    answers: Mapping[tuple[Cell, str], Mapping[str, Any]],
) -> Row:
    given = {question.digest: answers[cell, question.digest] for question in questions}
    interval = cell.task.aggregate([float(given[each.digest]["score"]) for each in questions])
    return {
        **subject.identity(cell),
        "unit": budget.unit,
        "prompts_digest": _digest("\0".join(question.prompt for question in questions)),
        "instances": len(questions),
        "score": interval.mean,
        "low": interval.low,
        "high": interval.high,
        **subject.facts(cell.length, [question.instance for question in questions]),
        "seconds": sum(answer["seconds"] for answer in given.values()),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
