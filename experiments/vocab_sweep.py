"""Vocabulary sizes at equal FLOPs: two losses of small models, and the best size by each."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.config import closest
from lminf.errors import InputError
from lminf.experiments import _corpus, _noise, _small
from lminf.experiments._main import main
from lminf.run import plots, style
from lminf.run.folder import Row, RunFolder
from lminf.scaling import accounting, collect, losses, published

MODES = ("checkpoints", "runs")
METRICS = {"loss_u": "L_u (nats/token)", "bits_per_character": "bits per character"}


def check(c: ConfigDict, given: Collection[str]) -> None:
    """Refuses settings that contradict each other."""
    if c.budget_mode not in MODES:
        raise InputError(
            f"there is no budget mode {c.budget_mode!r}; {closest(c.budget_mode, MODES)}"
        )
    if c.data.vocab not in c.data.vocabs:
        raise InputError(
            f"--config.data.vocab={c.data.vocab} is not one of data.vocabs={c.data.vocabs}, for "
            f"which the tokenizers are trained; add it there"
        )
    if list(c.budgets) != sorted(c.budgets):
        raise InputError(f"--config.budgets={c.budgets}: give budgets that rise")
    budgets = budgets_in_tokens(c)
    for asked in [budgets] if c.budget_mode == "checkpoints" else [[budget] for budget in budgets]:
        _small.check(c, budgets=asked)


def budgets_in_tokens(c: ConfigDict) -> list[int]:
    shape = _small.shape_of(c, c.data.vocab)
    per_token = accounting.training_flops(_small.parameters(shape), c.data.vocab * shape.width, 1)
    return [int(flops / per_token) for flops in c.budgets]


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    study = _corpus.corpus(c.data.corpus)
    tokenizer = study.tokenizers(c.data.vocabs)[c.data.vocab]
    shape = _small.shape_of(c, c.data.vocab)
    n_nv, n_v = _small.parameters(shape), c.data.vocab * shape.width
    tokens, held_out = study.tokens(tokenizer)
    log_unigram = losses.log_unigram(np.bincount(tokens, minlength=c.data.vocab))
    fertility = len(held_out) / _corpus.HELD_OUT
    budgets = budgets_in_tokens(c)
    # Checkpoints inside one long run, or for each budget a run whose schedule ends there.
    runs = [budgets] if c.budget_mode == "checkpoints" else [[budget] for budget in budgets]
    for budgets_of_run in runs:
        for measured in _small.train(c, shape, tokens, held_out, budgets=budgets_of_run):
            loss = float(measured.nll.mean())
            yield {
                "corpus": study.name, "text_digest": study.digest, "seed": measured.seed,
                "budget_mode": c.budget_mode, "vocab_size": c.data.vocab,
                "width": shape.width, "n_nv": n_nv, "n_v": n_v, "lr": measured.lr,
                "tokens": measured.tokens, "characters": measured.tokens / fertility,
                "tokens_per_character": fertility,
                "budget": c.budgets[budgets.index(nearest(budgets, measured.tokens))],
                "flops": float(accounting.training_flops(n_nv, n_v, measured.tokens)),
                "loss": loss,
                "loss_u": losses.unigram_normalised(measured.nll, measured.targets, log_unigram),
                "bits_per_character": float(losses.bits_per_character(loss, fertility)),
            }  # fmt: skip


def planned(c: ConfigDict) -> Row:
    """What a cell costs: a row of its counts, FLOPs as the law counts them, without attention."""
    shape = _small.shape_of(c, c.data.vocab)
    n_nv, n_v = _small.parameters(shape), c.data.vocab * shape.width
    longest = max(c.budgets) if c.budget_mode == "checkpoints" else sum(c.budgets)
    per_token = 6 * (n_nv + n_v)
    return {
        "layers": shape.num_layers, "width": shape.width, "n_nv": n_nv, "vocab": c.data.vocab,
        "n_v": n_v, "batch": c.data.batch, "tokens": int(max(c.budgets) / per_token),
        "flops_per_token": per_token, "runs": len(c.rates) * c.replicates,
        "flops": float(longest) * len(c.rates) * c.replicates,
    }  # fmt: skip


def nearest(values: Sequence[float], value: float) -> float:
    return min(values, key=lambda v: abs(v - value))


def curve(rows: list[Row], n_nv: int, budget: float, metric: str) -> _noise.Curve:
    """Of each size the mean over seeds of `metric` at its best rate, by rising size."""
    cells = [row for row in rows if (row["n_nv"], row["budget"]) == (n_nv, budget)]
    settings = _noise.settings(cells, ("vocab_size", "lr"), metric)
    best: dict[int, tuple] = {}
    for (size, lr), values in settings.items():
        if size not in best or np.mean(values) < np.mean(best[size][1]):
            best[size] = (lr, values)
    sizes = sorted(best)
    return _noise.Curve(
        np.array(sizes), tuple(best[size][1] for size in sizes), tuple(best[s][0] for s in sizes)
    )


def budgets_of(rows: list[Row]) -> list[tuple[int, float]]:
    return list(dict.fromkeys((row["n_nv"], row["budget"]) for row in rows))


def table(rows: list[Row]) -> list[Row]:
    """The best vocabulary of each budget by both metrics, beside the published law's."""
    lines = []
    for n_nv, budget in budgets_of(rows):
        line = {"N_nv": n_nv, "FLOPs": f"{budget:.0e}"}
        for metric in METRICS:
            by_size = curve(rows, n_nv, budget, metric)
            v, low, high = _noise.optimum(by_size)
            line[f"least {metric} at V"] = int(by_size.x[np.argmin(by_size.means)])
            line[f"optimum by {metric}"] = v and round(v)
            line["95 % " + metric] = f"{low:.0f} .. {high:.0f}" if low and high else None
            line["noise " + metric] = by_size.sigma
        line["published law"] = round(published_optimum(rows, n_nv, budget))
        lines.append(line)
    return lines


