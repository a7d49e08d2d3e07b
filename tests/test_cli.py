"""The lminf command: every one starts, errors are one line, pipes may close."""

import importlib.util
import io
import subprocess
import sys
from types import SimpleNamespace

import pytest

import lminf
from lminf import cli
from lminf.checkpoints import fetch
from lminf.commands import _model, generate
from lminf.errors import InputError
from lminf.run import environment, folder, header, request


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as ending:
        cli.main(["--help"])
    assert ending.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_of_its_own(name, capsys):
    with pytest.raises(SystemExit) as ending:
        cli.main([name, "--help"])
    assert ending.value.code == 0
    assert f"usage: lminf {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lst"], "there is no command 'lst'; did you mean 'list'"),
        (
            ["list", "length_generalisation"],
            "there is no experiment or topic 'length_generalisation'; did you mean "
            "'length_generalization'?",
        ),
        (["list", "Cost"], "there is no experiment or topic 'Cost'; did you mean 'cost'?"),
        (["run", "nothing"], "there is no experiment 'nothing'"),
        (["show", "nothing"], "'nothing' is no run's folder"),
        (
            ["nll", "m", "--length=x"],
            "argument --length: invalid int value: 'x'; `lminf nll --help`",
        ),
        (["show"], "the following arguments are required: RUN; `lminf show --help`"),
        (["train"], "there is no command 'train'; use list, run"),
        (["sweep", "stp"], "there is no sweep 'stp'; did you mean 'step'?"),
        (["data", "absent"], "there is no file or folder absent; check the path"),
        ([], "the following arguments are required: COMMAND; `lminf --help`"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as ending:
        cli.main(arguments)
    assert ending.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message}")
    assert printed.count("\n") == 1
    for debugging in (["--debug", *arguments], [*arguments, "--debug"]):
        if arguments[:1] != ["run"]:  # which hands on what follows the name
            with pytest.raises(InputError):
                cli.main(debugging)


def test_the_harness_is_asked_for_where_it_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        cli.main(["harness", "run", "--tasks", "niah_single_1"])
    printed = capsys.readouterr().err
    assert printed.endswith("is not installed; run pip install 'lminf[harness]'\n")


