"""Shuffles as functions of the index: no memory, any element at once, the same on every machine."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt64

ROUNDS = 6

Seed = int | Sequence[int]


def shuffled(indices: Int[np.ndarray, " _"], count: int, *, seed: Seed) -> Int[np.ndarray, " _"]:
    """Where a random permutation of `range(count)` puts the indices, int64.

    A Feistel network is a permutation of 4^w numbers whatever its round function; numbers beyond
    `count` are sent through again until they fall below it, fewer than four times on average.
    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", cycle walking.
    """
    half = np.uint64(max((int(count - 1).bit_length() + 1) // 2, 1))
    mask = np.uint64((1 << int(half)) - 1)
    keys = words(seed, ROUNDS)
    values = np.asarray(indices).astype(np.uint64)
    outside = np.arange(values.size)
    while outside.size:
        wrapped = values[outside]
        left, right = wrapped >> half, wrapped & mask
        for key in keys:
            left, right = right, left ^ (mixed(right ^ key) & mask)
        values[outside] = (left << half) | right
        outside = outside[values[outside] >= count]
    return values.astype(np.int64)


def words(seed: Seed, count: int) -> UInt64[np.ndarray, " count"]:
    """Random 64-bit words. NumPy promises this stream for ever, but not that of its generators."""
    return np.random.SeedSequence(seed).generate_state(count, np.uint64)


def mixed(values: UInt64[np.ndarray, " _"]) -> UInt64[np.ndarray, " _"]:
    """Random words, one for each value.

    Source: Steele, Lea and Flood 2014, the finalizer of SplitMix.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniform(values: UInt64[np.ndarray, " _"], *, seed: Seed) -> np.ndarray:
    """Numbers in [0, 1), one for each value, float64."""
    return (mixed(mixed(values) ^ words(seed, 1)[0]) >> np.uint64(11)) * 2.0**-53
