"""Losses that can be compared across vocabularies: unigram-normalised, and bits per character.

They are not the same ruler: L_u's denominator changes with V, so the two have different IsoFLOP
optima. Every vocabulary comparison reports both.
"""

import numpy as np
from jaxtyping import Float, Int

from lminf.errors import InputError
from lminf.scaling import fertility

# Unigram entropy H_u of the training text in nats per token, by vocabulary size of the published
# sweep (from its released frequency files). Enough to turn L_u into L.
PUBLISHED_UNIGRAM_ENTROPY = {
    4096: 6.8692,
    6144: 7.0604,
    8192: 7.1745,
    10240: 7.2549,
    16384: 7.4001,
    24576: 7.4905,
    32768: 7.5403,
    48128: 7.5918,
    64512: 7.6203,
    96256: 7.6451,
}


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


def bits_per_character(loss, tokens_per_character):
    """Loss in nats per token to bits per character of the evaluated text."""
    return np.asarray(loss, np.float64) * tokens_per_character / np.log(2.0)


def unigram_entropy(vocab_size) -> Float[np.ndarray, "..."]:
    """H_u in nats per token, linear in ln V between the ten published sizes."""
    sizes = np.array(sorted(PUBLISHED_UNIGRAM_ENTROPY), np.float64)
    asked = np.asarray(vocab_size, np.float64)
    if np.any((asked < sizes[0]) | (asked > sizes[-1])):
        raise InputError(
            f"the unigram entropy is known for V={sizes[0]:g}..{sizes[-1]:g}, asked for "
            f"{asked.min():g}..{asked.max():g}; compare in L_u only"
        )
    values = [PUBLISHED_UNIGRAM_ENTROPY[int(size)] for size in sizes]
    return np.interp(np.log(asked), np.log(sizes), values)


def published_bits_per_character(
    loss_u: Float[np.ndarray, " rows"], vocab_size: Float[np.ndarray, " rows"]
) -> Float[np.ndarray, " rows"]:
    """Bits per character of the published sweep's L_u, with its measured tokens per character."""
    ratio = fertility.MEASURED.tokens_per_character(vocab_size)
    return bits_per_character(loss_u + unigram_entropy(vocab_size), ratio)
