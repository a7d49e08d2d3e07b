"""From a command line to a finished folder, with a small experiment made for the occasion."""

import json
import re
import signal
import sys
from types import SimpleNamespace

import pytest

from lminf.errors import InputError
from lminf.experiments import _main
from lminf.run import folder, plots, request, tables

CONFIG = '''"""Squares, by power.

Question   How large is a number to
           some power?
Command    python -m experiments.demo
Time       an instant
"""

from lminf.configs import base
from lminf.config import to_config
from lminf.attention.policy import LMInfinite


def get_config(arg=""):
    c = base.get_config(arg, variants=("tiny",))
    c.lengths = (2, 4) if arg == "tiny" else (2, 4, 8)
    c.policies = ("full", "window:window=4")
    c.attention = to_config(LMInfinite(window=64, sinks=4))
    c.text = None
    c.rate = 0.5
    c.stop_after = 100
    return c
'''

EXPERIMENT = """
import os
import signal

from lminf.errors import InputError


def run(config, out):
    count = 0
    for power in (1, 2):
        for length in config.lengths:
            if count == config.stop_after:
                raise {error}
            count += 1
            yield {{"power": power, "length": length, "value": length**power}}
"""


@pytest.fixture(autouse=True)
def demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.py").write_text(CONFIG)


def parse(*arguments):
    given = any(word.partition("=")[0] == "--config" for word in arguments)
    return request.parse("demo", [*arguments] if given else ["--config=demo.py", *arguments])


def experiment(error="InputError('the text has 3 tokens; give a longer one')"):
    """The run function, as if from experiments/demo.py."""
    space = {}
    exec(compile(EXPERIMENT.format(error=error), "experiments/demo.py", "exec"), space)
    return space["run"]


def draw(rows):
    return plots.curves(rows, x="length", y="value", by="power")


def table(rows):
    return tables.pivot(rows, index="length", columns="power", value="value")


def start(*arguments, error=None, plot=draw, rendered=False):
    """Runs the command; pictures cost half a second each, so most runs only pretend."""
    run = experiment(error) if error else experiment()
    with pytest.MonkeyPatch.context() as patch:
        if not rendered:
            patch.setattr(plots, "save", lambda figure, kind: b"a picture")
        _main.main(run, plot, table=table, argv=["--config=demo.py", "--out=out", *arguments])


# --- Command lines --------------------------------------------------------------------------------


def test_overrides_reach_the_config_and_are_recorded():
    asked = parse("--config.rate=2", "--config.lengths=(3,)", "--config.attention.window", "9")
    assert asked.config.rate == 2.0
    assert asked.config.lengths == (3,)
    assert asked.config.attention.window == 9
    assert asked.overrides == {"rate": 2.0, "lengths": (3,), "attention.window": 9}


def test_a_tuple_of_words_needs_no_quotes():
    asked = parse("--config.policies=full", "--config.policies=lm_infinite:window=64,sinks=4")
    assert asked.config.policies == ("full", "lm_infinite:window=64,sinks=4")


def test_a_field_that_is_none_takes_a_value():
    assert parse("--config.text=a/b.txt").config.text == "a/b.txt"
    assert parse().resolved()["text"] is None
    assert parse("--config.attention.distance=7").config.attention.distance == 7


def test_a_variant_is_handed_to_get_config():
    assert request.parse("demo", ["--config=demo.py:tiny"]).config.lengths == (2, 4)


def test_a_config_is_found_from_any_folder_by_path_and_by_name():
    by_path = request.find_config("demo", "configs/base.py:tiny")
    by_name = request.find_config("demo", "base:tiny")
    assert by_path == by_name == request.find_config("base", ":tiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.lenths=3"], "no field 'lenths'; did you mean 'lengths'"),
        (["--config.attention.windw=3"], "did you mean 'attention.window'"),
        (["--config.attention=3"], "config.attention is a section; override attention.distance"),
        (["--config.attention.class=Full"], "attention.class is what the section is"),
        (["--config.attention.window=three"], "--config.attention.window=three: invalid literal"),
        (["--config.lengths=three"], "config.lengths holds int, not 'three'"),
        (["--config.rate"], "Missing value"),
        (["--ot=x"], "Unknown command line flag 'ot'"),
        (["tiny"], "'tiny' is not a flag; an override is written"),
        (["--config=demo.py:tny"], "no variant 'tny'; did you mean 'tiny'"),
        (["--config=dmo.py"], "there is no config file 'dmo.py'"),
        (["--config"], "--config needs a value"),
    ],
)
def test_a_bad_command_line_is_one_sentence(arguments, message):
    with pytest.raises(InputError, match=message):
        parse(*arguments)


