"""Re-reading: what windowed attention replaces, and the NLL it is measured against."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, Int

from lminf.evals import perplexity
from lminf.lm.lm import LM


def token_nll(
    lm: LM,
    tokens: Int[np.ndarray, " T"],
    *,
    head: Float32[np.ndarray, " _"] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Float32[np.ndarray, " T-1"]:
    """NLL of tokens 1.., each given a fresh full-attention context of at most the trained length.

    `head`, if given, is the same model's full-attention NLL of the first tokens: what the first
    window would compute again.
    """
    out = np.full(len(tokens) - 1, np.nan, np.float32)
    windows = perplexity.reread(len(tokens), trained=lm.spec.trained_length)
    for index, window in enumerate(windows):
        if index == 0 and head is not None:
            scored = head[: window.stop - 1]
        else:
            scored = lm.token_nll(tokens[window.start : window.stop])
        # scored[i] is token start + 1 + i.
        out[window.score_from - 1 : window.stop - 1] = scored[
            window.score_from - 1 - window.start :
        ]
        if progress:
            progress(window.stop, len(tokens))
    return out
