"""The studies: what their configs ask for, what they conclude, and their tiny forms."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from lminf import cli
from lminf.commands import sweep as command
from lminf.configs import step_sweep, vocab_sweep
from lminf.errors import InputError
from lminf.experiments import _noise, _optima, _small
from lminf.experiments import step_sweep as step_study
from lminf.experiments import vocab_sweep as vocab_study
from lminf.run import request, sweep
from lminf.run.folder import RunFolder
from lminf.scaling import accounting
from lminf.train.schedules import WSD

VARIANTS = [(name, v) for name in ("step_sweep", "vocab_sweep") for v in step_sweep.VARIANTS]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_cell_can_be_configured(name, variant):
    asked = request.parse(name, [f"--config={name}:{variant}"])
    assert asked is not None
    cells = sweep.cells_of(asked)
    assert len({cell.key for cell in cells}) == len(cells) >= 2


def test_fewer_seeds_do_not_change_the_cells():
    asked = request.parse("step_sweep", ["--config=step_sweep:laptop", "--config.replicates=1"])
    assert asked is not None
    assert len(sweep.cells_of(asked)) == 13


def test_phases_are_shares_of_the_steps_where_the_schedule_names_none():
    c = vocab_sweep.get_config("laptop")
    assert _small.schedule_of(c, steps=400, first=100) == WSD(1, 0, warmup=10, decay=100)
    c.schedule = "wsd:peak=1,floor=0,warmup=7,decay=0"
    assert _small.schedule_of(c, steps=400, first=100) == WSD(1, 0, warmup=7, decay=100)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("step_sweep", "schedule=constant:peak=3", "nothing reads this one; write peak=1"),
        ("step_sweep", "schedule=cosine:peak=1,floor=0.5,warmup=1", "a peak of 0.002 is below the"),
        (
            "step_sweep",
            "schedule=constant:peak=1,warmup=999",
            "every cell is refused,.*=999",
        ),
        ("step_sweep", "data.batch=4", "every cell of this sweep sets data.batch itself"),
        (
            "vocab_sweep",
            "data.length=64",
            "rows have 256 characters; give --config.data.characters=0",
        ),
        ("vocab_sweep", "schedule=constant:peak=1", "constant:peak=1 has no decay; give decay=0"),
        ("vocab_sweep", "budgets=(2e10,1e10)", "give budgets that rise"),
        ("vocab_sweep", "data.vocab=256", "every cell of this sweep sets data.vocab itself"),
    ],
)
def test_settings_of_a_sweep_that_contradict_each_other_are_refused(name, words, message):
    asked = request.parse(name, [f"--config={name}:tiny", f"--config.{words}"])
    with pytest.raises(InputError, match=message):
        command.cells_of(name, asked)


def test_settings_of_a_single_run_of_a_sweep_are_checked_too():
    asked = request.parse("vocab_sweep", ["--config=vocab_sweep:tiny", "--config.data.vocab=300"])
    with pytest.raises(InputError, match=r"data.vocab=300 is not one of data.vocabs=\(256, 512\)"):
        vocab_study.check(asked.config, asked.overrides)


def plan(capsys, config):
    cli.main(["plan", f"--config={config}", "--json"])
    return json.loads(capsys.readouterr().out)


def test_the_pod_sweep_has_the_papers_families(capsys):
    """Shapes, sizes and D_max of scaling_laws.md 2.6, and the data file's counts within 5 %."""
    found = plan(capsys, "vocab_sweep:pod")
    assert found["cells"] == 7 * 10
    nominal = (33.55e6, 84.93e6, 150.99e6, 301.99e6, 631.11e6, 1130.4e6, 2870.5e6)
    n_nv = list(dict.fromkeys(row["n_nv"] for row in found["shapes"]))
    assert n_nv == pytest.approx(nominal, rel=2e-4)
    assert n_nv == pytest.approx(list(accounting.SWEEP_SHAPES), rel=0.05)
    assert [r["vocab"] for r in found["shapes"]] == list(vocab_sweep.PUBLISHED_SIZES) * 7
    d_max = (1.2e9, 3.0e9, 5.3e9, 11.7e9, 27.7e9, 54.8e9, 165.5e9)
    at_16k = [row for row in found["shapes"] if row["vocab"] == 16384]
    assert [row["tokens"] for row in at_16k] == pytest.approx(d_max, rel=1e-6)
    for row in found["shapes"]:
        assert row["flops"] == pytest.approx(6 * (row["n_nv"] + row["n_v"]) * row["tokens"])


