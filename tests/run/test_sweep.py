"""Sweeps: the algebra, what makes a cell, and workers that stop, die and share."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

from lminf.commands import sweep as command
from lminf.errors import InputError
from lminf.run import folder, lock, request, sweep
from lminf.run.sweep import Shard, chain, cross, grid, zipped

CONFIG = '''
"""A toy.

Question   What does a cell measure?
"""
from ml_collections import ConfigDict
from lminf.run.sweep import chain, cross, grid, zipped

def get_config(arg=""):
    return ConfigDict({"rate": 0.1, "seed": 0, "model": {"width": 8}, "rates": (1.0, 2.0)})

def get_sweep(c, arg=""):
    return SWEEP
'''


WHOLE = Shard()


@pytest.fixture
def asked(tmp_path):
    """A request for the toy sweep with the cells that a test gives."""

    def ask(cells="grid({'rate': (0.1, 0.2), 'seed': (0, 1)})", *words):
        path = tmp_path / "toy.py"
        path.write_text(textwrap.dedent(CONFIG).replace("SWEEP", cells))
        found = request.parse("toy", [f"--config={path}", f"--out={tmp_path / 'sweep'}", *words])
        assert found is not None
        return found

    return ask


def toy(config, out):
    for half in (0, 1):
        yield {"half": half, "value": config.rate * 10 + config.seed}


def work(asked, run=toy, shard=WHOLE):
    cells = sweep.cells_of(asked)
    out = sweep.create(asked, cells, ["test"])
    said: list[str] = []
    return out, cells, sweep.work(out, asked, cells, run, shard=shard, say=said.append), said


# --- The algebra ----------------------------------------------------------------------------------


def test_the_algebra():
    a, b = {"x": (1, 2)}, {"y": (3, 4)}
    assert grid(a | b) == ({"x": 1, "y": 3}, {"x": 1, "y": 4}, {"x": 2, "y": 3}, {"x": 2, "y": 4})
    assert zipped(a | b) == ({"x": 1, "y": 3}, {"x": 2, "y": 4})
    assert chain(zipped(a), zipped(b)) == ({"x": 1}, {"x": 2}, {"y": 3}, {"y": 4})
    assert cross(zipped(a | b), ({"z": 0},)) == ({"x": 1, "y": 3, "z": 0}, {"x": 2, "y": 4, "z": 0})
    assert grid({"x": ()}) == ()
    with pytest.raises(InputError, match="x has 2, y has 1"):
        zipped({"x": (1, 2), "y": (3,)})
    with pytest.raises(InputError, match="x is set by two sweeps"):
        cross(zipped(a), zipped(a))


# --- Cells ----------------------------------------------------------------------------------------


def test_cells_are_keyed_by_their_resolved_config(asked):
    cells = sweep.cells_of(asked("zipped({'model.width': (16, 32)})"))
    assert [cell.config.model.width for cell in cells] == [16, 32]
    assert str(cells[0]) == "model.width=16"
    again = sweep.cells_of(asked("chain(({},), zipped({'model.width': (32,)}))"))
    assert again[1].key == cells[1].key
    assert again[0].key not in {cell.key for cell in cells}
    other_seed = sweep.cells_of(asked("zipped({'model.width': (32,)})", "--config.seed=1"))
    assert other_seed[0].key != cells[1].key


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("grid({'model.widht': (1, 2)})", "no field 'model.widht'; did you mean 'model.width'"),
        ("grid({'seed': ('a',)})", "sets seed='a'"),
        ("grid({'seed': (0, 0)})", "two cells are the same run"),
        ("grid({'seed': ()})", "has no cells"),
    ],
)
def test_cells_that_cannot_be(asked, cells, message):
    with pytest.raises(InputError, match=message):
        sweep.cells_of(asked(cells))


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/2", "1/0"])
def test_shards_that_cannot_be(text):
    with pytest.raises(InputError, match="write i/n"):
        Shard.parse(text)


# --- Workers --------------------------------------------------------------------------------------


def test_finished_cells_are_skipped_and_rows_are_collected(asked):
    out, cells, tally, said = work(asked())
    assert (tally.ran, tally.found_done, len(said)) == (4, 0, 4)
    assert work(asked())[2].found_done == 4
    rows = sweep.collect(out, cells)
    assert rows == out.rows()
    assert len(rows) == 8
    assert rows[2] == {"cell": cells[1].key, "rate": 0.1, "seed": 1, "half": 0, "value": 2.0}


def test_another_sweep_in_the_folder_is_refused(asked):
    work(asked())
    with pytest.raises(InputError, match="holds a run with"):
        work(asked("grid({'rate': (0.1,)})"))


def test_a_cell_that_stopped_in_the_middle_starts_anew(asked):
    def stops(config, out):
        yield {"value": 1}
        (out.path / "scratch").mkdir()
        if config.rate == 0.2:
            raise KeyboardInterrupt
        yield {"value": 2}

    with pytest.raises(KeyboardInterrupt):
        work(asked(), stops)
    out, cells, tally, _ = work(asked())
    assert (tally.ran, tally.found_done) == (2, 2)
    assert len(sweep.collect(out, cells)) == 8


def test_a_cell_that_starts_anew_leaves_what_others_put_there(asked):
    def stops(config, out):
        (out.path / "photos").mkdir()
        (out / "notes.txt").write_text("mine")
        (out.path / "checkpoints").mkdir()
        yield {"value": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(asked(), stops)
    out, *_ = work(asked())
    (notes,) = out.path.glob("cells/*/notes.txt")
    folders = sorted(path.name for path in notes.parent.iterdir() if path.is_dir())
    assert folders == ["checkpoints.interrupted-1", "photos"]


def test_a_stopped_sweep_says_how_much_is_kept(asked, monkeypatch, capsys):
    def stops(config, out):
        if config.rate == 0.2:
            raise KeyboardInterrupt
        yield {"value": 1}

    request = asked()
    cells = sweep.cells_of(request)
    out = sweep.create(request, cells, ["test"])
    monkeypatch.setattr(command, "experiment", lambda name: SimpleNamespace(run=stops))
    with pytest.raises(KeyboardInterrupt):
        command.work("toy", request, cells, out, WHOLE)
    kept = f"2 of 4 cells are kept in {out.path}; the same command goes on"
    assert kept in capsys.readouterr().err


def test_a_failing_cell_leaves_the_others_alone(asked):
    def fails(config, out):
        if config.seed == 1:
            raise FloatingPointError("loss is nan")
        yield {"value": 1}

    out, cells, tally, said = work(asked(), fails)
    assert (tally.ran, len(tally.failed)) == (2, 2)
    assert "seed=1): loss is nan" in tally.failed[0]
    assert "  failed: loss is nan" in said
    assert len(sweep.finished(out, cells)) == 2
    assert work(asked())[2].ran == 2


def test_a_cell_that_another_worker_holds_is_left_to_it(asked):
    out, cells, *_ = work(asked(), lambda config, out: iter(()))
    at = sweep.cell_folder(out, cells[0])
    (at / sweep.DONE).unlink()
    with lock.held(at.path):
        tally = work(asked())[2]
    assert tally.ran == 0
    assert f"process {os.getpid()}" in tally.elsewhere[0]
    assert work(asked())[2].ran == 1


def test_shards_begin_at_cells_of_their_own(asked):
    order = []

    def notes(config, out):
        order.append((config.rate, config.seed))
        yield {"value": 1}

    work(asked(), notes, shard=Shard(1, 2))
    assert order == [(0.1, 1), (0.2, 1), (0.1, 0), (0.2, 0)]


@pytest.mark.slow
def test_what_a_killed_worker_held_is_free(asked):
    """SIGKILL in the middle of a cell, in a real process."""
    wanted = asked()
    program = f"""
