"""Tokens that a text copies from far back, which a window must lose and a full context predicts."""

import numpy as np
from jaxtyping import Bool, Int


def far_copies(
    tokens: Int[np.ndarray, " T"], *, length: int, beyond: int
) -> Bool[np.ndarray, " T"]:
    """Whether each token ends an exact copy of `length` tokens that also ended more than `beyond`
    tokens before it.
    """
    tokens = np.ascontiguousarray(tokens, np.int32)
    size, first, copied = tokens.itemsize * length, {}, np.zeros(len(tokens), bool)
    content = tokens.tobytes()
    for end in range(length, len(tokens) + 1):
        # The first of several copies is the farthest one.
        place = first.setdefault(content[end * 4 - size : end * 4], end)
        copied[end - 1] = end - place > beyond
    return copied
