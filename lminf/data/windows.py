"""Training batches from one token array: a pure function of (tokens, seed, step)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from lminf.errors import InputError


@dataclass(frozen=True)
class RandomWindows:
    """Windows at random places, with the token after each as its target."""

    tokens: Int[np.ndarray, " _"]
    length: int  # tokens of a window
    rows: int  # windows of a batch
    seed: int

    def __post_init__(self):
        if len(self.tokens) <= self.length:
            raise InputError(
                f"{len(self.tokens)} tokens cannot fill a window of {self.length} and the token "
                f"after it; give a longer text"
            )

    def documents(self, step: int) -> Int[np.ndarray, " rows"]:
        """Where the windows of a step begin in the text, in tokens."""
        rng = np.random.default_rng((self.seed, step))
        return rng.integers(0, len(self.tokens) - self.length, self.rows)

    def batch(self, step: int) -> dict[str, Int[np.ndarray, "rows length"]]:
        return _windows(self.tokens, self.documents(step), self.length)


def consecutive(
    tokens: Int[np.ndarray, " _"], *, length: int, rows: int, at_most: int
) -> list[dict[str, Int[np.ndarray, "rows length"]]]:
    """Up to `at_most` batches of windows one after another, for measuring. The rest is left out."""
    starts = np.arange(0, len(tokens) - length, length)
    count = min(len(starts) // rows, at_most)
    if count == 0:
        raise InputError(
            f"{len(tokens)} held-out tokens cannot fill {rows} windows of {length}; hold out more "
            f"of the text, or give a longer one"
        )
    return [_windows(tokens, starts[i * rows : (i + 1) * rows], length) for i in range(count)]


def _windows(tokens, starts, length: int):
    rows = np.asarray(tokens)[starts[:, None] + np.arange(length + 1)]
    return {"tokens": rows[:, :-1].astype(np.int32), "targets": rows[:, 1:].astype(np.int32)}
