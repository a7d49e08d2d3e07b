"""Learning rate x batch: bowls of the held-out loss, and where each law's point falls in them."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.experiments import _collect, _corpus, _noise, _small
from lminf.experiments._main import main
from lminf.experiments._training import check_experts
from lminf.experiments.step_law import BATCH, RATE, contours, explain
from lminf.models import cost
from lminf.run import plots, style
from lminf.run.folder import Row, RunFolder
from lminf.scaling import accounting, baselines

LAWS = ("step", "deepseek", "porian")


def check(c: ConfigDict, given: Collection[str]) -> None:
    """Refuses settings that contradict each other, or that nothing reads."""
    check_experts(c, given)
    _small.check(c, budgets=[c.tokens])


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    study = _corpus.corpus(c.data.corpus)
    tokenizer = study.tokenizers([c.data.vocab])[c.data.vocab]
    shape = _small.shape_of(c, c.data.vocab)
    n, active = cost.block_parameters(shape), cost.block_parameters(shape, active=True)
    tokens, held_out = study.tokens(tokenizer)
    for measured in _small.train(c, shape, tokens, held_out, budgets=[c.tokens]):
        yield {
            "corpus": study.name, "text_digest": study.digest, "seed": measured.seed,
            "n": n, "n_active": active, "experts": c.experts.count,
            "width": shape.width, "hidden": shape.mlp.hidden_dim,
            "heads": shape.num_heads, "layers": shape.num_layers, "vocab_size": c.data.vocab,
            "seq_len": c.data.length, "d": measured.tokens, "batch_sequences": c.data.batch,
            "batch_tokens": c.data.batch * c.data.length, "lr": measured.lr,
            "train_loss": measured.train_loss, "loss": float(measured.nll.mean()),
        }  # fmt: skip


def planned(c: ConfigDict) -> Row:
    """What a cell costs: a row of its counts, FLOPs with attention as the law counts them."""
    shape = _small.shape_of(c, c.data.vocab)
    n, active = cost.block_parameters(shape), cost.block_parameters(shape, active=True)
    per_token = accounting.flops_per_token(
        active, layers=shape.num_layers, width=shape.width, seq_len=c.data.length
    )
    return {
        "layers": shape.num_layers, "width": shape.width, "experts": c.experts.count, "n": n,
        "n_active": active, "vocab": c.data.vocab, "batch": c.data.batch, "tokens": c.tokens,
        "flops_per_token": per_token, "runs": len(c.rates) * c.replicates,
        "flops": float(per_token) * c.tokens * len(c.rates) * c.replicates,
    }  # fmt: skip


def groups(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of each (corpus, shape, D) by a title; replicates of other seeds stay together."""
    by_title: dict[str, list] = {}
    for row in rows:
        mixed = f", {row['experts']} experts ({row['n_active']:,} active)" if row["experts"] else ""
        key = (
            f"{row['corpus']}, N = {row['n']:,} ({row['layers']} x {row['width']}){mixed}, "
            f"D = {row['d']:,}"
        )
        by_title.setdefault(key, []).append(row)
    return by_title


def cells_of(rows: list[Row]) -> dict[tuple, list[float]]:
    """Held-out losses of each (learning rate, batch), one for each seed."""
    return _noise.settings(rows, ("lr", "batch_tokens"), "loss")


def least(rows: list[Row]) -> tuple:
    """(learning rate, batch) of the least mean loss."""
    cells = cells_of(rows)
    return min(cells, key=lambda key: np.mean(cells[key]))


def along_rates(rows: list[Row], batch: float) -> _noise.Curve:
    """The bowl at one batch."""
    losses = {lr: v for (lr, tokens), v in cells_of(rows).items() if tokens == batch}
    rates = sorted(losses)
    return _noise.Curve(np.array(rates), tuple(losses[lr] for lr in rates))


