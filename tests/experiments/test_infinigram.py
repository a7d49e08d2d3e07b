"""The ∞-gram of a small corpus: its agreement, what is left out, and how a run goes on."""

import json

import numpy as np
import pytest

from lminf.errors import InputError
from lminf.experiments import infinigram as experiment

pytestmark = pytest.mark.slow


@pytest.fixture
def texts(tmp_path):
    """A pattern of documents that share sentences, each of them once more with another end."""
    random = np.random.default_rng(0)
    sentences = [" ".join(random.choice(list("abcdefghij"), 9)) for _ in range(30)]
    for number in range(24):
        lines = [sentences[i] for i in random.integers(0, 30, 6)]
        (tmp_path / f"{number}.txt").write_text(". ".join(lines))
        (tmp_path / f"copy{number}.txt").write_text(". ".join(lines) + " zzz")
    return f"{tmp_path}/*.txt"


def options(texts):
    return {"text": texts, "corpus_documents": 100, "parts": (2, 1), "documents": 16,
            "validation": 6, "length": 60}  # fmt: skip


def test_longer_contexts_agree_more_and_copies_are_left_out(rows_of, texts):
    rows = rows_of("infinigram", **options(texts))
    documents = [row for row in rows if row["measure"] == "document" and row["kind"] == "held_out"]
    by_corpus = {
        corpus: [row for row in documents if row["corpus"] == corpus]
        for corpus in ("with contamination", "1/2", "1/1")
    }
    assert all(len(group) == 16 for group in by_corpus.values())
    total = {corpus: {name: sum(row[name] for row in group) for name in experiment.ORDERS}
             for corpus, group in by_corpus.items()}  # fmt: skip
    assert total["1/1"]["infinigram"] > total["1/1"]["5-gram"] > total["1/1"]["3-gram"]
    assert total["1/1"]["infinigram"] >= total["1/2"]["infinigram"]
    left_out = by_corpus["1/1"][0]["left_out"]
    assert 0 < left_out < 26
    assert by_corpus["1/1"][0]["corpus_documents"] == 48 - 22 - left_out
    cells = [row for row in rows if row["measure"] == "joint" and row["corpus"] == "1/1"]
    tokens = sum(row["tokens"] for row in cells if row["kind"] == "held_out")
    assert tokens == sum(row["tokens"] for row in by_corpus["1/1"]) == 16 * 59
    ppl = experiment.perplexity(by_corpus["1/1"])
    assert ppl.mixture < ppl.neural
    assert len(experiment.table(rows)) == 6
    assert [line["tokens"] for line in experiment.growth(rows)][-1] == "1.4 T, on the line"


def test_a_stopped_run_measures_what_is_missing(rows_of, texts):
    rows = rows_of("infinigram", **options(texts))
    of_first = [row for row in rows if row["corpus"] == "with contamination"]
    missing = rows_of("infinigram", of_first, **options(texts))
    assert json.dumps(missing) == json.dumps(rows[len(of_first) :])
    assert rows_of("infinigram", rows, **options(texts)) == []


def test_too_few_documents_are_refused(rows_of, texts):
    with pytest.raises(InputError, match="has 48 documents of 60 tokens, but 56 are held"):
        rows_of("infinigram", **{**options(texts), "documents": 50})
