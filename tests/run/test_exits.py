"""What files contain cannot act on a terminal: in errors and in tables it is shown escaped."""

import gc
import logging
import signal
import time
import warnings

import pytest
from rich.console import Console

from lminf import cli
from lminf.errors import InputError, printable
from lminf.run import exits, tables

EVIL = "a\x1b[2J\x07\u202eb\x9b31m\ud800"
SHOWN = "a\\x1b[2J\\x07\\u202eb\\x9b31m\\ud800"


def test_control_characters_are_shown_and_text_of_any_script_stays():
    assert printable(EVIL) == SHOWN
    assert printable("naïve 漢字 👍 €") == "naïve 漢字 👍 €"


def test_errors_are_one_line_without_control_characters(capsys):
    with pytest.raises(SystemExit), exits.orderly(debug=False):
        raise InputError(f"{EVIL}\nnext")
    assert capsys.readouterr().err == f"error: {SHOWN} next\n"


def test_cells_and_heads_of_tables_are_shown_as_they_are(capsys):
    rows = [{f"head{EVIL}": EVIL, "note": "[/] [red]x[/red] :smile:\nnext", "n": 1}]
    Console(width=200, highlight=False).print(tables.rich_table(rows, title=f"[/]{EVIL}"))
    printed = capsys.readouterr().out
    assert printed.count(SHOWN) == 3
    assert "[/] [red]x[/red] :smile:\\nnext" in printed
    assert not set(printed) & {"\x1b", "\x07", "\x9b", "\u202e"}
    assert SHOWN in tables.markdown(rows)
    assert len(tables.markdown(rows).splitlines()) == 3


def test_remarks_of_libraries_follow_a_command_and_are_not_beside_its_failure(capsys):
    def remark(*, error=None):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("no GPU", stacklevel=1)
        logging.getLogger("library").warning("slow")
        print("done")
        if error:
            raise error

    with exits.orderly(debug=False):
        remark()
    printed = capsys.readouterr()
    assert printed.out == "done\n"
    assert "UserWarning: no GPU" in printed.err
    assert printed.err.endswith("slow\n")
    with pytest.raises(SystemExit), exits.orderly(debug=False):
        remark(error=InputError("no"))
    assert capsys.readouterr().err == "error: no\n"


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, exits.TERMINATED), (signal.SIGINT, exits.INTERRUPTED)],
)
def test_a_stop_that_comes_while_garbage_is_collected_is_not_lost(number, status, capsys):
    """Python ignores what a callback of the collector raises."""

    def stop(phase, info):
        if phase == "start":
            gc.callbacks.remove(stop)
            signal.raise_signal(number)

    def work():
        gc.callbacks.append(stop)
        gc.collect()
        time.sleep(20)

    with pytest.raises(SystemExit) as ending, exits.orderly(debug=False):
        work()
    assert ending.value.code == status
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("name", ["x" * 300, "loop"])
def test_a_name_that_no_file_can_have_is_one_sentence(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "t.txt").write_text("text")
    for words in (
        ["nll", name],
        ["tokenize", "t.txt", "--tokenizer=bytes", f"--out={name}"],
        ["tokenize", name, "--tokenizer=bytes", "--out=s"],
        ["data", name, "--tokenizer=bytes"],
        ["convert", "no-such", name],
        ["show", name],
        ["scaling", "fit", "step", "--data", name],
        ["scaling", "collect", "step", "--runs", name, "--out", "o.csv"],
        ["scaling", "plan", "step", "--flops=1e13", "--out", f"{name}/plan.py"],
        ["sweep", "step", "--config=step_sweep:tiny", f"--out={name}"],
    ):
        with pytest.raises(SystemExit) as ending:
            cli.main(words)
        printed = capsys.readouterr().err
        assert ending.value.code == 2, words
        assert printed.startswith("error: "), words
        assert printed.count("\n") == 1, words
    assert {path.name for path in tmp_path.iterdir()} == {"loop", "t.txt"}
