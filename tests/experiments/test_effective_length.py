"""Effective lengths from scripted answers: what the rows, table and figures say of them."""

import json
import subprocess
import sys
import time

import pytest
from matplotlib.figure import Figure

from lminf import cli
from lminf.commands import eval as evaluation
from lminf.errors import InputError
from lminf.evals import score
from lminf.evals.suites import summary
from lminf.experiments import _models, effective_length
from lminf.lm.lm import LM
from lminf.lm.prefix import SharedPrefix
from lminf.run import folder
from tests.evals.suite_solvers import SOLVERS

WINDOWED = "lm_infinite:window=700,sinks=4"
TASKS = ("single_needle:depth=0.0", "single_needle:depth=1.0", "multi_needle:needles=2",
         "single_thread:thread_length=2", "conditional_needle:needles=2")  # fmt: skip


@pytest.fixture(autouse=True)
def by_eye(random_lm, monkeypatch):
    """Prompts of up to as many bytes as the policy's window are solved, longer ones are not."""

    def generate(self, prompts, *, max_new_tokens, stop, on_answer):
        for index, prompt in enumerate(prompts):
            solver = next(s for start, s in STARTS.items() if start in prompt)
            window = self.lm.policy.window
            on_answer(index, solver(prompt) if not window or len(prompt) <= window else "?")

    monkeypatch.setattr(SharedPrefix, "generate", generate)
    monkeypatch.setattr(LM, "context_length", 700)
    monkeypatch.setattr(_models, "load", lambda *_, **__: random_lm)


STARTS = {
    "the character": SOLVERS["conditional_needle"],
    "follow the values": SOLVERS["single_thread"],
    "JSON": SOLVERS["single_needle"],
    "were sent to": SOLVERS["m4le"],
}


@pytest.fixture
def rows(rows_of):
    return rows_of(
        "effective_length", tasks=TASKS, lengths=(700, 1000), instances=8,
        policies=("full", WINDOWED),
    )  # fmt: skip


def test_a_row_has_the_coordinates_of_its_task(rows):
    assert len(rows) == 2 * 2 * len(TASKS)
    assert {(row["scope"], row["diffusion"]) for row in rows} == set(effective_length.QUARTERS)
    for row in rows:
        assert row["score"] == (row["policy"] == "full" or row["length"] == 700)
        assert row["instances"] == 8
        assert row["cut_prompts"] == 0
        assert 0.8 * row["length"] < row["mean_tokens"] <= row["length"]


def test_a_model_without_a_chat_template_is_not_asked_in_chat(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "single_needle:depth=1", "--chat", "--lengths=1k", f"--out={tmp_path}/a"])
    assert "this model has no chat template" in capsys.readouterr().err


def test_the_table_groups_by_scope_and_diffusion_and_says_how_far_a_policy_holds(rows):
    lines = effective_length.table(rows)
    assert [(line["scope"], line["diffusion"]) for line in lines[::2]] == effective_length.QUARTERS
    assert [line["effective length"] for line in lines] == [1000, 700] * 4
    assert lines[0]["700"] == "1.00 (0.81–1.00)"
    assert lines[0]["instances"] == 32
    assert "instruction following" not in lines[0]


def test_the_table_does_not_pool_answers_that_were_asked_for_in_two_ways():
    row = {
        "task": "babilong",
        "policy": "full",
        "length": 400,
        "facts": 1,
        "questions": 1,
        "scope": "low",
        "diffusion": "high",
        "attended": 1,
        "cache_bytes": 1,
        "text": None,
    }
    high = score.success_rate(3, 3)
    rows = [
        {**row, "answers": "written", **row_of(400, 0.0, 3)},
        {**row, "answers": "likeliest", **row_of(400, 1.0, 3)},
        {**row, "answers": "likeliest", "facts": 2, **row_of(400, 1.0, 3)},
    ]  # fmt: skip
    lines = effective_length.table(rows)
    assert [(line["task"], line["instances"]) for line in lines] == [
        ("babilong:answers=written", 3), ("babilong:answers=likeliest", 6),
    ]  # fmt: skip
    assert lines[0]["400"] == f"0.00 (0.00–{1 - high.low:.2f})"
    assert [line["task"] for line in effective_length.table(rows[1:])] == ["babilong"]


def test_the_table_has_the_share_of_answers_in_the_form_asked_for(rows):
    rate = effective_length.RATE
    rated = [{**row, rate: 0.5 if row["length"] == 700 else 1.0} if row["task"] == "single_needle"
             else row for row in rows]  # fmt: skip
    shares = {line["task"]: line["instruction following"] for line in effective_length.table(rated)}
    assert shares["single_needle"] == 0.75
    assert shares["multi_needle"] is None


def test_the_figures_are_a_panel_a_task_and_a_map_where_there_are_levels(rows):
    figures = effective_length.plot(rows)
    assert set(figures) == {"scores", "single_needle"}
    assert all(isinstance(figure, Figure) for figure in figures.values())
    one = effective_length.plot([row for row in rows if row["length"] == 700][:2])
    assert set(one) == {"scores", "single_needle"}
    shown = [text.get_text() for text in one["scores"].axes[0].get_yticklabels()]
    assert [label.endswith(" MB") for label in shown] == [True]
    several = effective_length.plot([row for row in rows if row["length"] == 700])
    assert {text.get_text() for text in several["scores"].axes[0].get_xticklabels()} >= {
        "multi_needle"
    }


def row_of(length, rate, count=50):
    low, high = score.success_rate(round(rate * count), count)[1:]
    return {"length": length, "score": rate, "low": low, "high": high, "instances": count}


