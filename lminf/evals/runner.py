"""Runs benchmark tasks on language models: a row per cell, and every answer stored as it arrives.

A cell is a task, a length and a number of instances. Answers are recorded one by one, so a run that
was stopped asks only what is missing; a cell's row follows once all its instances are answered.

    cells = [Cell(Passkey(depth=depth), 4096, 50) for depth in (0.1, 0.5, 0.9)]
    subjects = [Subject(SharedPrefix(lm), {"model": "smollm2"})]
    budget = partial(Budget, encode=lambda text: lm.encode(text)[0], unit="tokens")
    rows = list(measure(subjects, cells, budget=budget, seed=0))
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

TOGETHER = 8  # questions of one text whose answers are chosen in one call of the model

# Columns of an answer: a line that lacks one is asked anew.
ANSWER = {"prompt_digest", "completion", "score", "seconds"}
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
        """The key of its instances: of its own, so that cells are independent samples."""
        return seed, zlib.crc32(repr(self.coordinates).encode())


@dataclass(frozen=True)
class Subject:
    """A language model under test, and the columns that describe it in rows."""

    model: TextGenerator
    columns: Mapping[str, Any]  # that tell it from others, such as its model and policy
    # Further columns of a row, from its length and instances.
    facts: Callable[[int, Sequence[Any]], Mapping[str, Any]] = lambda length, instances: {}
    # An assistant ends its turn, and may answer below an empty line; a text would go on for ever.
    ends_answers: bool = False  # by itself, so that the task's `stop` is not needed

    def identity(self, cell: Cell) -> Row:
        """The columns that tell a row, or an answer, from others."""
        return {**self.columns, **cell.coordinates}

    def missing(
        self,
        cells: Sequence[Cell],
        rows: Sequence[Mapping[str, Any]],
        answers: Sequence[Mapping[str, Any]],
    ) -> dict[Cell, dict[str, Mapping[str, Any]]]:
        """The cells that have no row, each with its known answers by the digests of prompts."""

        def select(cell: Cell, lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
            identity = self.identity(cell).items()
            return [line for line in lines if all(line.get(k) == value for k, value in identity)]

        complete = [line for line in answers if line.keys() >= ANSWER]
        return {
            cell: {answer["prompt_digest"]: answer for answer in select(cell, complete)}
            for cell in cells
            if not select(cell, rows)
        }


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
    `instances`, the mean `score` with its 95 % interval `low` to `high`, the task's `rates`,
    `prompts_digest`, `seconds` and the subject's facts.

    `rows` and `answers` are those of earlier calls (of this generator, and as given to `record`);
    they are not measured again. Neighbouring cells of one task and length are asked in one call of
    the model, which can read once what their prompts share. `progress` is told how many units of
    prompts are done, and of how many, counted by their budgets.
    """
    for cell in cells:
        _questions(cell, budget, seed, count=1)  # refuses what does not fit before anything is read
    work = []  # of each group: every subject with its missing cells
    for _, group in itertools.groupby(cells, key=_asked_together):
        group = list(group)
        of_group = [[line for line in lines if line.get("length") == group[0].length]
                    for lines in (rows, answers)]  # fmt: skip
        work.append([(subject, subject.missing(group, *of_group)) for subject in subjects])
    total = sum(
        cell.length * (cell.count - len(known))
        for each in work for _, missing in each for cell, known in missing.items()
    )  # fmt: skip
    done = 0

    def keep(question: Question, answer: Row) -> None:
        nonlocal done
        record(answer)
        done += question.cell.length
        progress(done, total)

    for each in work:
        drawn = {
            cell: _questions(cell, budget, seed, count=cell.count)
            for cell in itertools.chain(*(missing for _, missing in each))
        }
        for subject, missing in each:
            _ask(subject, [question for cell in missing for question in drawn[cell]], missing, keep)
            for cell, known in missing.items():
                yield _row(subject, cell, budget(cell.length).unit, drawn[cell], known)


def _asked_together(cell: Cell) -> tuple[Any, ...]:
    return cell.task.name, cell.length, cell.task.max_new_tokens, tuple(cell.task.stop)


