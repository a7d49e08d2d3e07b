"""Plans: what fits a budget, what it is expected to show, and a run list that sweeps take."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from lminf import cli, scaling
from lminf.commands.scaling import _sweep_plan as plan
from lminf.errors import InputError
from lminf.run import request, sweep
from lminf.scaling import fertility
from lminf.scaling.tables import StepTable, VocabTable
from tests.scaling import data


@pytest.mark.parametrize("budget", [2e12, 1e13, 1e15])
def test_a_plan_spends_its_budget(budget):
    for found in (plan.vocab(budget, text_tokens=1e12), plan.step(budget, text_tokens=1e12)):
        whole = budget >= 1e13 or found.batches[1:] == ()  # few steps do not fill a budget
        assert found.flops == pytest.approx(budget, rel=0.02 if whole else 0.1)
        assert len({group.shape for group in found.groups}) >= 2
        assert all(b == 2 * a for a, b in zip(found.sizes, found.sizes[1:], strict=False))
        assert list(found.rates) == sorted(found.rates)
        # N = 0.0834 FLOPs^0.5, to the next step of the ladder.
        wanted = 0.0834 * math.sqrt(found.groups[0].flops)
        lowest = found.groups[-1].shape is plan.LADDER[0]  # there are no smaller ones
        assert lowest or 0.4 < found.groups[0].shape.parameters / wanted < 2.5


def test_more_budget_is_a_larger_model():
    sizes = [plan.step(10.0**e, text_tokens=1e15).groups[0].shape.parameters for e in (12, 14, 16)]
    assert sizes == sorted(set(sizes))


def test_no_token_is_read_twice():
    found = plan.vocab(1e15, text_tokens=1e7)
    assert {group.tokens for group in found.groups} == {10**7}
    assert found.flops < 1e15


def test_all_batches_of_a_group_train_on_as_many_tokens():
    """With tokens rounded to steps of its own, each batch was a group, and nothing was compared."""
    for budget in (1e12, 3e12, 1e13):
        found = plan.step(budget, text_tokens=1e12)
        assert len({group.tokens for group in found.groups}) == 3
        for group in found.groups:
            assert all(group.tokens % (32 * batch) == 0 for batch in found.batches)


def test_a_small_vocabulary_study_has_small_batches_for_its_steps():
    for budget, batch in ((1e12, 2), (1e13, 8)):
        found = plan.vocab(budget, text_tokens=1e12)
        assert found.batches == (batch,)
        assert found.groups[0].tokens / (128 * batch) >= plan.STEPS


def test_too_little_is_refused():
    with pytest.raises(InputError, match=r"too few to train anything; give at least"):
        plan.vocab(1e9, text_tokens=1e7)


def test_the_expected_interval_is_what_noise_makes_of_a_parabola():
    sigma, curvature = plan.MEASURED["vocab"]
    x = math.log(2) * np.array([-1, 0, 1])
    rng = np.random.default_rng(0)
    noise = sigma / math.sqrt(2) * rng.standard_normal((20_000, 3))
    a, b, _ = np.polyfit(x, (curvature / 2 * x**2 + noise).T, 2)
    spread = np.std(-b / (2 * a))
    assert math.log(plan.interval("vocab", 2)) == pytest.approx(1.96 * spread, rel=0.05)
    assert plan.interval("vocab", 8) < plan.interval("vocab", 2)


def test_a_plan_needs_a_budget():
    with pytest.raises(SystemExit):
        cli.main(["scaling", "plan", "vocab"])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "cells"), [("vocab", 12), ("step", 18)])
def test_the_run_list_is_a_sweep(kind, cells, tmp_path, capsys):
    """On this machine: its speed is measured."""
    file = tmp_path / "planned.py"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax mixes
        cli.main(["scaling", "plan", kind, "--flops", "2e12", f"--out={file}", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["flops"] == pytest.approx(2e12, rel=0.1)
    assert found["measured_flops_per_second"] > 1e7
    assert found["hours"] > 0
    asked = request.parse(f"{kind}_sweep", [f"--config={file}"])
    assert asked is not None
    listed = sweep.cells_of(asked)
    assert len(listed) == cells
    assert asked.config.replicates == found["replicates"]
    assert list(asked.config.rates) == found["rates"]


@pytest.mark.slow
def test_the_documented_lines_end_in_a_step_law(tmp_path, monkeypatch, capsys):
    """The four lines of docs/scaling_laws.md, for less compute and the three groups of two N and
    two D that a law needs at least: six cells, most of whose time is compilation."""
    monkeypatch.chdir(tmp_path)
    whole = plan.step

    def three_groups(budget, *, text_tokens):
        planned = whole(budget, text_tokens=text_tokens, rates=3, batches=2)
        return dataclasses.replace(planned, groups=tuple(planned.groups[i] for i in (0, 2, 3)))

    monkeypatch.setattr(plan, "step", three_groups)
    page = (Path(__file__).parents[2] / "docs/scaling_laws.md").read_text(encoding="utf-8")
    block = page.split("From a budget to a law")[1].split("```console\n")[1].split("```")[0]
    lines = [line.split() for line in block.splitlines()]
    assert [line[2] for line in lines] == ["plan", "step", "collect", "fit"]
    assert lines[0][4] == "--flops"
    lines[0][5] = "3e11"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax mixes
        for line in lines:
            cli.main(line[1:])
    law = scaling.load("mine.json")
    assert law.kind == "step"
    assert all(map(math.isfinite, law.constants.values()))


def test_a_planned_step_study_determines_a_law():
    """Runs at the step law's point in every planned group give its exponents back."""
    groups = plan.step(1e13, text_tokens=1e12).groups
    n, d = (np.array(column, float) for column in zip(
        *((group.shape.parameters, group.tokens) for group in groups), strict=True))  # fmt: skip
    k = data.STEP_TRUTH
    lr = np.exp(k["lr_ln_k"] + k["lr_n"] * np.log(n) + k["lr_d"] * np.log(d))
    batch = np.exp(k["batch_ln_k"] + k["batch_d"] * np.log(d))
    table = StepTable(n, n, d, lr, batch, np.full(n.size, 2.5), 6 * n, 64, "0" * 64)
    law = scaling.fit(scaling.StepFit(), table, draws=0)
    assert dict(law.constants) == pytest.approx({**k, "batch_n": 0.0})


