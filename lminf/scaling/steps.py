"""The step law: optimal peak learning rate and batch as powers of N and D.

    lr = k N^a D^b       batch = k' D^c  (tokens)       N non-embedding parameters, D tokens, raw

Fitted to all runs whose loss is within `threshold` of their group's best.
Source: Li et al. 2025, arXiv:2503.04715.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from lminf import ranges
from lminf.errors import InputError
from lminf.ranges import Range
from lminf.scaling import accounting, laws, resample
from lminf.scaling.laws import Interval, Law
from lminf.scaling.resample import Resampling
from lminf.scaling.tables import StepTable, require_spread

CONSTANTS = ("lr_ln_k", "lr_n", "lr_d", "batch_ln_k", "batch_d", "batch_n")
BOWL_EXCESS = 0.02  # cells of a group that its quadratic is fitted to
BOWL_SCALE = 0.005


class Setting(NamedTuple):
    lr: float  # peak learning rate, dimensionless
    batch: float | None  # tokens; None: the law names no batch


@dataclass(frozen=True, kw_only=True)
class StepLaw(Law):
    """Peak learning rate and batch of a model's size and tokens."""

    kind = "step"

    def setting(self, *, n: float, d: float) -> Setting:
        """Learning rate and batch in tokens for N and D in raw units."""
        accounting.require_raw("n", n, "n")
        accounting.require_raw("d", d, "d")
        return Setting(*(float(np.exp(v)) for v in _log_setting(self.constants, n, d)))

    def interval(self, *, n: float, d: float) -> dict[str, Interval]:
        """95 % intervals of lr and batch (tokens) over the law's draws; `method` says so where they
        are outside the fitted range and hold the law's form to be exact."""
        beyond = "; extrapolated: of the constants alone" if self.outside({"n": n, "d": d}) else ""
        settings = _log_setting(self.constant_draws(), n, d)
        return {
            name: self.percentiles(np.exp(values))._replace(method=self.resampling + beyond)
            for name, values in zip(("lr", "batch"), settings, strict=True)
        }

    def excess(self, *, lr_factor: float, batch_factor: float) -> float:
        """Relative loss above the optimum when lr and batch are off by these factors, by the
        median bowl of the fitted groups."""
        bowl = self.diagnostics.get("bowl")
        if not bowl:
            raise InputError(f"{self.version} carries no bowl, so it cannot price a mistake")
        off = np.log2([lr_factor, batch_factor])
        matrix = np.array([[bowl["lr"], bowl["cross"]], [bowl["cross"], bowl["batch"]]])
        return float(0.5 * off @ matrix @ off)


def _log_setting(constants: Mapping[str, Any], n: float, d: float) -> tuple[Any, Any]:
    ln_n, ln_d = np.log(n), np.log(d)
    lr = constants["lr_ln_k"] + constants["lr_n"] * ln_n + constants["lr_d"] * ln_d
    batch = constants["batch_ln_k"] + constants["batch_d"] * ln_d
    return lr, batch + constants["batch_n"] * ln_n


class Bowl(NamedTuple):
    """Quadratic of the relative excess around a group's minimum."""

    log2_lr: float
    log2_batch: float
    curvature: Float[np.ndarray, "2 2"]  # per factor of two, relative loss


def fit_bowl(table: StepTable, group: int) -> Bowl | None:
    """Minimum of a quadratic through the near-optimal cells; None unless positive definite."""
    near = np.flatnonzero((table.group == group) & (table.excess < BOWL_EXCESS))
    if near.size < 7:
        return None
    x, y, excess = np.log2(table.lr[near]), np.log2(table.batch[near]), table.excess[near]
    cx, cy = x[excess.argmin()], y[excess.argmin()]
    u, v = x - cx, y - cy
    design = np.stack([np.ones_like(u), u, v, u * u / 2, v * v / 2, u * v], axis=1)
    weight = np.sqrt(1 / (1 + (excess / BOWL_SCALE) ** 2))
    (_, gu, gv, huu, hvv, huv), _, rank, _ = np.linalg.lstsq(
        design * weight[:, None], excess * weight, rcond=None
    )
    curvature = np.array([[huu, huv], [huv, hvv]])
    if rank < 6 or np.linalg.eigvalsh(curvature)[0] <= 0:
        return None
    step = -np.linalg.solve(curvature, [gu, gv])
    return Bowl(float(cx + step[0]), float(cy + step[1]), curvature)


def fit_bowls(table: StepTable) -> dict[int, Bowl]:
    """The bowl of every group that has one."""
    bowls = {int(group): fit_bowl(table, int(group)) for group in np.unique(table.group)}
    return {group: bowl for group, bowl in bowls.items() if bowl is not None}


