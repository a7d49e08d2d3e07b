"""A cache of answers, with which an interrupted program resumes.

A program over a model is a sequence of prompts, each of which follows from the answers before it.
Recording every answer beside its prompt's digest is therefore all that a program needs to resume.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lminf.lm.protocol import OnAnswer, TextGenerator

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Recorded:
    """A TextGenerator that asks `model` only what `rows` do not answer.

    `record` is given each new answer as a row as soon as it is complete; with the functions
    of lminf.run.folder:

        Recorded(lm, "smollm2", folder.read_lines(path), partial(folder.append_line, path))
    """

    model: TextGenerator
    name: str  # of the model: answers of others in the same rows are not its own
    rows: Sequence[Row] = ()
    record: Callable[[Row], object] = lambda row: None
    _answers: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        known = {row["digest"]: row["answer"] for row in self.rows if row["model"] == self.name}
        self._answers.update(known)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        on_answer: OnAnswer | None = None,
    ) -> list[str]:
        digests = [_digest(prompt, max_new_tokens, stop) for prompt in prompts]
        unknown = dict(zip(digests, prompts, strict=True))
        unknown = {digest: p for digest, p in unknown.items() if digest not in self._answers}

        def keep(index: int, answer: str) -> None:
            digest = list(unknown)[index]
            self._answers[digest] = answer
            self.record({"model": self.name, "digest": digest, "answer": answer})

        if unknown:
            self.model.generate(
                list(unknown.values()), max_new_tokens=max_new_tokens, stop=stop, on_answer=keep
            )
        answers = [self._answers[digest] for digest in digests]
        if on_answer:
            for index, answer in enumerate(answers):
                on_answer(index, answer)
        return answers


def _digest(prompt: str, max_new_tokens: int, stop: Sequence[str]) -> str:
    """Of all that an answer depends on beside the model."""
    return hashlib.sha256(repr((prompt, max_new_tokens, tuple(stop))).encode()).hexdigest()
