"""The Chinchilla baseline: L(N, D) = E + A N^-alpha + B D^-beta, raw units, C = 6 N D.

Procedure 3 of the paper: the parametric loss, fitted in logarithms.
Source: Hoffmann et al. 2022, arXiv:2203.15556.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lminf.errors import InputError
from lminf.scaling import accounting, laws, robust_fit
from lminf.scaling.laws import Interval, Law
from lminf.scaling.resample import Resampling
from lminf.scaling.robust_fit import Columns, Numbers
from lminf.scaling.tables import LN_D_UNIT, LN_N_UNIT, CurveTable

PARAMETERS = ("ln_A", "ln_B", "ln_E", "alpha", "beta")  # N in 1e6 and D in 1e9 inside the fit
LOWER = np.array([-60.0, -60.0, -30.0, 0.01, 0.01])
UPPER = np.array([60.0, 60.0, 5.0, 4.0, 4.0])


def _starts(
    exponents: Sequence[float], logs: Sequence[float], floors: Sequence[float]
) -> Float[np.ndarray, "starts 5"]:
    """The published grid, in the units of the fit."""
    grid = itertools.product(logs, logs, floors, exponents, exponents)
    return np.array(
        [(a - al * LN_N_UNIT, b - be * LN_D_UNIT, e, al, be) for a, b, e, al, be in grid], float
    )


STARTS = _starts((0, 0.5, 1, 1.5, 2), (0, 5, 10, 15, 20, 25), (-1, -0.5, 0, 0.5, 1))
# For resampled draws: the corners of the same grid and its middle.
DRAW_STARTS = _starts((0.2, 0.5, 1.0), (0, 5, 10), (-0.5, 0.5))


def residual(theta: Numbers, columns: Columns) -> Array:
    """ln of predicted minus ln of observed loss; theta in the order of PARAMETERS."""
    a, b, e, alpha, beta = theta
    size, data = a - alpha * columns["ln_n"], b - beta * columns["ln_d"]
    floor = jnp.full_like(size, 1.0) * e
    return jax.nn.logsumexp(jnp.stack([size, data, floor]), axis=0) - columns["ln_loss"]


class Allocation(NamedTuple):
    n: float  # parameters
    d: float  # tokens
    loss: float  # nats per token


@dataclass(frozen=True, kw_only=True)
class ChinchillaLaw(Law):
    """The loss of N parameters trained on D tokens."""

    kind = "chinchilla"

    def loss(self, *, n: Any, d: Any) -> Float[np.ndarray, "..."]:
        """Nats per token for raw N and D."""
        k = self.constants
        size = k["A"] * np.asarray(n, float) ** -k["alpha"]
        return k["E"] + size + k["B"] * np.asarray(d, float) ** -k["beta"]

    def optimum(self, *, flops: float) -> Allocation:
        """Loss-optimal N and D at C = 6 N D."""
        accounting.require_raw("flops", flops, "flops")
        n = float(allocation(self.constants, flops))
        d = flops / (6 * n)
        return Allocation(n, d, float(self.loss(n=n, d=d)))

    def interval(self, *, flops: float) -> Interval:
        """95 % interval of the optimal N (parameters) over the law's draws."""
        return self.percentiles(allocation(self.constant_draws(), flops))


def allocation(constants: Mapping[str, Any], flops: float) -> Any:
    """N_opt = G (C / 6)^a with a = beta / (alpha + beta), G^(alpha + beta) = alpha A / (beta B)."""
    alpha, beta = constants["alpha"], constants["beta"]
    total = alpha + beta
    scale = (alpha * constants["A"] / (beta * constants["B"])) ** (1 / total)
    return scale * (flops / 6) ** (beta / total)


def raw_constants(theta: Float[np.ndarray, "draws 5"]) -> dict[str, Float[np.ndarray, " draws"]]:
    """The law's constants in raw units, of parameters in the units of the fit."""
    a, b, e, alpha, beta = np.asarray(theta).T
    return {
        "A": np.exp(a + alpha * LN_N_UNIT),
        "B": np.exp(b + beta * LN_D_UNIT),
        "E": np.exp(e),
        "alpha": alpha,
        "beta": beta,
    }


@dataclass(frozen=True)
class ChinchillaFit:
    """Procedure 3, the parametric loss: Huber(1e-3) of ln L from 4,500 starts."""

    def fit(self, table: CurveTable, resampling: Resampling) -> ChinchillaLaw:
        """The law of the table; InputError where the table does not determine it."""
        table.require_spread()
        if len(table) < 2 * len(PARAMETERS):
            raise InputError(
                f"{len(table)} rows do not determine five parameters; give ten or more"
            )
        columns = table.log_columns()
        box = {"lower": LOWER, "upper": UPPER}
        point = robust_fit.determined(
            "Chinchilla", PARAMETERS, residual, columns, starts=STARTS, **box
        )
        resampled = laws.Resampled()
        if resampling.draws:
            sample = robust_fit.minimise(
                residual, columns, starts=np.concatenate([point.parameters, DRAW_STARTS]), **box,
                weights=resampling.weights(table), keep=4,
            )  # fmt: skip
            constants = raw_constants(sample.parameters)
            resampled = laws.resampled(constants, sample.converged, resampling.described(table))
        bound = [name for name, side in zip(PARAMETERS, point.bound[0], strict=True) if side]
        return laws.fitted(
            ChinchillaLaw, "chinchilla", table.digest,
            constants={name: v[0] for name, v in raw_constants(point.parameters).items()},
            units={"N": "parameters", "D": "tokens", "L": "nats per token", "A, B": "raw units"},
            procedure={"approach": 3, "starts": len(STARTS)},
            columns={"n": table.n, "d": table.d},
            draws=resampled,
            warnings=[f"{name} is not identified: it sits on its bound" for name in bound],
            diagnostics={"rows": len(table), "objective": float(point.objective[0])},
        )  # fmt: skip
