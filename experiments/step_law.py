"""Fits the step law, prices every law's point on the measured grids, and draws the bowls."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.tri import Triangulation

from experiments import _tables
from experiments._main import main
from lminf import scaling
from lminf.run import plots
from lminf.scaling import gap, published, rivals, synthetic, validation
from lminf.scaling.steps import StepLaw, fit_bowl

LEVELS = (0.00125, 0.0025, 0.005, 0.01)  # relative excess: the plateau areas


def run(c, out):
    if c.data:
        table = scaling.read_step(_tables.found(c.data, "step_law"), seq_len=c.seq_len)
    else:
        table = synthetic.step_grid(noise=0.001, seed=c.seed)
    procedure = StepLaw(threshold=c.threshold)
    law = scaling.fit(procedure, table, draws=c.draws, seed=c.seed)
    law.save(out / f"{law.version}.json")
    for name, value in law.constants.items():
        low, high = law.intervals[name]
        row_low, row_high = law.diagnostics["row_intervals"][name]
        yield {"part": "constant", "constant": name, "value": value, "low_groups": low,
               "high_groups": high, "low_rows": row_low, "high_rows": row_high,
               "published": published.STEP.constants[name]}  # fmt: skip
    for level, share in gap.plateau(table, LEVELS).items():
        yield {"part": "plateau", "excess": level, "share_of_cells": share}
    rules = [rivals.rule(name) for name in c.laws]
    rules.append(rivals.without_batch(rules[0]))
    rules.append(rivals.from_law(law, "refit"))
    for name, groups in gap.gaps(table, rules).items():
        means = {method: _finite(gap.mean_gap(groups, method)[0]) for method in gap.METHODS}
        yield {"part": "gap", "law": name, **means, "clipped": sum(g.clipped for g in groups)}
        for g in groups:
            yield {"part": "point", "law": name, "n": g.n, "d": g.d, "lr": g.lr,
                   "batch": g.batch, "gap": _finite(g.gap["linear"])}  # fmt: skip
    for row in validation.leave_one_group_out(procedure, table):
        yield {"part": "leave one group out", **row}
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


def table(rows):
    """Mean gap by law; the other parts are in rows.jsonl."""
    return [
        {key: value for key, value in row.items() if key != "part"}
        for row in rows
        if row["part"] == "gap"
    ]


def plot(rows):
    cells = [row for row in rows if row["part"] == "cell"]
    groups = list(dict.fromkeys((row["n"], row["d"]) for row in cells))
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(15, 3.6 * -(-len(groups) // 4)), layout="constrained")
        for index, key in enumerate(groups):
            axes = figure.add_subplot(-(-len(groups) // 4), 4, index + 1)
            contours(axes, key, cells, [row for row in rows if row["part"] == "point"])
        names = dict.fromkeys(row["law"] for row in rows if row["part"] == "point")
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(names)
        )
    bars = [row for row in rows if row["part"] == "gap"]
    return {
        "contours": figure,
        "gaps": plots.bars(
            bars, x="law", y="linear", by="part", y_label="loss above the best (per mille)"
        ),
    }


def contours(axes, key, cells, points):
    """One group's excess as filled contours at the plateau levels, with every law's point."""
    own = [row for row in cells if (row["n"], row["d"]) == key]
    x, y = (np.log2([row[name] for row in own]) for name in ("lr", "batch"))
    excess = np.clip([row["excess"] for row in own], 0, 0.05)
    axes.tricontourf(
        Triangulation(x, y), excess, levels=(0, *LEVELS, 0.02), cmap="viridis_r", extend="max"
    )
    marks = "o^sDvP*Xd<>"
    named = [row for row in points if (row["n"], row["d"]) == key]
    for i, row in enumerate(named):
        axes.plot(
            np.log2(row["lr"]), np.log2(row["batch"]), marks[i % len(marks)], markersize=7,
            color=plots.PALETTE[i % len(plots.PALETTE)], markeredgecolor="white", label=row["law"],
        )  # fmt: skip
    axes.set_title(f"N = {key[0]:.3g}, D = {key[1]:.3g}")
    axes.set_xlabel("log2 peak learning rate")
    axes.set_ylabel("log2 batch (tokens)")


if __name__ == "__main__":
    main(run, plot, table=table)
