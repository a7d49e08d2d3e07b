"""Run folders: whole files, whole lines, and one sentence when the disk says no."""

import math
import os
import resource

import jax.numpy as jnp
import numpy as np
import pytest

from lminf.errors import InputError
from lminf.run import environment, folder, metrics


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def create(**changes):
    return folder.create(
        "demo",
        **{
            "variant": "",
            "config": {"seed": 0},
            "config_source": "# the file\n",
            "overrides": {"seed": 0},
            "command": ["python", "-m", "experiments.demo"],
            **changes,
        },
    )


def test_a_new_folder_holds_what_was_asked_and_where():
    run = create()
    assert run.path.parent.parts == ("runs", "demo")
    assert run.read_json("config.json") == {"seed": 0}
    assert (run / "config.py").read_text() == "# the file\n"
    assert run.read_json("overrides.json") == {"seed": 0}
    found = run.read_json("environment.json")
    assert found["command"] == "python -m experiments.demo"
    assert found["packages"]["jax"]
    assert sum(found["devices"].values()) == 8
    assert found["experiment"] == "demo"
    assert environment.hardware(found)


def test_two_runs_in_one_second_have_two_folders_that_end_alike():
    first, second = create(), create()
    assert first.path != second.path
    other = create(config={"seed": 1})
    short = [run.path.name.split("-")[4] for run in (first, second, other)]
    assert short[0] == short[1] != short[2]


def test_a_named_folder_must_be_empty(tmp_path):
    run = create(at=tmp_path / "here" / "out")
    assert run.path == tmp_path / "here" / "out"
    with pytest.raises(InputError, match="already holds files"):
        create(at=run.path)


def test_a_run_is_found_by_folder_and_by_experiment():
    first, second = create(), create()
    assert folder.find(str(first.path)).path == first.path
    assert folder.find("demo").path == max(first.path, second.path)
    with pytest.raises(InputError, match="did you mean 'demo'"):
        folder.find("demp")


def test_rows_come_back_as_they_went_in():
    run = create()
    row = {"policy": "full", "length": 8, "nll": 0.1, "ok": True, "note": None}
    run.append_row(row)
    run.append_row({"a": np.float32(0.5), "b": jnp.int32(3), "c": np.bool_(True)})
    assert run.rows() == [row, {"a": 0.5, "b": 3, "c": True}]


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("-inf"), jnp.array(math.nan)])
def test_what_is_no_number_is_refused_by_column(value):
    run = create()
    with pytest.raises(InputError, match="measured nll is"):
        run.append_row({"length": 8, "nll": value})
    assert run.rows() == []


def test_a_cell_holds_one_scalar():
    with pytest.raises(TypeError, match="one scalar per cell"):
        create().append_row({"nll": [1.0, 2.0]})


def test_a_full_disk_leaves_whole_lines_and_whole_files():
    """A limit on the size of files stands in for the disk: it takes a part, then refuses."""
    run = create()
    run.write("report.md", "old")
    run.append_row({"policy": "x" * 50})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(InputError, match="free some space, or name another folder"):
            run.append_row({"policy": "y" * 500})
        with pytest.raises(InputError, match=r"cannot write .*report"):
            run.write("report.md", "new" * 500)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert run.rows() == [{"policy": "x" * 50}]
    assert (run / "report.md").read_text() == "old"
    assert not [name for name in os.listdir(run) if name.startswith(".")]


def test_a_folder_that_cannot_be_made_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        create(at=tmp_path / "file" / "out")


def test_a_line_that_is_not_json_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(InputError, match="line 2 of"):
        folder.read_lines(tmp_path / "rows.jsonl")


def test_a_row_goes_on_a_line_of_its_own_behind_one_without_an_end(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"mine": 1}')
    folder.append_line(tmp_path / "rows.jsonl", {"a": 2})
    assert folder.read_lines(tmp_path / "rows.jsonl") == [{"mine": 1}, {"a": 2}]


def test_a_long_diff_is_cut_and_says_so(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(environment, "SOURCE", tmp_path)
    monkeypatch.setattr(environment, "DIFF_CHARACTERS", 10)
    monkeypatch.setattr(environment, "_git", lambda *arguments: "x" * 50)
    found = environment.source()
    assert (found["diff"], found["diff_complete"]) == ("x" * 10, False)


def test_a_smoothed_constant_is_that_constant_from_the_start():
    smoothed = metrics.Smoothed(half_life=10)
    assert [smoothed.add(3.0) for _ in range(3)] == pytest.approx([3.0, 3.0, 3.0])
