"""Bad input gives one sentence that names the column, row or unit, and what to do."""

import contextlib
import csv
import dataclasses
import io
import json

import numpy as np
import pytest

from lminf import cli, scaling
from lminf.errors import InputError
from lminf.scaling import baselines, published, synthetic
from lminf.scaling.steps import StepFit
from lminf.scaling.tables import STEP_COLUMNS
from lminf.scaling.vocab_isoflop import IsoflopFit
from lminf.scaling.vocab_loss import LossFit
from tests.scaling import data

COLUMNS = ("vocab_size", "embed_dim", "num_characters", "Non_vocab_parameters", "FLOPs", "Lossu")


@pytest.fixture(name="rows")
def _rows():
    table = data.synthetic_vocab(0.01, 0)
    columns = (table.vocab_size, table.width, table.characters, table.n_nv, table.flops, table.loss)
    return [dict(zip(COLUMNS, row, strict=True)) for row in zip(*columns, strict=True)]


def write(path, rows, columns=COLUMNS):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_table_survives_its_file(tmp_path, rows):
    table = scaling.read_vocab(write(tmp_path / "a.csv", rows))
    assert len(table) == len(rows)
    assert np.unique(table.run).size == 60
    assert len(table.digest) == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Lossu": "nan"}, r"row 5, column 'Lossu': nan is not finite"),
        ({"Lossu": "good"}, r"row 5, column 'Lossu': 'good' is no number"),
        ({"Non_vocab_parameters": 33.2}, r"row 5, column 'Non_vocab_parameters': 33\.2 cannot be"),
        ({"num_characters": 4.3}, r"row 5, column 'num_characters': 4\.3 cannot be training char"),
        ({"FLOPs": 2.5e14}, r"row 5, column 'FLOPs': .* times 6 \(N_nv \+ V d\) H f\(V\)"),
    ],
)
def test_a_bad_cell_is_named(tmp_path, rows, change, message):
    rows[3].update(change)
    with pytest.raises(InputError, match=message):
        scaling.read_vocab(write(tmp_path / "a.csv", rows))


def test_a_missing_column_is_named(tmp_path, rows):
    path = write(tmp_path / "a.csv", rows, COLUMNS[:-1])
    with pytest.raises(InputError, match="column 'Lossu' is missing; needed are vocab_size"):
        scaling.read_vocab(path)


@pytest.mark.parametrize("text", ["", "vocab_size\n", "\n"])
def test_an_empty_table_is_refused(tmp_path, text):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=r"empty|missing|no row"):
        scaling.read_vocab(path)


@pytest.mark.parametrize("procedure", [IsoflopFit(), LossFit("tokens"), LossFit("reference")])
def test_a_single_n_is_refused(procedure):
    table = data.synthetic_vocab(0.01, 0)
    one = table.select(table.n_nv == table.n_nv.max())
    with pytest.raises(InputError, match="single Non_vocab_parameters"):
        scaling.fit(procedure, one, draws=0)


def test_a_single_n_is_refused_by_the_step_law():
    table = data.synthetic_step(0.01, 0)
    with pytest.raises(InputError, match="single N"):
        scaling.fit(StepFit(), table.select(table.n == table.n.max()), draws=0)


def test_n_and_d_that_move_together_are_refused_by_the_step_law():
    table = data.synthetic_step(0.01, 0)
    together = dataclasses.replace(table, d=20 * table.n)
    with pytest.raises(InputError, match="move together"):
        scaling.fit(StepFit(), together, draws=0)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"n_nv": 6.7}, r"n_nv=6\.7 cannot be a count of parameters.*write 6\.7e9"),
        ({"n_nv": 7e9, "tokens": 1000}, "tokens=1000 cannot be a count of tokens"),
        ({"n_nv": 7e9, "flops": 2e22, "tokens": 1e12}, "both given"),
        ({"n_nv": float("nan")}, "no positive number"),
    ],
)
def test_a_query_in_the_wrong_unit_is_refused(query, message):
    with pytest.raises(InputError, match=message):
        published.ISOFLOP.optimum(**query)


def test_an_unknown_law_names_the_valid_ones():
    with pytest.raises(InputError, match="'stepp' is unknown; use step, "):
        baselines.rule("stepp")
    with pytest.raises(InputError, match="not published"):
        baselines.rule("meituan")


def test_predictions_do_not_depend_on_the_unit_of_batch_or_length():
    one, other = (
        cli_json(["predict", "step", "--n", "1e9", "--tokens", "1e11", "--seq-len", str(length)])
        for length in (1024, 4096)
    )
    for a, b in zip(one["laws"], other["laws"], strict=True):
        assert a["batch_tokens"] == b["batch_tokens"]
        if a["batch_tokens"] is not None:
            assert a["batch_sequences"] * 1024 == pytest.approx(b["batch_sequences"] * 4096)


