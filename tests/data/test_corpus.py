"""What a run reads: stores, files of any format, and the ends that are kept for measuring."""

import gzip
import json

import numpy as np
import pytest

from lminf import cli
from lminf.data import corpus, sources, store, tokenizing
from lminf.data.loader import Loader
from lminf.data.plans import BestFit, Windows
from lminf.data.tokenizers import ByteTokenizer
from lminf.data.windows import RandomWindows
from lminf.errors import InputError

BYTES = ByteTokenizer()


def read(found):
    return [store.read([0], [store.tokens])[0].tolist() for store in found]


def test_stores_and_files_are_opened_by_their_paths(tmp_path):
    rows = [{"text": "one"}, {"text": "two"}]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.txt").write_text("plain")
    out = str(tmp_path / "s")
    tokenizing.tokenize([str(tmp_path / "a.jsonl.gz")], BYTES, out, name="bytes")
    paths = f"{out}, {tmp_path / 'a.jsonl.gz'},{tmp_path / 'b.txt'}"
    documents = [*b"one", 256, *b"two", 256]
    assert read(corpus.open_corpora(paths, BYTES)) == [documents, documents, [*b"plain"]]
    (whole,) = corpus.open_corpora("", BYTES)
    assert whole.tokens == len(sources.python_topics().encode())
    other = ByteTokenizer()
    other.backend.add_tokens(["<more>"])
    with pytest.raises(InputError, match=r"written with the tokenizer bytes"):
        corpus.open_corpora(out, other)


def test_what_is_held_out_is_not_trained_on():
    found = [store.from_documents([np.arange(30), np.arange(30, 100)]),
             store.from_documents([np.arange(1000, 1040)])]  # fmt: skip
    left, ends = corpus.hold_out(found, 0.25, at_most=16)
    assert ends.tolist() == [*range(75, 83), *range(1030, 1038)]
    assert [part.ends.tolist() for part in left] == [[30, 75], [30]]
    assert read(left) == [list(range(75)), list(range(1000, 1030))]
    loaded = Loader(left, BestFit(), length=8, rows=2, seed=0)
    seen = {int(t) for step in range(20) for t in loaded.batch(step)["targets"].ravel()}
    assert max(t for t in seen if t < 1000) == 74
    assert max(seen) == 1029
    whole, none = corpus.hold_out(found[:1], 0.0, at_most=16)
    assert (whole[0].tokens, len(none)) == (100, 0)
    with pytest.raises(InputError, match=r"a share of 1.0 cannot be held out"):
        corpus.hold_out(found, 1.0, at_most=16)


def test_windows_of_a_store_are_those_of_an_array():
    tokens = np.arange(500)
    loaded = Loader([store.from_documents([tokens])], Windows(), length=16, rows=4, seed=3)
    array = RandomWindows(tokens, length=16, rows=4, seed=3)
    for step in range(4):
        ours, theirs = loaded.batch(step), array.batch(step)
        assert set(ours) == set(theirs)
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
            assert ours[name].dtype == theirs[name].dtype


def test_the_command_says_what_plans_make_of_a_store(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": "x" * n}) + "\n" for n in (16, 39, 4))
    )
    out = str(tmp_path / "s")
    tokenizing.tokenize([str(tmp_path / "a.jsonl")], BYTES, out, name="bytes")
    words = ["data", out, "--length=16", "--batch=2", "--plan=best_fit", "--plan=windows"]
    cli.main([*words, "--json"])
    found = json.loads(capsys.readouterr().out)
    (held,) = found["corpora"]
    assert (held["tokens"], held["documents"], held["tokenizer"]) == (62, 3, "bytes")
    best = found["plans"][0]
    assert (best["plan"], best["rows"], best["steps"]) == ("best_fit", 4, 2.0)
    assert (best["documents_cut"], best["fill"]) == (1, 59 / 64)
    cli.main(words)
    assert "best_fit" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"a.jsonl is no token store; name a tokenizer"):
        cli.main(["--debug", "data", str(tmp_path / "a.jsonl")])
