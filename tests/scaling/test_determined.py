"""What a table determines: exact tables give their law, and tables that cannot are refused."""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from lminf import cli, scaling
from lminf.commands.scaling import _arguments
from lminf.errors import InputError
from lminf.experiments import _tables
from lminf.scaling import chinchilla, synthetic
from tests import cases
from tests.scaling import data


@pytest.mark.slow
def test_an_exact_chinchilla_table_gives_its_five_numbers():
    """The shared cases chin_n0.csv and chin_n1e-5.csv."""
    for name, close in (("chin_n0.csv", 1e-6), ("chin_n1e-5.csv", 2e-3)):
        table = scaling.read_curves(cases.path(f"tables/{name}"))
        law = scaling.fit(scaling.ChinchillaFit(), table, draws=20)
        truth = {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}
        assert dict(law.constants) == pytest.approx(truth, rel=close)
        assert law.draws


@pytest.mark.slow
def test_exact_tables_give_their_laws_under_every_procedure():
    law = scaling.fit(scaling.DensityFit(), data.synthetic_density(0, 0), draws=20)
    assert dict(law.constants) == pytest.approx(data.DENSITY_TRUTH, rel=1e-5)
    table = data.synthetic_vocab(0, 0)
    law = scaling.fit(scaling.LossFit(flops_limit=0.0), table, draws=20)
    for name, value in data.VOCAB_TRUTH.items():
        assert law.constants[name] == pytest.approx(value, abs=1e-5)
    assert law.draws
    for procedure in (scaling.IsoflopFit(), scaling.IsoflopFit("ols"), scaling.DerivativeFit()):
        assert scaling.fit(procedure, table, draws=20).draws
    law = scaling.fit(scaling.StepFit(), data.synthetic_step(0, 0), draws=20)
    for name, value in data.STEP_TRUTH.items():
        assert law.constants[name] == pytest.approx(value, abs=1e-9)
    grid = synthetic.step_grid(noise=0, seed=0)
    law = scaling.fit(scaling.StepFit(target="bowl"), grid, draws=20)
    assert law.constants["lr_n"] == pytest.approx(-0.713, abs=1e-6)


@pytest.mark.parametrize(
    "procedure", [scaling.IsoflopFit(), scaling.DerivativeFit(), scaling.LossFit()], ids=str
)
def test_constant_losses_determine_no_vocabulary_law(procedure):
    """The shared case csv-vocab-constant-loss.csv."""
    table = scaling.read_vocab(cases.path("tables/csv-vocab-constant-loss.csv"))
    with pytest.raises(InputError, match="single loss"):
        scaling.fit(procedure, table, draws=20)


def test_constant_losses_determine_no_other_law():
    for procedure, table in (
        (scaling.ChinchillaFit(), data.synthetic_curves(0, 0)),
        (scaling.DensityFit(), data.synthetic_density(0, 0)),
    ):
        with pytest.raises(InputError, match="single loss"):
            scaling.fit(procedure, dataclasses.replace(table, loss=0 * table.loss + 2), draws=0)
    grid = synthetic.step_grid(noise=0, seed=0)
    with pytest.raises(InputError, match="none is better"):
        scaling.fit(scaling.StepFit(), dataclasses.replace(grid, loss=0 * grid.loss + 2), draws=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["n", "d"])
def test_two_values_of_a_regressor_are_said_to_be_too_few(name, monkeypatch):
    """Of few starts: 4,500 show no more of what the rows leave open."""
    monkeypatch.setattr(chinchilla, "STARTS", chinchilla.DRAW_STARTS)
    table = data.synthetic_curves(0, 0)
    two = np.flatnonzero(np.isin(getattr(table, name), np.unique(getattr(table, name))[:2]))
    columns = {key: getattr(table, key)[two] for key in ("n", "d", "loss", "run")}
    with pytest.raises(InputError, match="does not determine ln_"):
        scaling.fit(scaling.ChinchillaFit(), dataclasses.replace(table, **columns), draws=0)


@pytest.mark.slow
def test_repeated_rows_are_fitted():
    table = data.synthetic_vocab(0.01, 0)
    twice = table.select(np.repeat(np.arange(len(table)), 2))
    for procedure in (scaling.IsoflopFit(), scaling.DerivativeFit()):
        one, two = (scaling.fit(procedure, each, draws=0).constants for each in (table, twice))
        assert dict(two) == pytest.approx(dict(one), rel=1e-6)


@pytest.mark.parametrize(
    ("text", "value"),
    [("3B", 3e9), ("300B", 3e11), ("1e9", 1e9), ("2^20", 2**20), ("1.5t", 1.5e12)],
)
def test_numbers_are_read_with_suffixes_and_powers(text, value):
    assert _arguments.number(text) == value


@pytest.mark.parametrize("text", ["", "B", "nan", "inf", "1e400", "3X", "-8^0.5", "10^400"])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no number"):
        _arguments.number(text)


def test_the_help_of_a_verb_lists_its_flags_with_units(capsys):
    with pytest.raises(SystemExit):
        cli.main(["scaling", "predict", "vocab", "--help"])
    shown = capsys.readouterr().out
    assert "channels of the embedding" in shown
    assert "--threshold" not in shown
    with pytest.raises(SystemExit):
        cli.main(["scaling", "fit", "--help"])
    assert capsys.readouterr().out.count("usage: lminf scaling fit") == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message"), [("vocab", "does not determine ln_A1"), ("step", "N varies by only")]
)
def test_the_committed_studies_say_why_they_determine_no_law(kind, message, capsys):
    data_file = Path(__file__).parents[2] / f"docs/studies/{kind}_sweep/table.csv"
    with pytest.raises(SystemExit):
        cli.main(["scaling", "fit", kind, "--data", str(data_file)])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["vocab_law", "step_law"])
def test_an_absent_table_is_named_with_where_to_get_it(name):
    with pytest.raises(InputError, match=rf"github\.com.*{name}:tiny"):
        _tables.existing("absent.csv", name)