def test_the_pod_grid_has_the_papers_models(capsys):
    """N, N_a and M (FLOPs per token) of scaling_laws.md 3.3 and 3.4, exactly."""
    found = plan(capsys, "step_sweep:pod")["shapes"]
    dense = {}
    for row in found:
        if not row["experts"]:
            assert row["n"] == row["n_active"]
            dense.setdefault(row["n"], []).append(row["tokens"] / 1e9)
    assert dense == {
        214_663_680: [4, 11.4, 20, 100], 268_304_384: [5, 14.2, 25, 80],
        429_260_800: [8, 22.7, 40, 50], 536_872_960: [10, 28.4, 50],
        1_073_741_824: [20, 56.9],
    }  # fmt: skip
    mixed = [row for row in found if row["experts"]]
    assert {row["tokens"] for row in mixed} == {2e9, 4e9, 8e9, 20e9}
    assert {row["batches"] for row in mixed} == {"32 64 128 256 512"}
    assert {(row["n"], row["n_active"], row["flops_per_token"]) for row in mixed} == {
        (2_150_612_992, 187_973_632, 1_681_489_920),
        (2_150_612_992, 232_579_072, 1_949_122_560),
        (2_155_174_912, 590_436_352, 4_096_266_240),
        (2_156_188_672, 1_241_270_272, 8_001_269_760),
    }
    assert {row["runs"] for row in mixed} == {9}


def test_the_changes_of_the_laptop_grid_leave_n_as_it_is():
    asked = request.parse("step_sweep", ["--config=step_sweep:laptop"])
    assert asked is not None
    found = [step_study.planned(cell.config) for cell in sweep.cells_of(asked)]
    dense = {row["n"] for row in found if not row["experts"]}
    assert max(dense) / min(dense) < 1.002
    mixed = next(row for row in found if row["experts"])
    assert mixed["n_active"] in dense
    assert mixed["n"] > 1.9 * mixed["n_active"]


# --- Conclusions ----------------------------------------------------------------------------------


SIZES = np.array([256, 512, 1024, 2048, 4096])


def bowl(sigma, at=700):
    """Two seeds at every size, `sigma` apart by the sample's standard deviation."""
    values = 2 + 0.1 * (np.log(SIZES) - np.log(at)) ** 2
    apart = sigma / np.sqrt(2)
    return _noise.Curve(SIZES, tuple([v - apart, v + apart] for v in values))


def test_the_optimum_is_the_vertex_of_the_bowl():
    v, low, high = _noise.optimum(bowl(0.001))
    assert v == pytest.approx(700, rel=1e-6)
    assert low < 700 < high < 1.2 * low
    wide = _noise.optimum(bowl(0.02))
    assert wide[0] == pytest.approx(700, rel=1e-6)
    assert wide[2] / wide[1] > high / low


def test_a_best_size_at_the_edge_is_no_optimum():
    assert _noise.optimum(bowl(0.001, at=100)) == (None, None, None)
    said = _noise.describe_minimum(bowl(0.001, at=100), "V")
    assert "at V = 256, an end of the grid: no optimum between" in said


def test_what_the_noise_hides_is_not_claimed():
    assert "V = 1024 is 0.005 above, told apart" in _noise.describe_minimum(bowl(0.001), "V")
    assert "V = 1024 is 0.005 above, not told apart" in _noise.describe_minimum(bowl(0.02), "V")


def vocab_rows(sigma, slopes=(0.3, 0.2), shapes=((64, 170), (48, 128), (96, 256))):
    """Two seeds of a bowl in ln V at every budget, whose least goes as given with FLOPs and N."""
    noise = np.random.default_rng(0)
    rows = []
    for width, hidden in shapes:
        n_nv = accounting.block_parameters(2, width, hidden)
        for budget in (1e11, 2e11, 4e11):
            at = 900 * (budget / 2e11) ** slopes[0] * (n_nv / 1e5) ** slopes[1]
            for size in (256, 362, 512, 724, 1024, 1448, 2048, 2896, 4096):
                n_v = size * width
                values = 0.1 * np.log(size / at) ** 2 + sigma * noise.standard_normal(2)
                rows += [
                    {"n_nv": n_nv, "n_v": n_v, "width": width, "vocab_size": size, "lr": 1e-3,
                     "seed": seed, "budget": budget, "tokens": budget / (6 * (n_nv + n_v)),
                     "loss_u": value - 0.3 * np.log(budget)}
                    for seed, value in enumerate(values)
                ]  # fmt: skip
    return rows


