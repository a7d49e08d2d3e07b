"""Vocabulary sizes at equal FLOPs: two losses of small models, and the best size by each."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments import _corpus, _small
from experiments._main import main
from lminf.config import closest
from lminf.errors import InputError
from lminf.run import plots
from lminf.scaling import accounting, losses, published

MODES = ("checkpoints", "runs")
METRICS = {"loss_u": "L_u (nats/token)", "bits_per_character": "bits per character"}
DRAWS = 1000


def run(c, out):
    if c.budget_mode not in MODES:
        raise InputError(
            f"there is no budget mode {c.budget_mode!r}; {closest(c.budget_mode, MODES)}"
        )
    study = _corpus.corpus(c.data.corpus)
    tokenizer = study.tokenizers(c.data.vocabs)[c.data.vocab]
    shape = _small.shape_of(c, c.data.vocab)
    n_nv, n_v = _small.parameters(shape), c.data.vocab * shape.width
    tokens, held_out = study.tokens(tokenizer)
    log_unigram = losses.log_unigram(np.bincount(tokens, minlength=c.data.vocab))
    fertility = len(held_out) / _corpus.HELD_OUT
    budgets = [int(flops / accounting.training_flops(n_nv, n_v, 1)) for flops in c.budgets]
    # Checkpoints inside one long run, or for each budget a run whose schedule ends there.
    runs = [budgets] if c.budget_mode == "checkpoints" else [[budget] for budget in budgets]
    for asked in runs:
        for found in _small.train(c, shape, tokens, held_out, budgets=asked):
            loss = float(found.nll.mean())
            yield {
                "corpus": study.name, "text_digest": study.digest, "seed": found.seed,
                "budget_mode": c.budget_mode, "vocab_size": c.data.vocab,
                "width": shape.width, "n_nv": n_nv, "n_v": n_v, "lr": found.lr,
                "tokens": found.tokens, "characters": found.tokens / fertility,
                "tokens_per_character": fertility,
                "budget": c.budgets[budgets.index(nearest(budgets, found.tokens))],
                "flops": float(accounting.training_flops(n_nv, n_v, found.tokens)),
                "loss": loss,
                "loss_u": losses.unigram_normalised(found.nll, found.targets, log_unigram),
                "bits_per_character": float(losses.bits_per_character(loss, fertility)),
            }  # fmt: skip


def nearest(values, value):
    return min(values, key=lambda v: abs(v - value))


def best_rates(rows, metric):
    """Of each (n_nv, budget, vocabulary, seed) the row of the best learning rate."""
    found: dict[tuple, dict] = {}
    for row in rows:
        key = (row["n_nv"], row["budget"], row["vocab_size"], row["seed"])
        if key not in found or row[metric] < found[key][metric]:
            found[key] = row
    return list(found.values())


def noise(rows, metric):
    """Standard deviation between seeds of one setting, the median over settings; None: one seed."""
    settings: dict[tuple, list[float]] = {}
    for row in rows:
        key = (row["n_nv"], row["budget"], row["vocab_size"])
        settings.setdefault(key, []).append(row[metric])
    spread = [np.std(values, ddof=1) for values in settings.values() if len(values) > 1]
    return float(np.median(spread)) if spread else None


def optimum(sizes, values, sigma, *, seed=0):
    """(V, low, high): the vertex of a parabola in ln V through the three best neighbours, and its
    95 % interval over `DRAWS` draws of the losses with the noise that seeds showed.

    None where the least loss is at an end of the sizes: there is no optimum to name.
    """
    sizes, values = np.log(np.asarray(sizes, float)), np.asarray(values, float)
    order = np.argsort(sizes)
    sizes, values = sizes[order], values[order]
    best = vertex(sizes, values)
    if best is None:
        return None, None, None
    if not sigma:
        return float(np.exp(best)), None, None
    rng = np.random.default_rng(seed)
    drawn = [vertex(sizes, values + sigma * rng.standard_normal(len(values))) for _ in range(DRAWS)]
    inside = [v for v in drawn if v is not None]
    low, high = np.exp(np.percentile(inside, [2.5, 97.5])) if len(inside) > 0.9 * DRAWS else (0, 0)
    return float(np.exp(best)), float(low) or None, float(high) or None


def vertex(x, y):
    at = int(np.argmin(y))
    if at in (0, len(y) - 1):
        return None
    a, b, _ = np.polyfit(x[at - 1 : at + 2], y[at - 1 : at + 2], 2)
    return -b / (2 * a)


def table(rows):
    """The best vocabulary of each budget by both metrics, beside the published law's."""
    lines = []
    for n_nv, budget in dict.fromkeys((row["n_nv"], row["budget"]) for row in rows):
        line = {"N_nv": n_nv, "FLOPs": budget}
        for metric in METRICS:
            own = [
                row
                for row in best_rates(rows, metric)
                if (row["n_nv"], row["budget"]) == (n_nv, budget)
            ]
            sigma = noise(best_rates(rows, metric), metric)
            first = [row for row in own if row["seed"] == min(r["seed"] for r in own)]
            sizes, values = [r["vocab_size"] for r in first], [r[metric] for r in first]
            v, low, high = optimum(sizes, values, sigma)
            line[f"best V by {metric}"] = sizes[int(np.argmin(values))]
            line[f"V by {metric}"] = v and round(v)
            line[f"95 % by {metric}"] = f"{low:.0f} .. {high:.0f}" if low and high else None
            line[f"noise of {metric}"] = sigma
        law = published.ISOFLOP.optimum(n_nv=n_nv, d=rows[0]["width"], flops=budget)
        line["published isoflop law"] = round(law.vocab_size)
        lines.append(line)
    return lines


def plot(rows):
    figures = {}
    for metric, label in METRICS.items():
        with matplotlib.rc_context(plots.STYLE):
            figure = Figure(figsize=(7, 4.6), layout="constrained")
            axes = figure.add_subplot()
            best = best_rates(rows, metric)
            budgets = list(dict.fromkeys((row["n_nv"], row["budget"]) for row in best))
            for index, (n_nv, budget) in enumerate(budgets):
                own = sorted(
                    (r for r in best if (r["n_nv"], r["budget"]) == (n_nv, budget)),
                    key=lambda r: (r["seed"], r["vocab_size"]),
                )
                colour = plots.PALETTE[index % len(plots.PALETTE)]
                for seed in dict.fromkeys(r["seed"] for r in own):
                    points = [(r["vocab_size"], r[metric]) for r in own if r["seed"] == seed]
                    axes.plot(
                        *zip(*points, strict=True),
                        marker="o" if seed == own[0]["seed"] else "x",
                        color=colour,
                        label=f"{budget:.0e} FLOPs, N_nv {n_nv:,}, seed {seed}",
                    )
            axes.set_xscale("log", base=2)
            axes.set_xlabel("vocabulary (entries)")
            axes.set_ylabel(label)
            axes.legend()
        figures[metric] = figure
    return figures


if __name__ == "__main__":
    main(run, plot, table=table)