def along_batches(rows: list[Row]) -> _noise.Curve:
    """Of each batch the loss at its best rate: for each seed the least of the parabola through its
    best rate and the neighbours, since rates a factor of two apart cost more than batches do."""
    by_batch: dict[int, dict[float, list[float]]] = {}
    for (lr, batch), values in sorted(cells_of(rows).items()):
        by_batch.setdefault(batch, {})[lr] = values
    values_of = {batch: [] for batch in sorted(by_batch)}
    for batch, values in values_of.items():
        most = max(map(len, by_batch[batch].values()))  # without rates where a seed diverged
        complete = {lr: losses for lr, losses in by_batch[batch].items() if len(losses) == most}
        for losses in zip(*complete.values(), strict=True):
            lowest = _noise.vertex(np.log(list(complete)), np.array(losses))
            values.append(min(losses) if lowest is None else lowest[1])
    return _noise.Curve(np.array(list(values_of)), tuple(values_of.values()))


def table(rows: list[Row]) -> list[Row]:
    """The best cell of each group, the noise between seeds there, and each law's point."""
    lines = []
    for title, group in groups(rows).items():
        lr, batch = least(group)
        cells = cells_of(group)
        row = {**group[0], "loss": float(np.mean(cells[lr, batch]))}
        lines.append({
            "group": title, "cells": len(cells), "best lr": lr, "best batch (tokens)": batch,
            "loss": row["loss"], "noise": noise(group),
            "interior": interior(group, {"lr": lr, "batch_tokens": batch}),
            "plateau": plateau(group),
            **{f"{name} lr, batch": point(name, row) for name in LAWS},
        })  # fmt: skip
    return lines


def noise(rows: list[Row]) -> float | None:
    """Standard deviation between seeds of one setting; None: one seed.

    Of settings within 5 % of the least loss: at rates that hardly train, seeds differ by more.
    """
    cells = cells_of(rows)
    lowest = min(np.mean(values) for values in cells.values())
    return _noise.pooled([v for v in cells.values() if np.mean(v) < 1.05 * lowest])


def plateau(rows: list[Row]) -> str | None:
    """The cells that noise cannot tell from the best one."""
    cells, sigma = cells_of(rows), noise(rows)
    if sigma is None:
        return None
    best = cells[least(rows)]
    same = [
        key for key, values in cells.items()
        if not _noise.distinguishable(
            float(np.mean(values)), float(np.mean(best)),
            sigma * np.sqrt(1 / len(values) + 1 / len(best)),
        )
    ]  # fmt: skip
    return f"{len(same)} of {len(cells)}"


def interior(rows: list[Row], best: Mapping[str, float]) -> str:
    """In which directions the best cell is not at an edge: of its batch's rates, of all batches."""
    of_batch = [row for row in rows if row["batch_tokens"] == best["batch_tokens"]]
    inside = [
        name
        for name, beside in (("lr", of_batch), ("batch_tokens", rows))
        if min(r[name] for r in beside) < best[name] < max(r[name] for r in beside)
    ]
    return " and ".join({"lr": "lr", "batch_tokens": "batch"}[name] for name in inside) or "neither"


def point(name: str, row: Row) -> str:
    query = baselines.Query(row["n"], row["d"], row["loss"], None)
    lr, batch = baselines.rule(name).setting(query)
    return f"{lr:.2g}, {batch:,.0f}" if batch is not None else f"{lr:.2g}"


