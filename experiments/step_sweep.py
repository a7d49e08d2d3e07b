"""Learning rate x batch: bowls of the held-out loss, and where each law's point falls in them."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments import _corpus, _small
from experiments._main import main
from experiments.step_law import contours
from lminf.run import plots
from lminf.scaling import rivals

LAWS = ("step", "deepseek", "porian")


def run(c, out):
    study = _corpus.corpus(c.data.corpus)
    tokenizer = study.tokenizers([c.data.vocab])[c.data.vocab]
    shape = _small.shape_of(c, c.data.vocab)
    n = _small.parameters(shape)
    tokens, held_out = study.tokens(tokenizer)
    for found in _small.train(c, shape, tokens, held_out, budgets=[c.tokens]):
        yield {
            "corpus": study.name, "text_digest": study.digest, "seed": found.seed,
            "n": n, "width": shape.width, "hidden": shape.mlp.hidden_dim,
            "heads": shape.num_heads, "layers": shape.num_layers, "vocab_size": c.data.vocab,
            "seq_len": c.data.length, "d": found.tokens, "batch_sequences": c.data.batch,
            "batch_tokens": c.data.batch * c.data.length, "lr": found.lr,
            "train_loss": found.train_loss, "loss": float(found.nll.mean()),
        }  # fmt: skip


def groups(rows):
    """Rows of each (corpus, shape, D) by a title; replicates of other seeds stay together."""
    found: dict[str, list] = {}
    for row in rows:
        key = (
            f"{row['corpus']}, N = {row['n']:,} ({row['layers']} x {row['width']}), "
            f"D = {row['d']:,}"
        )
        found.setdefault(key, []).append(row)
    return found


def table(rows):
    """The best cell of each group, the noise between seeds there, and each law's point."""
    lines = []
    for title, own in groups(rows).items():
        best = min(own, key=lambda row: row["loss"])
        lines.append({
            "group": title, "cells": len(own), "best lr": best["lr"],
            "best batch (tokens)": best["batch_tokens"], "loss": best["loss"],
            "noise": noise(own), "interior": interior(own, best),
            **{f"{name} lr, batch": point(name, best) for name in LAWS},
        })  # fmt: skip
    return lines


def noise(rows):
    """Standard deviation between seeds of one setting, the median over settings; None: one seed."""
    settings: dict[tuple, list[float]] = {}
    for row in rows:
        settings.setdefault((row["lr"], row["batch_tokens"]), []).append(row["loss"])
    spread = [np.std(losses, ddof=1) for losses in settings.values() if len(losses) > 1]
    return float(np.median(spread)) if spread else None


def interior(rows, best):
    """In which directions the best cell is not at the edge of the grid."""
    inside = [
        name
        for name in ("lr", "batch_tokens")
        if min(r[name] for r in rows) < best[name] < max(r[name] for r in rows)
    ]
    return " and ".join({"lr": "lr", "batch_tokens": "batch"}[name] for name in inside) or "neither"


def point(name, row):
    query = rivals.Query(row["n"], row["d"], row["loss"], None)
    lr, batch = rivals.rule(name).setting(query)
    return f"{lr:.2g}, {batch:,.0f}" if batch is not None else f"{lr:.2g}"


def plot(rows):
    titled = groups(rows)
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(4.6 * min(3, len(titled)), 4 * -(-len(titled) // 3)),
                        layout="constrained")  # fmt: skip
        for index, (title, own) in enumerate(titled.items()):
            axes = figure.add_subplot(-(-len(titled) // 3), min(3, len(titled)), index + 1)
            lowest = min(row["loss"] for row in own)
            key = (own[0]["n"], own[0]["d"])
            cells = [{"n": r["n"], "d": r["d"], "lr": r["lr"], "batch": r["batch_tokens"],
                      "excess": r["loss"] / lowest - 1} for r in first_seed(own)]  # fmt: skip
            contours(axes, key, cells, points(own))
            axes.set_title(title.replace(", D", "\nD"), fontsize=9)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    lines = [
        {**row, "setting": f"{title}; batch {row['batch_tokens']:,}"}
        for title, own in titled.items()
        for row in first_seed(own)
    ]
    bowls = plots.curves(
        lines, x="lr", y="loss", by="setting", log_x=True,
        x_label="peak learning rate", y_label="held-out loss (nats/token)",
    )  # fmt: skip
    return {"contours": figure, "bowls": bowls}


def first_seed(rows):
    return [row for row in rows if row["seed"] == min(r["seed"] for r in rows)]


def points(rows):
    """Each law's point and the best cell, where a figure can show them."""
    best = min(rows, key=lambda row: row["loss"])
    found = [{"n": best["n"], "d": best["d"], "law": "best cell", "lr": best["lr"],
              "batch": best["batch_tokens"]}]  # fmt: skip
    for name in LAWS:
        lr, batch = rivals.rule(name).setting(
            rivals.Query(best["n"], best["d"], best["loss"], None)
        )
        if batch is not None:
            found.append({"n": best["n"], "d": best["d"], "law": name, "lr": lr, "batch": batch})
    return found


if __name__ == "__main__":
    main(run, plot, table=table)