def published_optimum(rows: list[Row], n_nv: int, budget: float) -> float:
    width = next(row["width"] for row in rows if row["n_nv"] == n_nv)
    return published.ISOFLOP.optimum(n_nv=n_nv, d=width, flops=budget).vocab_size


def findings(rows: list[Row]) -> str:
    """What the rows say, in sentences; a difference within its noise is called none."""
    first = rows[0]
    corpus = (
        f"The text is `{first['corpus']}`, digest {first['text_digest']}: "
        + (_corpus.DESCRIPTIONS[first["corpus"]])
    )
    lines = [
        corpus,
        "A size counts at its best learning rate; noise is the standard deviation between seeds of "
        "one setting, pooled over the sizes of a budget, and an interval is of optima of "
        f"{_noise.DRAWS:,} draws of the losses with that noise: what a parabola through sizes a "
        "factor of two apart is off by is not in it. Two losses are told apart where they differ "
        "by more than twice the noise of their difference.",
    ]
    for metric, label in METRICS.items():
        curves = {key: curve(rows, *key, metric) for key in budgets_of(rows)}
        for (_, budget), by_size in curves.items():
            lines.append(f"{budget:.0e} FLOPs, {label}: {_noise.describe_minimum(by_size, 'V')}")
        for n_nv in dict.fromkeys(n_nv for n_nv, _ in curves):
            lines.append(
                describe_shift({key: c for key, c in curves.items() if key[0] == n_nv}, label)
            )
    rates = sorted({row["lr"] for row in rows})
    edge = [
        f"V = {size} at {budget:.0e}"
        for key in budgets_of(rows)
        for budget, by_size in [(key[1], curve(rows, *key, "loss_u"))]
        for size, lr in zip(by_size.x, by_size.labels, strict=True)
        if len(rates) > 2 and lr in (rates[0], rates[-1])
    ]
    if edge:
        lines.append(
            f"The best of the rates {', '.join(f'{r:g}' for r in rates)} is the first or the last "
            f"for {'; '.join(edge)}: there a rate beyond them might do better."
        )
    return "\n\n".join(lines)


