"""Evidence beside the laws: what the curves say directly, what a choice changes, what it costs."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from lminf.errors import InputError
from lminf.scaling import accounting, losses, resample
from lminf.scaling.fertility import POWERLAW, Fertility
from lminf.scaling.tables import VocabTable
from lminf.scaling.vocab import VocabLaw
from lminf.scaling.vocab_derivative import PUBLISHED_SIZES, VocabLaw2
from lminf.scaling.vocab_isoflop import VocabLaw1
from lminf.scaling.vocab_loss import LossLaw, VocabLaw3

METRICS = ("L_u", "bits_per_character")
BOWL_POINTS = 5  # vocabulary sizes around the lowest that a bowl is fitted to
Row = dict[str, Any]


class IsoFlopCurve(NamedTuple):
    vocab_size: Float[np.ndarray, " sizes"]
    loss: Float[np.ndarray, " sizes"]
    optimum: float  # V at the bowl's minimum; NaN: no interior minimum
    low: float
    high: float
    note: str


def metric_values(table: VocabTable, metric: str) -> Float[np.ndarray, " rows"]:
    if metric == "L_u":
        return table.loss
    if metric == "bits_per_character":
        return losses.published_bits_per_character(table.loss, table.vocab_size)
    raise InputError(f"metric {metric!r} is unknown; use one of {METRICS}")


def with_metric(table: VocabTable, metric: str) -> VocabTable:
    """The table with another loss column."""
    return dataclasses.replace(table, loss=metric_values(table, metric))


def common_budget(table: VocabTable, family: float) -> float:
    """Most FLOPs that every run of a family reaches."""
    rows = table.n_nv == family
    return min(
        float(table.flops[rows & (table.vocab_size == v)].max())
        for v in np.unique(table.vocab_size[rows])
    )


def isoflop_curve(table: VocabTable, family: float, flops: float, metric: str) -> IsoFlopCurve:
    """Loss against V of one family at a budget, with a bowl in ln V around its lowest point.

    Losses are linear in ln F between checkpoints. The interval is a jackknife over the bowl's
    sizes, each a run of its own: there is one run for each size, so no other replicate exists.
    """
    values = metric_values(table, metric)
    sizes, found = [], []
    for size in np.unique(table.vocab_size[table.n_nv == family]):
        rows = np.flatnonzero((table.n_nv == family) & (table.vocab_size == size))
        rows = rows[np.argsort(table.flops[rows])]
        if not table.flops[rows[0]] <= flops <= table.flops[rows[-1]] * (1 + 1e-9):
            continue
        sizes.append(size)
        found.append(np.interp(np.log(flops), np.log(table.flops[rows]), values[rows]))
    x, y = np.log(np.array(sizes)), np.array(found)
    nan = float("nan")
    if len(x) < 4:
        return IsoFlopCurve(np.exp(x), y, nan, nan, nan, f"only {len(x)} sizes reach this budget")
    lowest = int(y.argmin())
    begin = min(max(lowest - BOWL_POINTS // 2, 0), max(len(x) - BOWL_POINTS, 0))
    near = slice(begin, begin + BOWL_POINTS)
    optimum = _vertex(x[near], y[near])
    if not np.isfinite(optimum):
        return IsoFlopCurve(np.exp(x), y, nan, nan, nan, "no interior minimum: not a bowl")
    left_out = [_vertex(np.delete(x[near], i), np.delete(y[near], i)) for i in range(len(x[near]))]
    note = "" if x[0] < optimum < x[-1] else "the bowl's minimum lies outside the sizes measured"
    if not np.all(np.isfinite(left_out)):
        return IsoFlopCurve(
            np.exp(x), y, float(np.exp(optimum)), nan, nan, "no interval: one run decides the bowl"
        )
    low, high = resample.jackknife_interval(optimum, np.array(left_out), 0.95)
    clip = np.log(1e7)
    low, high = (float(np.exp(min(max(bound, 0.0), clip))) for bound in (low, high))
    return IsoFlopCurve(np.exp(x), y, float(np.exp(optimum)), low, high, note)


def _vertex(x, y) -> float:
    square, slope, _ = np.polyfit(x - x.mean(), y, 2)
    return float(x.mean() - slope / (2 * square)) if square > 0 else float("nan")


def calibration(table: VocabTable, predictors: Sequence[VocabLaw]) -> list[Row]:
    """Per family, budget and metric: the optimum read off the curves beside every law's."""
    rows = []
    for family in np.unique(table.n_nv):
        width = float(table.width[table.n_nv == family][0])
        for share in (1.0, 0.5):
            flops = common_budget(table, family) * share
            for metric in METRICS:
                curve = isoflop_curve(table, family, flops, metric)
                row = {
                    "n_nv": float(family), "flops": flops, "metric": metric,
                    "measured_vocab": _finite(curve.optimum),
                    "low": _finite(curve.low), "high": _finite(curve.high), "note": curve.note,
                }  # fmt: skip
                for law in predictors:
                    row[law.version] = _predicted(law, family, width, flops)
                rows.append(row)
    return rows


