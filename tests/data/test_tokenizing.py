"""Token stores: what is read is what was written, killed or not, here or in memory."""

import json
import os
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorstore as ts

from lminf import cli
from lminf.data import documents, storage, store, tokenizing
from lminf.data.storage import Storage
from lminf.data.tokenizers import ByteTokenizer
from lminf.errors import InputError
from lminf.run import lock

BYTES = ByteTokenizer()
TEXTS = ["one", "", "two words", "three whole words", "é 語"] * 20
END = 256


def corpus(folder, texts=TEXTS):
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (folder / "b.txt").write_text("a plain file " * 9)
    return [str(folder / "a.jsonl"), str(folder / "b.txt")]


def expected(texts=TEXTS):
    return [[*t.encode(), END] for t in [*texts, "a plain file " * 9] if t]


def contents(found):
    starts = [0, *found.ends[:-1]]
    sizes = np.diff(found.ends, prepend=0)
    return [list(part) for part in found.read(starts, sizes)]


@pytest.mark.parametrize("where", ["file", "memory"])
def test_a_store_gives_back_the_documents(tmp_path, where):
    memory = ts.Context() if where == "memory" else None
    out = "memory://corpus/" if where == "memory" else str(tmp_path / "store")
    facts = tokenizing.tokenize(corpus(tmp_path), BYTES, out, name="bytes", memory=memory)
    found = store.open_store(out, tokenizer_digest=BYTES.digest, memory=memory)
    assert contents(found) == expected()
    assert found.facts == facts
    assert (facts.documents, facts.empty_documents) == (len(expected()), 20)
    assert facts.tokens == found.tokens == sum(map(len, expected()))
    assert facts.text_bytes == facts.tokens - facts.documents
    assert (facts.dtype, facts.vocab_size, facts.end_id) == ("uint16", 257, END)
    # Asked for again, it is found finished.
    again = tokenizing.tokenize(corpus(tmp_path), BYTES, out, name="bytes", memory=memory)
    assert again.text_digest == facts.text_digest


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path):
    wide = ByteTokenizer()
    wide.backend.add_tokens([f"<{i}>" for i in range(70_000)])
    facts = tokenizing.tokenize(corpus(tmp_path), wide, str(tmp_path / "s"), name="wide")
    assert (facts.dtype, facts.vocab_size) == ("uint32", 70_257)
    assert contents(store.open_store(str(tmp_path / "s"))) == expected()


def test_bos_stands_before_documents_where_the_model_was_trained_so(tmp_path):
    tokenizer = ByteTokenizer()
    object.__setattr__(tokenizer, "add_bos", True)
    facts = tokenizing.tokenize(corpus(tmp_path), tokenizer, str(tmp_path / "s"), name="bos")
    assert facts.bos_id == END
    assert contents(store.open_store(str(tmp_path / "s"))) == [[END, *d] for d in expected()]


def test_pieces_of_a_long_document_have_the_tokens_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_CHARS", 50)
    monkeypatch.setattr(tokenizing, "BATCH_CHARS", 90)
    texts = ["many words in a row " * 40, "short"]
    tokenizing.tokenize(corpus(tmp_path, texts), BYTES, str(tmp_path / "s"), name="bytes",
                        commit_tokens=100)  # fmt: skip
    assert contents(store.open_store(str(tmp_path / "s"))) == expected(texts)


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", ["array", "before progress", "after progress", "before facts"])
def test_a_killed_run_goes_on_and_ends_the_same(tmp_path, monkeypatch, at):
    """Stopped at every commit in turn, at each kind of place, by an exception that nothing sees."""
    monkeypatch.setattr(tokenizing, "BATCH_CHARS", 100)
    monkeypatch.setattr(documents, "PIECE_CHARS", 40)
    sources = corpus(tmp_path)
    whole = tokenizing.tokenize(sources, BYTES, str(tmp_path / "whole"), name="bytes")
    out = str(tmp_path / "killed")
    original = Storage.put_json, store.Writer._extend

    def run(count):
        """Runs until the `count`-th time, then dies."""
        left = [count]

        def die():
            left[0] -= 1
            if left[0] == 0:
                raise Killed

        def put_json(self, name, value, **options):
            if at == ("before facts" if name == store.FACTS else "before progress"):
                die()
            generation = original[0](self, name, value, **options)
            if at == "after progress" and name == store.PROGRESS:
                die()
            return generation

        def extend(self, name, start):
            stop = original[1](self, name, start)
            if at == "array":
                die()
            return stop

        with monkeypatch.context() as patch:
            patch.setattr(Storage, "put_json", put_json)
            patch.setattr(store.Writer, "_extend", extend)
            tokenizing.tokenize(sources, BYTES, out, name="bytes", commit_tokens=150)

    deaths = 0
    for count in (1, 2, 3, 2, 3, 4, 3, 3, 3, 3, 3, 3):
        try:
            run(count)
            break
        except Killed:
            deaths += 1
        if at != "before progress" or deaths > 1:
            with pytest.raises(InputError, match=r"is unfinished"):
                store.open_store(out)
    else:
        run(1000)
    assert deaths >= 1
    assert store.open_store(out).facts == whole
    assert contents(store.open_store(out)) == expected()


