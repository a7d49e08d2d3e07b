"""Fits the step law and finds the loss of every law's setting on the measured grids."""

from collections.abc import Iterator, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MultipleLocator
from matplotlib.tri import Triangulation, TriContourSet
from ml_collections import ConfigDict

from lminf import scaling
from lminf.experiments import _tables
from lminf.experiments._main import main
from lminf.run import plots, style
from lminf.run.folder import Row, RunFolder
from lminf.scaling import (
    baselines,
    diagnostics,
    published,
    recommend_step,
    regret,
    synthetic,
)
from lminf.scaling.steps import StepFit, fit_bowl


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    if c.data:
        table = scaling.read_step(_tables.existing(c.data, "step_law"), seq_len=c.seq_len)
    else:
        table = synthetic.step_grid(noise=0.001, seed=c.seed)
    procedure = StepFit(threshold=c.threshold)
    law = scaling.fit(procedure, table, draws=c.draws, seed=c.seed)
    law.save(out / f"{law.version}.json")
    for name, value in law.constants.items():
        low, high = law.intervals[name]
        row_low, row_high = law.diagnostics["row_intervals"][name]
        yield {"part": "constant", "constant": name, "value": value, "low_groups": low,
               "high_groups": high, "low_rows": row_low, "high_rows": row_high,
               "published": published.STEP.constants[name]}  # fmt: skip
    for level, share in regret.plateau(table).items():
        yield {"part": "plateau", "excess": level, "share_of_cells": share}
    rules = [baselines.rule(name) for name in c.laws]
    rules.append(baselines.without_batch(rules[0]))
    rules.append(baselines.from_law(law, "refit"))
    for name, groups in regret.regrets(table, rules).items():
        means = {
            method: _finite(regret.mean_regret(groups, method)[0]) for method in regret.METHODS
        }
        low, high = map(_finite, regret.interval(groups, "linear"))
        yield {"part": "gap", "law": name, **means, "low": low, "high": high,
               "groups": len(groups), "runs": len(table),
               "clipped": sum(g.clipped for g in groups)}  # fmt: skip
        for g in groups:
            yield {"part": "point", "law": name, "n": g.n, "d": g.d, "lr": g.lr,
                   "batch": g.batch, "gap": _finite(g.regret["linear"])}  # fmt: skip
    unseen = []
    for row in diagnostics.leave_one_group_out(procedure, table):
        unseen.append(row.get("gap_per_mille", np.nan))
        yield {"part": "leave one group out", **row}
    yield {"part": "gap", "law": "refit without the group", "linear": _finite(np.mean(unseen)),
           "groups": len(unseen), "runs": len(table)}  # fmt: skip
    for name in recommend_step.COMPARED:
        distance = recommend_step.distance(name)._asdict()
        yield {"part": "distance in octaves", **{k: v if k == "rule" else _finite(v)
                                                 for k, v in distance.items()}}  # fmt: skip
    for what, lr_factor, batch_factor in (
        ("lr x 2", 2, 1), ("lr / 2", 0.5, 1), ("batch x 2", 1, 2), ("batch / 2", 1, 0.5),
        ("both x 2", 2, 2),
    ):  # fmt: skip
        cost = 1000 * law.excess(lr_factor=lr_factor, batch_factor=batch_factor)
        yield {"part": "cost of a mistake", "mistake": what, "per_mille": cost}
    for group in np.unique(table.group):
        rows = table.group == group
        bowl = fit_bowl(table, group)
        if bowl is not None:
            yield {"part": "bowl", "n": float(table.n[rows][0]), "d": float(table.d[rows][0]),
                   "lr": 2**bowl.log2_lr, "batch": 2**bowl.log2_batch}  # fmt: skip
        for lr, batch, excess in zip(
            table.lr[rows], table.batch[rows], table.excess[rows], strict=True
        ):
            yield {"part": "cell", "n": float(table.n[rows][0]), "d": float(table.d[rows][0]),
                   "lr": lr, "batch": batch, "excess": excess}  # fmt: skip


def _finite(value):
    return value if np.isfinite(value) else None  # outside the hull of the cells: no number


def table(rows: list[Row]) -> list[Row]:
    """Mean gap by law, with the interval of `linear` over groups; the rest is in rows.jsonl."""
    return [
        {key: value for key, value in row.items() if key != "part"}
        for row in rows
        if row["part"] == "gap"
    ]