@pytest.mark.slow
def test_a_planned_vocabulary_study_determines_a_law():
    """Losses of the parametric form at the planned shapes, sizes and budgets give it back."""
    planned = plan.vocab(1e15, text_tokens=1e15)
    cells = [
        (size, group.shape.width, group.shape.parameters, budget)
        for group in planned.groups for size in planned.sizes for budget in plan.budgets(group)
    ]  # fmt: skip
    size, width, n, flops = np.array(cells, float).T
    tokens = flops / (6 * (n + size * width))
    k = data.VOCAB_TRUTH
    # D in 1e9 and parameters in 1e6, as the law has them; A2 so that V matters at these sizes.
    loss = (
        np.exp(k["ln_A1"]) * (n / 1e6) ** -k["beta"]
        + np.exp(k["ln_A2"]) * (size * width / 1e6) ** -k["alpha2"]
        + np.exp(k["ln_B"]) * (tokens / 1e9) ** -k["beta"]
        - np.exp(k["ln_E"])
    )
    characters = tokens / fertility.PUBLISHED.tokens_per_character(size)
    table = VocabTable(size, width, characters, n, flops, loss, "0" * 64)
    law = scaling.fit(scaling.LossFit(bounds="wide", flops_limit=0.0), table, draws=0)
    for name, value in k.items():
        assert law.constants[name] == pytest.approx(value, abs=1e-4)
