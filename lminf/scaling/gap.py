"""What a rule's point costs: loss there above the best of an exhaustive grid, in per mille.

    gap = 1000 (L(p) / L_min - 1),   p = (log2 lr, log2 batch in tokens)

L_min is the group's lowest measured loss, so a surface that dips under it gives a negative gap.
"""

from typing import NamedTuple

import numpy as np

from lminf.errors import InputError
from lminf.scaling.rivals import Query, Rule
from lminf.scaling.surfaces import Surface, merged
from lminf.scaling.tables import StepTable

METHODS = ("linear", "nearest", "cubic")
OTHER_DIAGONAL = "linear_other_diagonal"
CUBIC_EXCESS = 0.10  # cells further off are left out: diverged runs bend a cubic everywhere
BATCH_POINTS = 60
# The four corners of a grid cell lie on one circle, so either of its diagonals is Delaunay and
# rounding decides between them: 2 % of the dense file's mean gap, 12 % of the mixtures of experts'.
# Linear: a shear of one part in a million splits every cell from (high lr, small batch) to (low lr,
# large batch), across the valley, which flatters no law; the other diagonal is reported beside it.
# Cubic: whatever Qhull makes of the cells.
ACROSS = np.array([[1.0, 0.0], [1e-6, 1.0]])
ALONG = np.array([[1.0, 0.0], [-1e-6, 1.0]])


class GroupGap(NamedTuple):
    n: float
    n_active: float
    d: float
    lr: float
    batch: float  # tokens
    gap: dict[str, float]  # per mille by method; NaN: outside the hull of the cells
    clipped: bool  # the point lay outside the measured box and was moved to its edge


class _Grid:
    """A group's cells as surfaces."""

    def __init__(self, table: StepTable, rows: np.ndarray):
        points = np.stack([np.log2(table.lr[rows]), np.log2(table.batch[rows])], axis=1)
        points, loss = merged(points, table.loss[rows])  # of repeated cells the mean
        self.best = float(table.loss[rows].min())
        near = loss < self.best * (1 + CUBIC_EXCESS)
        try:
            self.across = Surface(points @ ACROSS, loss)
            self.along = Surface(points @ ALONG, loss)
            self.near = Surface(points[near], loss[near])
        except InputError as error:
            first = rows[0]
            raise InputError(
                f"group N={table.n[first]:g}, D={table.d[first]:g} ({rows.size} rows) is no grid "
                f"of learning rates and batches: {error}"
            ) from None
        self.low, self.high = points.min(0), points.max(0)

    def at(self, method: str, points) -> np.ndarray:
        if method == "nearest":
            return self.across.nearest(points @ ACROSS)
        if method == "linear":
            return self.across.linear(points @ ACROSS)
        if method == OTHER_DIAGONAL:
            return self.along.linear(points @ ALONG)
        return self.near.cubic(points, converged=True)


def gaps(table: StepTable, rules: list[Rule], *, use_n: str = "total") -> dict[str, list[GroupGap]]:
    """Gap of every rule in every group. `use_n` for mixtures of experts: "total" or "active"."""
    if use_n not in ("total", "active"):
        raise InputError(f"n={use_n!r} is unknown; use total or active parameters")
    found: dict[str, list[GroupGap]] = {rule.name: [] for rule in rules}
    for group in np.unique(table.group):
        rows = np.flatnonzero(table.group == group)
        grid = _Grid(table, rows)
        first = rows[0]
        query = Query(
            n=float((table.n if use_n == "total" else table.n_active)[first]),
            d=float(table.d[first]),
            loss=grid.best,  # a favour to the rules that need the loss
            flops_per_token=float(table.flops_per_token[first]),
        )
        for rule in rules:
            found[rule.name].append(_group_gap(grid, rule, query, float(table.n_active[first])))
    return found


def _group_gap(grid: _Grid, rule: Rule, query: Query, n_active: float) -> GroupGap:
    lr, batch = rule.setting(query)
    if not np.isfinite(lr):
        raise InputError(f"law {rule.name!r} names no learning rate, so it has no point to price")
    if batch is None:
        batches = np.linspace(grid.low[1], grid.high[1], BATCH_POINTS)
    else:
        batches = np.array([np.log2(batch)])
    points = np.stack([np.full(batches.size, np.log2(lr)), batches], axis=1)
    inside = np.clip(points, grid.low, grid.high)
    gap, chosen = {}, 0
    for method in (*METHODS, OTHER_DIAGONAL):
        loss = grid.at(method, inside)
        if np.all(np.isnan(loss)):
            gap[method] = float("nan")
            continue
        best = int(np.nanargmin(loss))
        gap[method] = float(1000 * (loss[best] / grid.best - 1))
        chosen = best if method == "linear" else chosen
    moved = not np.allclose(points[chosen], inside[chosen], rtol=0, atol=1e-12)
    return GroupGap(query.n, n_active, query.d, lr, float(2 ** inside[chosen, 1]), gap, moved)


def mean_gap(groups: list[GroupGap], method: str) -> tuple[float, int]:
    """(mean over the groups where the method gives a number, how many those are)."""
    values = np.array([group.gap[method] for group in groups])
    good = np.isfinite(values)
    return (float(values[good].mean()) if good.any() else float("nan")), int(good.sum())


def plateau(table: StepTable, levels=(0.00125, 0.0025, 0.005, 0.01)) -> dict[float, float]:
    """Mean share of a group's cells within each relative excess of its best."""
    group, excess = table.group, table.excess
    ids = np.unique(group)
    return {
        level: float(np.mean([np.mean(excess[group == g] < level) for g in ids]))
        for level in levels
    }