import time
from lminf.run import request, sweep
asked = request.parse("toy", ["--config={wanted.config_path}", "--out={wanted.out}"])
cells = sweep.cells_of(asked)
out = sweep.create(asked, cells, ["test"])
def run(config, out):
    yield {{"value": 1}}
    print("begun", flush=True)
    time.sleep(60)
sweep.work(out, asked, cells, run, shard=sweep.Shard(), say=lambda text: None)
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "begun\n"
        assert work(wanted)[2].elsewhere  # the others are run, that one is not
        worker.send_signal(signal.SIGKILL)
    out, cells, tally, _ = work(wanted)
    assert tally.ran == 1
    assert len(sweep.collect(out, cells)) == 8


def test_half_a_row_is_never_collected(asked):
    """A worker that died while it wrote leaves no done.json, so its rows are not read."""
    out, cells, *_ = work(asked())
    at = sweep.cell_folder(out, cells[0])
    (at / sweep.DONE).unlink()
    with open(at / "rows.jsonl", "a") as file:
        file.write('{"half": 0, "val')
    assert len(sweep.collect(out, cells)) == 6
    assert work(asked())[2].ran == 1
    assert len(sweep.collect(out, cells)) == 8


def test_rows_stand_in_the_folder_as_json(asked):
    out, cells, *_ = work(asked("grid({'rates': ((1.0,), (2.0, 3.0))})"))
    sweep.collect(out, cells)
    lines = (out / "rows.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["rates"] == "(2.0, 3.0)"
    assert folder.read_lines(out / "rows.jsonl") == out.rows()