def test_a_config_file_that_is_no_config_is_bad_input(tmp_path):
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(InputError, match="cannot read the config file broken"):
        request.parse("demo", ["--config=broken.py"])
    with pytest.raises(InputError, match="has no get_config"):
        request.parse("demo", ["--config=empty.py"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named"),
        ("1 / 0", "ZeroDivisionError"),
        ("def get_config(arg=''):\n    return {}", "returns dict; it should return a ConfigDict"),
        ("def get_config():\n    pass", r"get_config\(''\) of broken.py fails with TypeError"),
    ],
)
def test_a_config_file_that_fails_is_bad_input(text, message, tmp_path):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(InputError, match=message):
        request.parse("demo", ["--config=broken.py"])


@pytest.mark.parametrize("name", ["(" * 3000, "\0", "../" * 2000])
def test_a_name_that_no_config_file_can_have_is_bad_input(name):
    with pytest.raises(InputError, match="there is no config file"):
        request.parse("demo", [f"--config={name}"])


def test_control_characters_of_an_error_are_shown_escaped(capsys):
    with pytest.raises(SystemExit):
        start("--config.stop_after=0", error=r"InputError('a\x1b[2Jb \ud800')")
    assert capsys.readouterr().err == "error: a\\x1b[2Jb \\ud800\n"


def test_help_lists_the_question_and_every_field(capsys):
    assert parse("--help") is None
    text = capsys.readouterr().out
    assert "How large is a number to some power?" in text
    assert "--config.attention.window=64" in text


# --- Runs -----------------------------------------------------------------------------------------


def test_a_run_leaves_rows_figure_and_report(tmp_path, capsys):
    start("--config.lengths=(2,3)", rendered=True)
    out = tmp_path / "out"
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert rows[-1] == {"power": 2, "length": 3, "value": 9}
    assert (out / "plots/demo.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "config.py").read_text() == CONFIG
    report = (out / "report.md").read_text()
    for part in (
        "# Squares",
        "some power?",
        "| 3 | 3 | 9 |",
        "![demo.png](plots/demo.png)",
        "Time:",
    ):
        assert part in report
    printed = capsys.readouterr()
    assert "│      3 │ 3 │ 9 │" in printed.out
    assert "out/rows.jsonl" in printed.out


def test_several_figures_are_drawn_by_name(tmp_path):
    start(plot=lambda rows: {"one": draw(rows), "two": draw(rows)})
    assert sorted(path.name for path in (tmp_path / "out/plots").iterdir()) == [
        "one.png",
        "one.svg",
        "two.png",
        "two.svg",
    ]


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit) as ending:
        start("--config.stop_after=0")
    assert ending.value.code == 2
    assert capsys.readouterr().err == "error: the text has 3 tokens; give a longer one\n"
    assert not (tmp_path / "out").exists()


def resume(*arguments, error):
    """An experiment that resumes, as train_lm does."""
    argv = ["--config=demo.py", "--out=out", *arguments]
    with pytest.raises(SystemExit):
        _main.main(experiment(error), draw, table=table, resumes=True, argv=argv)


def test_bad_input_takes_nothing_from_a_folder_that_was_there(tmp_path):
    (tmp_path / "out").mkdir()
    resume("--config.stop_after=0", error="InputError('no')")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(SystemExit):
        start("--config.stop_after=0")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_refusal_leaves_no_lock_and_no_folder(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    resume(error="InputError('no')")
    assert "holds a run with" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
    with pytest.raises(SystemExit):
        start("--config.stop_after=0", "--out=deep/in/new")
    with pytest.raises(SystemExit):
        _main.main(experiment(), draw, argv=["--config=demo.py", "--config.stop_after=0"])
    assert {path.name for path in tmp_path.iterdir()} == {"out", "demo.py"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"power": 1, "value": 1},
            r"rows of out are not those of demo \(there is no 'length' in a row\)",
        ),
        ({"power": "\x1b[31m", "value": []}, "line 1 of out/rows.jsonl is not a row"),
    ],
)
def test_rows_that_are_not_of_the_experiment_are_neither_drawn_nor_gone_on_with(
    row, message, tmp_path, capsys
):
    resume("--config.stop_after=1", error="KeyboardInterrupt")
    written = (tmp_path / "out" / "report.md").read_bytes()
    (tmp_path / "out" / "rows.jsonl").write_text(json.dumps(row) + "\n")
    resume("--config.stop_after=1", error="ZeroDivisionError()")
    printed = capsys.readouterr().err
    assert re.search(message, printed), printed
    assert (tmp_path / "out" / "report.md").read_bytes() == written
    assert not list((tmp_path / "out" / "plots").iterdir())


