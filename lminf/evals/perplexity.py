"""Perplexity protocols: which windows are read, and how token losses are averaged.

A token's NLL is in nats, given the tokens before it; the first token of a text has none.
Sources of the protocols: Han et al. 2024, arXiv:2308.16137 (by position, streams).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lminf.errors import InputError


@dataclass(frozen=True)
class Block:
    """Tokens whose positions are in [start, stop)."""

    start: int
    stop: int
    tokens: int  # scored, over all documents
    nll: float  # mean, nats per token


def by_position(
    documents: Sequence[Float[np.ndarray, " _"]], *, block: int, first: int = 1
) -> list[Block]:
    """Mean NLL of each block of positions, over all tokens of all documents.

    Each document is the NLL of its tokens at positions first, first + 1, …; documents may differ
    in length, and blocks far out then average over fewer of them.
    """
    if not documents or not any(len(document) for document in documents):
        raise InputError("no token was scored; give at least one document of two tokens")
    end = first + max(len(document) for document in documents)
    sums, counts = np.zeros(-(-end // block)), np.zeros(-(-end // block), np.int64)
    for document in documents:
        index = np.arange(first, first + len(document)) // block
        np.add.at(sums, index, np.asarray(document, np.float64))
        np.add.at(counts, index, 1)
    return [
        Block(i * block, min((i + 1) * block, end), int(count), float(total / count))
        for i, (total, count) in enumerate(zip(sums, counts, strict=True))
        if count
    ]


class Window(NamedTuple):
    """Read tokens [start, stop) as a text of their own; score those at [score_from, stop)."""

    start: int
    stop: int
    score_from: int


def reread(length: int, *, trained: int, stride: int | None = None) -> list[Window]:
    """Windows that score every token but the first once, each with a fresh context.

    All are `trained` tokens long (so one compilation serves them), or one window of `length` if
    that is less. From the second on, every token has between trained - stride and trained - 1
    tokens before it. The stride is half of the trained length unless given. This is the costly
    reading that windowed attention replaces, so its NLL is what they are measured against.
    """
    stride = trained // 2 if stride is None else stride
    if not 1 <= stride < trained:
        raise InputError(f"stride={stride} for windows of {trained} tokens; use 1 to {trained - 1}")
    if length < 2:
        raise InputError(f"a text of {length} tokens has nothing to score; give at least 2")
    windows = [Window(0, min(trained, length), 1)]
    while (done := windows[-1].stop) < length:
        stop = min(done + stride, length)
        windows.append(Window(stop - trained, stop, done))
    return windows


def stream(
    documents: Sequence[Int[np.ndarray, " _"]], *, chunk: int, seed: int, bos: int | None = None
) -> Iterator[Int[np.ndarray, " _"]]:
    """Chunks of `chunk` tokens of all documents in random order, joined without a separator.

    A BOS token, if given, is only at the start of the stream: documents are expected without. The
    reader carries its cache from chunk to chunk; the protocol scores tokens from the chunk before
    them in the same chunk only, so each chunk's first has no NLL. The last chunk may be shorter.
    """
    order = np.random.default_rng(seed).permutation(len(documents))
    buffer = np.array([] if bos is None else [bos], np.int32)
    for index in order:
        buffer = np.concatenate([buffer, np.asarray(documents[index], np.int32)])
        while len(buffer) >= chunk:
            yield buffer[:chunk]
            buffer = buffer[chunk:]
    if len(buffer):
        yield buffer