def test_the_second_of_two_writers_is_told(tmp_path):
    place = Storage(str(tmp_path / "s"))
    first = store.Writer(place, request={"x": 1}, dtype="uint16")
    first.append(np.arange(5), ends_document=True)
    second = store.Writer(Storage(str(tmp_path / "s")), request={"x": 1}, dtype="uint16")
    with pytest.raises(InputError, match=r"another process writes"):
        first.commit(None)
    second.append(np.arange(5), ends_document=True)
    second.commit(None)


def test_wrong_tokenizers_and_places_are_refused_by_name(tmp_path):
    sources, out = corpus(tmp_path), str(tmp_path / "s")
    with pytest.raises(InputError, match=r"holds no token store; make one with: lminf tokenize"):
        store.open_store(out)
    tokenizing.tokenize(sources, BYTES, out, name="bytes")
    with pytest.raises(InputError, match=r"written with the tokenizer bytes \(digest .*not with"):
        store.open_store(out, tokenizer_digest="0" * 64)
    with pytest.raises(InputError, match=r"finished store of another list of sources"):
        tokenizing.tokenize(sources[:1], BYTES, out, name="bytes")
    with pytest.raises(InputError, match=r"has no token '<end>'.*--end"):
        tokenizing.tokenize(sources, BYTES, str(tmp_path / "t"), name="bytes", end="<end>")
    store.Writer(Storage(str(tmp_path / "u")), request={"tokenizer": "other"}, dtype="uint16")
    with pytest.raises(InputError, match=r"beginning of another store: its tokenizer differs"):
        tokenizing.tokenize(sources, BYTES, str(tmp_path / "u"), name="bytes")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot .* /.*/file/s: "):
        tokenizing.tokenize(sources, BYTES, str(tmp_path / "file" / "s"), name="bytes")
    (tmp_path / "s" / "store.json").write_text('{"format"')
    with pytest.raises(InputError, match=r"store.json is damaged"):
        store.open_store(out)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("gs://bucket/a/b", {"driver": "gcs", "bucket": "bucket", "path": "a/b/tokens/"}),
        ("s3://bucket/a/", {"driver": "s3", "bucket": "bucket", "path": "a/tokens/"}),
        ("/data/a", {"driver": "file", "path": "/data/a/tokens/"}),
    ],
)
def test_addresses_choose_the_driver(url, expected):
    """No bucket can be reached from a test; what TensorStore is asked for can be seen."""
    spec = storage.spec(url, "tokens")
    assert {name: spec[name] for name in expected} == expected


