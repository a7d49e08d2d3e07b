"""Vocabulary sizes at equal FLOPs: two losses of small models, and the best size by each."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from scipy import linalg, optimize

from lminf.errors import InputError
from lminf.experiments import _collect, _corpus, _noise, _small
from lminf.experiments._main import main
from lminf.experiments._optima import (
    NEAR,
    RESAMPLED,
    Optimum,
    budgets_of,
    curve,
    optima_of,
)
from lminf.models import cost
from lminf.run import plots, style
from lminf.run.folder import Row, RunFolder
from lminf.scaling import accounting, losses, published, vocab_derivative
from lminf.scaling.fertility import PUBLISHED, Fertility

METRICS = {"loss_u": "L_u (nats/token)", "bits_per_character": "bits per character"}


def check(c: ConfigDict, given: Collection[str]) -> None:
    """Refuses settings that contradict each other."""
    if c.data.vocab not in c.data.vocabs:
        raise InputError(
            f"--config.data.vocab={c.data.vocab} is not one of data.vocabs={c.data.vocabs}, for "
            f"which the tokenizers are trained; add it there"
        )
    if list(c.budgets) != sorted(c.budgets):
        raise InputError(f"--config.budgets={c.budgets}: give budgets that rise")
    if c.data.characters and "data.length" in given:
        raise InputError(
            f"--config.data.length={c.data.length}: rows have {c.data.characters} characters; "
            f"give --config.data.characters=0 for rows of so many tokens"
        )
    if c.decay and not c.schedule.startswith("wsd"):
        raise InputError(
            f"--config.decay={c.decay}: {c.schedule} has no decay; give decay=0, or a wsd schedule"
        )
    _small.check(c, budgets=budgets_in_tokens(c))


def budgets_in_tokens(c: ConfigDict) -> list[int]:
    shape = _small.shape_of(c, c.data.vocab)
    n_nv, n_v = cost.block_parameters(shape), c.data.vocab * shape.width
    per_token = accounting.training_flops(n_nv, n_v, 1)
    return [int(flops / per_token) for flops in c.budgets]


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    study = _corpus.corpus(c.data.corpus)
    tokenizer = study.tokenizers(c.data.vocabs)[c.data.vocab]
    tokens, held_out = study.tokens(tokenizer)
    log_unigram = losses.log_unigram(np.bincount(tokens, minlength=c.data.vocab))
    fertility = len(held_out) / _corpus.HELD_OUT
    if c.data.characters:
        c = c.copy_and_resolve_references()
        c.data.length = max(2, round(c.data.characters * fertility))
    shape = _small.shape_of(c, c.data.vocab)
    n_nv, n_v = cost.block_parameters(shape), c.data.vocab * shape.width
    budgets = budgets_in_tokens(c)
    for measured in _small.train(c, shape, tokens, held_out, budgets=budgets):
        loss = float(measured.nll.mean())
        yield {
            "corpus": study.name, "text_digest": study.digest, "seed": measured.seed,
            "budget_mode": "branches" if c.decay else "checkpoints", "vocab_size": c.data.vocab,
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
    n_nv, n_v = cost.block_parameters(shape), c.data.vocab * shape.width
    # The branches, and the trunk up to the last of them.
    trained = c.decay * sum(c.budgets) + (1 - c.decay) * max(c.budgets)
    per_token = 6 * (n_nv + n_v)
    return {
        "layers": shape.num_layers, "width": shape.width, "n_nv": n_nv, "vocab": c.data.vocab,
        "n_v": n_v, "batch": c.data.batch, "tokens": int(max(c.budgets) / per_token),
        "flops_per_token": per_token, "runs": len(c.rates) * c.replicates,
        "flops": float(trained) * len(c.rates) * c.replicates,
    }  # fmt: skip


def nearest(values: Sequence[float], value: float) -> float:
    return min(values, key=lambda v: abs(v - value))


def table(rows: list[Row]) -> list[Row]:
    """The best vocabulary of each shape and budget by both losses, beside the published law's."""
    return [
        {
            "N_nv": one.n_nv, "FLOPs": f"{one.budget:.0e}", "loss": metric,
            "least at V": int(one.by_size.x[np.argmin(one.by_size.means)]),
            "told apart from": " and ".join(
                "none" if v is None else f"{v:g}" for v in _noise.bracket(one.by_size)
            ),
            "parabola": one.parabola[0] and round(one.parabola[0]),
            "95 % of noise": span(one.parabola[1:]),
            "surface": one.surface and round(one.surface),
            "95 % of runs": span(one.interval),
            "without one size": span(ends(one.without_a_size)),
            "noise": one.by_size.sigma,
            "published law": round(published_optimum(rows, one.n_nv, one.budget)),
        }
        for metric in METRICS for one in optima_of(rows, metric)
    ]  # fmt: skip


