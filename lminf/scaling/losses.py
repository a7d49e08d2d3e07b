"""Losses that can be compared across vocabularies: unigram-normalised, and bits per character.

They are not the same ruler: L_u's denominator changes with V, so the two have different IsoFLOP
optima. Every vocabulary comparison reports both.
"""

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from lminf.errors import InputError
from lminf.scaling import fertility, stored

# Unigram entropy H_u of the training text in nats per token, by vocabulary size of the published
# sweep (from its released frequency files). Enough to turn L_u into L.
ENTROPY_SIZES, UNIGRAM_ENTROPY = (
    np.array(column, float) for column in stored.read("tao2024.json")["unigram_entropy"].values()
)


def log_unigram(counts: Int[np.ndarray, " V"]) -> Float[np.ndarray, " V"]:
    """ln p_u in nats; ids never seen count once before normalising."""
    safe = np.maximum(np.asarray(counts, np.float64), 1.0)
    return np.log(safe) - np.log(safe.sum())


def unigram_normalised(
    nll: Float[np.ndarray, " T"], targets: Int[np.ndarray, " T"], log_probs: Float[np.ndarray, " V"]
) -> float:
    """Mean of nll + ln p_unigram(target) in nats per token; 0: no better than word frequencies.

    Source: arXiv:2407.13623, eq. 3. The sum is of logarithms: a ratio of probabilities underflows.
    """
    return float(np.mean(np.asarray(nll, np.float64) + np.asarray(log_probs)[targets]))


def bits_per_character(
    loss: ArrayLike, tokens_per_character: ArrayLike
) -> Float[np.ndarray, "..."]:
    """Bits per character of the evaluated text, of a loss in nats per token."""
    return np.asarray(loss, np.float64) * np.asarray(tokens_per_character) / np.log(2.0)


def published_bits_per_character(
    loss_u: Float[np.ndarray, " rows"], vocab_size: Float[np.ndarray, " rows"]
) -> Float[np.ndarray, " rows"]:
    """Bits per character of the published sweep's L_u, with its measured tokens per character; the
    unigram entropy is linear in ln V between the ten published sizes."""
    low, high = ENTROPY_SIZES[[0, -1]]
    if vocab_size.min() < low or vocab_size.max() > high:
        raise InputError(
            f"the unigram entropy is known for V={low:g}..{high:g}, not for "
            f"{vocab_size.min():g}..{vocab_size.max():g}; compare in L_u only"
        )
    entropy = np.interp(np.log(vocab_size), np.log(ENTROPY_SIZES), UNIGRAM_ENTROPY)
    ratio = fertility.MEASURED.tokens_per_character(vocab_size)
    return bits_per_character(loss_u + entropy, ratio)
