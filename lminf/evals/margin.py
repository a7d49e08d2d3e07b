"""Margins of key-value questions: what a model that answers wrongly still knows, in nats.

    needle margin      log p(value) − mean of log p(a value that is not in the document)
    key-value margin   log p(value) − mean of log p(another value that is asked for)
    rank               of the value among those asked for, 1 the likeliest

A needle margin shows that the value was read, a key-value margin that it belongs to its key. Values
are drawn, so what is forgotten has margins of 0 on average, and ranks of (Q + 1)/2 among Q values.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from lminf.evals.haystack import Haystack
from lminf.lm.prefix import Tails


class Margins(NamedTuple):
    """Of each question asked."""

    needle: Float[np.ndarray, " Q"]  # nats
    key_value: Float[np.ndarray, " Q"]  # nats; 0 where there is no other value
    rank: Float[np.ndarray, " Q"]  # from 1; equals share theirs


def tails(haystack: Haystack) -> Tails:
    """The questions."""
    return Tails(haystack.questions, 1)


def margins(
    log_probs: Float[np.ndarray, "D 1 V"], haystack: Haystack, chosen: Bool[np.ndarray, " D"]
) -> Margins:
    """Of the questions that are `chosen`, from the log-probabilities of what follows all of them.
    The other values are those of these questions: of values that a policy forgot and others that
    it sees, it would prefer the latter, and a forgotten one would have a negative margin.
    """
    logs = log_probs[chosen, 0].astype(np.float64)
    present, absent = logs[:, haystack.values[chosen]], logs[:, haystack.absent]  # [Q, values]
    right, wrong_count = np.diag(present), len(present) - 1
    return Margins(
        right - absent.mean(1),
        right - (present.sum(1) - right) / wrong_count if wrong_count else np.zeros(1),
        1 + (present > right[:, None]).sum(1) + ((present == right[:, None]).sum(1) - 1) / 2,
    )
