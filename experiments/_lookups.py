"""A world of lookups: documents of characters that hold eight facts, and questions about them.

A document is a row of characters: eight facts, each of them one character that names a key and its
value, among characters that say nothing. A prompt is a document and a key; the answer is its value.
"""

from collections.abc import Sequence

import numpy as np

from lminf.experiments import _seeds
from lminf.programs.longpo import Prompts

KEYS = VALUES = 8
FACT, KEY, VALUE, FILLER = 32, 96, 104, 112  # first characters of each kind, eight or more of them
ASK, END = 120, 126  # that ask for a summary of the first, second, … length; what ends one
TRAINING, MEASURED = 0, 1  # random streams


def documents(
    random: np.random.Generator, rows: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(documents [rows, length], and of every key its value and its place [rows, KEYS])."""
    content = random.integers(FILLER, FILLER + 8, (rows, length))
    values = random.integers(0, VALUES, (rows, KEYS))
    places = np.argsort(random.random((rows, length)), axis=1)[:, :KEYS]
    np.put_along_axis(content, places, FACT + VALUES * np.arange(KEYS) + values, axis=1)
    return content, values, places


class Lookups(_seeds.DrawnRows):
    """Batches of documents, each with many questions about its facts and their answers."""

    def batch(self, step: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng((self.seed, TRAINING, step))
        count = int(random.integers(1, (self.length - KEYS) // 2))
        content, values, _ = documents(random, self.rows, self.length + 1 - 2 * count)
        keys = random.integers(0, KEYS, (self.rows, count))
        answers = VALUE + np.take_along_axis(values, keys, axis=1)
        dialogue = np.stack([KEY + keys, answers], axis=2).reshape(self.rows, -1)
        text = np.concatenate([content, dialogue], axis=1).astype(np.int32)
        counts = np.zeros(text.shape, np.float32)
        counts[:, content.shape[1] + 1 :: 2] = 1
        return {"tokens": text[:, :-1], "targets": text[:, 1:], "weights": counts[:, 1:]}


def questions(
    key: Sequence[int], count: int, *, short: int, long: int
) -> tuple[list[Prompts], list[str]]:
    """Prompts of `long` and of `short` characters with one question each, and the right answers."""
    random = np.random.default_rng(key)
    content, values, places = documents(random, count, long - 1)
    prompts, answers = [], []
    for row, number in enumerate(random.integers(0, KEYS, count)):
        place = int(places[row, number])
        first, last = max(0, place - short + 2), min(place, long - short)
        start = int(random.integers(first, last + 1))
        document, question = bytes(content[row].tolist()).decode(), chr(KEY + number)
        prompts.append(Prompts(document[start : start + short - 1] + question, document + question))
        answers.append(chr(VALUE + values[row, number]))
    return prompts, answers
