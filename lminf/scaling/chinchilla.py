"""The Chinchilla baseline: L(N, D) = E + A N^-alpha + B D^-beta, raw units, C = 6 N D.

Procedure 3 of the paper: the parametric loss, fitted in logarithms.
Source: Hoffmann et al. 2022, arXiv:2203.15556.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lminf.errors import InputError
from lminf.scaling import accounting, engine, laws, resample
from lminf.scaling.laws import Interval, Law
from lminf.scaling.tables import CurveTable

PARAMETERS = ("ln_A", "ln_B", "ln_E", "alpha", "beta")  # N in 1e6 and D in 1e9 inside the fit
LN_N_UNIT, LN_D_UNIT = np.log(1e6), np.log(1e9)
LOWER = np.array([-60.0, -60.0, -30.0, 0.01, 0.01])
UPPER = np.array([60.0, 60.0, 5.0, 4.0, 4.0])


def _starts(exponents, logs, floors) -> np.ndarray:
    """The published grid, in the units of the fit."""
    grid = itertools.product(logs, logs, floors, exponents, exponents)
    return np.array(
        [(a - al * LN_N_UNIT, b - be * LN_D_UNIT, e, al, be) for a, b, e, al, be in grid], float
    )


STARTS = _starts((0, 0.5, 1, 1.5, 2), (0, 5, 10, 15, 20, 25), (-1, -0.5, 0, 0.5, 1))
# For resampled draws: the corners of the same grid and its middle.
DRAW_STARTS = _starts((0.2, 0.5, 1.0), (0, 5, 10), (-0.5, 0.5))


def residual(theta, columns):
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
class ChinchillaFit(Law):
    kind = "chinchilla"

    def loss(self, *, n, d) -> Float[np.ndarray, "..."]:
        """Nats per token for raw N and D."""
        k = self.constants
        return (
            k["E"]
            + k["A"] * np.asarray(n, float) ** -k["alpha"]
            + k["B"] * (np.asarray(d, float) ** -k["beta"])
        )

    def optimum(self, *, flops: float) -> Allocation:
        """Loss-optimal N and D at C = 6 N D."""
        accounting.require_raw("flops", flops, "flops")
        n = float(allocation(self.constants, flops))
        d = flops / (6 * n)
        return Allocation(n, d, float(self.loss(n=n, d=d)))

    def interval(self, *, flops: float, level: float = 0.95) -> Interval:
        """Interval of the optimal N over the law's draws."""
        if not self.draws:
            raise InputError(f"{self.version} carries no draws; fit with draws > 0")
        sizes = allocation(self.draws, flops)
        return Interval(*resample.percentile_interval(sizes, level), self.resampling)


def allocation(constants, flops):
    """N_opt = G (C / 6)^a with a = beta / (alpha + beta), G^(alpha + beta) = alpha A / (beta B)."""
    alpha, beta = constants["alpha"], constants["beta"]
    total = alpha + beta
    scale = (alpha * constants["A"] / (beta * constants["B"])) ** (1 / total)
    return scale * (flops / 6) ** (beta / total)


UNITS = {"N": "parameters", "D": "tokens", "L": "nats per token", "A, B": "raw units"}


def _raw(theta) -> dict[str, np.ndarray]:
    a, b, e, alpha, beta = np.asarray(theta).T
    return {
        "A": np.exp(a + alpha * LN_N_UNIT),
        "B": np.exp(b + beta * LN_D_UNIT),
        "E": np.exp(e),
        "alpha": alpha,
        "beta": beta,
    }


@dataclass(frozen=True)
class ChinchillaLaw:
    """Procedure 3, the parametric loss: Huber(1e-3) of ln L from 4,500 starts."""

    def fit(
        self, table: CurveTable, *, draws: int = 300, cluster: str = "run", seed: int = 0
    ) -> ChinchillaFit:
        laws.require_spread(table.n, "N")
        laws.require_spread(table.d, "D")
        laws.require_spread(table.loss, "loss", minimum=1)
        if len(table) < 2 * len(PARAMETERS):
            raise InputError(
                f"{len(table)} rows do not determine five parameters; give ten or more"
            )
        columns = {
            "ln_n": np.log(table.n) - LN_N_UNIT,
            "ln_d": np.log(table.d) - LN_D_UNIT,
            "ln_loss": np.log(table.loss),
        }
        found = engine.minimise(
            residual, columns, starts=STARTS, lower=LOWER, upper=UPPER,
            weights=np.ones((1, len(table))),
        )  # fmt: skip
        laws.require_determined("Chinchilla", PARAMETERS, residual, columns, found)
        constants = {name: float(v[0]) for name, v in _raw(found.parameters).items()}
        drawn, how, spans, notes = {}, "", {}, ()
        if draws:
            if cluster not in ("run", "row"):
                raise InputError(f"cluster={cluster!r} is unknown for Chinchilla; use run or row")
            ids = table.run if cluster == "run" else np.arange(len(table))
            weights = resample.bootstrap_weights(ids, draws=draws, seed=seed)
            starts = np.concatenate([found.parameters, DRAW_STARTS])
            sample = engine.minimise(
                residual, columns, starts=starts, lower=LOWER, upper=UPPER, weights=weights, keep=4
            )
            drawn, how, spans, notes = laws.draw_summary(
                _raw(sample.parameters),
                sample.converged,
                f"{draws} bootstrap draws over {cluster}s",
            )
        bound = [n for n, b in zip(PARAMETERS, found.bound[0], strict=True) if b]
        notes = (*notes, *(f"{name} is not identified: it sits on its bound" for name in bound))
        return ChinchillaFit(
            version=f"chinchilla-{table.digest[:8]}",
            source=f"data sha256 {table.digest}",
            constants=constants,
            units=UNITS,
            procedure={"approach": 3, "starts": len(STARTS)},
            fitted_range={
                "n": (float(table.n.min()), float(table.n.max())),
                "d": (float(table.d.min()), float(table.d.max())),
            },
            draws=drawn,
            resampling=how,
            intervals=spans,
            warnings=notes,
            diagnostics={"rows": len(table), "objective": float(found.objective[0])},
        )


def _preset(version, source, **constants) -> ChinchillaFit:
    return ChinchillaFit(
        version=version, source=source, constants=constants, units=UNITS,
        procedure={"approach": 3, "no_draws": "published constants"}, fitted_range={},
    )  # fmt: skip


HOFFMANN = _preset(
    "hoffmann2022", "arXiv:2203.15556", A=406.4, B=410.7, E=1.69, alpha=0.3392, beta=0.2849
)
REFIT = _preset(
    "besiroglu2024", "arXiv:2404.10102, a re-fit of the same data",
    A=482.01, B=2085.43, E=1.8172, alpha=0.3478, beta=0.3658,
)  # fmt: skip