def test_a_disk_that_refuses_is_one_sentence_and_nothing_is_lost(tmp_path, monkeypatch):
    """The limit of a file's size stands for a full disk: the same call fails in the same place."""
    noise = np.random.default_rng(0).integers(33, 127, 60_000).astype(np.uint8)
    sources = corpus(tmp_path, [noise.tobytes().decode()])
    monkeypatch.setattr(documents, "PIECE_CHARS", 5000)
    monkeypatch.setattr(documents, "CUT_ANYWAY_CHARS", 10_000)
    monkeypatch.setattr(tokenizing, "BATCH_CHARS", 10_000)
    out, given = str(tmp_path / "s"), {"name": "bytes", "commit_tokens": 20_000}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*/s: .*File too large.*free space"):
            tokenizing.tokenize(sources, BYTES, out, **given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert store.Storage(out).json(store.PROGRESS)[0]["tokens"] >= 20_000
    tokenizing.tokenize(sources, BYTES, out, **given)
    assert contents(store.open_store(out)) == expected([noise.tobytes().decode()])


def test_a_disk_that_is_full_at_the_start_is_one_sentence_and_leaves_no_folder(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with (
            pytest.raises(InputError, match=r"cannot write .*s/lock: File too large; free some"),
            lock.held(tmp_path / "s"),
        ):
            raise AssertionError("the lock was written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "s").exists()


def test_what_lies_at_the_place_already_is_not_removed(tmp_path):
    (tmp_path / "out" / "tokens").mkdir(parents=True)
    (tmp_path / "out" / "tokens" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"out/tokens/thesis.txt is there already and belongs to"):
        tokenizing.tokenize(corpus(tmp_path), BYTES, str(tmp_path / "out"), name="bytes")
    assert (tmp_path / "out" / "tokens" / "thesis.txt").read_text() == "mine"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tokens"]


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: [],
        lambda facts: facts | {"tokens": None},
        lambda facts: facts | {"documents": -1},
        lambda facts: facts | {"tokens": 0, "documents": 0},
        lambda facts: facts | {"documents": facts["tokens"] + 1},
        lambda facts: facts | {"sources": {"name": "a"}},
        lambda facts: facts | {"tokenizer_digest": 3},
        lambda facts: facts | {"dtype": "float32"},
        lambda facts: facts | {"more": 1},
        lambda facts: {name: facts[name] for name in facts if name != "end_id"},
        lambda facts: facts | {"tokens": facts["tokens"] - 1},
    ],
)
def test_a_damaged_manifest_of_a_store_is_named(tmp_path, change):
    out = str(tmp_path / "s")
    tokenizing.tokenize(corpus(tmp_path), BYTES, out, name="bytes")
    path = tmp_path / "s" / "store.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(InputError, match=r"/s/store.json is|token store .*/s is damaged"):
        store.open_store(out)


@pytest.mark.parametrize("progress", ["[]", "{}", '{"request": {}, "tokens": "x"}'])
def test_damaged_progress_of_a_store_is_named(tmp_path, progress):
    out = tmp_path / "s"
    out.mkdir()
    (out / "progress.json").write_text(progress)
    with pytest.raises(InputError, match=r"s/progress.json is damaged|holds no token store"):
        store.open_store(str(out))
    with pytest.raises(InputError, match=r"s/progress.json is damaged"):
        tokenizing.tokenize(corpus(tmp_path), BYTES, str(out), name="bytes")


def test_ends_that_do_not_rise_to_the_last_token_are_damage(tmp_path):
    out = str(tmp_path / "s")
    facts = tokenizing.tokenize(corpus(tmp_path), BYTES, out, name="bytes")
    array = Storage(out).array("ends", write=True)
    array[3:4].write(np.array([facts.tokens * 2])).result()
    with pytest.raises(InputError, match=r"ends of documents in .*/s do not rise"):
        assert store.open_store(out).ends is None


def test_special_tokens_of_texts_are_plain_unless_parsed_and_stores_remember(tmp_path):
    texts, out = ["one <bos> two"], str(tmp_path / "s")
    sources = corpus(tmp_path, texts)
    tokenizing.tokenize(sources, BYTES, out, name="bytes")
    assert contents(store.open_store(out)) == expected(texts)
    with pytest.raises(InputError, match=r"finished store of another special"):
        tokenizing.tokenize(sources, BYTES, out, name="bytes", special="parse")
    parsed = str(tmp_path / "parsed")
    tokenizing.tokenize(sources, BYTES, parsed, name="bytes", special="parse")
    assert contents(store.open_store(parsed))[0] == [*b"one ", END, *b" two", END]


def test_sources_that_changed_are_not_continued(tmp_path, monkeypatch):
    sources, out = corpus(tmp_path), str(tmp_path / "s")

    def die(self, facts):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(store.Writer, "finish", die)
        with pytest.raises(Killed):
            tokenizing.tokenize(sources, BYTES, out, name="bytes")
    (tmp_path / "b.txt").write_text("another text")
    with pytest.raises(InputError, match=r"its list of sources differs"):
        tokenizing.tokenize(sources, BYTES, out, name="bytes")


def test_the_command_prints_what_it_made(tmp_path, capsys):
    sources = corpus(tmp_path)
    cli.main(["tokenize", *sources, "--tokenizer", "bytes", "--out", str(tmp_path / "s")])
    printed = capsys.readouterr().out
    assert f"{sum(map(len, expected())):,} tokens (uint16)" in printed
    assert "20 without text left out" in printed


@pytest.mark.slow
def test_workers_give_the_same_store_and_survive_kill_9(tmp_path):
    """A real process, killed in the middle of writing, then run again."""
    texts = [f"document {i} " + "words of it " * (i % 700) for i in range(6000)]
    sources = corpus(tmp_path, texts)
    out = [str(tmp_path / name) for name in ("alone", "workers", "killed")]
    facts = tokenizing.tokenize(sources, BYTES, out[0], name="bytes", workers=0)
    shared = tokenizing.tokenize(
        sources, BYTES, out[1], name="bytes", workers=2, commit_tokens=10**6
    )
    assert facts == shared
    code = (
        "from lminf.data import tokenizing\n"
        "from lminf.data.tokenizers import ByteTokenizer\n"
        "if __name__ == '__main__':\n"
        f"    tokenizing.tokenize({sources!r}, ByteTokenizer(), {out[2]!r}, name='bytes',\n"
        "                        workers=2, commit_tokens=10**6)\n"
    )
    (tmp_path / "run.py").write_text(code)
    process = subprocess.Popen([sys.executable, str(tmp_path / "run.py")], start_new_session=True)
    place, deadline = Storage(out[2]), time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        progress, _ = place.json(store.PROGRESS)
        if progress and progress["tokens"] > 2 * 10**6:
            break
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    while _alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(process.pid), "workers outlive the process that started them"
    with pytest.raises(InputError, match=r"is unfinished"):
        store.open_store(out[2])
    done = subprocess.run([sys.executable, str(tmp_path / "run.py")], check=False)
    assert done.returncode == 0
    first, last = store.open_store(out[0]), store.open_store(out[2])
    assert last.facts == facts
    np.testing.assert_array_equal(first.ends, last.ends)
    np.testing.assert_array_equal(
        first.read([0], [first.tokens])[0], last.read([0], [last.tokens])[0]
    )


def _alive(group):
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_refused_command_leaves_no_folder(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["tokenize", str(tmp_path / "none"), "--tokenizer=bytes", f"--out={tmp_path}/s"])
    assert capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_sources_are_looked_at_before_the_place_of_the_store(tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    (tmp_path / "texts" / "z.csv").write_text("a,b")
    (tmp_path / "s").mkdir()
    words = ["tokenize", f"{tmp_path}/texts", "--tokenizer=bytes"]
    for name in ("s", "t/u", "texts/s"):
        with pytest.raises(SystemExit):
            cli.main([*words, f"--out={tmp_path}/{name}"])
        assert "z.csv ends in .csv, which is no format of texts" in capsys.readouterr().err
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"texts", "texts/a.txt", "texts/z.csv", "s"}


def test_a_store_among_its_sources_is_not_read_itself(tmp_path, capsys):
    corpus(tmp_path)
    words = ["tokenize", str(tmp_path), "--tokenizer=bytes", f"--out={tmp_path}/in/store"]
    for _ in range(2):  # and is found finished
        cli.main(words)
    assert contents(store.open_store(f"{tmp_path}/in/store")) == expected()
    for out in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(InputError, match=r"a.jsonl would be read and lies in "):
            documents.find([str(tmp_path / "a.jsonl")], out=out)
    with pytest.raises(InputError, match="hold no files beside"):
        documents.find([f"{tmp_path}/in"], out=tmp_path / "in" / "store")
