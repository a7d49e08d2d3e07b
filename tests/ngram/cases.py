"""Small corpora and their indexes."""

import numpy as np

from lminf.ngram import build
from lminf.ngram.encoding import Encoding
from lminf.ngram.index import Index

ID = Encoding(2, "id")
PLENTY = 1 << 30  # bytes of memory
TOP = {1: 250, 2: 1000, 4: 100_000}  # ids by width: of several bytes, where tokens have them


def documents(seed: int, *, alphabet: int = 3, top: int = 3, slots: int = 200) -> list[np.ndarray]:
    """Some 20 documents of few different tokens."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 2 * slots // 20, 20)
    ids = random.integers(0, alphabet, sizes.sum()) * (top // alphabet)
    return np.split(ids, np.cumsum(sizes)[:-1])


def corpus(found: list[np.ndarray]) -> build.Corpus:
    return build.of_documents(found, tokenizer="drawn", tokenizer_digest="0" * 64)


def made(folder, found, encoding=ID, *, shard_slots=build.MOST_SLOTS, memory=PLENTY) -> Index:
    return build.build(
        corpus(found), folder / "index", encoding=encoding, memory_bytes=memory,
        shard_slots=shard_slots,
    )  # fmt: skip


def streams(index: Index) -> list[list[int]]:
    return [shard.tokens.tolist() for shard in index.shards]
