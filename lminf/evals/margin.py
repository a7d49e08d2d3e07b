"""Margins of key-value questions: what a model that answers wrongly still knows, in nats.

    needle margin      log p(value) − mean of log p(a value that is not in the document)
    key-value margin   log p(value) − mean of log p(another value of the document)
    rank               of the value among those of the document, 1 the likeliest

A needle margin shows that the value was read, a key-value margin that it belongs to its key. Values
are drawn, so what is forgotten has margins of 0 on average, and ranks of (D + 1)/2 among D values.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from lminf.evals.haystack import Haystack
from lminf.lm.prefix import Tails


class Margins(NamedTuple):
    """Of each question of a document."""

    needle: Float[np.ndarray, " D"]  # nats
    key_value: Float[np.ndarray, " D"]  # nats
    rank: Float[np.ndarray, " D"]  # from 1; equals share theirs


def tails(haystack: Haystack) -> Tails:
    """The questions."""
    return Tails(haystack.questions, 1)


def margins(log_probs: Float[np.ndarray, "D 1 V"], haystack: Haystack) -> Margins:
    """Of the log-probabilities of what follows each question."""
    present = log_probs[:, 0, haystack.values].astype(np.float64)  # [questions, values]
    absent = log_probs[:, 0, haystack.absent].astype(np.float64)
    own, others = np.diag(present), len(present) - 1
    return Margins(
        own - absent.mean(1),
        own - (present.sum(1) - own) / max(others, 1),
        1 + (present > own[:, None]).sum(1) + ((present == own[:, None]).sum(1) - 1) / 2,
    )