def test_the_effective_length_ends_where_the_interval_leaves_that_of_the_shortest():
    rows = [row_of(1, 0.9), row_of(2, 0.8), row_of(4, 0.5), row_of(8, 0.9)]
    assert summary.effective_length(rows) == 2
    assert summary.effective_length(rows[:2]) == 2
    assert summary.effective_length(rows[:1]) is None
    assert summary.effective_length([row_of(1, 0.0), row_of(2, 0.0)]) is None


def test_right_and_wrong_answers_are_pooled_by_wilson_and_others_by_their_own_intervals():
    pooled = summary.interval([row_of(1, 0.9), row_of(1, 0.5)])
    assert pooled == pytest.approx(score.success_rate(70, 100))
    graded = {"instances": 50, "score": 0.5, "low": 0.4, "high": 0.7}
    other = {"instances": 50, "score": 0.7, "low": 0.6, "high": 0.9}
    assert summary.interval([graded, other]) == pytest.approx(
        (0.6, 0.6 - 0.0707, 0.6 + 0.1414), abs=1e-3
    )


# --- The command ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_leaves_a_run_and_goes_on_with_one(tmp_path, capsys):
    words = ["eval", "single_needle,multi_needle:needles=2", "--model=m", "--lengths=1k",
             f"--policy=full,{WINDOWED}", "--instances=2", f"--out={tmp_path / 'run'}"]  # fmt: skip
    cli.main(words)
    assert "effective length" in capsys.readouterr().out
    rows = folder.RunFolder(tmp_path / "run").rows()
    assert [row["length"] for row in rows] == [1024] * 12
    assert {row["policy"] for row in rows} == {"full", WINDOWED}
    report = (tmp_path / "run/report.md").read_text()
    assert "plots/single_needle.png" in report
    answers = (tmp_path / "run/answers.jsonl").read_text().splitlines()
    assert len({json.loads(line)["prompt_digest"] + json.loads(line)["policy"]
                for line in answers}) == len(answers) == 24  # fmt: skip
    cli.main(words)
    assert folder.RunFolder(tmp_path / "run").rows() == rows
    words[1] = "multi_needle:needles=3,m4le:ability=global"
    words[3] = "--lengths=2k,1k"
    cli.main(words)
    more = folder.RunFolder(tmp_path / "run").rows()
    assert more[: len(rows)] == rows
    assert len(more) == len(rows) + 2 * 2 * 2
    with pytest.raises(SystemExit):
        cli.main([*words[:-2], "--instances=3", words[-1]])
    cli.main(["show", str(tmp_path / "run")])
    assert "diffusion" in capsys.readouterr().out


# A command whose model is scripted and takes a while for an answer.
PROGRAM = """
import sys, time
from lminf import cli
from lminf.experiments import _models
from lminf.lm.prefix import SharedPrefix
from tests.evals.suite_solvers import looked_up
from tests.experiments.conftest import small_lm

def generate(self, prompts, *, max_new_tokens, stop, on_answer):
    for index, prompt in enumerate(prompts):
        time.sleep(float(sys.argv[1]))
        on_answer(index, looked_up(prompt))

SharedPrefix.generate = generate
_models.load = lambda *_, **__: small_lm()
cli.main(sys.argv[2:])
"""


@pytest.mark.slow
def test_a_killed_command_loses_and_doubles_no_answer(tmp_path):
    words = ["eval", "single_needle,multi_needle:needles=2", "--model=m", "--lengths=1k",
             "--instances=6"]  # fmt: skip

    def start(pause, out):
        command = [sys.executable, "-c", PROGRAM, str(pause), *words, f"--out={out}"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def lines(name, out):
        path = out / name
        return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for least in (5, 20):
        process = start(0.2, killed)
        while len(lines("answers.jsonl", killed)) < least:
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
        process.wait()
    known = lines("answers.jsonl", killed)
    assert 20 <= len(known) < 36
    assert start(0, killed).wait() == start(0, whole).wait() == 0

    def without_time(rows):
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]

    answers = lines("answers.jsonl", killed)
    assert answers[: len(known)] == known
    assert without_time(answers) == without_time(lines("answers.jsonl", whole))
    assert without_time(lines("rows.jsonl", killed)) == without_time(lines("rows.jsonl", whole))
    assert len(answers) == 36


def test_the_list_names_every_task_with_its_fields(capsys):
    cli.main(["eval", "--list"])
    listed = capsys.readouterr().out
    assert "single_needle(depth: float = 0.5)" in listed
    assert "Scope high, diffusion high; of ada_leval." in listed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no task is named; `lminf eval --list`"),
        (["single_nedle"], "there is no task 'single_nedle'; did you mean 'single_needle'"),
        (["tsort", "--lengths=4x"], "--lengths=4x: '4x' is no length; write 4096 or 4k"),
        (["tsort", "--lengths=0"], "'0' is no length"),
        (["tsort", "--instances=0"], "instances=0: give"),
        (["tsort", "--policy=ful"], "did you mean 'full'"),
        (["tsort,tsort"], "holds 'tsort' twice"),
        (["single_needle", "--lengths=50"], "ask for a length of at least"),
    ],
)
def test_a_command_that_cannot_be_run_is_refused_in_a_sentence(
    words, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", *words, f"--out={tmp_path / 'run'}"])
    assert ended.value.code == 2
    assert not (tmp_path / "run").exists()


def test_lengths_are_numbers_of_tokens_or_of_1024_of_them():
    assert evaluation.lengths_of("4k,600") == (4096, 600)
    with pytest.raises(InputError, match="write 4096 or 4k"):
        evaluation.lengths_of("4k,,")
