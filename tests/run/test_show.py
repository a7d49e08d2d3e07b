"""lminf show of damaged runs: what can be read is shown, and one sentence says what could not."""

import json
import os
import shutil
from pathlib import Path

import pytest

from lminf import cli
from lminf.commands import show
from lminf.errors import InputError
from lminf.run import folder, header, report
from tests import cases

ROW = {"trained_length": 64, "policy": "full", "start": 0, "stop": 64, "nll": 2.5,
       "excess_over_reread": 0.0}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    rows = [ROW, {**ROW, "start": 64, "stop": 128}]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "environment.json").write_text('{"experiment": "length_generalization"}')
    (path / "overrides.json").write_text("{}")
    (path / "config.json").write_text("{}")
    return path


def shown(path, capsys, *flags) -> tuple[str, str]:
    """What `lminf show` prints, and the one line that it ends with."""
    code = 0
    try:
        cli.main(["show", str(path), *flags])
    except SystemExit as ending:
        code = ending.code
    out, err = capsys.readouterr()
    assert code == (2 if err and not err.startswith("warning: ") else 0)
    assert "Traceback" not in out + err
    assert err.count("\n") <= 1
    return out, err


def test_a_whole_run_is_shown_without_a_word(run, capsys):
    out, err = shown(run, capsys)
    assert "2.500" in out
    assert err == ""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "line 2 of"), (b"7", "int instead of an object"), (b"\xff\xfe", "line 2 of"),
        (b'{"nll": NaN}', "NaN is no measurement"), (b'{"nll": 1e999}', "is infinite"),
        (b'{"nll": [1]}', "no single value"), (b'{"nll": 1' + b"0" * 400 + b"}", "63 bits"),
        (b"[" * 100_000, "line 2 of"), (b'{"nll": ' + b"1" * 5000 + b"}", "line 2 of"),
    ],
)  # fmt: skip
def test_a_damaged_row_is_named_and_the_others_are_shown(run, line, said, capsys):
    first, second = (run / "rows.jsonl").read_bytes().splitlines()
    (run / "rows.jsonl").write_bytes(b"\n".join([first, line, second]) + b"\n")
    out, err = shown(run, capsys)
    assert "2.500" in out
    assert err.startswith("warning: ")
    assert said in err
    with pytest.raises(InputError, match="line 2 of"):  # where every row counts
        folder.RunFolder(run).rows()


@pytest.mark.parametrize("name", ["environment.json", "overrides.json", "config.json"])
@pytest.mark.parametrize("content", [b"[]", b"null", b"\xff", b"{", b"[" * 100_000, b"1"])
def test_damaged_settings_are_named_and_the_rows_are_shown(run, name, content, capsys):
    (run / name).write_bytes(content)
    out, err = shown(run, capsys)
    assert "2.500" in out
    assert name in err


@pytest.mark.parametrize("name", [7, None, [], "no_such", "_noise", "../x", "a.b", "\x1b[2J\ud800"])
def test_a_run_of_no_known_experiment_is_shown_as_rows(run, name, capsys):
    (run / "environment.json").write_text(json.dumps({"experiment": name}))
    out, err = shown(run, capsys)
    assert "excess_over_reread" in out
    assert "\x1b" not in out + err
    _, err = shown(run, capsys, "--redraw")
    assert "not installed here" in err or "names no experiment" in err


@pytest.mark.parametrize(
    "changed", [{"policy": None}, {"stop": "x"}, {"stop": -1e308, "nll": 1e308}]
)
def test_rows_that_cannot_be_drawn_leave_the_figures_as_they_were(run, changed, capsys):
    (run / "plots").mkdir()
    (run / "plots/length_generalization.png").write_bytes(b"old")
    (run / "rows.jsonl").write_text(json.dumps({"policy": "full", "nll": 2.5} | changed) + "\n")
    out, err = shown(run, capsys, "--redraw")
    assert "nll" in out
    assert "as they were" in err or "cannot draw" in err
    assert (run / "plots/length_generalization.png").read_bytes() == b"old"


