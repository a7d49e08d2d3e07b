"""Files of an index: the same however they are sorted, interrupted builds, and bad ones."""

import json
import os

import numpy as np
import pytest

from lminf.data import store, tokenizing
from lminf.data.tokenizers import ByteTokenizer
from lminf.errors import InputError
from lminf.ngram import build, sorting
from lminf.ngram.encoding import Encoding
from lminf.ngram.index import open_index
from tests.ngram import cases, oracle

SMALL = 40 * sorting.SLOT_BYTES  # memory for 40 slots


def repeats():
    """Documents that begin alike for long, one of them all of one token."""
    random = np.random.default_rng(0)
    drawn = random.integers(0, 4, 120)
    return [drawn, np.zeros(60, int), drawn[:90], drawn[40:], random.integers(0, 900, 60)]


def content(folder):
    return {path.name: path.read_bytes() for path in (folder / "index").iterdir()}


@pytest.mark.parametrize("order", ["id", "bytes"])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_sort_in_little_memory_gives_the_same_table(width, order, tmp_path):
    encoding = Encoding(width, order)
    tokens = np.array(oracle.stream([d % 250 for d in repeats()], encoding.separator))
    expected = oracle.suffix_array(tokens.tolist(), width, order)
    for number, memory in enumerate((cases.PLENTY, SMALL)):
        path = tmp_path / f"table.{number}"
        sorting.write_table(tokens.astype(encoding.tokens), encoding, path, memory_bytes=memory)
        packed = np.frombuffer(path.read_bytes(), np.uint8)
        size = 2 if tokens.size * width <= 1 << 16 else 3
        assert packed.view(f"<u{size}").tolist() == expected
    assert sorted(os.listdir(tmp_path)) == ["table.0", "table.1"]


def test_divsufsort_gives_the_same_table():
    pytest.importorskip("pydivsufsort")
    for encoding in (Encoding(width, order) for width in (1, 2, 4) for order in ("id", "bytes")):
        tokens = np.array(oracle.stream([d % 250 for d in repeats()], encoding.separator))
        found = sorting.by_divsufsort(tokens.astype(encoding.tokens), encoding)
        expected = oracle.suffix_array(tokens.tolist(), encoding.width, encoding.order)
        assert found.tolist() == expected


def test_suffixes_that_differ_by_zeros_at_the_end_are_in_order():
    """A published file ends without a separator, and id 0 is what stands beyond its end."""
    for tokens in ([0] * 50, [0, 0, 1] + [0] * 20, [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]):
        found = sorting.sorted_starts(np.array(tokens, "<u2"), np.arange(len(tokens)), cases.ID)
        assert found.tolist() == oracle.suffix_array(tokens, 1, "id")


class Stopped(Exception):
    pass


def stop_after(calls):
    """A progress that fails at its nth call."""
    left = iter(range(calls))

    def progress(done, of):
        if next(left, None) is None:
            raise Stopped

    return progress