def ends(values: Sequence[float]) -> tuple[float, float] | None:
    return (min(values), max(values)) if values else None


def span(interval: tuple[float | None, float | None] | None) -> str | None:
    if interval is None or interval[0] is None or interval[1] is None:
        return None
    return f"{interval[0]:.0f} .. {interval[1]:.0f}"


def published_optimum(rows: list[Row], n_nv: int, budget: float) -> float:
    width = next(row["width"] for row in rows if row["n_nv"] == n_nv)
    return published.ISOFLOP.optimum(n_nv=n_nv, d=width, flops=budget).vocab_size


def findings(rows: list[Row]) -> str:
    """What the rows say, in sentences; a difference within its noise is called none."""
    first = rows[0]
    lines = [
        f"The text is `{first['corpus']}`, digest {first['text_digest']}: "
        f"{_corpus.DESCRIPTIONS[first['corpus']]}.",
        "Noise is the standard deviation between seeds of one setting, pooled over the sizes of a "
        "budget. Two losses are told apart where they differ by more than twice the noise of their "
        "difference; an optimum is claimed only where a size below and a size above the best one "
        "are. The parabola is of the best size and its neighbours, its interval of "
        f"{_noise.DRAWS:,} draws of the losses with that noise. The surface is one quadratic in "
        "ln N_v, ln N_nv and ln D, with a cube of ln N_v, for all shapes and budgets, fitted to "
        f"the sizes within a factor of {NEAR} of each best one; its interval is of {RESAMPLED} "
        "resamples of whole runs.",
    ]
    for metric, label in METRICS.items():
        by_budget = optima_of(rows, metric)
        lines += [
            f"N_nv = {one.n_nv:,}, {one.budget:.0e} FLOPs, {label}: "
            f"{_noise.describe_minimum(one.by_size, 'V')}"
            for one in by_budget
        ]
        lines += [describe_methods(by_budget, label), describe_shift(by_budget, label)]
        if metric == "loss_u":
            lines.append(describe_law(rows, by_budget))
    return "\n\n".join(filter(None, [*lines, describe_rates(rows)]))


def describe_methods(optima: Sequence[Optimum], label: str) -> str:
    """What the choice of a method moves, beside what the sample of runs does."""
    claimed = [one for one in optima if one.bracketed]
    text = (
        f"By {label} the optimum is told apart from sizes on both sides at {len(claimed)} of "
        f"{len(optima)} budgets of a shape"
    )
    fitted = [one for one in claimed if one.surface and one.interval]
    if not fitted:
        return text + "."
    methods = max(max(one.methods) / min(one.methods) for one in fitted)
    low_high = [one.interval for one in fitted if one.interval]
    runs = max(high / low for low, high in low_high)
    sizes = max(max(one.without_a_size) / min(one.without_a_size) for one in fitted)
    return (
        f"{text}. There least size, parabola and surface lie within a factor of {methods:.2f} of "
        f"each other at most, the surface's 95 % intervals over runs are at most a factor of "
        f"{runs:.2f} wide, and leaving out any one size moves its optimum within a factor of "
        f"{sizes:.2f}. The surface misses the losses that it is fitted to by "
        f"{fitted[0].misfit:.3f}, root mean square; what seeds differ by is "
        f"{np.median([one.by_size.sigma for one in fitted]):.3f}."
    )


