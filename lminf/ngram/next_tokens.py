"""What follows prompts in a corpus: counts of next tokens, read from ranges of suffixes.

Along a range the next tokens are in order, so a part whose first and last agree is all of one
token, and others are halved. Source: Liu et al. 2024, arXiv:2401.17377.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int64

from lminf.ngram.index import Index, Ranges, Tokens, counts

MAX_SUPPORT = 1000  # suffixes that are read of a prompt, about
READ_WHOLE = 1024  # suffixes of a part that are read without halving it, where all are


class NextTokens(NamedTuple):
    """The tokens after each of B prompts, as rows of (prompt, token, counts), in their order."""

    prompt: Int64[np.ndarray, " N"]  # 0 to B - 1
    token: Int64[np.ndarray, " N"]  # the separator where a document ends
    counts: Int64[np.ndarray, " N"]
    prompt_count: Int64[np.ndarray, " B"]
    suffix_len: Int64[np.ndarray, " B"]  # tokens of the prompt that were looked for
    approx: Bool[np.ndarray, " B"]  # the counts are of a sample, and still sum to the prompt's

    def of(self, prompt: int) -> dict[int, int]:
        """Token -> count after one prompt."""
        first, end = np.searchsorted(self.prompt, [prompt, prompt + 1])
        tokens, counts = self.token[first:end].tolist(), self.counts[first:end].tolist()
        return dict(zip(tokens, counts, strict=True))


def ntd(
    index: Index, prompts: Sequence[Tokens], *, max_support: int | None = MAX_SUPPORT
) -> NextTokens:
    """The next-token distribution of each prompt: exact where it occurs at most `max_support`
    times, or None is given; else of one suffix in every so many.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    return _distribution(index, index.find(prompts), lengths, max_support)


def infgram_ntd(
    index: Index, prompts: Sequence[Tokens], *, max_support: int | None = MAX_SUPPORT
) -> NextTokens:
    """The same of the longest suffix of each prompt that occurs."""
    lengths = index.longest_suffix(prompts)
    ends = [list(prompt[len(prompt) - n :]) for prompt, n in zip(prompts, lengths, strict=True)]
    return _distribution(index, index.find(ends), lengths, max_support)


def _distribution(
    index: Index, ranges: Ranges, lengths: Int64[np.ndarray, " B"], max_support: int | None
) -> NextTokens:
    prompt_count = counts(ranges)
    unit = np.ones_like(prompt_count)
    if max_support is not None:
        while (more := prompt_count > unit * max_support).any():
            unit[more] *= 2
    by_shard = [_of_shard(index, shard, ranges[shard], lengths, unit)
             for shard in range(len(index.shards))]  # fmt: skip
    prompt, token, count = (np.concatenate(parts) for parts in zip(*by_shard, strict=True))
    # Prompts and tokens in one number, so that what stands in several parts is added.
    key, inverse = np.unique(prompt << 32 | token, return_inverse=True)
    summed = np.bincount(inverse, weights=count, minlength=len(key)).astype(np.int64)
    return NextTokens(key >> 32, key & 0xFFFFFFFF, summed, prompt_count, lengths, unit > 1)


def _of_shard(index: Index, number: int, ranges, lengths, unit):
    """(prompt, token, count) of parts of one shard's ranges."""
    shard = index.shards[number]
    parts: list[tuple[Int[np.ndarray, " _"], ...]] = []

    def token_after(prompt, ranks):
        return shard.tokens_at(shard.positions(ranks) + lengths[prompt])

    prompt = np.flatnonzero(ranges[:, 1] > ranges[:, 0])
    low, high = ranges[prompt, 0], ranges[prompt, 1]
    while len(prompt):
        token = token_after(prompt, low)
        alike = token == token_after(prompt, high - 1)
        parts.append((prompt[alike], token[alike], (high - low)[alike]))
        prompt, low, high = prompt[~alike], low[~alike], high[~alike]
        short = high - low < np.where(unit[prompt] > 1, 4 * unit[prompt], READ_WHOLE)
        parts.append(_strides(token_after, prompt[short], low[short], high[short], unit))
        prompt, low, high = prompt[~short], low[~short], high[~short]
        middle = (low + high) >> 1
        prompt = np.concatenate([prompt, prompt])
        low, high = np.concatenate([low, middle]), np.concatenate([middle, high])
    return [np.concatenate(columns) for columns in zip(*parts, strict=True)] or [
        np.empty(0, np.int64)
    ] * 3


def _strides(token_after, prompt, low, high, unit):
    """One suffix from the middle of each stride of `unit`, which stands for all of it."""
    strides = -(-(high - low) // unit[prompt])
    row = np.repeat(np.arange(len(prompt)), strides)
    index = np.arange(len(row)) - np.repeat(np.cumsum(strides) - strides, strides)
    start = low[row] + index * unit[prompt[row]]
    end = np.minimum(start + unit[prompt[row]], high[row])
    return prompt[row], token_after(prompt[row], (start + end) >> 1), end - start
