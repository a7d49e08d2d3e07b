"""Synthetic data from each law: 95 % intervals cover the truth, and units do not matter."""

import dataclasses

import numpy as np
import pytest

from lminf import scaling
from lminf.scaling import chinchilla, density, fertility, resample, robust_fit, vocab_loss
from tests.scaling import data

DATASETS, DRAWS = 100, 200
REQUIRED = 90


def interval(values):
    return resample.percentile_interval(values)


def covered(truth, draws):
    """1 for each constant whose interval over the draws holds the true value."""
    spans = {name: interval(draws[name]) for name in truth}
    return {name: float(low <= truth[name] <= high) for name, (low, high) in spans.items()}


def assert_covered(results):
    counts = {name: sum(result[name] for result in results) for name in results[0]}
    print(counts)
    assert min(counts.values()) >= REQUIRED, counts


@pytest.mark.slow
def test_the_vocabulary_law_is_recovered():
    """Draws start at the point estimate: 100 fits from 486 starts each, 20,000 draws from one."""
    procedure = vocab_loss.LossFit("tokens", bounds="wide", flops_limit=0.0)
    lower, upper = (np.array(bound) for bound in vocab_loss.BOUNDS["wide"])
    results = []
    for seed in range(DATASETS):
        table = data.synthetic_vocab(0.01, seed, checkpoints=5)
        columns = procedure.columns(table, fertility.PUBLISHED)
        point = robust_fit.minimise(
            vocab_loss.residual, columns, starts=vocab_loss.STARTS[::6], lower=lower, upper=upper,
            weights=np.ones((1, len(table))),
        )  # fmt: skip
        assert point.converged.all()
        weights = resample.bootstrap_weights(table.run, draws=DRAWS, seed=seed)
        sample = robust_fit.minimise(
            vocab_loss.residual, columns, starts=point.parameters, lower=lower, upper=upper,
            weights=weights, keep=1,
        )  # fmt: skip
        assert sample.converged.mean() > 0.8, (seed, sample.converged.mean())
        kept = sample.parameters[sample.converged]
        draws = dict(zip(vocab_loss.PARAMETERS, kept.T, strict=True))
        results.append(covered(data.VOCAB_TRUTH, draws))
    assert_covered(results)


@pytest.mark.slow
def test_the_step_law_is_recovered():
    results = []
    for seed in range(DATASETS):
        law = scaling.fit(scaling.StepFit(), data.synthetic_step(0.01, seed), draws=500, seed=seed)
        results.append(covered(data.STEP_TRUTH, law.draws))
    assert_covered(results)


@pytest.mark.slow
def test_the_chinchilla_law_is_recovered():
    results = []
    for seed in range(DATASETS):
        table = data.synthetic_curves(0.01, seed)
        columns = {
            "ln_n": np.log(table.n / 1e6),
            "ln_d": np.log(table.d / 1e9),
            "ln_loss": np.log(table.loss),
        }
        box = {"lower": chinchilla.LOWER, "upper": chinchilla.UPPER}
        point = robust_fit.minimise(
            chinchilla.residual, columns, starts=chinchilla.DRAW_STARTS,
            weights=np.ones((1, len(table))), **box,
        )  # fmt: skip
        sample = robust_fit.minimise(
            chinchilla.residual, columns, starts=point.parameters, keep=1, **box,
            weights=resample.bootstrap_weights(table.run, draws=DRAWS, seed=seed),
        )  # fmt: skip
        draws = chinchilla.raw_constants(sample.parameters[sample.converged])
        results.append(covered(data.CHINCHILLA_TRUTH, draws))
    assert_covered(results)


@pytest.mark.slow
def test_the_density_law_is_recovered():
    """The constants of its loss step; draws start at the point estimate."""
    results = []
    box = {"lower": density.LOSS_LOWER, "upper": density.LOSS_UPPER}
    for seed in range(DATASETS):
        table = data.synthetic_density(0.01, seed)
        columns = table.log_columns()
        point = robust_fit.minimise(
            density.loss_residual, columns, starts=density.LOSS_STARTS,
            weights=np.ones((1, len(table))), **box,
        )  # fmt: skip
        sample = robust_fit.minimise(
            density.loss_residual, columns, starts=point.parameters, keep=1, **box,
            weights=resample.bootstrap_weights(table.run, draws=DRAWS, seed=seed),
        )  # fmt: skip
        assert sample.converged.mean() > 0.8, (seed, sample.converged.mean())
        kept = sample.parameters[sample.converged]
        constants = density.raw_constants(kept, np.zeros((len(kept), 4)))
        draws = {name: constants[name] for name in ("a", "b", "alpha", "beta")}
        results.append(covered({name: data.DENSITY_TRUTH[name] for name in draws}, draws))
    assert_covered(results)


def test_a_model_on_the_reference_curve_has_density_one():
    k = {name: float(value) for name, value in data.DENSITY_TRUTH.items()}
    law = density.DensityLaw(
        version="synthetic", source="test", constants=k, units={}, procedure={}, fitted_range={}
    )
    score = float(law.score(law.loss(n=3e9, d=density.REFERENCE_TOKENS)))
    assert law.density(n=3e9, score=score).density == pytest.approx(1, rel=1e-9)
    assert law.density(n=6e9, score=score).density == pytest.approx(0.5, rel=1e-9)
    outside = law.density(n=6e9, score=0.2)
    assert np.isnan(outside.density)
    assert "floor" in outside.reason
    assert "any size" in law.density(n=6e9, score=0.9499).reason


def test_the_trend_of_densities_counts_records_only():
    days = np.arange(0, 500, 50)
    density_now = np.exp(0.007 * days)
    density_now[3] = 0.5
    found = density.trend(days, density_now)
    assert found.rate == pytest.approx(0.007, rel=1e-6)
    assert found.doubling_months == pytest.approx(3.25, abs=0.02)


def test_the_step_law_does_not_depend_on_the_unit_of_the_batch():
    table = data.synthetic_step(0.01, 0)
    law = scaling.fit(scaling.StepFit(), table, draws=0)
    other = dataclasses.replace(table, seq_len=512)  # the batch is in tokens whatever the length
    again = scaling.fit(scaling.StepFit(), other, draws=0)
    assert law.setting(n=1e9, d=1e11) == again.setting(n=1e9, d=1e11)


@pytest.mark.slow
def test_predictions_do_not_depend_on_the_unit_of_n_and_d():
    """A fit to N / 1000 and D / 1000 predicts the same losses from N / 1000 and D / 1000."""
    table = data.synthetic_curves(0.01, 0)
    law = scaling.fit(scaling.ChinchillaFit(), table, draws=0)
    scaled = dataclasses.replace(table, n=table.n / 1000, d=table.d / 1000)
    again = scaling.fit(scaling.ChinchillaFit(), scaled, draws=0)
    np.testing.assert_allclose(
        law.loss(n=table.n, d=table.d), again.loss(n=scaled.n, d=scaled.d), rtol=1e-6
    )
    expected, found = law.optimum(flops=1e21), again.optimum(flops=1e15)
    assert found.n * 1000 == pytest.approx(expected.n, rel=1e-5)