def test_rows_of_another_experiment_are_shown_as_they_are_with_a_warning(run, capsys):
    (run / "rows.jsonl").write_text('{"speed": 2.5}\n')
    out, err = shown(run, capsys)
    assert "2.500" in out
    assert err.startswith("warning: the rows of ")
    assert "there is no 'start' in a row" in err
    assert shown(run, capsys, "--redraw")[1].startswith("error: ")
    (run / "rows.jsonl").write_text("{\n")
    assert shown(run, capsys)[1].startswith("error: line 1 of ")


def test_pipes_and_folders_in_place_of_files_are_refused(run, capsys):
    (run / "rows.jsonl").unlink()
    os.mkfifo(run / "rows.jsonl")
    (run / "config.json").unlink()
    (run / "config.json").mkdir()
    _, err = shown(run, capsys)
    assert "rows.jsonl is a pipe or a device, not a regular file" in err
    assert "config.json is a folder" in err


def test_a_run_without_its_environment_is_known_by_its_name(run, capsys):
    kept = run.parent / "length_generalization_long"
    run.rename(kept)
    (kept / "environment.json").unlink()
    out, err = shown(kept, capsys)
    assert out.startswith("length_generalization\n")
    assert err == ""


@pytest.mark.parametrize("name", ["", "\0", "a" * 5000, "**", "/no/such"])
def test_a_name_that_is_no_run_is_refused(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, err = shown(name, capsys)
    assert err.startswith("error: ")


@pytest.mark.parametrize("name", ["108", "3", "32", "6", "78"])
def test_the_damaged_runs_of_the_cases_are_shown(name, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(cases.path(f"runs/cli_rows-{name}"), run)
    out, _ = shown(run, capsys)
    assert len(out.splitlines()) > 5


def test_a_copy_under_another_name_is_known_by_its_report(tmp_path):
    kept = Path(__file__).parents[2] / "docs/results/passkey"
    (tmp_path / "copy").mkdir()
    for name in ("report.md", "rows.jsonl"):
        shutil.copy(kept / name, tmp_path / "copy" / name)
    assert show.read(str(tmp_path / "copy")).experiment == "passkey"
    (tmp_path / "copy/report.md").unlink()
    with pytest.raises(InputError, match="which experiment it is of; name the folder after it"):
        show.redraw(show.read(str(tmp_path / "copy")))


def test_a_run_without_rows_is_not_drawn(tmp_path, capsys):
    run = tmp_path / "passkey"
    run.mkdir()
    (run / "rows.jsonl").write_text("")
    with pytest.raises(SystemExit):
        cli.main(["show", str(run), "--redraw"])
    assert "rows.jsonl holds no row to draw; run the experiment first" in capsys.readouterr().err


def test_a_report_gets_the_new_table_and_the_figures_that_are_there():
    text = (
        "# A\n\n- **Question**: old?\n\n```\nrun\n```\n\n| a |\n| ---: |\n| 1 |\n\n"
        "![b](plots/b.png)\n\n![c](plots/c.png)\n\nEnd | x\n"
    )
    said = header.Header("a", "A", {"Question": "new?", "Command": "run", "Tiny": "seconds"})
    figures = ["plots/d.png", "plots/c.png"]
    new = report.with_results(text, header=said, table=[{"a": 2.5}], figures=figures)
    assert new == (
        "# A\n\n- **Question**: new?\n- **Tiny**: seconds\n\n```\nrun\n```\n\n| a |\n| ---: |\n"
        "| 2.500 |\n\n![c.png](plots/c.png)\n\n![d.png](plots/d.png)\n\nEnd | x\n"
    )
    another = text.replace("run\n", "lminf run a --config=my.py:tiny\n")
    assert "old?" in report.with_results(another, header=said, table=[], figures=figures)
    failed = "# A\n\n- **Question**: new?\n- **Tiny**: seconds\n\n**Failed**\n\n(no rows)\n"
    assert report.with_results(failed, header=said, table=[], figures=[]) == failed
