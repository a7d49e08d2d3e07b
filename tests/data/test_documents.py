"""Reading: every format gives the same documents, and what cannot be read is named by line."""

import gzip
import itertools
import json
import sys

import pytest

from lminf.data import byte_streams, documents, records
from lminf.errors import InputError

TEXTS = ["One text.", "Zwei Sätze über 語.\nMit Zeile.", "third"]


def texts(path, **options):
    """The documents of one file, put together from their pieces."""
    (source,) = documents.find([str(path)])
    found, held = [], ""
    for piece in documents.read(source, **options):
        assert piece.first == (held == "")
        held += piece.text
        if piece.last:
            found.append(held)
            held = ""
    assert held == ""
    return found


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_lines_of_json_plain_and_compressed(tmp_path):
    data = lines({"id": i, "text": text} for i, text in enumerate(TEXTS))
    (tmp_path / "a.jsonl").write_bytes(data + b"\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data[:50]) + gzip.compress(data[50:]))
    assert texts(tmp_path / "a.jsonl") == TEXTS
    assert texts(tmp_path / "b.jsonl.gz") == TEXTS


def test_zstandard_frames_and_a_file_that_was_cut(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    data = lines({"text": text} for text in TEXTS)
    packed = [zstandard.compress(part) for part in (data[:20], data[20:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(packed))
    assert texts(tmp_path / "a.jsonl.zst") == TEXTS
    (tmp_path / "cut.jsonl.zst").write_bytes(b"".join(packed)[:-3])
    with pytest.raises(
        InputError, match=r"cut.jsonl.zst cannot be read to its end .*in the middle"
    ):
        texts(tmp_path / "cut.jsonl.zst")
    (tmp_path / "not.zst").write_bytes(b"plain text")
    with pytest.raises(
        InputError, match=r"not.zst is not zstandard data, although its name ends in .zst"
    ):
        texts(tmp_path / "not.zst")


def test_rows_of_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS, "id": [0, 1, 2]}), path)
    assert texts(path, field="body") == TEXTS
    with pytest.raises(InputError, match=r"a.parquet has no column 'boddy'.*did you mean 'body'"):
        texts(path, field="boddy")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    assert texts(path) == ["a", ""]
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"a"]}), path)
    with pytest.raises(InputError, match=r"a.parquet row 1: the field 'text' is .*not a text"):
        texts(path)
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match=r"a.parquet is not a readable parquet file"):
        texts(path)


@pytest.mark.parametrize(
    ("name", "package", "data"),
    [("a.parquet", "pyarrow", b"PAR1"), ("a.zst", "zstandard", b"\x28\xb5\x2f\xfd")],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package, data):
    (tmp_path / name).write_bytes(data)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"needs the package {package}; install it with"):
        texts(tmp_path / name)


def test_plain_text_is_one_document_or_one_between_blank_lines(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("\n\none\nstill one\n \n\ntwo 語\n\n\n", encoding="utf-8")
    assert texts(path) == [path.read_text(encoding="utf-8")]
    for block in (1, 2, 3, 7, 1 << 20):  # wherever the blocks of bytes end
        monkeypatch.setattr(byte_streams, "BLOCK_BYTES", block)
        assert texts(path, split="blank_line") == ["one\nstill one", "two 語"]
        assert texts(path) == [path.read_text(encoding="utf-8")]


def test_a_long_document_comes_in_pieces_that_end_where_no_token_notices(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_CHARS", 100)
    monkeypatch.setattr(documents, "CUT_ANYWAY_CHARS", 1000)
    monkeypatch.setattr(byte_streams, "BLOCK_BYTES", 64)
    text = "some words, and more of them " * 40
    (tmp_path / "a.txt").write_text(text)
    (source,) = documents.find([str(tmp_path / "a.txt")])
    pieces = list(documents.read(source))
    assert "".join(piece.text for piece in pieces) == text
    assert len(pieces) > 8
    assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    for before, after in itertools.pairwise(pieces):
        assert before.text[-1].isalpha()
        assert after.text[0] == " "
        assert len(before.text) < 120
    # Memory stays bounded where there is no such place at all.
    (tmp_path / "b.txt").write_text("語" * 3500)
    assert list(map(len, texts(tmp_path / "b.txt"))) == [3500]
    (source,) = documents.find([str(tmp_path / "b.txt")])
    assert max(len(piece.text) for piece in documents.read(source)) <= 1000


def test_documents_without_text_are_handed_on_to_be_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": ""}, {"text": " \n"}, {"text": "x"}]))
    assert texts(tmp_path / "a.jsonl") == ["", "", "x"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"fine\n\xff", r"a.txt line 2 is not UTF-8 text: byte 0xff at offset 5"),
        ("a.txt", b"caf\xc3", r"a.txt line 1 is not UTF-8 text: byte 0xc3 at offset 3"),
        ("a.txt", b"x\ny\0z", r"a.txt line 2 holds a zero byte \(offset 3\).*binary"),
        ("a.txt", b" \n\n", r"a.txt holds no text \(3 bytes\)"),
        ("a.txt", b"", r"a.txt is empty"),
        ("a.gz", b"not packed", r"a.gz is not gzip data"),
        ("a.gz", gzip.compress(b"some text", mtime=0)[:-9], r"a.gz cannot be read to its end"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2 is not UTF-8.*0xff"),
        ("a.jsonl", b'{"txt": "a"}\n', r"line 1 has no field 'text'.*did you mean 'txt'"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: the field 'text' is 3, not a text"),
        ("a.jsonl", b'["text"]\n', r"line 1 \(item 1\) holds a str, not an object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: character 0 .* surrogate"),
        ("a.jsonl", b"\n\n", r"a.jsonl holds no line of JSON"),
    ],
)
def test_bad_files_are_named_by_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        texts(tmp_path / name)


def test_the_line_of_bad_bytes_is_counted_over_blocks(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"a\n" * 9 + "é".encode() * 5 + b"\xe9\n")
    for block in (1, 2, 3, 5, 100):
        monkeypatch.setattr(byte_streams, "BLOCK_BYTES", block)
        with pytest.raises(InputError, match=r"line 10 .* byte 0xe9 at offset 28"):
            texts(tmp_path / "a.txt")


def test_a_line_of_json_too_long_to_parse_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RECORD_BYTES", 64)
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "a"}, {"text": "b" * 100}]))
    with pytest.raises(InputError, match=r"a.jsonl line 2: the record is longer than"):
        texts(tmp_path / "a.jsonl")


def test_files_are_found_by_name_folder_and_pattern(tmp_path):
    for name in ("b.txt", "a.jsonl", "sub/c.txt", ".hidden/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    def names(*patterns):
        found = documents.find([str(tmp_path / pattern) for pattern in patterns])
        return [str(source.path.relative_to(tmp_path)) for source in found]

    assert names("") == ["a.jsonl", "b.txt", "sub/c.txt"]
    assert names("b.txt", "*.jsonl") == ["b.txt", "a.jsonl"]
    assert names("**/*.txt") == ["b.txt", "sub/c.txt"]
    with pytest.raises(InputError, match=r"there is no file, folder or match of '.*nothing\*'"):
        names("nothing*")
    with pytest.raises(InputError, match=r"b.txt is named twice"):
        names("", "b.txt")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"the folder .*none holds no files"):
        names("none")