def _questions(
    cell: Cell, budget: Callable[[int], Budget], seed: int, *, count: int
) -> list[Question]:
    instances = cell.task.instances(budget(cell.length), count=count, key=cell.key(seed))
    prompts = [cell.task.prompt(instance) for instance in instances]
    return [
        Question(cell, instance, prompt, _digest(prompt))
        for instance, prompt in zip(instances, prompts, strict=True)
    ]


def _ask(
    subject: Subject,
    questions: Sequence[Question],
    known: Mapping[Cell, dict[str, Mapping[str, Any]]],
    keep: Callable[[Question, Row], None],
) -> None:
    """Adds the answers that are not `known` yet; each goes to `keep` as soon as it is there."""
    started = time.perf_counter()

    def answered(question: Question, completion: str) -> None:
        nonlocal started
        cell, _, _, digest = question
        seconds, started = time.perf_counter() - started, time.perf_counter()
        known[cell][digest] = answer = {
            **subject.identity(cell),
            "prompt_digest": digest,
            "completion": completion,
            "score": cell.task.score(cell.task.parse(completion), question.instance),
            "seconds": seconds,
        }
        keep(question, answer)

    # Two equal prompts of a cell have one answer.
    unknown = {(each.cell, each.digest): each for each in questions
               if each.digest not in known[each.cell]}  # fmt: skip
    choosing, written = [], []
    for question in unknown.values():
        choices = question.cell.task.choices(question.instance)
        (choosing if choices else written).append(question)
    for alike in _that_begin_alike(choosing):
        for question, choice in zip(alike, _likeliest(subject, alike), strict=True):
            answered(question, choice)
    if written:
        task = written[0].cell.task
        subject.model.generate(
            [question.prompt for question in written], max_new_tokens=task.max_new_tokens,
            stop=() if subject.ends_answers else task.stop,
            on_answer=lambda index, text: answered(written[index], text),
        )  # fmt: skip


def _that_begin_alike(questions: Sequence[Question]) -> Iterator[list[Question]]:
    """Neighbours whose prompts begin alike, to the half, as those of one text do: a few, for a run
    that is stopped loses their answers.
    """
    group: list[Question] = []
    for question in questions:
        half = question.prompt[: len(question.prompt) // 2]
        if group and (len(group) == TOGETHER or not group[0].prompt.startswith(half)):
            yield group
            group = []
        group.append(question)
    if group:
        yield group


def _likeliest(subject: Subject, questions: Sequence[Question]) -> list[str]:
    if not isinstance(subject.model, LanguageModel):
        raise InputError(
            f"{questions[0].cell.task.name} compares the probabilities of answers, which "
            f"{dict(subject.columns)} does not give; ask a model that has the verb score"
        )
    choices = [question.cell.task.choices(question.instance) for question in questions]
    scores = iter(
        subject.model.score(
            [question.prompt for question, of in zip(questions, choices, strict=True) for _ in of],
            list(itertools.chain(*choices)),
        )
    )
    chosen = []
    for options in choices:
        scored = [(option, next(scores).log_prob) for option in options]
        chosen.append(max(scored, key=lambda pair: pair[1])[0])
    return chosen


def _row(
    subject: Subject,
    cell: Cell,
    unit: str,
    questions: Sequence[Question],
    answers: Mapping[str, Mapping[str, Any]],
) -> Row:
    given = [answers[each.digest] for each in questions]
    instances = [question.instance for question in questions]
    interval = cell.task.aggregate([float(answer["score"]) for answer in given])
    return {
        **subject.identity(cell),
        "unit": unit,
        "prompts_digest": _digest("\0".join(question.prompt for question in questions)),
        "instances": len(questions),
        "score": interval.mean,
        "low": interval.low,
        "high": interval.high,
        **cell.task.rates([answer["completion"] for answer in given], instances),
        **subject.facts(cell.length, instances),
        "seconds": sum(
            answers[digest]["seconds"] for digest in {each.digest for each in questions}
        ),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