def describe_shift(optima: Sequence[Optimum], label: str) -> str:
    """Whether the optimum moves with budget and shape: exponents over draws of the surface."""
    claimed = [one for one in optima if one.bracketed and one.interval]
    design = np.array([[1, np.log(one.budget), np.log(one.n_nv)] for one in claimed])
    if len(claimed) < 3 or np.linalg.matrix_rank(design) < 3:
        return f"By {label} too few budgets and shapes have an optimum to say how it moves."
    draws = np.log([one.draws for one in claimed])
    draws = draws[:, np.isfinite(draws).all(0)]
    slopes = linalg.lstsq(design, draws)[0][1:]
    point = linalg.lstsq(design, np.log([one.surface for one in claimed]))[0][1:]
    parts = []
    for name, slope, sampled in zip(("FLOPs", "N_nv"), point, slopes, strict=True):
        low, high = np.percentile(sampled, [2.5, 97.5])
        verdict = "rises" if low > 0 else "falls" if high < 0 else "is not seen to move"
        parts.append(f"{verdict} with {name} (as {name}^{slope:.2f}, 95 % {low:.2f} .. {high:.2f})")
    return (
        f"By {label} V of the surface's optimum {' and '.join(parts)}, over {len(claimed)} budgets "
        f"of {len({one.n_nv for one in claimed})} shapes."
    )


def describe_law(rows: list[Row], optima: Sequence[Optimum]) -> str:
    """The published law's optima beside these, and what part the tokenizers have in it."""
    claimed = [(one, one.surface or one.parabola[0]) for one in optima if one.bracketed]
    ratios = [v / published_optimum(rows, one.n_nv, one.budget) for one, v in claimed if v]
    measured_fertility = _collect.fertility(rows)
    if not ratios or len(measured_fertility.constants) < 8:
        return ""
    law_range = published.ISOFLOP.fitted_range
    sizes, measured = np.array(measured_fertility.constants).reshape(-1, 2).T
    fitted, _ = optimize.curve_fit(lambda v, k, g, f0: k * v**-g + f0, sizes, measured,
                                   p0=(10.0, 0.5, 0.2))  # fmt: skip
    smooth = Fertility("fitted", "powerlaw", tuple(fitted), measured_fertility.fitted_range, np.inf)
    width = next(row["width"] for row in rows if row["n_nv"] == claimed[-1][0].n_nv)
    n_nv = claimed[-1][0].n_nv
    by_published, by_measured = (
        float(vocab_derivative.flops_root(n_nv, width=width, fertility=f)[0])
        for f in (PUBLISHED, smooth)
    )
    return (
        f"The published law's optimum is {min(ratios):.1f} to {max(ratios):.1f} times smaller than "
        f"the surface's. It is extrapolated {law_range['flops'][0] / claimed[-1][0].budget:,.0f} "
        f"times in FLOPs and {law_range['n_nv'][0] / n_nv:,.0f} times in N_nv below its range, to "
        f"sizes under the {law_range['vocab'][0]:,.0f} entries of its smallest vocabulary. Its "
        f"fertility is not that of these tokenizers either: at V = {sizes[0]:.0f} it has "
        f"{float(PUBLISHED.tokens_per_character(sizes[0])):.2f} tokens per character, measured are "
        f"{measured[0]:.2f}. What fertility alone decides, the V of least FLOPs for a fixed text, "
        f"is at N_nv = {n_nv:,} {by_published:,.0f} by the published one and {by_measured:,.0f} by "
        "ours."
    )


