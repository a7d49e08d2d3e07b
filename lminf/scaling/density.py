"""Density of a model: the size of a reference model that would score the same, over its own size.

    loss step         L = a N^-alpha + b D^-beta          (no constant; L of the reference answer)
    performance step  S = c / (1 + exp(-g (L - l))) + d   (g < 0; d the chance floor, c + d the top)

Source: Xiao et al. 2024, arXiv:2412.04315.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import stats

from lminf.errors import InputError
from lminf.scaling import accounting, laws, robust_fit
from lminf.scaling.laws import Interval, Law
from lminf.scaling.resample import Resampling
from lminf.scaling.robust_fit import Columns, Numbers, Solutions
from lminf.scaling.tables import LN_D_UNIT, LN_N_UNIT, CurveTable, require_spread

REFERENCE_TOKENS = 1e12  # D0: density compares with references trained on this much
LOSS_PARAMETERS = ("ln_a", "ln_b", "alpha", "beta")  # N in 1e6 and D in 1e9 inside the fit
LOSS_LOWER = np.array([-60, -60, 0.005, 0.005])
LOSS_UPPER = np.array([60, 60, 4.0, 4.0])
LOSS_STARTS = np.array(
    list(itertools.product((-2, 0, 2), (-2, 0, 2), (0.1, 0.5), (0.1, 0.5))), float
)
SCORE_PARAMETERS = ("ln_c", "ln_steepness", "l", "d")


def loss_residual(theta: Numbers, columns: Columns) -> Array:
    """ln of predicted minus ln of observed conditional loss."""
    a, b, alpha, beta = theta
    size, data = a - alpha * columns["ln_n"], b - beta * columns["ln_d"]
    return jnp.logaddexp(size, data) - columns["ln_loss"]


def score_residual(theta: Numbers, columns: Columns) -> Array:
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
class DensityLaw(Law):
    """Loss of a model by its size and tokens, and score by its loss."""

    kind = "density"

    def loss(self, *, n: Any, d: Any) -> Float[np.ndarray, "..."]:
        """Conditional loss (nats per token) of a reference model for raw N and D."""
        k = self.constants
        size = k["a"] * np.asarray(n, float) ** -k["alpha"]
        return size + k["b"] * np.asarray(d, float) ** -k["beta"]

    def score(self, loss: Any) -> Float[np.ndarray, "..."]:
        """Benchmark score at a conditional loss (nats per token)."""
        k = self.constants
        return k["c"] / (1 + np.exp(-k["g"] * (np.asarray(loss, float) - k["l"]))) + k["d"]

    def density(self, *, n: float, score: float) -> Density:
        """Effective size over `n` raw parameters, for a model with that benchmark score."""
        accounting.require_raw("n", n, "n")
        return _density(self.constants, n, score)

    def interval(self, *, n: float, score: float) -> Interval:
        """95 % interval of the density over the law's draws."""
        draws = self.constant_draws()
        densities = np.array(
            [
                _density(dict(zip(draws, values, strict=True)), n, score).density
                for values in zip(*draws.values(), strict=True)
            ]
        )
        inside = densities[np.isfinite(densities)]
        if inside.size < 0.8 * densities.size:
            raise InputError(
                f"score {score:g} is outside the domain of {densities.size - inside.size} draws"
            )
        return self.percentiles(inside)


def _density(k: Mapping[str, float], n: float, score: float) -> Density:
    if not k["d"] < score < k["c"] + k["d"]:
        reason = f"score {score:g} is not between the floor {k['d']:.4g} and {k['c'] + k['d']:.4g}"
        return Density(float("nan"), float("nan"), reason)
    loss = k["l"] - np.log(k["c"] / (score - k["d"]) - 1) / k["g"]
    left = loss - k["b"] * REFERENCE_TOKENS ** -k["beta"]
    if left <= 0:
        reason = f"loss {loss:.4g} is below what any size reaches with {REFERENCE_TOKENS:g} tokens"
        return Density(float("nan"), float("nan"), reason)
    size = (left / k["a"]) ** (-1 / k["alpha"])
    return Density(float(size / n), float(size), "")


@dataclass(frozen=True)
class DensityFit:
    """Procedure: both steps by Huber(1e-3), of ln L and of S."""

    def fit(self, table: CurveTable, resampling: Resampling) -> DensityLaw:
        """The law of the table; InputError where the table does not determine it."""
        if table.score is None:
            raise InputError("column 'score' is missing; the density law needs N, D, loss, score")
        table.require_spread()
        require_spread(table.score, "score", minimum=1)
        if len(table) < 8:
            raise InputError(
                f"{len(table)} rows do not determine the two steps; give eight or more"
            )
        weights = np.ones((1, len(table)))
        if resampling.draws:
            weights = np.concatenate([weights, resampling.weights(table)])
        columns = table.log_columns()
        first = robust_fit.determined(
            "the loss step", LOSS_PARAMETERS, loss_residual, columns, starts=LOSS_STARTS,
            lower=LOSS_LOWER, upper=LOSS_UPPER, weights=weights, keep=4,
        )  # fmt: skip
        columns = {"loss": table.loss, "score": np.asarray(table.score)}
        second = _fit_score(columns, weights)
        values = raw_constants(first.parameters, second.parameters)
        resampled = laws.resampled(
            {name: v[1:] for name, v in values.items()},
            (first.converged & second.converged)[1:],
            resampling.described(table),
        )
        return laws.fitted(
            DensityLaw, "density", table.digest,
            constants={name: v[0] for name, v in values.items()},
            units={"N": "parameters", "D": "tokens", "L": "nats per token", "S": "as in the table"},
            procedure={"reference_tokens": REFERENCE_TOKENS},
            columns={"n": table.n, "d": table.d, "score": table.score},
            draws=resampled,
            diagnostics={
                "rows": len(table),
                "objective_loss": float(first.objective[0]),
                "objective_score": float(second.objective[0]),
            },
        )  # fmt: skip


def _fit_score(columns: Mapping[str, np.ndarray], weights: np.ndarray) -> Solutions:
    score, loss = columns["score"], columns["loss"]
    low, high = score.min(), score.max()
    span, loss_span = high - low, np.ptp(loss)
    starts = np.array(
        [
            (np.log(span * f), np.log(k / loss_span), middle, low)
            for f in (1.0, 1.5)
            for k in (2.0, 8.0)
            for middle in np.percentile(loss, (20, 50, 80))
        ]
    )
    return robust_fit.determined(
        "the performance step", SCORE_PARAMETERS, score_residual, columns, starts=starts,
        lower=np.array([np.log(span) - 3, np.log(0.1 / loss_span), loss.min() - 5, low - 5 * span]),
        upper=np.array([np.log(span) + 3, np.log(1e3 / loss_span), loss.max() + 5, high]),
        weights=weights, keep=4,
    )  # fmt: skip


def raw_constants(first: np.ndarray, second: np.ndarray) -> dict[str, np.ndarray]:
    """The law's constants in raw units, of both fits' parameters [draws, parameters]."""
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
    line: Any = stats.linregress(days[record], np.log(density[record]))
    months = np.log(2) / line.slope / (365.25 / 12) if line.slope > 0 else np.inf
    return Trend(*map(float, (line.slope, line.intercept, line.rvalue**2, months)))