def findings(rows: list[Row]) -> str:
    """What the rows say, in sentences; a difference within its noise is called none."""
    titled = groups(rows)
    first = rows[0]
    lines = [
        f"The text is `{first['corpus']}`, digest {first['text_digest']}: "
        f"{_corpus.DESCRIPTIONS[first['corpus']]}.",
        "Noise is the standard deviation between seeds of one setting near the least loss; an "
        f"interval is of optima of {_noise.DRAWS:,} draws of the losses with that noise. Two "
        "losses are told apart where they differ by more than twice the noise of their difference. "
        "A group's plateau are the cells not told apart from its best one.",
    ]
    for title, group in titled.items():
        batch = least(group)[1]
        lines.append(
            f"{title}; batch of {batch} tokens: "
            f"{_noise.describe_minimum(steady(along_rates(group, batch), noise(group)), 'lr')}"
        )
        batches = along_batches(group)
        if len(batches.x) > 2:
            text = _noise.describe_minimum(steady(batches, noise(group)), "batch (tokens)")
            lines.append(f"{title}; at each batch's best rate: {text}")
            lines += [describe_law(name, group) for name in LAWS]
    base, *changes = titled.items()
    lines += [describe_change(base, change) for change in changes]
    return "\n\n".join(lines)


def steady(curve: _noise.Curve, sigma: float | None) -> _noise.Curve:
    """The curve with the noise near the least loss in place of its own points' alone."""
    return dataclasses.replace(curve, noise=sigma)


def describe_law(name: str, rows: list[Row]) -> str:
    """What a law's point costs: the loss of the cell nearest to it."""
    cells, sigma = cells_of(rows), noise(rows)
    best = least(rows)
    row = {**rows[0], "loss": float(np.mean(cells[best]))}
    lr, batch = baselines.rule(name).setting(baselines.Query(row["n"], row["d"], row["loss"], None))
    if batch is None:
        return f"The {name} law names no batch here."
    near = min(cells, key=lambda c: np.hypot(np.log2(c[0] / lr), np.log2(c[1] / batch)))
    above = float(np.mean(cells[near])) - row["loss"]
    off = max(abs(np.log2(near[0] / lr)), abs(np.log2(near[1] / batch)))
    text = (
        f"The {name} law, far below its range, says lr {lr:.2g} and {batch:,.0f} tokens; the "
        f"nearest cell, lr {near[0]:g} and {near[1]} tokens, is {above:.3f} above the best"
    )
    if off > 1:
        text += f" (the point is a factor {2**off:.1f} from it, outside the grid)"
    if sigma is None:
        return text + "; one seed, so no noise to compare it with."
    error = sigma * np.sqrt(1 / len(cells[near]) + 1 / len(cells[best]))
    apart = _noise.distinguishable(above, 0, error)
    return f"{text}, {'' if apart else 'not '}told apart."


def describe_change(base: tuple[str, list[Row]], change: tuple[str, list[Row]]) -> str:
    """The best rate and loss of a change beside those of the group it changes, at its batch."""
    (title, rows), (other_title, changed) = base, change
    batch = least(changed)[1]
    one, two = (
        steady(along_rates(group, batch), noise(group) or noise(rows)) for group in (rows, changed)
    )
    if not len(one.x) or one.errors is None or two.errors is None:
        return f"{other_title} has no noise to be compared with {title} by."
    shift = np.log2(_noise.sampled_optima(two, seed=1) / _noise.sampled_optima(one))
    low, high = np.percentile(shift, [2.5, 97.5])
    moved = "moves the best rate" if low > 0 or high < 0 else "does not move the best rate visibly"
    text = (
        f"{other_title} against {title}, batch of {batch} tokens: this {moved}: by "
        f"{np.median(shift):+.2f} octaves (95 % {low:+.2f} .. {high:+.2f})"
    )
    by_batch = [steady(along_batches(group), noise(group)) for group in (rows, changed)]
    if min(len(curve.x) for curve in by_batch) > 2:
        ratio = _noise.sampled_optima(by_batch[1], seed=1) / _noise.sampled_optima(by_batch[0])
        low, high = np.percentile(np.log2(ratio), [2.5, 97.5])
        text += (
            f"; the best batch moves by {np.median(np.log2(ratio)):+.2f} octaves "
            f"(95 % {low:+.2f} .. {high:+.2f})"
        )
    if changed[0]["corpus"] != rows[0]["corpus"]:
        return f"{text}. Losses on other text are not comparable."
    i, j = int(np.argmin(one.means)), int(np.argmin(two.means))
    gap = float(two.means[j] - one.means[i])
    apart = _noise.distinguishable(gap, 0, float(np.hypot(one.errors[i], two.errors[j])))
    return f"{text}; its least loss differs by {gap:+.3f}, {'' if apart else 'not '}told apart."