def describe_rates(rows: list[Row]) -> str:
    """Whether the peak that every size has is the best one, where others were tried."""
    settings = _noise.settings(rows, ("n_nv", "budget", "vocab_size", "lr"), "loss")
    tried: dict[tuple, dict[float, float]] = {}
    for (*cell, lr), values in settings.items():
        tried.setdefault(tuple(cell), {})[lr] = float(np.mean(values))
    several = {cell: rates for cell, rates in tried.items() if len(rates) > 2}
    if not several:
        return ""
    inside = sum(
        min(rates, key=lambda lr: rates[lr]) not in (min(rates), max(rates))
        for rates in several.values()
    )
    vertices = [
        _noise.vertex(np.log2(sorted(rates)), np.array([rates[lr] for lr in sorted(rates)]))
        for rates in several.values()
    ]
    middles = [np.log2(sorted(rates)[1]) for rates in several.values()]
    off = [v[0] - middle for v, middle in zip(vertices, middles, strict=True) if v is not None]
    text = f"At {inside} of {len(several)} shapes and sizes where three rates were tried the middle"
    if not off:
        return f"{text} one, which all sizes have, is the best."
    return (
        f"{text} one, which all sizes have, is the best; the parabola's best rate is there "
        f"{min(off):+.2f} to {max(off):+.2f} octaves from it."
    )


def plot(rows: list[Row]) -> Mapping[str, Figure]:
    figures = {metric: bowls(rows, metric) for metric in METRICS}
    return figures | {"optimum": optima(rows)}


LOSSES = {"loss_u": "L_u (nats/token)", "bits_per_character": "loss (bits/character)"}


def bowls(rows: list[Row], metric: str) -> Figure:
    """Every seed's loss at its size's best rate."""
    points = []
    for n_nv, budget in budgets_of(rows):
        by_size = curve(rows, n_nv, budget, metric)
        points += [
            {"vocab": int(size), "loss": value, "budget": f"{style.power(budget)} FLOPs",
             "shape": f"N = {n_nv:,}"}
            for size, values in zip(by_size.x, by_size.values, strict=True)
            for value in values
        ]  # fmt: skip
    return plots.curves(
        points, x="vocab", y="loss", by="budget", panel="shape", log_x=True,
        x_label="vocabulary (entries)", y_label=LOSSES[metric],
    )  # fmt: skip


def optima(rows: list[Row]) -> Figure:
    """The optima that sizes on both sides are told apart from, beside the published law."""
    points = []
    for metric, label in METRICS.items():
        for one in optima_of(rows, metric):
            best = one.surface or one.parabola[0]
            low, high = one.interval or one.parabola[1:]
            if best and one.bracketed:
                points.append({"by": f"least {label.partition(' (')[0]}", "flops": one.budget,
                              "vocab": best, "low": low, "high": high,
                              "shape": f"N = {one.n_nv:,}"})  # fmt: skip
    for n_nv, budget in budgets_of(rows):
        points.append({"by": "published law,\nfar below its range", "flops": budget,
                      "vocab": published_optimum(rows, n_nv, budget),
                      "shape": f"N = {n_nv:,}"})  # fmt: skip
    return plots.curves(
        points, x="flops", y="vocab", by="by", panel="shape", log_x=True, log_y=True,
        interval=("low", "high"), x_label="training compute (FLOPs)",
        y_label="best vocabulary (entries)",
    )  # fmt: skip


def files(rows: list[Row]) -> dict[str, str]:
    """What stands beside the report: the table that `lminf scaling fit vocab` takes, and the
    tokens per character of its tokenizers."""
    measured = json.dumps(_collect.fertility(rows).to_json(), indent=2) + "\n"
    return {"table.csv": _collect.vocab(rows), "table.fertility.json": measured}


if __name__ == "__main__":
    main(run, plot, table=table, check=check)