def describe_shift(curves: Mapping[tuple[int, float], _noise.Curve], label: str) -> str:
    """Whether the optimum rises with the budget: the exponent of V in FLOPs over draws."""
    inside = {
        key: by_size for key, by_size in curves.items() if _noise.optimum(by_size)[0] is not None
    }
    if len(inside) < 2:
        return f"By {label} fewer than two budgets have an optimum between the sizes: no movement."
    log_flops = np.log([budget for _, budget in inside])
    # Draws of their own for each budget: with the same ones the slope would seem to have no noise.
    drawn = np.log([_noise.sampled_optima(f, seed=i) for i, f in enumerate(inside.values())])
    slopes = np.polyfit(log_flops, drawn, 1)[0]
    vertex = np.log([_noise.optimum(by_size)[0] for by_size in inside.values()])
    slope = np.polyfit(log_flops, vertex, 1)[0]
    low, high = np.percentile(slopes, [2.5, 97.5])
    verdict = (
        "it rises with the budget" if low > 0
        else "it falls with the budget" if high < 0
        else "the noise does not let one say that it moves"
    )  # fmt: skip
    return (
        f"By {label} the optimum goes as FLOPs^{slope:.2f} (95 % {low:.2f} .. {high:.2f}) at this "
        f"one N_nv over {len(inside)} budgets: {verdict}."
    )


def plot(rows: list[Row]) -> Mapping[str, Figure]:
    figures = {metric: bowls(rows, metric) for metric in METRICS}
    return figures | {"optimum": optima(rows)}


LOSSES = {"loss_u": "L_u (nats/token)", "bits_per_character": "loss (bits/character)"}


def bowls(rows: list[Row], metric: str) -> Figure:
    """Every seed's loss at its size's best rate, and 95 % of the optimum of each budget."""
    shown = []
    for n_nv, budget in budgets_of(rows):
        by_size = curve(rows, n_nv, budget, metric)
        shown += [
            {"vocab": int(size), "loss": value, "budget": f"{style.power(budget)} FLOPs"}
            for size, values in zip(by_size.x, by_size.values, strict=True)
            for value in values
        ]
    figure = plots.curves(
        shown, x="vocab", y="loss", by="budget", log_x=True, x_label="vocabulary (entries)",
        y_label=LOSSES[metric], title="Every seed at the best rate; bars: 95 % of the optimum",
    )  # fmt: skip
    for index, key in enumerate(budgets_of(rows)):
        by_size = curve(rows, *key, metric)
        best, low, high = _noise.optimum(by_size)
        if best and low and high:
            least = by_size.means.min()
            colour = style.PALETTE[index % len(style.PALETTE)]
            figure.axes[0].plot([low, high], [least, least], "-", color=colour, linewidth=5,
                                alpha=0.35, solid_capstyle="butt")  # fmt: skip
    return figure


def optima(rows: list[Row]) -> Figure:
    """The optimum by budget, with its interval, beside the published law."""
    shown = []
    for n_nv, budget in budgets_of(rows):
        for metric, label in METRICS.items():
            best, low, high = _noise.optimum(curve(rows, n_nv, budget, metric))
            if best is not None:
                shown.append({"by": f"least {label.partition(' (')[0]}", "flops": budget,
                              "vocab": best, "low": low, "high": high})  # fmt: skip
        shown.append({"by": "published law,\nfar below its range", "flops": budget,
                      "vocab": published_optimum(rows, n_nv, budget)})  # fmt: skip
    return plots.curves(
        shown, x="flops", y="vocab", by="by", log_x=True, log_y=True, interval=("low", "high"),
        x_label="training compute (FLOPs)", y_label="best vocabulary (entries)",
    )  # fmt: skip


def files(rows: list[Row]) -> dict[str, str]:
    """What stands beside the report: the table that `lminf scaling fit vocab` takes, and the
    tokens per character of its tokenizers."""
    measured = json.dumps(collect.fertility(rows).to_json(), indent=2) + "\n"
    return {"table.csv": collect.vocab(rows), "table.fertility.json": measured}


if __name__ == "__main__":
    main(run, plot, table=table, check=check)
