"""Asks language models the instances of tasks: one row a cell, every answer kept as it comes.

A cell is a task, a length and a number of instances. Answers are recorded one by one, so a run that
was stopped asks only what is missing; a cell's row follows once all its instances are answered.
"""

import dataclasses
import hashlib
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lminf.evals.task import Budget, Task
from lminf.lm.protocol import LanguageModel

Row = dict[str, Any]  # column -> str, int, float, bool or None


@dataclass(frozen=True)
class Cell:
    """What one row measures."""

    task: Task
    length: int  # the budget of a prompt, in its unit
    count: int  # instances

    @property
    def coordinates(self) -> dict[str, Any]:
        """The columns that tell this cell from others: the task, its fields, the length."""
        fields: Any = self.task  # the protocol does not say that it is a dataclass
        return {"task": self.task.name, **dataclasses.asdict(fields), "length": self.length}

    def key(self, seed: int) -> tuple[int, int]:
        """The key of its instances: of its own, so that cells are independent samples."""
        return seed, zlib.crc32(repr(self.coordinates).encode())

    def is_of(self, row: Mapping[str, Any], model: str) -> bool:
        """Whether a row, or an answer, is of this cell and that model."""
        identity = {"model": model, **self.coordinates}
        return all(row.get(name) == value for name, value in identity.items())


def measure(
    models: Mapping[str, LanguageModel],
    cells: Sequence[Cell],
    *,
    budget: Callable[[int], Budget],
    seed: int,
    batch_size: Callable[[Cell], int] = lambda cell: 1,
    rows: Sequence[Row] = (),
    answers: Sequence[Row] = (),
    record: Callable[[Row], None] = lambda answer: None,
    progress: Callable[[int], None] = lambda units: None,
) -> Iterator[Row]:
    """A row for every cell and model: `model`, the cell's coordinates, `instances`, the mean
    `score` with its 95 % interval `low` to `high`, `prompts_digest` and `seconds`.

    `models` are named as rows call them. `rows` and `answers` are those of earlier calls (of this
    generator, and as given to `record`); they are not measured again. `batch_size` is how many
    prompts of a cell the model is given at a time. `progress` is told of the units of prompts, as
    they are answered.
    """
    for cell in cells:
        missing = [name for name in models if not any(cell.is_of(row, name) for row in rows)]
        if not missing:
            continue
        limit = budget(cell.length)
        instances = cell.task.instances(limit, count=cell.count, key=cell.key(seed))
        prompts = [cell.task.prompt(instance) for instance in instances]
        digests = [_digest(prompt) for prompt in prompts]
        for name in missing:
            started = time.perf_counter()
            place = {"model": name, **cell.coordinates}
            known = {
                answer["prompt_digest"]: float(answer["score"])
                for answer in answers
                if cell.is_of(answer, name)
            }
            unanswered = [index for index, digest in enumerate(digests) if digest not in known]
            size = batch_size(cell)
            for start in range(0, len(unanswered), size):
                batch = unanswered[start : start + size]
                completions = models[name].generate(
                    [prompts[index] for index in batch],
                    max_new_tokens=cell.task.max_new_tokens,
                    stop=cell.task.stop,
                )
                for index, completion in zip(batch, completions, strict=True):
                    score = cell.task.score(cell.task.parse(completion), instances[index])
                    known[digests[index]] = score
                    record(
                        {
                            **place,
                            "prompt_digest": digests[index],
                            "completion": completion,
                            "score": score,
                        }
                    )
                progress(sum(limit.count(prompts[index]) for index in batch))
            interval = cell.task.aggregate([known[digest] for digest in digests])
            yield {
                **place,
                "unit": limit.unit,
                "prompts_digest": _digest("\0".join(prompts)),
                "instances": len(instances),
                "score": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "seconds": time.perf_counter() - started,
            }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