@dataclass(frozen=True)
class StepFit:
    """Procedure: threshold and what is regressed.

    estimator  "ols": the kept rows once; "reference": the average over row-bootstrap draws, as
               released.
    target     "kept": all near-optimal rows; "bowl": one quadratic minimum per group.
    batch_n    "zero": batch depends on D alone, as published; "free": ln N enters too.
    fix_n      exponent of N in lr to impose when the table cannot identify it; None: fit it.
    """

    # relative excess over the group's best of the runs that are kept
    threshold: Annotated[float, Range(above=0, below=0.5)] = 0.0025
    estimator: str = "ols"
    target: str = "kept"
    batch_n: str = "zero"
    fix_n: Annotated[float, Range(min=-10, max=10)] | None = None

    def __post_init__(self):
        ranges.check(self)
        laws.require_choice("estimator", self.estimator, ("ols", "reference"))
        laws.require_choice("target", self.target, ("kept", "bowl"))
        laws.require_choice("batch_n", self.batch_n, ("zero", "free"))

    def kept(self, table: StepTable) -> dict[str, np.ndarray]:
        """Rows that are regressed: ln of N, D, lr, batch (tokens) and their group."""
        if self.target == "kept":
            rows = np.flatnonzero(table.excess < self.threshold)
            lr, batch = np.log(table.lr[rows]), np.log(table.batch[rows])
        else:
            bowls = fit_bowls(table)
            if not bowls:
                raise InputError(
                    "no group has a positive definite bowl of seven cells; use target='kept'"
                )
            rows = np.array([np.flatnonzero(table.group == group)[0] for group in bowls])
            lr = np.log(2) * np.array([bowl.log2_lr for bowl in bowls.values()])
            batch = np.log(2) * np.array([bowl.log2_batch for bowl in bowls.values()])
        return {
            "ln_n": np.log(table.n[rows]), "ln_d": np.log(table.d[rows]), "ln_lr": lr,
            "ln_batch": batch, "group": table.group[rows],
        }  # fmt: skip

    def fit(self, table: StepTable, resampling: Resampling) -> StepLaw:
        """The law of the table; InputError where the table does not determine it."""
        rows = self.kept(table)
        require_spread(table.d, "D")
        if self.fix_n is None:
            require_spread(table.n, "N", instead=", or hold its exponent with --fix-n")
        count = len(rows["ln_n"])
        point, sound = self._regress(rows, np.ones((1, count)))
        if not sound[0]:
            raise InputError(
                f"N and D move together in the {count} kept rows, so their exponents cannot be "
                "told apart; add groups or impose --fix-n"
            )
        if np.bincount(table.group).max() > 1 and table.excess.max() <= 1e-9:
            raise InputError(
                "all runs of each group have one loss, so none is better than another; give the "
                "measured losses"
            )
        draws, cluster = resampling.draws, resampling.cluster_of(table)
        if self.estimator == "reference" and not draws:
            raise InputError("estimator='reference' averages bootstrap draws; give draws > 0")
        constants = {name: values[0] for name, values in point.items()}
        chosen, extra = laws.Resampled(), {}
        for name in ("group", "row") if draws else ():
            clusters = rows["group"] if name == "group" else np.arange(count)
            weights = resample.bootstrap_weights(clusters, draws=draws, seed=resampling.seed)
            sample = laws.resampled(
                *self._regress(rows, weights), f"{draws} bootstrap draws over {name}s"
            )
            means = {key: float(np.mean(values)) for key, values in sample.draws.items()}
            extra |= {f"{name}_intervals": sample.intervals, f"{name}_mean": means}
            if name == cluster:
                chosen = sample
            if (name, self.estimator) == ("row", "reference"):
                constants |= means
        bowls = fit_bowls(table)
        if bowls:
            middle = np.median([bowl.curvature for bowl in bowls.values()], axis=0)
            extra["bowl"] = {
                "lr": middle[0, 0], "batch": middle[1, 1], "cross": middle[0, 1],
                "groups": len(bowls), "unit": "relative loss per factor of two, squared",
            }  # fmt: skip
        return laws.fitted(
            StepLaw, f"step-{self.estimator}", table.digest,
            constants=constants,
            units={"N": "non-embedding parameters", "D": "tokens", "batch": "tokens", "lr": "peak"},
            procedure=vars(self),
            columns={"n": table.n, "d": table.d},
            draws=chosen,
            diagnostics={
                "rows": len(table),
                "kept": count,
                "groups": int(np.unique(table.group).size),
                **extra,
            },
        )  # fmt: skip

    def _regress(self, rows: Mapping[str, np.ndarray], weights: np.ndarray) -> tuple[Any, Any]:
        """Constants of both regressions under each draw's weights, and which are sound."""
        ln_n, ln_d = rows["ln_n"], rows["ln_d"]
        constants, sound = {}, np.ones(len(weights), bool)
        imposed = {"lr": self.fix_n, "batch": 0.0 if self.batch_n == "zero" else None}
        for target, exponent in imposed.items():  # of N; None: fitted
            columns = [np.ones_like(ln_n), ln_d]
            if exponent is None:
                columns.append(ln_n)
            values = rows[f"ln_{target}"] - (exponent or 0.0) * ln_n
            (k, of_d, *of_n), ranked = _weighted_ols(columns, values, weights)
            constants[f"{target}_ln_k"], constants[f"{target}_d"] = k, of_d
            constants[f"{target}_n"] = of_n[0] if of_n else np.full(len(weights), exponent)
            sound &= ranked
        return {name: constants[name] for name in CONSTANTS}, sound


def _weighted_ols(columns, target, weights) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients [terms, draws] of the columns, the first of them ones, and whether each draw's
    design has full rank."""
    design = np.stack(columns, axis=1)
    centre = design.mean(0)
    centre[0] = 0.0
    scale = np.where(np.ptp(design, axis=0) > 0, np.ptp(design, axis=0), 1.0)
    scaled = (design - centre) / scale  # conditioning: ln D is 20 to 26
    matrix = np.einsum("bi,ij,ik->bjk", weights, scaled, scaled, optimize=True)
    right = np.einsum("bi,ij,i->bj", weights, scaled, target, optimize=True)
    sound = np.linalg.cond(matrix) < 1e8
    matrix[~sound] = np.eye(design.shape[1])
    coefficients = np.linalg.solve(matrix, right[..., None])[..., 0] / scale
    coefficients[:, 0] -= coefficients[:, 1:] @ centre[1:]
    return coefficients.T, sound
