"""Diagnostics beside the laws: what the curves say directly, and how much a law rests on each
family or group."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from lminf.errors import InputError
from lminf.scaling import baselines, fit, laws, losses, regret, resample
from lminf.scaling.fertility import Fertility
from lminf.scaling.steps import StepFit
from lminf.scaling.tables import StepTable, VocabTable
from lminf.scaling.vocab_derivative import DerivativeFit
from lminf.scaling.vocab_isoflop import IsoflopFit
from lminf.scaling.vocab_loss import LossFit, LossLaw

METRICS = ("L_u", "bits_per_character")
MOST_FAMILIES = 24  # that are left out in turn: each is a fit
MOST_GROUPS = 128  # likewise
BOWL_POINTS = 5  # vocabulary sizes around the lowest that a bowl is fitted to
Row = dict[str, Any]


class IsoFlopCurve(NamedTuple):
    vocab_size: Float[np.ndarray, " sizes"]
    loss: Float[np.ndarray, " sizes"]
    optimum: float = np.nan  # V at the bowl's minimum; NaN: no interior minimum
    low: float = np.nan
    high: float = np.nan
    note: str = ""


def with_metric(table: VocabTable, metric: str) -> VocabTable:
    """The table with its loss as L_u (nats per token) or in bits per character."""
    laws.require_choice("metric", metric, METRICS)
    if metric == "L_u":
        return table
    bits = losses.published_bits_per_character(table.loss, table.vocab_size)
    return dataclasses.replace(table, loss=bits)


def common_budget(table: VocabTable, family: float) -> float:
    """Most FLOPs that every run of a family reaches."""
    return min(float(run.flops[-1]) for run in table.runs_of(family))


def isoflop_curve(table: VocabTable, family: float, flops: float, metric: str) -> IsoFlopCurve:
    """Loss against V of one family at a budget, with a bowl in ln V around its lowest point.

    Losses are linear in ln F between checkpoints. The interval is a jackknife over the bowl's
    sizes, each a run of its own: there is one run for each size, so no other replicate exists.
    """
    sizes, at_budget = [], []
    for run in with_metric(table, metric).runs_of(family):
        if run.flops[0] <= flops <= run.flops[-1] * (1 + 1e-9):
            sizes.append(run.vocab_size[0])
            at_budget.append(np.interp(np.log(flops), np.log(run.flops), run.loss))
    x, y = np.log(np.array(sizes)), np.array(at_budget)
    curve = IsoFlopCurve(np.exp(x), y)
    if len(x) < 4:
        return curve._replace(note=f"only {len(x)} sizes reach this budget")
    lowest = int(y.argmin())
    begin = min(max(lowest - BOWL_POINTS // 2, 0), max(len(x) - BOWL_POINTS, 0))
    x_near, y_near = (part[begin : begin + BOWL_POINTS] for part in (x, y))
    optimum = _vertex(x_near, y_near)
    if not np.isfinite(optimum):
        return curve._replace(note="no interior minimum: not a bowl")
    curve = curve._replace(optimum=float(np.exp(optimum)))
    left_out = [_vertex(np.delete(x_near, i), np.delete(y_near, i)) for i in range(len(x_near))]
    if not np.all(np.isfinite(left_out)):
        return curve._replace(note="no interval: one run decides the bowl")
    interval = np.clip(resample.jackknife_interval(optimum, np.array(left_out)), 0.0, np.log(1e7))
    low, high = map(float, np.exp(interval))
    note = "" if x[0] < optimum < x[-1] else "the bowl's minimum lies outside the sizes measured"
    return curve._replace(low=low, high=high, note=note)


def _vertex(x: Float[np.ndarray, " sizes"], y: Float[np.ndarray, " sizes"]) -> float:
    square, slope, _ = np.polyfit(x - x.mean(), y, 2)
    return float(x.mean() - slope / (2 * square)) if square > 0 else float("nan")


def leave_one_family_out(
    procedure: IsoflopFit | DerivativeFit | LossFit, table: VocabTable, *, fertility: Fertility
) -> Iterator[Row]:
    """Constants without each family, V at N_nv = 7e9, and approach 3's loss error on that family.

    Of more than MOST_FAMILIES the first ones are left out, one at a time.
    """
    for family in np.unique(table.n_nv)[:MOST_FAMILIES]:
        unseen = table.n_nv == family
        row: Row = {"left_out_n_nv": float(family)}
        try:
            law = fit(procedure, table.select(~unseen), fertility=fertility, draws=0)
            row |= law.constants
            if isinstance(law, LossLaw):
                left_out = table.select(unseen)
                error = law.loss(left_out) - left_out.loss
                row["rmse_left_out"] = float(np.sqrt(np.mean(error**2)))  # nats per token
            row["vocab"] = law.optimum(n_nv=7e9).vocab_size
        except InputError as error:
            row["note"] = str(error)
        yield row


def leave_one_group_out(procedure: StepFit, table: StepTable) -> Iterator[Row]:
    """Constants without each group, and the regret there of the law that never saw it.

    Of more than MOST_GROUPS the first ones are left out, one at a time.
    """
    procedure = dataclasses.replace(procedure, estimator="ols")
    for group in np.unique(table.group)[:MOST_GROUPS]:
        unseen = table.select(table.group == group)
        row: Row = {"n": float(unseen.n[0]), "d": float(unseen.d[0])}
        try:
            law = fit(procedure, table.select(table.group != group), draws=0)
            row |= law.constants
            refit = regret.regrets(unseen, [baselines.from_law(law, "refit")])["refit"][0]
            row["gap_per_mille"] = refit.regret["linear"]
        except InputError as error:
            row["note"] = str(error)
        yield row
