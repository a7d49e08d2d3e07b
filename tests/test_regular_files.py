"""Whatever a command reads is a regular file: a pipe without a writer would be waited for."""

import os
import signal
import sys

import pytest

from lminf import cli
from lminf.data import store, tokenizing
from lminf.data.tokenizers import ByteTokenizer
from lminf.errors import InputError
from lminf.run.folder import RunFolder


@pytest.fixture(autouse=True)
def soon():
    """A read that waits ends the test."""
    signal.alarm(30)
    yield
    signal.alarm(0)


@pytest.mark.parametrize(
    "words",
    [
        "scaling fit chinchilla --data {}",
        "scaling fit vocab --data {0} --fertility {0}",
        "scaling predict step --n 1B --tokens 1B --law {}",
        "scaling plan step --flops 1e12 --out {}",
        "nll {}",
        "nll {}.gguf",
        "nll m --text {}",
        "tokenize {} --tokenizer bytes --out {}.store",
        "tokenize t.txt --tokenizer {} --out {}.store",
        "data {} --tokenizer bytes",
        "run passkey --config {}.py",
        "run train_lm --config=:tiny --config.data.path={} --out={}.out",
        "run length_generalization --config=:tiny --config.text={} --out={}.out",
        "run step_law --config.data={} --out={}.out",
        "show {}",
        "convert {} {}.new",
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_is_one_sentence(words, kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if words.startswith("run "):  # as a program, which must not be imported
        monkeypatch.delitem(sys.modules, f"lminf.experiments.{words.split()[1]}", raising=False)
    (tmp_path / "t.txt").write_text("text")
    for name in ("odd", "odd.gguf", "odd.py"):
        if kind == "pipe":
            os.mkfifo(tmp_path / name)
        elif kind == "device":
            (tmp_path / name).symlink_to("/dev/zero")
        else:
            (tmp_path / name).mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as ending:
        cli.main(words.format(*["odd"] * 3).split())
    printed = capsys.readouterr().err
    assert ending.value.code == 2
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["store.json", "tokens/zarr.json", "ends/c/0"])
def test_a_store_with_a_pipe_in_it_is_refused(name, tmp_path):
    (tmp_path / "t.txt").write_text("text")
    out = tmp_path / "store"
    tokenizing.tokenize([str(tmp_path / "t.txt")], ByteTokenizer(), str(out), name="bytes")
    (out / name).unlink()
    os.mkfifo(out / name)
    with pytest.raises(InputError, match=rf"{name} is a pipe or a device"):
        store.open_store(str(out))


def test_rows_are_not_written_into_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match="is a pipe or a device"):
        RunFolder(tmp_path).append_row({"a": 1})
