"""Training batches from one token array: a pure function of (tokens, seed, step)."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from lminf.errors import InputError

Batch = dict[str, Int[np.ndarray, "B T"]]


def random_windows(
    tokens: Int[np.ndarray, " _"], *, length: int, batch: int, seed: int
) -> Callable[[int], Batch]:
    """`batch_at(step)`: windows at random places, with the token after each as its target."""
    if len(tokens) <= length:
        raise InputError(
            f"{len(tokens)} tokens cannot fill a window of {length} and the token after it; "
            f"give a longer text"
        )

    def batch_at(step: int) -> Batch:
        rng = np.random.default_rng((seed, step))
        starts = rng.integers(0, len(tokens) - length, batch)
        rows = np.asarray(tokens)[starts[:, None] + np.arange(length + 1)]
        return {"tokens": rows[:, :-1].astype(np.int32), "targets": rows[:, 1:].astype(np.int32)}

    return batch_at