def test_an_interrupted_build_opens_as_none_and_goes_on_to_the_same(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    cases.made(whole, repeats(), memory=SMALL, shard_slots=250)
    (parts / "index").mkdir(parents=True)
    (parts / "index" / "notes.txt").write_text("somebody's")
    arguments = {"encoding": cases.ID, "memory_bytes": SMALL, "shard_slots": 250}
    for calls in range(1, 200, 3):
        try:
            build.build(cases.corpus(repeats()), parts / "index", **arguments,
                        progress=stop_after(calls))  # fmt: skip
            break
        except Stopped:
            with pytest.raises(InputError, match="is unfinished; run the same"):
                open_index(parts / "index")
    assert calls > 10
    assert content(parts) == content(whole) | {"notes.txt": b"somebody's"}


def test_documents_that_cannot_be_read_leave_no_index(tmp_path):
    def read():
        yield np.array([1, 2]), None
        raise Stopped

    broken = cases.corpus([])._replace(read=read)
    arguments = {"encoding": cases.ID, "memory_bytes": SMALL}
    with pytest.raises(Stopped):
        build.build(broken, tmp_path / "index", **arguments)
    with pytest.raises(InputError, match="unfinished"):
        open_index(tmp_path / "index")
    # No token of it can be used, so the corrected command begins anew, and keeps what is not ours.
    (tmp_path / "index" / "metadata.json").write_text("somebody's")
    cases.made(tmp_path / "whole", repeats(), memory=SMALL)
    build.build(cases.corpus(repeats()), tmp_path / "index", **arguments)
    assert content(tmp_path) == content(tmp_path / "whole") | {"metadata.json": b"somebody's"}


def test_tokens_that_wait_for_another_index_are_kept(tmp_path):
    arguments = {"encoding": cases.ID, "memory_bytes": SMALL}
    with pytest.raises(Stopped):
        build.build(
            cases.corpus(repeats()), tmp_path / "index", **arguments, progress=stop_after(1)
        )
    before = sorted(tmp_path.rglob("*"))
    message = "beginning of another index, which differs in its sources"
    with pytest.raises(InputError, match=message):
        build.build(cases.corpus(repeats()[1:]), tmp_path / "index", **arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_index_that_is_there_is_kept(tmp_path):
    cases.made(tmp_path, repeats())
    before = content(tmp_path)
    cases.made(tmp_path, repeats())
    with pytest.raises(InputError, match="holds another index, which differs in its sources"):
        cases.made(tmp_path, repeats()[1:])
    assert content(tmp_path) == before
    (tmp_path / "other" / "index").mkdir(parents=True)
    (tmp_path / "other" / "index" / "table.0").write_text("mine")
    with pytest.raises(InputError, match=r"table\.0 is there already and belongs to no index"):
        cases.made(tmp_path / "other", repeats())
    assert content(tmp_path / "other") == {"table.0": b"mine"}


@pytest.mark.parametrize("name", ["tokenized.0", "table.0", "offset.0", "metaoff.0"])
def test_an_index_that_is_cut_short_is_refused(name, tmp_path):
    cases.made(tmp_path, repeats())
    path = tmp_path / "index" / name
    for size in (path.stat().st_size - 8, path.stat().st_size - 1, 0):
        os.truncate(path, size)
        with pytest.raises(InputError, match="cut short"):
            open_index(tmp_path / "index")


def test_other_folders_and_tokenizers_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds no index"):
        open_index(tmp_path)
    cases.made(tmp_path, repeats())
    folder = tmp_path / "index"
    with pytest.raises(InputError, match="built with the tokenizer drawn"):
        open_index(folder, tokenizer_digest="1" * 64)
    with pytest.raises(InputError, match="leave --width"):
        open_index(folder, encoding=Encoding(4, "id"))
    (folder / "index.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(InputError, match="not of the format"):
        open_index(folder)
    (folder / "index.json").unlink()
    with pytest.raises(InputError, match="--width=2 --order=bytes"):
        open_index(folder)
    assert open_index(folder, encoding=cases.ID).documents == len(repeats())
    with pytest.raises(InputError, match="does not fit into 1 bytes"):
        cases.made(tmp_path / "narrow", repeats(), Encoding(1, "id"))


def test_a_published_shard_ends_without_a_separator(tmp_path):
    """Of the suffix that ends there nothing follows, which reads as the end of a document."""
    tokens = oracle.stream(cases.documents(6), 0xFFFF)[:-1]
    tokens += [5, 6]
    encoding = Encoding(2, "bytes")
    np.array(tokens, "<u2").tofile(tmp_path / "tokenized.0")
    np.array(oracle.suffix_array(tokens, 2, "bytes"), "<u2").tofile(tmp_path / "table.0")
    starts = [2 * i for i, token in enumerate(tokens) if token == 0xFFFF]
    np.array(starts, "<u8").tofile(tmp_path / "offset.0")
    index = open_index(tmp_path, encoding=encoding)
    from lminf.ngram import next_tokens

    for query in ([5, 6], [6], [1], [6, 0], []):
        assert index.count([query, [1]])[0] == len(oracle.occurrences([tokens], query))
        assert next_tokens.ntd(index, [query]).of(0) == oracle.followers([tokens], query, 0xFFFF)
    assert index.shards[0].span(len(starts) - 1)[1] == len(tokens)


def test_a_token_store_and_its_texts_give_one_index(tmp_path):
    texts = ["To be, or not to be", "that is the question", "be"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    files = [str(tmp_path / f"{number}.txt") for number in range(3)]
    tokenizer, url = ByteTokenizer(), str(tmp_path / "store")
    tokenizing.tokenize(files, tokenizer, url, name="bytes", workers=0)
    assert store.open_store(url).facts.documents == 3
    made = [
        build.build(corpus, tmp_path / name, encoding=cases.ID, memory_bytes=cases.PLENTY)
        for name, corpus in (("of_store", build.of_store(url)),
                             ("of_texts", build.of_texts(files, tokenizer, name="bytes")))
    ]  # fmt: skip
    for index in made:
        stream = oracle.stream([list(text.encode()) for text in texts], 0xFFFF)
        assert index.shards[0].tokens.tolist() == stream
    assert made[1].docs(list(b"question"), 1)[0].metadata == {"path": files[1], "linenum": 0}
    assert made[0].docs(list(b"question"), 1)[0].metadata is None
