"""The robust fits against SciPy, finite differences, and itself in other units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from lminf import scaling
from lminf.scaling import chinchilla, density, fertility, resample, robust_fit, vocab_loss
from lminf.scaling.vocab_isoflop import fit_lines, line_residual
from tests.scaling import data


def small_columns():
    table = data.synthetic_vocab(0.01, 0)
    return vocab_loss.LossFit("tokens").columns(
        table.select(np.arange(0, len(table), 37)), fertility.PUBLISHED
    )


@pytest.mark.parametrize(
    ("residual", "theta", "columns"),
    [
        (vocab_loss.residual, (0.6, -1.6, 0.3, 1.7, 0.6, 0.44), small_columns()),
        (
            chinchilla.residual,
            (1.2, -0.3, 0.6, 0.35, 0.36),
            {
                "ln_n": np.linspace(4, 9, 9),
                "ln_d": np.linspace(0, 6, 9),
                "ln_loss": np.full(9, 0.9),
            },
        ),
        (
            density.loss_residual,
            (1.0, 0.5, 0.3, 0.2),
            {
                "ln_n": np.linspace(2, 7, 9),
                "ln_d": np.linspace(0, 3, 9),
                "ln_loss": np.full(9, 0.1),
            },
        ),
        (
            density.score_residual,
            (-0.3, 1.5, 0.9, 0.25),
            {"loss": np.linspace(0.5, 1.5, 9), "score": np.linspace(0.9, 0.3, 9)},
        ),
        (line_residual, (0.31, 0.47), {"x": np.linspace(-2, 2, 9), "y": np.linspace(0, 1, 9) ** 2}),
    ],
)
def test_automatic_gradients_equal_central_differences(residual, theta, columns):
    theta, step = np.array(theta), 1e-6
    with jax.enable_x64(True):

        @jax.jit
        def at(point):
            return robust_fit.objective(residual, point, columns, 1.0, 0.05)

        found = jax.jit(jax.grad(at))(theta)
        for i, unit in enumerate(np.eye(theta.size) * step):
            central = (at(theta + unit) - at(theta - unit)) / (2 * step)
            assert found[i] == pytest.approx(float(central), rel=1e-6, abs=1e-8)


def test_huber_lines_equal_scipy():
    random = np.random.default_rng(1)
    x = random.normal(size=(3, 40)) + 20
    y = 0.4 * x + 1 + 0.1 * random.standard_t(2, size=x.shape)
    k, alpha, converged, objective = fit_lines(x, y, np.ones_like(x), np.full(3, np.nan), "huber")
    assert converged.all()
    for i in range(3):

        def huber(theta, i=i):
            r = np.abs(theta[0] + theta[1] * (x[i] - 20) - y[i])
            return np.where(r <= 1e-3, r**2 / 2, 1e-3 * (r - 5e-4)).sum()

        start = [k[i] + 20 * alpha[i] + 0.05, alpha[i] - 0.02]
        options = {"xatol": 1e-12, "fatol": 1e-16, "maxiter": 8000}
        peer = optimize.minimize(huber, start, method="Nelder-Mead", options=options)
        assert objective[i] <= peer.fun * (1 + 1e-9)
        assert alpha[i] == pytest.approx(peer.x[1], abs=1e-4)


def test_the_rest_of_the_process_stays_in_single_precision():
    x = np.tile(np.arange(40.0), (3, 1))
    fit_lines(x, x, np.ones_like(x), np.full(3, np.nan), "huber")
    assert jnp.ones(2).dtype == jnp.float32


def test_bootstrap_weights_keep_clusters_together():
    cluster = np.repeat(np.arange(7), 5)
    weights = resample.bootstrap_weights(cluster, draws=50, seed=0)
    assert np.all(weights.sum(1) == 35)
    assert np.all(weights.reshape(50, 7, 5) == weights.reshape(50, 7, 5)[:, :, :1])


@pytest.mark.slow
def test_approach_3_equals_scipy_from_many_starts():
    table = data.synthetic_vocab(0.01, 3)
    procedure = vocab_loss.LossFit("tokens", flops_limit=0.0)
    columns = procedure.columns(table, fertility.PUBLISHED)
    law = scaling.fit(procedure, table, draws=0)

    def huber(theta):
        a1, a2, b, e, alpha2, beta = theta
        r = np.exp(a1 - beta * columns["ln_n_nv"]) + np.exp(a2 - alpha2 * columns["ln_n_v"])
        r = np.abs(r + np.exp(b - beta * columns["ln_data"]) - np.exp(e) - columns["loss"])
        return np.where(r <= 1e-3, r**2 / 2, 1e-3 * (r - 5e-4)).sum()

    bounds = [(-20, 60)] * 4 + [(0.1, 1.0)] * 2
    options = {"ftol": 1e-15, "gtol": 1e-10, "maxfun": 20000}
    peers = [
        optimize.minimize(huber, start, method="L-BFGS-B", bounds=bounds, options=options).fun
        for start in vocab_loss.STARTS[::81].clip([-20] * 4 + [0.1] * 2, [60] * 4 + [1.0] * 2)
    ]
    assert law.diagnostics["objective"] <= min(peers) * (1 + 1e-9)


@pytest.mark.slow
def test_dropping_starts_early_loses_no_optimum():
    table = data.vocab_table()
    procedure = vocab_loss.LossFit("tokens", bounds="wide")
    kept = procedure.fitted_rows(table)
    columns = procedure.columns(kept, fertility.PUBLISHED)
    lower, upper = (np.array(b) for b in vocab_loss.BOUNDS["wide"])
    weights = resample.bootstrap_weights(kept.run, draws=4, seed=5)
    few, all_starts = (
        robust_fit.minimise(
            vocab_loss.residual, columns, starts=vocab_loss.STARTS, lower=lower, upper=upper,
            weights=weights, keep=keep,
        )
        for keep in (8, 48)
    )  # fmt: skip
    np.testing.assert_allclose(few.objective, all_starts.objective, rtol=1e-8)