def test_fetch_without_a_name_lists_the_names(capsys):
    cli.main(["fetch"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in fetch.MODELS)


def listed(capsys, *words: str) -> list[str]:
    cli.main(["list", *words])
    return capsys.readouterr().out.splitlines()


def test_list_prints_every_experiment_beside_its_topic(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = listed(capsys)
    assert len(lines) < 30
    assert max(map(len, lines)) <= 80
    names, topic = {}, ""
    for line in lines:
        topic, *rest = [topic, *line.split()] if line[0] == " " else line.split()
        names |= dict.fromkeys(rest, topic)
    assert names == {each.name: each.entries["Topic"] for each in header.experiments()}


def test_twice_as_many_experiments_still_fit_a_screen(capsys, monkeypatch):
    """60 with names as long as the longest today, of 8 topics."""
    monkeypatch.setenv("COLUMNS", "100")
    longest = max(len(each.name) for each in header.experiments())
    many = [
        header.Header(f"{i:02}".ljust(longest, "n"), "", {"Topic": f"topic_{i % 8}"})
        for i in range(60)
    ]
    monkeypatch.setattr(header, "experiments", lambda *_: many)
    lines = listed(capsys)
    assert len(lines) < 30
    assert max(map(len, lines)) <= 100
    assert {word for line in lines for word in line.split()} >= {each.name for each in many}


def test_list_prints_the_titles_of_a_topic(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    expected = [each for each in header.experiments() if each.entries["Topic"] == "scaling"]
    lines = listed(capsys, "scaling")
    assert len(lines) == len(expected) > 3
    for line, experiment in zip(lines, expected, strict=True):
        assert line.split()[0] == experiment.name
        assert experiment.title[:30] in line
        assert len(line) <= 80


def test_list_prints_all_about_an_experiment_that_is_named(capsys):
    for found in header.experiments():
        cli.main(["list", found.name])
        assert found.entries["Question"] in " ".join(capsys.readouterr().out.split())


def test_list_takes_topics_beside_names(capsys):
    printed = "\n".join(listed(capsys, "cost", "train_lm"))
    assert printed.index("decode_cost") < printed.index("train_lm: ")
    assert "passkey" not in printed


def test_outside_a_checkout_every_command_is_of_lminf(tmp_path, monkeypatch, capsys):
    def said():
        for words in (["list", "passkey"], ["list", "step_law"]):
            cli.main(words)
        request.parse("passkey", ["--help"])
        spec = SimpleNamespace(name="lminf.experiments.passkey")
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
        monkeypatch.setattr(sys, "argv", ["lminf", "--config=:tiny"])
        return capsys.readouterr().out + " ".join(environment.command_line())

    monkeypatch.chdir(header.ROOT.parent)
    assert header.command("passkey") == "python -m experiments.passkey"
    assert "usage: python -m experiments.passkey [" in said()
    monkeypatch.chdir(tmp_path)
    outside = said()
    assert "python -m" not in outside
    assert "usage: lminf run passkey [" in outside
    assert outside.endswith("lminf run passkey --config=:tiny")


def test_a_header_is_read_without_running_the_file(tmp_path):
    (tmp_path / "demo.py").write_text(
        '"""A title\nin two lines.\n\nQuestion   Is it\n    so?\nTiny: yes\n\nProse.\n"""\n'
        "raise SystemExit\n"
    )
    (tmp_path / "base.py").write_text('"""Shared."""\n')
    (found,) = header.experiments(configs=tmp_path)
    assert found == header.Header(
        "demo", "A title in two lines.", {"Question": "Is it so?", "Tiny": "yes"}
    )


def test_show_puts_runs_of_one_experiment_into_one_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, name in ((0, "plain"), (1, "changed")):
        run = folder.create(
            "no_such_experiment",
            variant="tiny",
            config={"seed": seed},
            config_source="",
            overrides={"seed": seed} if seed else {},
            command=["demo"],
            at=tmp_path / name,
        )
        run.append_row({"length": 8, "nll": 1.5 + seed})
    cli.main(["show", "plain", "changed"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["│", "tiny", "│", "8", "│", "1.500", "│"] in lines
    assert ["│", "tiny", "seed=1", "│", "8", "│", "2.500", "│"] in lines


def test_a_reader_that_goes_away_is_no_error():
    code = (
        "from lminf.run import exits\nwith exits.orderly(debug=False):\n    print('x' * 200_000)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(30) == 141
    assert errors == b""


def test_convert_looks_at_its_target_before_it_reads(tmp_path, capsys):
    (tmp_path / "held").write_text("something")
    with pytest.raises(SystemExit) as ending:
        cli.main(["convert", "no-such-model", str(tmp_path / "held")])
    assert ending.value.code == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["nll", "m", "--policy=full", "--policy", "streaming:window=4"],
        ["generate", "m", "--seed=1", "text", "--seed=2"],
        ["tokenize", "a", "--out=b", "--tokenizer=bytes", "--out=c"],
        ["scaling", "fit", "chinchilla", "--data=a", "--data=b", "--out=c"],
        ["run", "passkey", "--config=:tiny", "--out=a", "--out=b"],
        ["run", "passkey", "--config=:tiny", "--config=:all"],
        ["run", "passkey", "--config.seed=1", "--config.seed", "2"],
    ],
)
def test_an_option_of_one_value_is_not_given_two(arguments, capsys, monkeypatch):
    monkeypatch.delitem(
        sys.modules, "lminf.experiments.passkey", raising=False
    )  # run again as a program
    with pytest.raises(SystemExit) as ending:
        cli.main(arguments)
    assert ending.value.code == 2
    assert "is given twice" in capsys.readouterr().err


def test_options_that_may_repeat_still_do():
    args = cli.parse(["nll", "m", "--text=a", "--text=b"])
    assert args.text == ["a", "b"]
    assert cli.parse(["generate", "m", "--stop=a", "x", "--stop=b"]).stop == ["a", "b"]


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as ending:
        cli.main(["--version"])
    assert ending.value.code == 0
    assert capsys.readouterr().out == f"lminf {lminf.__version__}\n"


def test_a_chat_is_given_every_option_of_the_command(monkeypatch, capsys):
    given = {}

    def chat(messages, **options):
        given.update(options, messages=list(messages))
        yield "said"

    monkeypatch.setattr(_model, "load", lambda args: SimpleNamespace(chat=chat))
    words = ["--chat", "--stop=a", "hello", "--stop=b", "--seed=3", "--max-new-tokens=7",
             "--temperature=1"]  # fmt: skip
    cli.main(["generate", "m", *words])
    assert capsys.readouterr().out == "said\n"
    assert (given["stop"], given["seed"], given["max_new_tokens"]) == (["a", "b"], 3, 7)
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffone\ntwo\n"))
    cli.main(["generate", "m", "--chat"])
    said = [message["content"] for message in given["messages"]]
    assert said == ["one", "said", "two"]


def test_what_a_model_says_does_not_act_on_a_terminal(monkeypatch, capsys):
    for terminal, expected in ((False, "a\x1b[2J\n\té"), (True, "a\\x1b[2J\n\té")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal, raising=False)
        generate.show("a\x1b[2J\n\té")
        assert capsys.readouterr().out == expected


@pytest.mark.parametrize("command", [["nll", "m"], ["generate", "m", "text"]])
def test_the_type_of_numbers_is_chosen_on_the_command_line(command, monkeypatch):
    given = {}

    def from_pretrained(name, **options):
        given.update(options)
        raise InputError("no further")

    monkeypatch.setattr("lminf.lm.lm.LM.from_pretrained", from_pretrained)
    with pytest.raises(SystemExit):
        cli.main([*command, "--dtype=bfloat16", "--weights=int8"])
    assert given["dtype"] == "bfloat16"
    assert given["weights"] == "int8"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nll", "m", "--text="], "--text is empty"),
        (["tokenize", "a.txt", "--tokenizer=bytes", "--out="], "--out is empty; give a value"),
        (["tokenize", "", "--tokenizer=bytes", "--out=b"], "SOURCES is empty; give a value"),
        (["convert", "", "b"], "SRC is empty; give a value"),
        (["data", "", "--tokenizer=bytes"], "PATHS is empty; give a value"),
        (["scaling", "predict", "vocab", "--n=7B", "--law="], "--law is empty; give a value"),
        (["run", "passkey", "--out="], "--out is empty; name a folder"),
        (["run", "passkey", "--config="], "--config is empty; give a value"),
        (["plan", "--config="], "--config is empty; give a value"),
        (["plan", "--config=train_lm", "--override="], "the config has no field ''"),
        (["plan", "--config=train_lm", "--length=5"], "--length means nothing to a plan of a --co"),
        (["plan", "m", "--mfu=0.5"], "--mfu means nothing to a plan of a MODEL"),
        (["plan", "--config=train_lm", "--devices=h100x9999999"], "and how many (at most 1,048,57"),
        (
            ["plan", "--config=train_lm", "--override=model.num_layers=5000"],
            "num_layers=5000: give",
        ),
        (["data", "x", "--length=1"], "--length=1: give a whole number of at least 2"),
        (["data", "x", "--batch=0"], "--batch=0: give a whole number of at least 1"),
        (
            ["scaling", "predict", "step", "--n=1B", "--tokens=1e12", "--loss=1e-300"],
            "--loss=1e-30",
        ),
        (
            ["nll", "m", "--block=99999999999999999999"],
            "--block=999999999999999",
        ),
        (
            ["nll", "m", "--protocol=stream", "--prompt=3"],
            "--prompt means nothing to --proto",
        ),
        (["nll", "m", "--seed=3"], "--seed means nothing to --protocol=document"),
        (["generate", "m", "x", "--top-k=3"], "--top-k means nothing at temperature 0"),
        (["generate", "m", "x", "--temperature=inf"], "--temperature=inf: give a finite number"),
        (["generate", "m", "x", "--stop="], "--stop is empty"),
        (["generate", "m", "x", "--draft-tokens=3"], "--draft-tokens means nothing without --dra"),
        (
            ["generate", "m", "x", "--draft=prompt_lookup", "--draft-tokens=0"],
            "--draft-tokens=0: give a whole number of at least 1",
        ),
        (["generate", "m", "x", "--draft=layers:all"], "'layers:all' has no number of layers"),
        (["generate", "m", "x", "--acceptance=rapid:eta=1"], "--acceptance means nothing without"),
        (
            ["generate", "m", "x", "--draft=retrieved:tokens=512", "--acceptance=rapid:eta=1"],
            "RAPID shifts probabilities, but at temperature 0 nothing is drawn",
        ),
        (["generate", "m", "x", "--seed=-1"], "give a whole number below 2^32"),
        (["generate", "m", "x", "--seed=99999999999999999999"], "give a whole number below 2^32"),
    ],
)
def test_empty_names_and_seeds_out_of_range_are_refused(
    words, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "lminf.experiments.passkey", raising=False)
    with pytest.raises(SystemExit) as ending:
        cli.main(words)
    assert ending.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