def _predicted(law: VocabLaw, n_nv, width, flops) -> float | None:
    try:
        return law.optimum(n_nv=float(n_nv), d=width, flops=flops).vocab_size
    except InputError:  # this law has no optimum there; the table says so by a gap
        return None


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def metric_exponents(table: VocabTable, share: float = 1.0) -> list[Row]:
    """N_v ~ F^e through the IsoFLOP optima of the families, per metric."""
    rows = []
    for metric in METRICS:
        flops, n_v = [], []
        for family in np.unique(table.n_nv):
            budget = common_budget(table, family) * share
            curve = isoflop_curve(table, family, budget, metric)
            if np.isfinite(curve.optimum):
                flops.append(budget)
                n_v.append(curve.optimum * table.width[table.n_nv == family][0])
        exponent = float("nan")
        if len(flops) > 1:
            exponent = float(np.polyfit(np.log(flops), np.log(n_v), 1)[0])
        rows.append({"metric": metric, "families": len(flops), "exponent": exponent})
    return rows


def sensitivity(tables: dict[str, VocabTable], fertility: Fertility, *, n_nv: float) -> list[Row]:
    """V at n_nv (compute-optimal) under each choice that a fit makes; no draws.

    `tables`: the sweep by source of N_nv, "as_published" first.
    """
    table = next(iter(tables.values()))
    cases = [
        ("approach 1", VocabLaw1(), table, fertility),
        ("approach 1, least squares", VocabLaw1("ols"), table, fertility),
        ("approach 1, reference selector", VocabLaw1("reference"), table, fertility),
        ("approach 1, no interpolation", VocabLaw1(densify="none"), table, fertility),
        ("approach 1, converged interpolation", VocabLaw1(densify="converged"), table, fertility),
        ("approach 1, exponents free", VocabLaw1(exponents="free"), table, fertility),
        ("approach 2", VocabLaw2(), table, fertility),
        ("approach 2, anchor 2.5e17", VocabLaw2(anchor_flops=2.55e17), table, fertility),
        ("approach 2, anchor 3.0e17", VocabLaw2(anchor_flops=3.0e17), table, fertility),
        ("approach 2, sizes to 1.13B", VocabLaw2(sizes=PUBLISHED_SIZES[:-1]), table, fertility),
        ("approach 2, power-law fertility", VocabLaw2(), table, POWERLAW),
    ]
    for name, other in list(tables.items())[1:]:
        cases.append((f"approach 1, N_nv {name}", VocabLaw1(), other, fertility))
        cases.append((f"approach 3 tokens, N_nv {name}", VocabLaw3("tokens"), other, fertility))
    for mode in ("reference", "consistent-reference", "tokens"):
        for limit in (2.18e17, 0.0, 1e18, 3e18):
            case = VocabLaw3(mode, flops_limit=limit)
            cases.append((f"approach 3 {mode}, F >= {limit:g}", case, table, fertility))
        wide = VocabLaw3(mode, bounds="wide")
        cases.append((f"approach 3 {mode}, no bounds", wide, table, fertility))
    rows = [_case(name, procedure, data, f, n_nv) for name, procedure, data, f in cases]
    rows.append(_bits_case(table, fertility, n_nv))
    return rows


def _case(name, procedure, table, fertility, n_nv) -> Row:
    row: Row = {"choice": name, "vocab": None, "exponent": None, "note": ""}
    try:
        law = procedure.fit(table, fertility=fertility, draws=0)
        for key in ("alpha_nv", "gamma", "alpha2"):
            if key in law.constants:
                row["exponent"] = law.constants[key]
        row["note"] = "; ".join(law.warnings)
        row["vocab"] = law.optimum(n_nv=n_nv).vocab_size
    except InputError as error:
        row["note"] = str(error)
    return row


def _bits_case(table, fertility, n_nv) -> Row:
    other = with_metric(table, "bits_per_character")
    row = _case(
        "approach 1 in bits per character", VocabLaw1(densify="none"), other, fertility, n_nv
    )
    return row


class Mistake(NamedTuple):
    """What a vocabulary off the optimum costs at a budget."""

    excess_loss: float  # L_u, nats per token
    compute_factor: float  # the optimum reaches the same loss with this share of the FLOPs


def mistake(
    law: LossLaw, *, n_nv: float, vocab_size: float, flops: float, d: float | None = None
) -> Mistake:
    """Excess loss of V, and the share of the FLOPs at which the best V would have done as well."""
    width = float(accounting.ladder_width(n_nv)) if d is None else d
    reached = float(law.loss_at_budget(n_nv=n_nv, vocab_size=vocab_size, width=width, flops=flops))

    def best(budget: float) -> float:
        size = law.optimum(n_nv=n_nv, d=width, flops=budget).vocab_size
        return float(law.loss_at_budget(n_nv=n_nv, vocab_size=size, width=width, flops=budget))

    excess = reached - best(flops)
    low, high = np.log(1e-3), 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if best(flops * np.exp(middle)) < reached else (middle, high)
    return Mistake(excess, float(np.exp((low + high) / 2)))
