"""What a file holds is told by its content as well as by its name; what is no text is refused."""

import bz2
import gzip
import json
import lzma
import os
import tracemalloc

import pytest

from lminf.data import byte_streams, documents, records, sources
from lminf.errors import InputError
from tests import cases
from tests.data.test_documents import TEXTS, lines, texts

ROWS = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
GOOD = ["The cat sat on the mat. " * 3, "", "Dogs bark at night. " * 3]


@pytest.mark.parametrize(
    "name", ["good.jsonl", "UP.JSONL", "plain.json", "c4-train.00000-of-01024.json.gz"]
)
def test_the_cases_of_json_lines_hold_documents(name):
    assert texts(cases.path(f"corpora/{name}")) == GOOD
    assert sources.read_text(cases.path(f"corpora/{name}")) == f"{GOOD[0]}\n\n{GOOD[2]}"


def test_the_other_cases_hold_their_documents():
    assert texts(cases.path("corpora/alpaca.json")) == ["hello there", "second doc"]
    assert texts(cases.path("corpora/null_row.jsonl")) == ["one", "", "three"]
    (text,) = texts(cases.path("corpora/bom.txt"))
    assert text == sources.read_text(cases.path("corpora/bom.txt"))
    assert text.startswith("A text that begins")
    with pytest.raises(InputError, match=r"x.csv ends in .csv, which is no format"):
        texts(cases.path("corpora/x.csv"))


@pytest.mark.parametrize(
    "data",
    [
        lines(ROWS),
        lines(ROWS).rstrip(),
        b"\xef\xbb\xbf" + lines(ROWS),
        b"\xef\xbb\xbf\n\n" + lines(ROWS).replace(b"\n", b"\r\n"),
        json.dumps(ROWS).encode(),
        b"\n " + json.dumps(ROWS, indent=1).encode() + b"\n",
        b"\n".join(json.dumps(row, indent=1).encode() for row in ROWS),
    ],
    ids=["lines", "no last newline", "mark", "mark and CRLF", "array", "pretty array", "objects"],
)
@pytest.mark.parametrize("name", ["a.json", "b.JSONL", "c.ndjson", "d.jsonlines", "e", "f.txt",
                                  "part-00000", "g.json.00001-of-00002"])  # fmt: skip
def test_records_are_read_in_every_way_of_writing_them(tmp_path, name, data, monkeypatch):
    (tmp_path / name).write_bytes(data)
    assert texts(tmp_path / name) == TEXTS
    monkeypatch.setattr(byte_streams, "BLOCK_BYTES", 7)
    assert texts(tmp_path / name) == TEXTS


@pytest.mark.parametrize(
    ("ending", "pack"),
    [(".gz", gzip.compress), (".gzip", gzip.compress), (".GZ", gzip.compress), ("", gzip.compress),
     (".bz2", bz2.compress), (".xz", lzma.compress), ("", lzma.compress)],
)  # fmt: skip
def test_compressed_files_are_known_by_their_first_bytes(tmp_path, ending, pack):
    data = lines(ROWS)
    (tmp_path / f"a.jsonl{ending}").write_bytes(pack(data[:40]) + pack(data[40:]))
    assert texts(tmp_path / f"a.jsonl{ending}") == TEXTS
    whole = pack(data)
    (tmp_path / f"cut.jsonl{ending}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read to its end"):
        texts(tmp_path / f"cut.jsonl{ending}")