def files(rows: list[Row]) -> dict[str, str]:
    """What stands beside the report: the table that `lminf scaling fit step` takes."""
    first = rows[0]["corpus"]
    return {"table.csv": _collect.step([row for row in rows if row["corpus"] == first])}


def plot(rows: list[Row]) -> Mapping[str, Figure]:
    titled = {  # a contour needs an area
        title: group for title, group in groups(rows).items() if len(along_batches(group).x) > 2
    } or groups(rows)
    with matplotlib.rc_context({**plots.STYLE, "axes.grid": False}):
        titles = [short_title(group) for group in titled.values()]
        figure, grid = plots.panels_of(titles, RATE, BATCH, height=3.6, size=9.5)
        for axes, group in zip(grid, titled.values(), strict=True):
            means = {cell: float(np.mean(losses)) for cell, losses in cells_of(group).items()}
            lowest = min(means.values())
            key = (group[0]["n"], group[0]["d"])
            cells = [
                {"n": key[0], "d": key[1], "lr": lr, "batch": batch, "excess": loss / lowest - 1}
                for (lr, batch), loss in means.items()
            ]
            filled = contours(axes, key, cells, points(group))
        explain(figure, grid, filled)
    return {"contours": figure, "bowls": bowls(rows)}


OTHERS = "Other text and shapes"


def bowls(rows: list[Row]) -> Figure:
    """The loss by learning rate: a panel for each shape and D with a line for each batch, and one
    for all those that were measured at a single batch, beside the first of the others.
    """
    lines, alone = [], []
    for group in groups(rows).values():
        batches = sorted({row["batch_tokens"] for row in group})
        for batch in batches:
            named = [{**row, "line": f"batch {style.length(batch)}", "panel": short_title(group)}
                     for row in group if row["batch_tokens"] == batch]  # fmt: skip
            (lines if len(batches) > 1 else alone).extend(named)
    if len({row["panel"] for row in alone}) > 1 or (alone and lines):
        batch = alone[0]["line"]
        beside = [row for row in lines if row["line"] == batch and
                  row["d"] == alone[0]["d"] and row["panel"] == lines[0]["panel"]]  # fmt: skip
        lines += [
            {**row, "line": shape_of(row), "panel": f"{OTHERS}, {batch}"}
            for row in beside + [row for row in alone if row["line"] == batch]
        ]
        lines += [row for row in alone if row["line"] != batch]
    else:
        lines += alone
    return plots.curves(
        lines, x="lr", y="loss", by="line", panel="panel", log_x=True,
        x_label=RATE, y_label="held-out loss (nats/token)",
    )  # fmt: skip


def short_title(group: list[Row]) -> str:
    row = group[0]
    return f"{shape_of(row)}, D = {style.length(row['d'])}"


def shape_of(row: Row) -> str:
    mixed = f", {row['experts']} experts" if row["experts"] else ""
    return f"{row['corpus']}, {row['layers']} × {row['width']}{mixed}"


def points(rows: list[Row]) -> list[Row]:
    """Each law's point and the best cell, where a figure can show them."""
    lr, batch = least(rows)
    best = {**rows[0], "loss": float(np.mean(cells_of(rows)[lr, batch]))}
    settings = [{"n": best["n"], "d": best["d"], "law": "best cell", "lr": lr, "batch": batch}]
    for name in LAWS:
        lr, batch = baselines.rule(name).setting(
            baselines.Query(best["n"], best["d"], best["loss"], None)
        )
        if batch is not None:
            settings.append({"n": best["n"], "d": best["d"], "law": name, "lr": lr, "batch": batch})
    return settings


if __name__ == "__main__":
    main(run, plot, table=table, check=check)
