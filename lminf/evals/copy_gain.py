"""Copy gain: how much likelier a passage is because it was read before, far outside every window.

    gain = mean over copied tokens of  log p(token | the document, cue)
                                     − log p(token | another document, cue)      nats per token

After the document its passage comes again: first the cue, which says which one, then the tokens
that are scored. What a policy forgot it predicts as after the other document, but for what the end
of the document, which it still sees, tells of its topic: the gain of a window alone, to subtract.
"""

import numpy as np
from jaxtyping import Float, Int

from lminf.evals.haystack import Encode, Haystack
from lminf.lm.prefix import Tails

GAP, CUE, COPIED = 8, 8, 24  # tokens: after a sentence, of the cue, and scored
SPACE = GAP + CUE + COPIED  # tokens of text that a passage takes


def passages(haystack: Haystack) -> Int[np.ndarray, "D {CUE+COPIED}"]:
    """The passage after each sentence of the document."""
    first = haystack.ends[:, None] + GAP
    return haystack.tokens[first + np.arange(CUE + COPIED)]


def tails(haystack: Haystack, encode: Encode) -> Tails:
    """Each passage as it comes again, after a blank line."""
    spans = passages(haystack)[:, :-1]
    blank = np.broadcast_to(np.asarray(encode("\n\n"), np.int32), (len(spans), len(encode("\n\n"))))
    return Tails(np.concatenate([blank, spans], 1), COPIED)


def log_prob(
    log_probs: Float[np.ndarray, "D {COPIED} V"], haystack: Haystack
) -> Float[np.ndarray, " D"]:
    """Mean log-probability of the scored tokens of each passage, nats per token."""
    targets = passages(haystack)[:, CUE:, None]
    return np.take_along_axis(log_probs, targets, 2)[..., 0].mean(1, dtype=np.float64)
