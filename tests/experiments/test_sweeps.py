"""The studies: what their configs ask for, what they conclude, and their tiny forms."""

import jax
import numpy as np
import pytest

from configs import step_sweep, vocab_sweep
from experiments import vocab_sweep as vocab_study
from experiments.step_sweep import interior, noise
from lminf import cli
from lminf.run import request, sweep
from lminf.run.folder import RunFolder
from lminf.scaling import accounting

VARIANTS = [(name, v) for name in ("step_sweep", "vocab_sweep") for v in step_sweep.VARIANTS]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_cell_can_be_configured(name, variant):
    asked = request.parse(name, [f"--config={name}:{variant}"])
    assert asked is not None
    cells = sweep.cells_of(asked)
    assert len({cell.key for cell in cells}) == len(cells) >= 2


def test_fewer_rates_do_not_change_the_cells():
    asked = request.parse("step_sweep", ["--config=step_sweep:laptop", "--config.rates=(1e-3,)"])
    assert asked is not None
    assert len(sweep.cells_of(asked)) == 13


def test_the_pod_sweep_has_the_papers_families():
    """N_nv from the shapes, and the published parameter counts of the data file within 5 %."""
    asked = request.parse("vocab_sweep", ["--config=vocab_sweep:pod"])
    assert asked is not None
    cells = sweep.cells_of(asked)
    assert len(cells) == 7 * 10
    shapes = {
        (c.config.model.num_layers, c.config.model.width, c.config.model.hidden_dim) for c in cells
    }
    assert shapes == set(accounting.SWEEP_SHAPES.values())
    sizes = sorted({c.config.data.vocab for c in cells})
    assert sizes == sorted(vocab_sweep.PUBLISHED_SIZES)
    for column, shape in accounting.SWEEP_SHAPES.items():
        layers, width, hidden = shape
        count = accounting.block_parameters(layers, width, hidden)
        assert abs(count / column - 1) < 0.05


def test_the_pod_grid_has_the_papers_shapes():
    published = {214_663_680, 268_304_384, 429_260_800, 536_872_960, 1_073_741_824}
    found = {
        accounting.block_parameters(layers, width, hidden)
        for (width, hidden, _, layers), _ in step_sweep.PUBLISHED
    }
    assert found == published


# --- Conclusions ----------------------------------------------------------------------------------


def test_the_optimum_is_the_vertex_of_the_bowl():
    sizes = np.array([256, 512, 1024, 2048, 4096])
    values = 2 + 0.1 * (np.log(sizes) - np.log(700)) ** 2
    v, low, high = vocab_study.optimum(sizes, values, 0.001)
    assert v == pytest.approx(700, rel=1e-6)
    assert low < 700 < high < 1.2 * low
    wide = vocab_study.optimum(sizes[::-1], values[::-1], 0.02)
    assert wide[0] == pytest.approx(700, rel=1e-6)
    assert wide[2] is None or wide[2] / wide[1] > high / low


def test_a_best_size_at_the_edge_is_no_optimum():
    assert vocab_study.optimum([256, 512, 1024], [3.0, 2.0, 1.0], 0.1) == (None, None, None)


def test_noise_is_what_seeds_differ_by():
    rows = [{"lr": 1, "batch_tokens": 2, "loss": loss} for loss in (1.0, 1.2)]
    assert noise(rows) == pytest.approx(np.std([1.0, 1.2], ddof=1))
    assert noise(rows[:1]) is None


def test_interior_names_the_directions():
    rows = [{"lr": lr, "batch_tokens": b} for lr in (1, 2, 3) for b in (1, 2)]
    assert interior(rows, {"lr": 2, "batch_tokens": 1}) == "lr"
    assert interior(rows, {"lr": 3, "batch_tokens": 2}) == "neither"


# --- Tiny forms -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows"), [("step", 4), ("vocab", 8)])
def test_a_tiny_sweep_runs_and_goes_on(name, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LMINF_CACHE", str(tmp_path / "cache"))
    command = ["sweep", name, f"--config={name}_sweep:tiny", f"--out={tmp_path / 'sweep'}"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax mixes
        cli.main(command)
    out = RunFolder(tmp_path / "sweep")
    assert len(out.rows()) == rows
    assert (out / "report.md").is_file()
    assert {row["seed"] for row in out.rows()} == {0}
    cli.main(command)
    assert "0 cells run, 2 finished before" in capsys.readouterr().out
