"""Every query of an index against the count of all places, on small random corpora."""

import itertools

import numpy as np
import pytest

from lminf.ngram import build
from lminf.ngram.encoding import WIDTHS, Encoding
from lminf.ngram.index import Index
from tests.ngram import oracle

ALPHABET = 3
ENCODINGS = [Encoding(width, order) for width in WIDTHS for order in ("id", "bytes")]


def documents(seed, *, slots=200, alphabet=ALPHABET, top=0):
    """Some 20 documents; with `top`, ids that take several bytes."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 2 * slots // 20, 20)
    ids = random.integers(0, alphabet, sizes.sum()) * max(1, top // alphabet)
    return np.split(ids, np.cumsum(sizes)[:-1])


def made(tmp_path, found, encoding, *, shard_slots=build.MOST_SLOTS, memory=2**30):
    corpus = build.of_documents(found, tokenizer="drawn", tokenizer_digest="0" * 64)
    return build.build(
        corpus, tmp_path / "index", encoding=encoding, memory_bytes=memory, shard_slots=shard_slots
    )


def streams(index: Index):
    return [shard.tokens.tolist() for shard in index.shards]


@pytest.fixture(params=ENCODINGS, ids=lambda e: f"{e.width}-{e.order}")
def encoding(request):
    return request.param


@pytest.fixture(params=[build.MOST_SLOTS, 60], ids=["one", "several"])
def index(request, encoding, tmp_path):
    top = {1: 250, 2: 1000, 4: 100_000}[encoding.width]
    return made(tmp_path, documents(0, top=top), encoding, shard_slots=request.param)


def all_queries(index, longest):
    ids = sorted({token for shard in streams(index) for token in shard})
    return [list(q) for n in range(longest + 1) for q in itertools.product(ids, repeat=n)]


def test_counts_are_those_of_all_places(index):
    shards, queries = streams(index), all_queries(index, 4)
    expected = [oracle.count(shards, query) for query in queries]
    assert index.count(queries).tolist() == expected
    for query in queries[::7]:  # one query is looked for in plain Python
        assert index.count([query])[0] == oracle.count(shards, query)


def test_files_are_as_published(index):
    for number, shard in enumerate(index.shards):
        tokens, encoding = shard.tokens.tolist(), index.encoding
        table = oracle.suffix_array(tokens, encoding.width, encoding.order)
        assert (shard.places(np.arange(shard.slots)) * encoding.width).tolist() == table
        assert [tokens[start] for start in shard.offsets] == [encoding.separator] * len(
            shard.offsets
        )
        assert shard.number == number
    joined = list(itertools.chain(*streams(index)))
    assert [t for t in joined if t != index.encoding.separator] == np.concatenate(
        documents(0, top={1: 250, 2: 1000, 4: 100_000}[index.encoding.width])
    ).tolist()
