"""The step law: optimal peak learning rate and batch as powers of N and D.

    lr = k N^a D^b       batch = k' D^c  (tokens)       N non-embedding parameters, D tokens, raw

Fitted to all runs whose loss is within `threshold` of their group's best.
Source: Li et al. 2025, arXiv:2503.04715.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from lminf import ranges
from lminf.errors import InputError
from lminf.ranges import Range
from lminf.scaling import accounting, laws, resample
from lminf.scaling.laws import Interval, Law
from lminf.scaling.tables import StepTable

LR_NAMES = ("lr_ln_k", "lr_n", "lr_d")
BATCH_NAMES = ("batch_ln_k", "batch_d")
BOWL_EXCESS = 0.02  # cells of a group that its quadratic is fitted to
BOWL_SCALE = 0.005


class Setting(NamedTuple):
    lr: float  # peak learning rate, dimensionless
    batch: float | None  # tokens; None: the law names no batch


@dataclass(frozen=True, kw_only=True)
class StepPowerLaw(Law):
    kind = "step"

    def setting(self, *, n: float, d: float) -> Setting:
        """Learning rate and batch in tokens for N and D in raw units."""
        accounting.require_raw("n", n, "n")
        accounting.require_raw("d", d, "d")
        lr, batch = self._at(self.constants, np.log(n), np.log(d))
        return Setting(float(np.exp(lr)), float(np.exp(batch)))

    @staticmethod
    def _at(constants: Mapping[str, Any], ln_n, ln_d):
        lr = constants["lr_ln_k"] + constants["lr_n"] * ln_n + constants["lr_d"] * ln_d
        batch = constants["batch_ln_k"] + constants["batch_d"] * ln_d
        return lr, batch + constants["batch_n"] * ln_n

    def interval(self, *, n: float, d: float, level: float = 0.95) -> dict[str, Interval]:
        """Intervals of lr and batch (tokens) over the law's draws."""
        if not self.draws:
            reason = self.procedure.get("no_draws", "fit with draws > 0")
            raise InputError(f"{self.version} carries no draws, so no interval: {reason}")
        constants = {name: self.draws.get(name, v) for name, v in self.constants.items()}
        return {
            name: Interval(*resample.percentile_interval(np.exp(values), level), self.resampling)
            for name, values in zip(
                ("lr", "batch"), self._at(constants, np.log(n), np.log(d)), strict=True
            )
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


class Bowl(NamedTuple):
    """Quadratic of the relative excess around a group's minimum."""

    log2_lr: float
    log2_batch: float
    curvature: Float[np.ndarray, "2 2"]  # per factor of two, relative loss


def fit_bowl(table: StepTable, group: int) -> Bowl | None:
    """Minimum of a quadratic through the near-optimal cells; None unless positive definite."""
    rows = table.group == group
    excess = table.excess[rows]
    x, y = np.log2(table.lr[rows]), np.log2(table.batch[rows])
    near = excess < BOWL_EXCESS
    if near.sum() < 7:
        return None
    x, y, excess = x[near], y[near], excess[near]
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


@dataclass(frozen=True)
class StepLaw:
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
        for name, value, valid in (
            ("estimator", self.estimator, ("ols", "reference")),
            ("target", self.target, ("kept", "bowl")),
            ("batch_n", self.batch_n, ("zero", "free")),
        ):
            if value not in valid:
                raise InputError(f"step law: {name}={value!r} is unknown; use one of {valid}")

    def kept(self, table: StepTable) -> dict[str, np.ndarray]:
        """Rows that are regressed: ln of N, D, lr, batch (tokens) and their group."""
        if self.target == "bowl":
            found = [(g, fit_bowl(table, g)) for g in np.unique(table.group)]
            good = [(g, bowl) for g, bowl in found if bowl is not None]
            if not good:
                raise InputError(
                    "no group has a positive definite bowl of seven cells; use target='kept'"
                )
            first = [int(np.flatnonzero(table.group == g)[0]) for g, _ in good]
            return {
                "ln_n": np.log(table.n[first]),
                "ln_d": np.log(table.d[first]),
                "ln_lr": np.log(2) * np.array([bowl.log2_lr for _, bowl in good]),
                "ln_batch": np.log(2) * np.array([bowl.log2_batch for _, bowl in good]),
                "group": np.array([g for g, _ in good]),
            }
        near = table.excess < self.threshold
        return {
            "ln_n": np.log(table.n[near]),
            "ln_d": np.log(table.d[near]),
            "ln_lr": np.log(table.lr[near]),
            "ln_batch": np.log(table.batch[near]),
            "group": table.group[near],
        }

    def fit(
        self, table: StepTable, *, draws: int = 1000, cluster: str = "group", seed: int = 0
    ) -> StepPowerLaw:
        rows = self.kept(table)
        laws.require_spread(table.d, "D")
        if self.fix_n is None:
            laws.require_spread(table.n, "N", instead=", or hold its exponent with --fix-n")
        count = len(rows["ln_n"])
        point, sound = self._regress(rows, np.ones((1, count)))
        if not sound[0]:
            raise InputError(
                f"N and D move together in the {count} kept rows, so their exponents cannot be "
                "told apart; add groups or impose --fix-n"
            )
        runs = np.bincount(table.group)
        if runs.max() > 1 and table.excess.max() <= 1e-9:
            raise InputError(
                "all runs of each group have one loss, so none is better than another; give the "
                "measured losses"
            )
        if cluster not in ("group", "row"):
            raise InputError(f"cluster={cluster!r} is unknown for a step law; use group or row")
        drawn, how, spans, notes, extra = {}, "", {}, (), {}
        if draws:
            names = {"group": rows["group"], "row": np.arange(count)}
            samples = {
                name: self._regress(rows, resample.bootstrap_weights(ids, draws=draws, seed=seed))
                for name, ids in names.items()
            }
            for name, (values, good) in samples.items():
                how_name = f"{draws} bootstrap draws over {name}s"
                kept_draws, text, intervals, warnings = laws.draw_summary(values, good, how_name)
                extra[f"{name}_intervals"] = intervals
                extra[f"{name}_mean"] = {k: float(np.mean(v)) for k, v in kept_draws.items()}
                if name == cluster:
                    drawn, how, spans, notes = kept_draws, text, intervals, warnings
        constants = {name: float(values[0]) for name, values in point.items()}
        if self.estimator == "reference":
            if not draws:
                raise InputError("estimator='reference' averages bootstrap draws; give draws > 0")
            constants = constants | extra["row_mean"]
        bowls = [b for g in np.unique(table.group) if (b := fit_bowl(table, g)) is not None]
        if bowls:
            middle = np.median([bowl.curvature for bowl in bowls], axis=0)
            extra["bowl"] = {
                "lr": middle[0, 0], "batch": middle[1, 1], "cross": middle[0, 1],
                "groups": len(bowls), "unit": "relative loss per factor of two, squared",
            }  # fmt: skip
        return StepPowerLaw(
            version=f"step-{self.estimator}-{table.digest[:8]}",
            source=f"data sha256 {table.digest}",
            constants=constants,
            units={"N": "non-embedding parameters", "D": "tokens", "batch": "tokens", "lr": "peak"},
            procedure={
                "threshold": self.threshold,
                "estimator": self.estimator,
                "target": self.target,
                "batch_n": self.batch_n,
                "fix_n": self.fix_n,
            },
            fitted_range={
                "n": (float(table.n.min()), float(table.n.max())),
                "d": (float(table.d.min()), float(table.d.max())),
            },
            draws=drawn,
            resampling=how,
            intervals=spans,
            warnings=notes,
            diagnostics={
                "rows": len(table),
                "kept": count,
                "groups": int(np.unique(table.group).size),
                **extra,
            },
        )

    def without_each_group(self, table: StepTable) -> Iterator[tuple[int, StepPowerLaw | None]]:
        """(group, the law of the other groups' rows, None where they do not determine it)."""
        rows = self.kept(table)
        for group in np.unique(table.group):
            values, sound = self._regress(rows, (rows["group"] != group).astype(float)[None])
            law = StepPowerLaw(
                version="refit", source="", units={}, procedure={}, fitted_range={},
                constants={name: float(value[0]) for name, value in values.items()},
            )  # fmt: skip
            yield int(group), law if sound[0] else None

    def _regress(self, rows, weights):
        """Constants [draws] of both regressions under each draw's weights, and which are sound."""
        one = np.ones_like(rows["ln_n"])
        if self.fix_n is None:
            lr, lr_sound = _weighted_ols(
                np.stack([one, rows["ln_n"], rows["ln_d"]], axis=1), rows["ln_lr"], weights
            )
            k, n, d = lr.T
        else:
            lr, lr_sound = _weighted_ols(
                np.stack([one, rows["ln_d"]], axis=1),
                rows["ln_lr"] - self.fix_n * rows["ln_n"],
                weights,
            )
            k, d = lr.T
            n = np.full(len(weights), self.fix_n)
        design = [one, rows["ln_d"]] + ([rows["ln_n"]] if self.batch_n == "free" else [])
        batch, batch_sound = _weighted_ols(np.stack(design, axis=1), rows["ln_batch"], weights)
        free = batch[:, 2] if self.batch_n == "free" else np.zeros(len(weights))
        values = dict(zip(LR_NAMES, (k, n, d), strict=True))
        values |= dict(zip(BATCH_NAMES, batch.T[:2], strict=True))
        return values | {"batch_n": free}, lr_sound & batch_sound


def _weighted_ols(design, target, weights):
    """Coefficients [draws, terms] and whether each draw's design has full rank."""
    centre = design.mean(0)
    centre[0] = 0.0
    scale = np.where(np.ptp(design, axis=0) > 0, np.ptp(design, axis=0), 1.0)
    scaled = (design - centre) / scale  # conditioning: ln D is 20 to 26
    matrix = np.einsum("bi,ij,ik->bjk", weights, scaled, scaled, optimize=True)
    right = np.einsum("bi,ij,i->bj", weights, scaled, target, optimize=True)
    sound = np.linalg.cond(matrix) < 1e8
    matrix[~sound] = np.eye(design.shape[1])
    found = np.linalg.solve(matrix, right[..., None])[..., 0] / scale
    found[:, 0] -= found[:, 1:] @ centre[1:]
    return found, sound