# The same law looks the same here and in step_sweep.
LOOKS = {
    "best cell": style.Look("best cell", "#000000", "*"),
    "step": style.Look("step law", "#0072B2", "o"),
    "step-best-batch": style.Look("step law, best batch", "#56B4E9", "o"),
    "refit": style.Look("refitted here", "#E69F00", "P"),
    "openai-lr": style.Look("OpenAI (rate)", "#CC79A7", "v"),
    "microsoft": style.Look("Microsoft", "#009E73", "s"),
    "deepseek": style.Look("DeepSeek", "#D55E00", "D"),
    "porian": style.Look("Porian et al.", "#FFFFFF", "^"),
    "moonlight": style.Look("Moonlight", "#8C8C8C", "X"),
    "fixed": style.Look("one setting for all", "#F0E442", "d"),
}


def look(law: str) -> style.Look:
    return LOOKS.get(law, style.Look(law, "#8C8C8C", "<"))


def plot(rows: list[Row]) -> Mapping[str, Figure]:
    """Bowls and gaps; rows without cells, as they are kept here, give the gaps alone."""
    cells = [row for row in rows if row["part"] == "cell"]
    points = [row for row in rows if row["part"] == "point"]
    groups = list(dict.fromkeys((row["n"], row["d"]) for row in cells))
    figures = {}
    if groups:
        figures["contours"] = bowls(groups, cells, points)
    if points:
        gaps = [{**row, "law": look(row["law"]).label} for row in points]
        figures["gaps"] = plots.bars(
            gaps, x="law", y="gap", center=np.mean, x_label="",
            y_label="loss above the best cell of a grid (per mille); dots: grids",
        )  # fmt: skip
    return figures


def bowls(groups: Sequence[tuple[float, float]], cells: list[Row], points: list[Row]) -> Figure:
    titles = [f"N = {style.short(n)}, D = {style.short(d)}" for n, d in groups]
    with matplotlib.rc_context({**plots.STYLE, "axes.grid": False}):
        figure, grid = plots.panels_of(titles, RATE, BATCH, columns=4, height=1.95, size=9)
        for axes, key in zip(grid, groups, strict=True):
            filled = contours(axes, key, cells, points)
        explain(figure, grid, filled)
    return figure


RATE, BATCH = "peak learning rate (per step)", "batch (tokens)"


def contours(
    axes: Axes, key: tuple[float, float], cells: list[Row], points: list[Row]
) -> TriContourSet:
    """One group's excess as filled contours at the plateau levels, with every law's point; what the
    grid does not reach is grey. Returns what a colour bar needs.
    """
    group_cells = [row for row in cells if (row["n"], row["d"]) == key]
    x, y = (np.log2([row[name] for row in group_cells]) for name in ("lr", "batch"))
    excess = np.clip([row["excess"] for row in group_cells], 0, 0.05)
    axes.set_facecolor("#eeeeee")
    filled = axes.tricontourf(
        Triangulation(x, y),
        excess,
        levels=(0, *regret.PLATEAUS, 0.02),
        cmap="viridis_r",
        extend="max",
    )
    for row in (row for row in points if (row["n"], row["d"]) == key):
        mark = look(row["law"])
        axes.plot(
            np.log2(row["lr"]), np.log2(row["batch"]), mark.marker, color=mark.colour,
            markersize=11 if mark.marker == "*" else 6, markeredgewidth=0.7,
            markeredgecolor="black" if mark.colour == "#FFFFFF" else "white",
            label=mark.label,
        )  # fmt: skip
    axes.xaxis.set_major_locator(FixedLocator(np.log2([1e-4, 1e-3, 1e-2, 1e-1])))
    axes.xaxis.set_minor_locator(FixedLocator(np.log2([3e-4, 3e-3, 3e-2])))
    axes.yaxis.set_major_locator(MultipleLocator(2))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{2.0**value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: style.length(2.0**value)))
    return filled


def explain(figure: Figure, grid: Sequence[Axes], filled: TriContourSet) -> None:
    """The laws' marks above the panels, the levels beside them."""
    named = {label: handle for axes in grid
             for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}  # fmt: skip
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=5,
                  frameon=True, facecolor="#dddddd", edgecolor="none")  # fmt: skip
    bar = figure.colorbar(filled, ax=grid, label="loss above the best cell (%)", aspect=40)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))


if __name__ == "__main__":
    main(run, plot, table=table)
