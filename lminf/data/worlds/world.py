"""Worlds: texts of which everything is known, because they were made from it.

A world is a value that its maker's settings and seed fix: documents, questions, the truth behind
both, and what is kept apart for tests. Its texts are words with spaces between them, and its
tokenizer has one token for each word.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from lminf.atomic import disk_errors
from lminf.data import tokenizing
from lminf.data.store import Facts
from lminf.data.tokenizers import SPACE, Tokenizer
from lminf.errors import InputError

Words: TypeAlias = tuple[str, ...]
END = "<end>"  # after each document; its token is 0, and word i of the vocabulary is token i + 1


class Question(NamedTuple):
    """Something that a model may be asked, and the one right answer."""

    prompt: Words
    answer: Words
    subject: int  # index in the world's truth
    attribute: str


@dataclass(frozen=True)
class World:
    vocabulary: Words  # every word that a text of it may hold, each once
    corpus: Mapping[str, Sequence[Words]]  # split -> documents, in a random order
    questions: Mapping[str, Sequence[Question]]  # split -> questions about its subjects
    truth: Sequence[Mapping[str, Any]]  # what the texts say, a row for each subject

    @cached_property
    def tokenizer(self) -> Tokenizer:
        vocab = {END: 0} | {SPACE + word: i + 1 for i, word in enumerate(self.vocabulary)}
        backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=END))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        backend.add_special_tokens([AddedToken(END, special=True, normalized=False)])
        return Tokenizer(backend, {"eos_token": END}, False, (0,), None)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate((END, *self.vocabulary))}

    def encode(self, words: Iterable[str]) -> Int[np.ndarray, " T"]:
        """Token ids, int32: those that `tokenizer` gives the words with spaces between them, and 0
        for END."""
        return np.array([self._ids[word] for word in words], np.int32)

    def documents(self, name: str) -> list[Int[np.ndarray, " _"]]:
        """Token ids of each document of `corpus[name]`, or of each question and its answer of
        `questions[name.removeprefix("questions_")]`, ended by 0.
        """
        return [np.append(self.encode(text), np.int32(0)) for text in self._texts()[name]]

    def _texts(self) -> dict[str, Sequence[Words]]:
        with_answers = {
            f"questions_{split}": [question.prompt + question.answer for question in questions]
            for split, questions in self.questions.items() if questions
        }  # fmt: skip
        return {**self.corpus, **with_answers}

    def write(self, folder: Path) -> dict[str, Facts]:
        """Facts of the token stores that were written into a new or empty folder, by name.

        Beside the store NAME lie its texts, NAME.jsonl; questions.jsonl and truth.jsonl have what
        the world asks and what is true in it.
        """
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise InputError(f"{folder} is there and not empty; name a new folder with --out")
            return self._write(folder)

    def _write(self, folder: Path) -> dict[str, Facts]:
        rows = [
            {"split": split, **question._asdict()}
            for split, questions in self.questions.items() for question in questions
        ]  # fmt: skip
        _write_lines(folder / "truth.jsonl", self.truth)
        _write_lines(folder / "questions.jsonl", rows)
        facts = {}
        for name, texts in self._texts().items():
            path = folder / f"{name}.jsonl"
            _write_lines(path, ({"text": " ".join(words)} for words in texts))
            facts[name] = tokenizing.tokenize(
                [str(path)], self.tokenizer, str(folder / name), name=str(folder)
            )
        return facts


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
