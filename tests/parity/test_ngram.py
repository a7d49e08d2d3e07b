"""infini-gram reads our files, sorts them to the same table and answers the same."""

import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from lminf.ngram import matches, next_tokens
from lminf.ngram.encoding import Encoding
from tests.ngram import cases

pytestmark = pytest.mark.parity

ENCODING = Encoding(2, "bytes")
END = 999  # what infini-gram calls the separator


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Documents of few tokens, and one long enough that distributions are sampled."""
    random = np.random.default_rng(0)
    found = [random.geometric(0.2, n) for n in random.integers(1, 400, 60)]
    return cases.made(tmp_path_factory.mktemp("ours"), [*found, random.geometric(0.3, 9000)],
                      ENCODING)  # fmt: skip


@pytest.fixture(scope="module")
def folder(index, tmp_path_factory):
    """The same tokens, sorted by infini-gram."""
    import infini_gram.indexing

    Path(infini_gram.indexing.__file__).with_name("rust_indexing").chmod(0o755)
    folder, before = tmp_path_factory.mktemp("peer"), os.getcwd()
    shard = index.shards[0]
    (folder / "tokenized.0").write_bytes(shard.tokens.tobytes())
    (shard.offsets * 2).astype("<u8").tofile(folder / "offset.0")
    infini_gram.indexing.build_sa(
        Namespace(save_dir=str(folder), temp_dir=str(folder / "tmp"), worker_id=0, shards=1,
                  workers=1, mem=1, cpus=1, token_width=2)
    )  # fmt: skip
    os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    return engine_of(folder)


def engine_of(folder):
    from infini_gram.engine import InfiniGramEngine

    return InfiniGramEngine(index_dir=str(folder), eos_token_id=END, vocab_size=1000)


@pytest.fixture(scope="module")
def prompts(index):
    random = np.random.default_rng(1)
    tokens = index.shards[0].tokens[:-1]
    starts = random.integers(0, len(tokens) - 12, 400)
    drawn = [tokens[at : at + int(random.integers(1, 12))].tolist() for at in starts]
    drawn = [[token for token in each if token != 0xFFFF] or [1] for each in drawn]
    return [each if i % 3 else [*each, 400 + i] for i, each in enumerate(drawn)]


def test_the_table_is_the_same(index, folder):
    ours = (index.shards[0].positions(np.arange(index.slots)) * 2).astype("<u8").view("u1")
    theirs = np.fromfile(folder / "table.0", "u1").reshape(index.slots, -1)
    np.testing.assert_array_equal(theirs, ours.reshape(-1, 8)[:, : theirs.shape[1]])


def test_counts_and_probabilities_are_the_same(index, engine, prompts):
    expected = [engine.count(input_ids=prompt)["count"] for prompt in prompts]
    assert index.count(prompts).tolist() == expected
    for ours, theirs in ((index.prob, engine.prob), (index.infgram_prob, engine.infgram_prob)):
        found = ours(prompts, [1] * len(prompts))
        for i, prompt in enumerate(prompts):
            answer = theirs(prompt_ids=prompt, cont_id=1)
            assert answer["prompt_cnt"] == found.prompt_count[i]
            assert answer["cont_cnt"] == found.cont_count[i]
            assert answer["prob"] == pytest.approx(found.prob[i])
            assert answer.get("suffix_len", len(prompt)) == found.suffix_len[i]


@pytest.mark.parametrize("support", [20, 1000])
def test_distributions_are_the_same(support, index, engine, prompts):
    prompts = [*prompts[:100], [1], [2], [1, 1]]
    for ours, theirs in ((next_tokens.ntd, engine.ntd),
                         (next_tokens.infgram_ntd, engine.infgram_ntd)):  # fmt: skip
        found = ours(index, prompts, max_support=support)
        for i, prompt in enumerate(prompts):
            answer = theirs(prompt_ids=prompt, max_support=support)
            tokens = {t: each["cont_cnt"] for t, each in answer["result_by_token_id"].items()}
            assert tokens == {END if t == 0xFFFF else t: n for t, n in found.of(i).items()}
            assert answer["approx"] == found.approx[i]


CLAUSES = (
    [[[1, 2]], [[3, 1]]],
    [[[5], [6, 1]], [[9]]],
    [[[1]], [[12]], [[7, 7]]],
    [[[2, 2]], [[8]], [[4, 1], [1, 4]], [[3]]],
)


@pytest.mark.parametrize("clauses", CLAUSES, ids=len)
def test_clauses_are_counted_alike_within_a_document(clauses, tmp_path):
    found = np.random.default_rng(0).geometric(0.3, 9000)
    index = cases.made(tmp_path, [found], ENCODING)
    engine = engine_of(tmp_path / "index")
    for limit in (3, 10, 100):
        answer = engine.count_cnf(cnf=clauses, max_diff_tokens=limit)
        assert matches.count_cnf(index, clauses, max_diff_tokens=limit) == (answer["count"], False)


@pytest.mark.parametrize("clauses", CLAUSES, ids=len)
def test_near_the_end_of_a_document_more_clauses_are_counted(clauses, index, engine):
    """infini-gram drops an occurrence where what it found beside it is of another document."""
    answer = engine.count_cnf(cnf=clauses, max_diff_tokens=10)["count"]
    assert answer <= matches.count_cnf(index, clauses, max_diff_tokens=10).occurrences
