"""A world of keys and values, in which every answer stands at a known distance before its question.

A document of `size` tokens lists pairs of a key and a value, one token each, and then asks for the
keys in turn: a question token, and the pair again. An eighth of its tokens is the list. Keys are
drawn for each document, so only its own text tells the value.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from lminf.errors import InputError

END = 0  # the token that ends a document
FIRST = 8  # token of the first pair; those between are kept for knots
ASKED = 8  # tokens of a document for each of its pairs


class Needles(NamedTuple):
    """Contexts that end in a question about each of their documents, and its answer."""

    tokens: Int[np.ndarray, "B T"]
    answers: Int[np.ndarray, "B Q"]  # what follows the tokens T - 2 Q, T - 2 Q + 2, …
    distances: Int[np.ndarray, "B Q"]  # tokens from the answer's last occurrence to its question


@dataclass(frozen=True)
class Recall:
    keys: int
    values: int

    @property
    def vocab_size(self) -> int:
        return FIRST + self.keys * (self.values + 1)

    def check(self, *, size: int, documents: int) -> None:
        """Refuses contexts of so many documents in which keys could not differ."""
        if documents * (size // ASKED) > self.keys:
            raise InputError(
                f"--config.num_keys={self.keys}: {documents} documents of {size} tokens have "
                f"{documents * (size // ASKED)} keys; give as many or more, or shorter documents"
            )

    def documents(self, count: int, size: int, *, seed: tuple[int, ...]) -> list[np.ndarray]:
        """Documents of `size` tokens and the end."""
        rng = np.random.default_rng(seed)
        chosen = (rng.permutation(self.keys)[: size // ASKED] for _ in range(count))
        return [self._document(keys, size, rng)[0] for keys in chosen]

    def needles(self, count: int, size: int, length: int, *, seed: tuple[int, ...]) -> Needles:
        """Contexts of as many documents of `size` tokens as `length` tokens hold with a question
        for each, in a random order. No key occurs in two documents of a context."""
        rng = np.random.default_rng(seed)
        documents = length // (size + 3)
        self.check(size=size, documents=documents)
        made = [self._context(documents, size, rng) for _ in range(count)]
        return Needles(*(np.stack(part) for part in zip(*made, strict=True)))

    def _document(self, keys: np.ndarray, size: int, rng: np.random.Generator):
        """(tokens, pairs)"""
        pairs = FIRST + keys * self.values + rng.integers(0, self.values, len(keys))
        drawn = rng.integers(0, len(keys), (size - len(keys)) // 2)
        body = np.stack([self._question(keys[drawn]), pairs[drawn]], 1).ravel()
        return np.concatenate([pairs, body, [END]]).astype(np.int32), pairs

    def _question(self, keys: np.ndarray) -> np.ndarray:
        return FIRST + self.keys * self.values + keys

    def _context(self, documents: int, size: int, rng: np.random.Generator):
        keys = rng.permutation(self.keys)[: documents * (size // ASKED)].reshape(documents, -1)
        made = [self._document(each, size, rng) for each in keys]
        text = np.concatenate([tokens for tokens, _ in made])
        order, column = rng.permutation(documents), rng.integers(0, keys.shape[1], documents)
        answers = np.array([made[d][1][c] for d, c in zip(order, column, strict=True)])
        dialogue = np.stack([self._question(keys[order, column]), answers], 1).ravel()
        last = np.array([np.flatnonzero(text == answer)[-1] for answer in answers])
        places = len(text) + 2 * np.arange(documents)
        tokens = np.concatenate([text, dialogue]).astype(np.int32)
        return tokens, answers.astype(np.int32), places - last
