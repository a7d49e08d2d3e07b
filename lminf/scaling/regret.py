"""Regret of a rule's setting: loss there above the best of an exhaustive grid, in per mille.

    regret = 1000 (L(p) / L_min - 1),   p = (log2 lr, log2 batch in tokens)

L_min is the group's lowest measured loss, so a surface that dips under it gives a negative regret.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from lminf.errors import InputError
from lminf.scaling import laws, resample
from lminf.scaling.baselines import Query, Rule
from lminf.scaling.surfaces import Surface, merged
from lminf.scaling.tables import StepTable

METHODS = ("linear", "nearest", "cubic")
OTHER_DIAGONAL = "linear_other_diagonal"
CUBIC_EXCESS = 0.10  # cells further off are left out: diverged runs bend a cubic everywhere
BATCH_POINTS = 60
PLATEAUS = (0.00125, 0.0025, 0.005, 0.01)  # relative excess
# The four corners of a grid cell lie on one circle, so either of its diagonals is Delaunay and
# rounding decides between them: 2 % of the dense file's mean, 12 % of the mixtures of experts'.
# Linear: a shear of one part in a million splits every cell from (high lr, small batch) to (low lr,
# large batch), across the valley, which flatters no law; the other diagonal is reported beside it.
# Cubic: whatever Qhull makes of the cells.
SHEARS = {"linear": 1e-6, OTHER_DIAGONAL: -1e-6}


class GroupRegret(NamedTuple):
    n: float
    n_active: float
    d: float
    lr: float
    batch: float  # tokens
    regret: dict[str, float]  # per mille by method; NaN: outside the hull of the cells
    clipped: bool  # the point lay outside the measured box and was moved to its edge


def _sheared(points: np.ndarray, method: str) -> np.ndarray:
    return points @ np.array([[1.0, 0.0], [SHEARS[method], 1.0]])


class _Grid:
    """A group's cells as surfaces."""

    def __init__(self, group: StepTable):
        points = np.stack([np.log2(group.lr), np.log2(group.batch)], axis=1)
        points, loss = merged(points, group.loss)  # of repeated cells the mean
        self.best = float(group.loss.min())
        near = loss < self.best * (1 + CUBIC_EXCESS)
        try:
            self.sheared = {m: Surface(_sheared(points, m), loss) for m in SHEARS}
            self.near = Surface(points[near], loss[near])
        except InputError as error:
            raise InputError(
                f"group N={group.n[0]:g}, D={group.d[0]:g} ({len(group)} rows) is no grid "
                f"of learning rates and batches: {error}"
            ) from None
        self.low, self.high = points.min(0), points.max(0)

    def loss(self, method: str, points: np.ndarray) -> np.ndarray:
        """Loss at points (log2 lr, log2 batch); NaN outside the hull of the cells."""
        if method == "nearest":
            return self.sheared["linear"].nearest(_sheared(points, "linear"))
        if method in SHEARS:
            return self.sheared[method].linear(_sheared(points, method))
        return self.near.cubic(points, converged=True)


def regrets(
    table: StepTable, rules: list[Rule], *, use_n: str = "total"
) -> dict[str, list[GroupRegret]]:
    """Regret of every rule in every group. `use_n` for mixtures of experts: "total" or "active"."""
    laws.require_choice("use_n", use_n, ("total", "active"))
    costs: dict[str, list[GroupRegret]] = {rule.name: [] for rule in rules}
    for number in np.unique(table.group):
        group = table.select(table.group == number)
        grid = _Grid(group)
        query = Query(
            n=float((group.n if use_n == "total" else group.n_active)[0]),
            d=float(group.d[0]),
            loss=grid.best,  # a favour to the rules that need the loss
            flops_per_token=float(group.flops_per_token[0]),
        )
        for rule in rules:
            costs[rule.name].append(_group_regret(grid, rule, query, float(group.n_active[0])))
    return costs


def _group_regret(grid: _Grid, rule: Rule, query: Query, n_active: float) -> GroupRegret:
    lr, batch = rule.setting(query)
    if not np.isfinite(lr):
        raise InputError(f"law {rule.name!r} names no learning rate, so it has no point to price")
    if batch is None:
        batches = np.linspace(grid.low[1], grid.high[1], BATCH_POINTS)
    else:
        batches = np.array([np.log2(batch)])
    points = np.stack([np.full(batches.size, np.log2(lr)), batches], axis=1)
    inside = np.clip(points, grid.low, grid.high)
    regret, chosen = {}, 0
    for method in (*METHODS, OTHER_DIAGONAL):
        loss = grid.loss(method, inside)
        if np.all(np.isnan(loss)):
            regret[method] = float("nan")
            continue
        best = int(np.nanargmin(loss))
        regret[method] = float(1000 * (loss[best] / grid.best - 1))
        chosen = best if method == "linear" else chosen
    moved = not np.allclose(points[chosen], inside[chosen], rtol=0, atol=1e-12)
    return GroupRegret(query.n, n_active, query.d, lr, float(2 ** inside[chosen, 1]), regret, moved)


def _finite(groups: list[GroupRegret], method: str) -> Float[np.ndarray, " groups"]:
    """Regrets of the groups where the method gives a number."""
    values = np.array([group.regret[method] for group in groups])
    return values[np.isfinite(values)]


def mean_regret(groups: list[GroupRegret], method: str) -> tuple[float, int]:
    """(mean over the groups where the method gives a number, how many those are)."""
    values = _finite(groups, method)
    return float(values.mean()) if values.size else float("nan"), values.size


def interval(groups: list[GroupRegret], method: str) -> tuple[float, float]:
    """95 % interval of the mean regret (per mille) over resampled groups."""
    values = _finite(groups, method)
    if values.size < 2:
        return float("nan"), float("nan")
    weights = resample.bootstrap_weights(np.arange(values.size), draws=4000, seed=0)
    return resample.percentile_interval(weights @ values / values.size)


def plateau(table: StepTable) -> dict[float, float]:
    """Mean share of a group's cells within each relative excess of its best."""
    group, excess = table.group, table.excess
    ids = np.unique(group)
    return {
        level: float(np.mean([np.mean(excess[group == g] < level) for g in ids]))
        for level in PLATEAUS
    }