def cli_json(words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.main(["scaling", *words, "--json"])
    return json.loads(out.getvalue())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "vocab"], "needs --n:"),
        (["predict", "vocab", "--n", "6.7"], "write 6.7e9"),
        (["predict", "vocab", "--n", "7e9", "--seq-len", "2048"], "--seq-len means nothing"),
        (["predict", "step", "--n", "1", "--tokens", "100"], "raw parameters are expected"),
        (["gap", "step", "--data", "absent.csv"], "absent.csv: cannot be read"),
        (["loss", "vocab", "--data", "a.csv", "--law", "absent.json"], "absent.json: cannot be"),
        (["fit", "everything"], "does not exist; use one of: predict vocab"),
        (
            ["predict", "step", "--n", "1e9", "--tokens", "1e11", "--law", "best"],
            "'best' is unknown",
        ),
    ],
)
def test_the_command_line_ends_with_one_sentence(capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        cli.main(["scaling", *words])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_place_that_cannot_be_written_is_found_before_the_fit(monkeypatch, capsys):
    monkeypatch.setattr(scaling, "fit", lambda *_, **__: pytest.fail("it was fitted"))
    with pytest.raises(SystemExit):
        cli.main(["scaling", "fit", "step", "--data", "absent.csv", "--out", "/proc/x/law.json"])
    assert capsys.readouterr().err.startswith("error: cannot write /proc/x/law.json")


def test_a_law_survives_its_file(tmp_path):
    for law in (published.STEP, *published.VOCAB_LAWS.values()):
        path = tmp_path / "law.json"
        law.save(path)
        again = scaling.load(path)
        assert type(again) is type(law)
        if law is not published.STEP:
            expected, found = law.optimum(n_nv=7e9), again.optimum(n_nv=7e9)
            assert found.vocab_size == expected.vocab_size
            assert again.interval(n_nv=7e9).low == pytest.approx(
                law.interval(n_nv=7e9).low, rel=1e-6
            )


def test_out_leaves_other_files_of_the_user_alone(tmp_path, capsys):
    """The law was once written under the name X.partial before it became X."""
    grid = synthetic.step_grid(noise=0.001, seed=0)
    columns = (np.full(len(grid), 1024), np.full(len(grid), 8), grid.lr, grid.batch / 2048,
               np.round(grid.d / grid.batch), grid.loss, grid.d, grid.n)  # fmt: skip
    rows = [dict(zip(STEP_COLUMNS, row, strict=True)) for row in zip(*columns, strict=True)]
    table = write(tmp_path / "grid.csv", rows, tuple(STEP_COLUMNS))
    notes, out = tmp_path / "law.json.partial", tmp_path / "law.json"
    notes.write_text("mine")
    cli.main(["scaling", "fit", "step", "--data", str(table), "--draws", "0", f"--out={out}"])
    assert scaling.load(out).kind == "step"
    assert notes.read_text() == "mine"
    out.unlink()
    out.mkdir()
    (out / "full").touch()
    with pytest.raises(SystemExit):
        cli.main(["scaling", "fit", "step", "--data", str(table), "--draws", "0", f"--out={out}"])
    assert "is a folder; name a file" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "grid.csv", "law.json", "law.json.partial",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "no JSON"), ("{}", "holds no law"), ('{"kind": "x"}', "law kind 'x' is unknown")],
)
def test_a_file_that_is_no_law_is_refused(tmp_path, text, message):
    path = tmp_path / "law.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        scaling.load(path)


@pytest.mark.slow
def test_prices_and_predictions_on_the_command_line(tmp_path):
    found = cli_json(["predict", "vocab", "--n", "7B", "--flops", "2e22"])
    assert {law["approach"] for law in found["laws"]} == {1, 2, 3}
    assert all(law["vocab_rounded"] % 128 == 0 for law in found["laws"])
    spans = [(law["interval"]["low"], law["interval"]["high"]) for law in found["laws"]]
    assert all(None in span or span[0] < span[1] for span in spans)  # None: open
    assert sum(None in span for span in spans) == 1
    assert found["warnings"]
    out = tmp_path / "step.json"
    dense = str(data.dense_file(tmp_path))
    fitted = cli_json(["fit", "step", "--data", dense, "--draws", "50", "--out", str(out)])
    assert fitted["diagnostics"]["kept"] == 100
    found = cli_json(
        ["gap", "step", "--data", dense, "--law", f"step,{out}", "--method", "nearest"]
    )
    assert found["laws"]["step"]["mean_per_mille"] == pytest.approx(0.83, rel=0.02)
    assert found["laws"]["step.json"]["mean_per_mille"] < 1.5


def test_a_row_longer_than_the_header_is_refused(tmp_path):
    """As decimals with a comma make it: the loss would be read without them."""
    path = tmp_path / "comma.csv"
    path.write_text("N,D,loss\n10000000,1000000000,4,593\n")
    with pytest.raises(InputError, match=r"row 2 has 4 cells for 3 columns; write decimals with a"):
        scaling.read_curves(path)


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "chinchilla", "--data=mine.csv", "--out=mine.csv"],
        ["fit", "chinchilla", "--data=mine.csv", "--out=notes.json"],
        ["plan", "step", "--flops=1e12", "--out=notes.json"],
        ["collect", "step", "--runs=nowhere", "--out=mine.csv"],
        ["collect", "vocab", "--runs=nowhere", "--out=new.csv"],
    ],
)
def test_a_file_of_the_user_is_not_replaced(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {"mine.csv": "N,D,loss\n1e7,1e9,4\n", "notes.json": "{}", "new.fertility.json": "{}"}
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as ending:
        cli.main(["scaling", *words])
    assert ending.value.code == 2
    assert "name another file with --out" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("flops", ["0", "-1", "1e30"])
def test_a_budget_out_of_range_is_refused_at_once(flops, capsys):
    with pytest.raises(SystemExit) as ending:
        cli.main(["scaling", "plan", "step", f"--flops={flops}"])
    assert ending.value.code == 2
    assert "give more than 0 and at most 1e+18" in capsys.readouterr().err


def test_a_folder_is_no_output(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["scaling", "fit", "chinchilla", "--data=absent.csv", f"--out={tmp_path}"])
    assert "is a folder; name a file" in capsys.readouterr().err
