"""Density of a model: the size of a reference model that would score the same, over its own size.

    loss step         L = a N^-alpha + b D^-beta          (no constant; L of the reference answer)
    performance step  S = c / (1 + exp(-g (L - l))) + d   (g < 0; d the chance floor, c + d the top)

Source: Xiao et al. 2024, arXiv:2412.04315.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lminf.errors import InputError
from lminf.scaling import accounting, engine, laws, resample
from lminf.scaling.laws import Interval, Law
from lminf.scaling.tables import CurveTable

REFERENCE_TOKENS = 1e12  # D0: density compares with references trained on this much
LOSS_PARAMETERS = ("ln_a", "ln_b", "alpha", "beta")  # N in 1e6 and D in 1e9 inside the fit
SCORE_PARAMETERS = ("ln_c", "ln_steepness", "l", "d")
LN_N_UNIT, LN_D_UNIT = np.log(1e6), np.log(1e9)


def loss_residual(theta, columns):
    """ln of predicted minus ln of observed conditional loss."""
    a, b, alpha, beta = theta
    size, data = a - alpha * columns["ln_n"], b - beta * columns["ln_d"]
    return jnp.logaddexp(size, data) - columns["ln_loss"]


def score_residual(theta, columns):
    """Predicted minus observed score."""
    c, steepness, middle, floor = theta
    falling = 1 / (1 + jnp.exp(jnp.exp(steepness) * (columns["loss"] - middle)))
    return jnp.exp(c) * falling + floor - columns["score"]


class Density(NamedTuple):
    """NaN with the reason outside the domain; never a clipped number."""

    density: float
    effective_size: float  # parameters of the equal reference model
    reason: str


@dataclass(frozen=True, kw_only=True)
class DensityFit(Law):
    kind = "density"

    def loss(self, *, n, d) -> Float[np.ndarray, "..."]:
        k = self.constants
        return k["a"] * np.asarray(n, float) ** -k["alpha"] + k["b"] * (
            np.asarray(d, float) ** -k["beta"]
        )

    def score(self, loss) -> Float[np.ndarray, "..."]:
        k = self.constants
        return k["c"] / (1 + np.exp(-k["g"] * (np.asarray(loss, float) - k["l"]))) + k["d"]

    def density(self, *, n: float, score: float, tokens: float = REFERENCE_TOKENS) -> Density:
        """Effective size over `n` raw parameters, for a model with that benchmark score."""
        accounting.require_raw("n", n, "n")
        return _density(self.constants, n, score, tokens)

    def interval(self, *, n: float, score: float, level: float = 0.95) -> Interval:
        if not self.draws:
            raise InputError(f"{self.version} carries no draws; fit with draws > 0")
        count = len(next(iter(self.draws.values())))
        values = []
        for i in range(count):
            constants = {k: float(self.draws[k][i]) for k in self.constants}
            values.append(_density(constants, n, score, REFERENCE_TOKENS).density)
        good = np.array(values)[np.isfinite(values)]
        if good.size < 0.8 * count:
            raise InputError(f"score {score:g} is outside the domain of {count - good.size} draws")
        return Interval(*resample.percentile_interval(good, level), self.resampling)


def _density(k, n, score, tokens) -> Density:
    if not k["d"] < score < k["c"] + k["d"]:
        reason = f"score {score:g} is not between the floor {k['d']:.4g} and {k['c'] + k['d']:.4g}"
        return Density(float("nan"), float("nan"), reason)
    loss = k["l"] - np.log(k["c"] / (score - k["d"]) - 1) / k["g"]
    left = loss - k["b"] * tokens ** -k["beta"]
    if left <= 0:
        reason = f"loss {loss:.4g} is below what any size reaches with {tokens:g} tokens"
        return Density(float("nan"), float("nan"), reason)
    size = (left / k["a"]) ** (-1 / k["alpha"])
    return Density(float(size / n), float(size), "")


@dataclass(frozen=True)
class DensityLaw:
    """Procedure: both steps by Huber(1e-3), of ln L and of S."""

    def fit(
        self, table: CurveTable, *, draws: int = 300, cluster: str = "run", seed: int = 0
    ) -> DensityFit:
        if table.score is None:
            raise InputError("column 'score' is missing; the density law needs N, D, loss, score")
        laws.require_spread(table.n, "N")
        laws.require_spread(table.d, "D")
        laws.require_spread(table.loss, "loss", minimum=1)
        laws.require_spread(table.score, "score", minimum=1)
        if len(table) < 8:
            raise InputError(
                f"{len(table)} rows do not determine the two steps; give eight or more"
            )
        weights = np.ones((1, len(table)))
        if draws:
            if cluster not in ("run", "row"):
                raise InputError(f"cluster={cluster!r} is unknown for a density law; use run, row")
            ids = table.run if cluster == "run" else np.arange(len(table))
            sampled = resample.bootstrap_weights(ids, draws=draws, seed=seed)
            weights = np.concatenate([weights, sampled])
        columns = {
            "ln_n": np.log(table.n) - LN_N_UNIT,
            "ln_d": np.log(table.d) - LN_D_UNIT,
            "ln_loss": np.log(table.loss),
        }
        first = _fit_loss(columns, weights)
        laws.require_determined("the loss step", LOSS_PARAMETERS, loss_residual, columns, first)
        columns = {"loss": table.loss, "score": np.asarray(table.score)}
        second = _fit_score(columns, weights)
        laws.require_determined(
            "the performance step", SCORE_PARAMETERS, score_residual, columns, second
        )
        values = _raw(first.parameters, second.parameters)
        constants = {name: float(v[0]) for name, v in values.items()}
        drawn, how, spans, notes = {}, "", {}, ()
        if draws:
            drawn, how, spans, notes = laws.draw_summary(
                {name: v[1:] for name, v in values.items()},
                (first.converged & second.converged)[1:],
                f"{draws} bootstrap draws over {cluster}s",
            )
        return DensityFit(
            version=f"density-{table.digest[:8]}",
            source=f"data sha256 {table.digest}",
            constants=constants,
            units={"N": "parameters", "D": "tokens", "L": "nats per token", "S": "as in the table"},
            procedure={"reference_tokens": REFERENCE_TOKENS},
            fitted_range={
                "n": (float(table.n.min()), float(table.n.max())),
                "d": (float(table.d.min()), float(table.d.max())),
                "score": (float(table.score.min()), float(table.score.max())),
            },
            draws=drawn,
            resampling=how,
            intervals=spans,
            warnings=notes,
            diagnostics={
                "rows": len(table),
                "objective_loss": float(first.objective[0]),
                "objective_score": float(second.objective[0]),
            },
        )


def _fit_loss(columns, weights):
    grid = itertools.product((-2, 0, 2), (-2, 0, 2), (0.1, 0.5), (0.1, 0.5))
    starts = np.array(list(grid), float)
    return engine.minimise(
        loss_residual, columns, starts=starts, lower=np.array([-60, -60, 0.005, 0.005]),
        upper=np.array([60, 60, 4.0, 4.0]), weights=weights, keep=4,
    )  # fmt: skip


def _fit_score(columns, weights):
    score, loss = columns["score"], columns["loss"]
    low, high = score.min(), score.max()
    span, reach = high - low, np.ptp(loss)
    starts = np.array(
        [
            (np.log(span * f), np.log(k / reach), middle, low)
            for f in (1.0, 1.5)
            for k in (2.0, 8.0)
            for middle in np.percentile(loss, (20, 50, 80))
        ]
    )
    return engine.minimise(
        score_residual, columns, starts=starts,
        lower=np.array([np.log(span) - 3, np.log(0.1 / reach), loss.min() - 5, low - 5 * span]),
        upper=np.array([np.log(span) + 3, np.log(1e3 / reach), loss.max() + 5, high]),
        weights=weights, keep=4,
    )  # fmt: skip


def _raw(first, second) -> dict[str, np.ndarray]:
    a, b, alpha, beta = first.T
    c, steepness, middle, floor = second.T
    return {
        "a": np.exp(a + alpha * LN_N_UNIT),
        "b": np.exp(b + beta * LN_D_UNIT),
        "alpha": alpha,
        "beta": beta,
        "c": np.exp(c),
        "g": -np.exp(steepness),
        "l": middle,
        "d": floor,
    }


class Trend(NamedTuple):
    rate: float  # per day: ln rho_max = rate * t + intercept
    intercept: float
    r_squared: float
    doubling_months: float


def trend(days: Float[np.ndarray, " models"], density: Float[np.ndarray, " models"]) -> Trend:
    """Growth of the running maximum of density over release days."""
    order = np.argsort(days, kind="stable")
    days, density = np.asarray(days, float)[order], np.asarray(density, float)[order]
    record = density > np.concatenate([[-np.inf], np.maximum.accumulate(density)[:-1]])
    if record.sum() < 2 or np.ptp(days[record]) == 0:
        raise InputError("a trend needs two record densities on different days")
    x, y = days[record], np.log(density[record])
    rate, intercept = np.polyfit(x, y, 1)
    left = np.sum((y - rate * x - intercept) ** 2)
    total = np.sum((y - y.mean()) ** 2)
    months = float(np.log(2) / rate / (365.25 / 12)) if rate > 0 else float("inf")
    return Trend(float(rate), float(intercept), float(1 - left / total), months)
