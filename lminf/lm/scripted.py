"""A language model whose answers are written down: for tests of tasks, programs and ensembles."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from lminf.errors import InputError
from lminf.lm.protocol import Score, SequentialModel, cut_at_stop

BYTES = 256
SCRIPTED = 0.99  # probability of the byte that the script has next; the others share the rest


@dataclass(frozen=True)
class Scripted(SequentialModel):
    """A LanguageModel that writes `answer(prompt)`. Its tokens are the bytes of UTF-8.

    Every byte of the answer has probability 0.99; after the answer's end, or once a text has left
    it, all bytes are equally likely.
    """

    answer: Callable[[str], str]

    def encode(self, text: str) -> bytes:
        return text.encode()

    def score_one(self, prompt: str, continuation: str) -> Score:
        given, script = _encoded(continuation), self.answer(prompt).encode()
        log_prob, follows = 0.0, True
        for index, byte in enumerate(given):
            expected = script[index] if follows and index < len(script) else None
            log_prob += float(_log_probs(expected)[byte])
            follows = follows and byte == expected
        return Score(log_prob, len(given), follows)

    def next(self, prompts: Sequence[str]) -> Float32[np.ndarray, "B V"]:
        scripts = [self.answer(prompt).encode() for prompt in prompts]
        return np.stack([_log_probs(script[0] if script else None) for script in scripts])

    def generate_one(self, prompt: str, *, max_new_tokens: int, stop: Sequence[str] = ()) -> str:
        _encoded(prompt)
        text = self.answer(prompt).encode()[:max_new_tokens].decode(errors="ignore")
        return cut_at_stop(text, stop)

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "B D"]:
        """How often each byte occurs, normalised to length 1."""
        rows = [np.frombuffer(_encoded(text), np.uint8) for text in texts]
        counts = np.stack([np.bincount(row, minlength=BYTES) for row in rows])
        return (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)


def _log_probs(expected: int | None) -> Float32[np.ndarray, " V"]:
    """Of the next byte, where the script has `expected`."""
    if expected is None:
        return np.full(BYTES, np.log(1 / BYTES), np.float32)
    chances = np.full(BYTES, (1 - SCRIPTED) / (BYTES - 1), np.float32)
    chances[expected] = SCRIPTED
    return np.log(chances)


def _encoded(text: str) -> bytes:
    if not text:
        raise InputError("a text is empty; give at least one character")
    return text.encode()