@pytest.mark.parametrize(
    "kind", ["zst", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gz", "bz2", "xz"))]
)
def test_a_file_that_expands_a_thousandfold_is_read_in_bounded_memory(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(records, "RECORD_BYTES", 1 << 22)
    kinds = {"gz": gzip, "bz2": bz2, "xz": lzma}
    module = kinds[kind] if kind in kinds else pytest.importorskip("zstandard")
    data = module.compress(b'{"text": "a"}\n{"text": "' + b"x" * (64 << 20))
    (tmp_path / f"a.jsonl.{kind}").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="the record is longer than"):
            texts(tmp_path / f"a.jsonl.{kind}")
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.tsv", b"x\ty", r"a.tsv ends in .tsv, which is no format of texts"),
        ("a.html", b"<p>x</p>", r"ends in .html"),
        ("a.csv.gz", gzip.compress(b"x,y", mtime=0), r"a.csv.gz ends in .csv"),
        ("a.tgz", gzip.compress(b"x", mtime=0), r"ends in .tgz"),
        ("a.unknown", b"text", r"ends in .unknown"),
        ("a.txt", b"PK\x03\x04", r"a.txt holds a zip archive, no text"),
        ("a", b"%PDF-1.7 text", r"a holds a PDF document"),
        ("a.txt.gz", gzip.compress(b"x" * 257 + b"ustar\0", mtime=0), r"holds a tar archive"),
        ("a.gz", gzip.compress(gzip.compress(b"x", mtime=0), mtime=0), r"holds gzip data inside"),
        ("a.txt", "text".encode("utf-16"), r"a.txt is UTF-16 text.*iconv -f UTF-16"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16"), r"is UTF-16 text"),
        ("a.parquet", b"text", r"a.parquet is not a readable parquet file"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), r"parquet inside gzip data"),
        ("a.json", b"", r"is empty"),
        ("a.json", b"[]", r"holds an empty array"),
        ("a.json", b'[{"text": "a"}', r"ends inside its array, after 1 items"),
        ("a.json", b'[{"text": "a"},\n {"text": ]', r"line 2 column \d+ is not JSON"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', r"has '\{' between two items"),
        ("a.json", b'[{"text": "a"}]\n\n{}', r"line 3: something follows the array"),
        ("a.json", b'{"data": [{"text": "a"}]}', r"no field 'text'"),
        ("a.json", b'{"text": {"0": "a"}}', r"the field 'text' is .*, not a text"),
        ("a.json", b"[" * 100_000, r"is not JSON|longer"),
        ("a.json", b'{"text": ' + b"9" * 5000 + b"}\n", r"is not JSON .*4300 digits"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', r"'messages' is a conversation.*chat\("),
        ("a.json", b'{"instruction": "a", "input": "", "output": "b"}', r"instruction.*chat\("),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused_by_name(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        texts(tmp_path / name)


def test_a_text_that_only_begins_like_json_stays_a_text(tmp_path):
    for text in ('{"a": 1} is an object.\n', '{"a": \nis not closed', "[see below]", "{x}\n"):
        (tmp_path / "a.txt").write_text(text)
        assert texts(tmp_path / "a.txt") == [text]
    (tmp_path / "a.md").write_text('{"text": "a"}\n')
    assert texts(tmp_path / "a.md") == ['{"text": "a"}\n']


def test_every_document_loses_its_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "\ufeffone"}\n\ufeff{"text": "two"}\n')
    assert texts(tmp_path / "a.jsonl") == ["one", "two"]
    (tmp_path / "a.txt").write_text("\ufeffone\n\n\ufefftwo")
    assert texts(tmp_path / "a.txt", split="blank_line") == ["one", "two"]


def test_a_conversation_named_as_the_field_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([{"chat": [{"role": "user", "content": "x"}]}]))
    with pytest.raises(InputError, match=r"'chat' is a conversation; write each row as one text"):
        texts(tmp_path / "a.jsonl", field="chat")


def test_pipes_devices_and_names_that_cannot_be_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    for name in ("pipe.txt", "device.txt"):
        with pytest.raises(InputError, match=f"{name} is a pipe or a device"):
            documents.find([str(tmp_path / name)])
        with pytest.raises(InputError, match=f"{name} is a pipe or a device"):
            sources.read_text(tmp_path / name)
    (tmp_path / "a.txt").write_text("x")
    assert [s.path.name for s in documents.find([str(tmp_path)])] == ["a.txt"]
    with pytest.raises(InputError, match="there is no file, folder or match of"):
        documents.find(["x" * 5000])
    with pytest.raises(InputError, match="cannot read"):
        sources.read_text("x" * 5000)


def test_a_text_that_never_ends_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "TEXT_CHARS", 1000)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"x" * 2000))
    with pytest.raises(InputError, match="holds more than"):
        sources.read_text(tmp_path / "a.txt.gz")


def test_an_array_of_records_takes_the_memory_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RECORD_BYTES", 1 << 16)
    monkeypatch.setattr(byte_streams, "BLOCK_BYTES", 1 << 12)
    rows = [{"text": f"{i} " * 100} for i in range(2000)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert texts(tmp_path / "a.json") == [row["text"] for row in rows]
    (tmp_path / "b.json").write_text(json.dumps([{"text": "x" * (1 << 17)}]))
    with pytest.raises(InputError, match=r"line 1: the record is longer than"):
        texts(tmp_path / "b.json")