def test_a_row_without_a_column_that_the_run_reads_is_refused(tmp_path):
    out = folder.RunFolder(tmp_path)
    request_ = SimpleNamespace(config=None, experiment="demo")

    def run(config, out):
        yield {"length": {"a": 1}["length"]}

    with pytest.raises(InputError, match="there is no 'length' in a row"):
        list(_main.measured(run, request_, out, [{"power": 1}]))
    with pytest.raises(KeyError):  # the code's own
        list(_main.measured(run, request_, out, [{"length": 1}]))


def test_a_run_that_measures_nothing_draws_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit):
        _main.main(lambda config, out: iter(()), draw, argv=["--config=demo.py", "--out=out"])
    assert "measured nothing; give it something to measure" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_refusal_leaves_the_report_of_a_finished_run(tmp_path):
    resume("--config.stop_after=0", error="KeyboardInterrupt")
    report = tmp_path / "out" / "report.md"
    report.write_text("whole")
    resume("--config.stop_after=0", error="InputError('no')")
    assert report.read_text() == "whole"


def test_a_resume_that_fails_keeps_the_run_and_what_is_beside_it(tmp_path):
    """No row and no line of metrics yet, but checkpoints and notes."""
    resume("--config.stop_after=0", error="KeyboardInterrupt")
    out = tmp_path / "out"
    (out / "checkpoints" / "00000002").mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    before = {path for path in out.rglob("*") if path.name != "report.md"}
    resume("--config.stop_after=0", error="InputError('no')")
    assert {path for path in out.rglob("*") if path.name != "report.md"} == before


def test_a_new_folder_in_which_something_appeared_is_kept(tmp_path):
    write = "[os.makedirs('out/checkpoints'), InputError('no')][1]"
    resume("--config.stop_after=0", error=write)
    assert (tmp_path / "out" / "checkpoints").exists()


def test_a_lock_of_somebody_else_is_left_as_it_is(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lock").write_text("mine")
    resume("--config.stop_after=0", error="InputError('no')")
    assert "is no lock of this program" in capsys.readouterr().err
    assert (tmp_path / "out" / "lock").read_text() == "mine"


def test_debug_shows_the_traceback():
    with pytest.raises(InputError):
        start("--config.stop_after=0", "--debug")


@pytest.mark.parametrize(
    ("error", "ending", "word"),
    [
        ("KeyboardInterrupt", SystemExit, "Interrupted"),
        ("InputError('text too short')", SystemExit, "text too short"),
        ("ZeroDivisionError('by zero')", ZeroDivisionError, "by zero"),
    ],
)
def test_a_run_that_stops_early_keeps_its_rows_and_says_so(tmp_path, error, ending, word):
    with pytest.raises(ending):
        start("--config.stop_after=2", error=error)
    assert len((tmp_path / "out/rows.jsonl").read_text().splitlines()) == 2
    report = (tmp_path / "out/report.md").read_text()
    assert word in report
    assert "after 2 rows" in report


def test_an_interrupted_run_ends_with_130():
    with pytest.raises(SystemExit) as ending:
        start("--config.stop_after=2", error="KeyboardInterrupt")
    assert ending.value.code == 130


def test_a_terminated_run_ends_with_143_and_says_what_is_kept(capsys):
    with pytest.raises(SystemExit) as ending:
        start("--config.stop_after=2", error="os.kill(os.getpid(), signal.SIGTERM)")
    assert ending.value.code == 143
    assert "2 rows are in" in (said := capsys.readouterr().err)
    assert "cannot go on from there" in said
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_recorded_command_is_one_that_can_be_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/lminf", "run", "demo"])
    start()
    with open("out/environment.json") as file:
        assert json.load(file)["command"] == "lminf run demo"