def test_the_surface_finds_the_optima_and_how_they_move(monkeypatch):
    """Of bowls that are parabolas at equal FLOPs, which is not the surface's own form."""
    monkeypatch.setattr(_optima, "RESAMPLED", 40)
    found = _optima.optima_of(vocab_rows(0.005), "loss_u")
    assert len(found) == 9
    for one in found:
        truth = 900 * (one.budget / 2e11) ** 0.3 * (one.n_nv / 1e5) ** 0.2
        assert one.bracketed
        assert one.surface == pytest.approx(truth, rel=0.1)
        low, high = one.interval
        assert 0.8 * truth < low < one.surface < high < 1.25 * truth
        assert one.without_a_size[0] == pytest.approx(truth, rel=0.25)
    said = vocab_study.describe_shift(found, "L_u")
    assert "rises with FLOPs (as FLOPs^0.3" in said
    assert "rises with N_nv (as N_nv^0." in said
    still = _optima.optima_of(vocab_rows(0.005, slopes=(0, 0)), "loss_u")
    assert "is not seen to move with N_nv" in vocab_study.describe_shift(still, "L_u")


def test_one_shape_has_no_surface_and_noise_no_bracket(monkeypatch):
    monkeypatch.setattr(_optima, "RESAMPLED", 2)
    found = _optima.optima_of(vocab_rows(0.005, shapes=((64, 170),)), "loss_u")
    assert {one.surface for one in found} == {None}
    assert "too few" in vocab_study.describe_shift(found, "L_u")
    hidden = _optima.optima_of(vocab_rows(1.0), "loss_u")
    assert not all(one.bracketed for one in hidden)


def test_the_best_sizes_neighbours_bracket_it():
    assert _noise.bracket(bowl(0.001)) == (256, 1024)
    assert _noise.bracket(bowl(0.02)) == (256, 2048)
    assert _noise.bracket(bowl(0.001, at=100))[0] is None


def test_a_second_minimum_is_said():
    assert _noise.other_minima(bowl(0.001)) == []
    twice = _noise.Curve(SIZES, tuple([v - 1e-3, v + 1e-3] for v in (1.0, 0.5, 0.9, 0.6, 0.7)))
    assert _noise.other_minima(twice) == [2048]
    assert "no single bowl: a further minimum at 2048" in _noise.describe_minimum(twice, "V")
    noisy = _noise.Curve(SIZES, tuple([v - 0.3, v + 0.3] for v in (1.0, 0.5, 0.9, 0.6, 0.7)))
    assert _noise.other_minima(noisy) == []


def test_a_batch_has_the_loss_of_its_best_rate_between_the_rates():
    rows = [
        {"lr": lr, "batch_tokens": batch, "loss": 1 + (np.log2(lr / 3) ** 2) / batch}
        for lr in (1, 2, 4, 8) for batch in (10, 20)
    ]  # fmt: skip
    curve = step_study.along_batches(rows)
    assert list(curve.x) == [10, 20]
    np.testing.assert_allclose(curve.means, 1, atol=1e-9)


def test_noise_is_what_seeds_differ_by():
    rows = [{"lr": 1, "batch_tokens": 2, "loss": loss} for loss in (1.0, 1.01)]
    assert step_study.noise(rows) == pytest.approx(np.std([1.0, 1.01], ddof=1))
    assert step_study.noise(rows[:1]) is None
    assert _noise.pooled([[1.0, 3.0], [0.0, 0.0], [5.0]]) == pytest.approx(1.0)


def test_interior_names_the_directions():
    rows = [{"lr": lr, "batch_tokens": b} for lr in (1, 2, 3) for b in (1, 2)]
    assert step_study.interior(rows, {"lr": 2, "batch_tokens": 1}) == "lr"
    assert step_study.interior(rows, {"lr": 3, "batch_tokens": 2}) == "neither"


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


@pytest.mark.slow
def test_a_sweep_is_submitted_as_jobs(tmp_path):
    """submitit's local executor: two workers share the folder. In a process of its own, because
    submitit keeps the streams that it finds, which pytest closes.
    """
    out = tmp_path / "sweep"
    command = [
        sys.executable, "-m", "lminf.cli", "sweep", "step", "--config=step_sweep:tiny",
        "--config.data.corpus=prose", "--config.data.vocab=256", "--config.tokens=2048",
        "--config.schedule=constant:peak=1", f"--out={out}", "--submit=local",
        "--jobs=2", "--minutes=10",
    ]  # fmt: skip
    environment = {**os.environ, "LMINF_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "jobs " in done.stdout
    assert len(list((out / "jobs").glob("*_result.pkl"))) == 2
    logs = "".join(path.read_text() for path in (out / "jobs").glob("*_log.out"))
    assert "data.batch=2" in logs
    assert "data.batch=8" in logs
    assert len(RunFolder(out).rows()) == 4
    assert (out / "report.md").is_file()
