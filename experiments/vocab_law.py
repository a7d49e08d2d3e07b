"""Fits all three approaches, calibrates them on the curves, and measures what choices change."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf import scaling
from lminf.errors import InputError
from lminf.experiments import _tables
from lminf.experiments._main import main
from lminf.run import plots, style, tables
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import track
from lminf.scaling import (
    diagnostics,
    published,
    recommend_vocab,
    robust_fit,
    synthetic,
    vocab_loss,
)
from lminf.scaling import fertility as fertilities
from lminf.scaling.fertility import Fertility
from lminf.scaling.tables import VocabTable
from lminf.scaling.vocab import VocabLaw
from lminf.scaling.vocab_derivative import PUBLISHED_SIZES, DerivativeFit
from lminf.scaling.vocab_isoflop import IsoflopFit, envelope, measured
from lminf.scaling.vocab_loss import LossFit

EDGES = (2e3, 1e6)  # of the figure, entries
LONG = ((8e9, 15e12), (70e9, 15e12))  # (parameters, tokens) far beyond compute-optimal
SEPARATE = (
    "recommendation", "calibration", "sensitivity", "leave one family out", "exponent by metric",
)  # fmt: skip


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    """All rows; the long tables also as Markdown files of their own beside report.md."""
    kept = {}
    for row in measure(c, out):
        row = {key: _none_if_not_finite(value) for key, value in row.items()}
        kept.setdefault(row["part"], []).append(row)
        yield row
    for part in SEPARATE:
        if part in kept:
            text = f"# {part.capitalize()}\n\n{tables.markdown(kept[part])}\n"
            out.write(f"{part.replace(' ', '_')}.md", text)


def _none_if_not_finite(value):
    """A row holds no NaN: None says that there is no number, and `note` why."""
    return None if isinstance(value, float) and not np.isfinite(value) else value


def measure(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    fertility = fertilities.PUBLISHED
    table = (
        scaling.read_vocab(_tables.existing(c.data, "vocab_law"))
        if c.data
        else synthetic.vocab_sweep(noise=0.005, seed=c.seed)
    )
    procedures = [IsoflopFit(), DerivativeFit(), LossFit("reference"), LossFit("tokens")]
    laws = []
    for procedure in track(procedures, total=len(procedures), label="fitting", unit="approaches"):
        try:
            law = scaling.fit(procedure, table, draws=c.draws, seed=c.seed)
        except InputError as error:
            yield {"part": "refused", "law": type(procedure).__name__, "note": str(error)}
            continue
        laws.append(law)
        if law.procedure.get("mode") == "reference":  # the same fit, another optimum
            procedure = {**law.procedure, "mode": "consistent-reference"}
            version = law.version.replace("reference", "consistent-reference")
            laws.append(dataclasses.replace(law, version=version, procedure=procedure))
    for law in laws:
        law.save(out / f"{law.version}.json")
    for law in [*laws, *published.VOCAB_LAWS.values()]:
        yield from predictions(law, c.n_nv)
        for name, value in law.constants.items():
            low, high = law.intervals.get(name, (None, None))
            yield {"part": "constant", "law": law.version, "constant": name, "value": value,
                   "low": low, "high": high}  # fmt: skip
    yield from recommendations(c.n_nv)
    yield from without_a_run(table, c.n_nv[0])
    for row in calibration(table, laws):
        yield {"part": "calibration", **row}
    for row in metric_exponents(table):
        yield {"part": "exponent by metric", **row}
    for row in profile(LossFit("tokens"), table, fertility=fertility, grid=c.profile):
        yield {"part": "profile of alpha2, tokens", **row}
    for procedure in (IsoflopFit(), LossFit("reference"), LossFit("tokens")):
        for row in diagnostics.leave_one_family_out(procedure, table, fertility=fertility):
            name = getattr(procedure, "mode", "isoflop")
            keep = ("left_out_n_nv", "alpha_nv", "alpha2", "vocab", "rmse_left_out", "note")
            yield {"part": "leave one family out", "law": name,
                   **{key: row[key] for key in keep if key in row}}  # fmt: skip
    if c.sensitivity:
        sources = {"as_published": table}
        if c.data:
            sources["from_shapes"] = scaling.read_vocab(c.data, n_nv="from_shapes")
        for row in sensitivity(sources, fertility, n_nv=7e9):
            yield {"part": "sensitivity", **row}
    kept = envelope(measured(table))
    for n, v, f, loss in zip(kept.n_nv, kept.n_v, kept.flops, kept.loss, strict=True):
        yield {"part": "envelope", "n_nv": n, "n_v": v, "flops": f, "loss": loss}
    yield from isoflop_rows(table)


def recommendations(sizes: Sequence[float]) -> Iterator[Row]:
    """The recommended vocabulary at the compute-optimal FLOPs of each size, and of LONG runs."""
    refits = recommend_vocab.published_refits()
    for n_nv, tokens in [*((size, None) for size in sizes), *LONG]:
        best = recommend_vocab.recommend(refits, n_nv=n_nv, tokens=tokens)
        low, high = best.interval
        yield {
            "part": "recommendation", "rows": refits.rows, "n_nv": n_nv, "tokens": tokens,
            "flops": best.flops, "vocab": best.vocab_size, "determined": best.determined,
            "low": low, "high": high, "waste": best.waste, "waste_by_laws": best.waste_by_laws,
            "flat low": best.flat[0], "flat high": best.flat[1],
            **{f"waste_{size}": lost for size, lost in best.costs.items()},
            **{f"{r.choice} {end}": value for r in best.ranges
               for end, value in (("low", r.low), ("high", r.high))},
            "note": best.sentences()[0],
        }  # fmt: skip


def without_a_run(table: VocabTable, n_nv: float) -> Iterator[Row]:
    """V at n_nv by approach 1, without interpolation, when each run is left out in turn."""
    for run in np.unique(table.run):
        out = table.run == run
        law = scaling.fit(IsoflopFit(densify="none"), table.select(~out), draws=0)
        yield {
            "part": "leave one run out", "n_nv": n_nv, "left_out_n_nv": float(table.n_nv[out][0]),
            "left_out_vocab": float(table.vocab_size[out][0]),
            "vocab": law.optimum(n_nv=n_nv).vocab_size,
        }  # fmt: skip


def calibration(table: VocabTable, laws: Sequence[VocabLaw]) -> list[Row]:
    """Per family, budget and metric: the optimum read off the curves beside every law's."""
    rows = []
    for family in np.unique(table.n_nv):
        width = float(table.width[table.n_nv == family][0])
        for share in (1.0, 0.5):
            flops = diagnostics.common_budget(table, family) * share
            for metric in diagnostics.METRICS:
                curve = diagnostics.isoflop_curve(table, family, flops, metric)
                row = {
                    "n_nv": float(family), "flops": flops, "metric": metric,
                    "measured_vocab": curve.optimum, "low": curve.low, "high": curve.high,
                    "note": curve.note,
                }  # fmt: skip
                for law in laws:
                    row[law.version] = predicted(law, family, width, flops)
                rows.append(row)
    return rows


def predicted(law: VocabLaw, n_nv: float, width: float, flops: float) -> float | None:
    try:
        return law.optimum(n_nv=float(n_nv), d=width, flops=flops).vocab_size
    except InputError:  # this law has no optimum there; the table says so by a gap
        return None


def metric_exponents(table: VocabTable) -> list[Row]:
    """N_v ~ F^e through the IsoFLOP optima of the families, per metric."""
    rows = []
    for metric in diagnostics.METRICS:
        flops, n_v = [], []
        for family in np.unique(table.n_nv):
            budget = diagnostics.common_budget(table, family)
            curve = diagnostics.isoflop_curve(table, family, budget, metric)
            if np.isfinite(curve.optimum):
                flops.append(budget)
                n_v.append(curve.optimum * table.width[table.n_nv == family][0])
        exponent = float("nan")
        if len(flops) > 1:
            exponent = float(np.polyfit(np.log(flops), np.log(n_v), 1)[0])
        rows.append({"metric": metric, "families": len(flops), "exponent": exponent})
    return rows


def sensitivity(
    tables: Mapping[str, VocabTable], fertility: Fertility, *, n_nv: float
) -> list[Row]:
    """V at n_nv (compute-optimal) under each choice that a fit makes; no draws.

    `tables`: the sweep by source of N_nv, "as_published" first.
    """
    table = next(iter(tables.values()))
    cases = [
        ("approach 1", IsoflopFit(), table, fertility),
        ("approach 1, least squares", IsoflopFit("ols"), table, fertility),
        ("approach 1, reference selector", IsoflopFit("reference"), table, fertility),
        ("approach 1, no interpolation", IsoflopFit(densify="none"), table, fertility),
        ("approach 1, converged interpolation", IsoflopFit(densify="converged"), table, fertility),
        ("approach 1, exponents free", IsoflopFit(exponents="free"), table, fertility),
        ("approach 2", DerivativeFit(), table, fertility),
        ("approach 2, anchor 2.5e17", DerivativeFit(anchor_flops=2.55e17), table, fertility),
        ("approach 2, anchor 3.0e17", DerivativeFit(anchor_flops=3.0e17), table, fertility),
        ("approach 2, sizes to 1.13B", DerivativeFit(sizes=PUBLISHED_SIZES[:-1]), table, fertility),
        ("approach 2, power-law fertility", DerivativeFit(), table, fertilities.POWERLAW),
    ]
    for name, variant in list(tables.items())[1:]:
        cases.append((f"approach 1, N_nv {name}", IsoflopFit(), variant, fertility))
        cases.append((f"approach 3 tokens, N_nv {name}", LossFit("tokens"), variant, fertility))
    for mode in ("reference", "consistent-reference", "tokens"):
        for limit in (2.18e17, 0.0, 1e18, 3e18):
            case = LossFit(mode, flops_limit=limit)
            cases.append((f"approach 3 {mode}, F >= {limit:g}", case, table, fertility))
        wide = LossFit(mode, bounds="wide")
        cases.append((f"approach 3 {mode}, no bounds", wide, table, fertility))
    bits = diagnostics.with_metric(table, "bits_per_character")
    cases.append(("approach 1 in bits per character", IsoflopFit(densify="none"), bits, fertility))
    return [choice_row(name, procedure, data, f, n_nv) for name, procedure, data, f in cases]


def choice_row(
    name: str,
    procedure: IsoflopFit | DerivativeFit | LossFit,
    table: VocabTable,
    fertility: Fertility,
    n_nv: float,
) -> Row:
    """V at n_nv by one procedure, and its exponent; a note where it has none."""
    row = {"choice": name, "vocab": None, "exponent": None, "note": ""}
    try:
        law = scaling.fit(procedure, table, fertility=fertility, draws=0)
        for key in ("alpha_nv", "gamma", "alpha2"):
            if key in law.constants:
                row["exponent"] = law.constants[key]
        row["note"] = "; ".join(law.warnings)
        row["vocab"] = law.optimum(n_nv=n_nv).vocab_size
    except InputError as error:
        row["note"] = str(error)
    return row


def profile(
    procedure: LossFit, table: VocabTable, *, fertility: Fertility, grid: Sequence[float]
) -> list[Row]:
    """Rows (alpha2, objective, log-likelihood ratio) with all other parameters re-fitted.

    The ratio is 2 n ln(Q / Q_min) of Laplace errors with n the number of runs, not rows, since
    checkpoints of a run share noise; below 3.84 a value of alpha2 is inside the 95 % interval.
    """
    kept = procedure.fitted_rows(table)
    lower, upper = (np.tile(np.array(b, float), (len(grid), 1)) for b in vocab_loss.BOUNDS["wide"])
    lower[:, 4] = upper[:, 4] = grid
    fits = robust_fit.minimise(
        vocab_loss.residual, procedure.columns(kept, fertility), starts=vocab_loss.STARTS,
        lower=lower, upper=upper, weights=np.ones((len(grid), len(kept))),
    )  # fmt: skip
    runs = np.unique(kept.run).size
    if not fits.converged.any():
        raise InputError(
            "no fit of the profile of alpha2 converged; the table does not determine it"
        )
    floor = 0.5 * len(kept) * robust_fit.RESIDUAL_FLOOR**2  # at a perfect fit nothing is left
    value = np.where(fits.converged, np.maximum(fits.objective, floor), np.nan)
    ratio = 2 * runs * np.log(value / np.nanmin(value))
    return [
        {"alpha2": float(a), "objective": float(v), "likelihood_ratio": float(r)}
        for a, v, r in zip(grid, value, ratio, strict=True)
    ]


def predictions(law: VocabLaw, sizes: Sequence[float]) -> Iterator[Row]:
    for n_nv in sizes:
        row = {"part": "prediction", "law": law.version, "n_nv": n_nv}
        try:
            optimum = law.optimum(n_nv=n_nv)
            low, high, method = law.interval(n_nv=n_nv) if law.draws else (None, None, "no draws")
            row |= {"vocab": optimum.vocab_size, "low": low, "high": high, "flops": optimum.flops,
                    "rows": law.diagnostics.get("rows"), "interval": method}  # fmt: skip
        except InputError as error:
            row["note"] = str(error)
        yield row


def isoflop_rows(table: VocabTable) -> Iterator[Row]:
    for family in np.unique(table.n_nv):
        budget = diagnostics.common_budget(table, family)
        for metric in diagnostics.METRICS:
            curve = diagnostics.isoflop_curve(table, family, budget, metric)
            above = curve.loss - curve.loss.min()
            for v, loss in zip(curve.vocab_size, above, strict=True):
                yield {"part": "isoflop", "n_nv": family, "flops": budget, "metric": metric,
                       "vocab": v, "excess": loss, "optimum": curve.optimum}  # fmt: skip


def table(rows: list[Row]) -> list[Row]:
    """The recommendations, then V by law and size with the rows that each was fitted to; the other
    parts are in rows.jsonl and files of their own."""
    chosen = [
        {
            "law": "recommendation" if row["determined"] else "not determined; best compromise",
            "N_nv": f"{row['n_nv']:.3g}" + (f", D {row['tokens']:.3g}" if row["tokens"] else ""),
            **{name: _whole(row[name]) for name in ("vocab", "low", "high")},
            "rows": row["rows"],
            "note": f"wastes {100 * row['waste']:.0f} % of the FLOPs under another choice",
        }
        for row in rows
        if row["part"] == "recommendation"
    ]
    return chosen + [
        {
            "law": row["law"],
            "N_nv": f"{row['n_nv']:.3g}",
            **{name: _whole(row.get(name)) for name in ("vocab", "low", "high")},
            "rows": row.get("rows") or "as published",
            "note": row.get("note", "") or row["interval"].partition("; ")[2],
        }
        for row in rows
        if row["part"] == "prediction"
    ]


def _whole(value: float | None) -> int | str:
    """Entries; an end that is no number is open."""
    return "open" if value is None else round(value)


def plot(rows: list[Row]) -> Mapping[str, Figure]:
    """A figure for each part that the rows hold: what repeats published losses is not kept here."""
    drawn = {"isoflop": isoflops, "prediction": approaches, "envelope": vocabularies}
    figures = {}
    for part, draw in drawn.items():
        selected = [row for row in rows if row["part"] == part]
        figures |= draw(selected) if selected else {}
    return figures


def isoflops(rows: list[Row]) -> dict[str, Figure]:
    named = [{**row, "family": f"N_nv = {style.short(row['n_nv'])}"} for row in rows]
    units = {
        "isoflop": ("L_u", "L_u above the lowest (nats/token)"),
        "isoflop_bits": ("bits_per_character", "loss above the lowest (bits/character)"),
    }
    return {
        stem: plots.curves(
            [row for row in named if row["metric"] == metric], x="vocab", y="excess", by="family",
            log_x=True, x_label="vocabulary (entries)", y_label=label,
            title="At the largest budget that all sizes reach",
        )
        for stem, (metric, label) in units.items()
    }  # fmt: skip


def approaches(rows: list[Row]) -> dict[str, Figure]:
    """Each approach refitted and as published, with the intervals of its draws; one that is open
    runs to the edge."""
    named = [
        {
            **row, "approach": approach(row["law"]), "fit": fitted(row["law"]),
            **{end: edge if row.get(end) is None else row[end]
               for end, edge in zip(("low", "high"), EDGES, strict=True)},
        }
        for row in rows
        if row.get("vocab") is not None
    ]  # fmt: skip
    return {
        "approaches": plots.curves(
            named, x="n_nv", y="vocab", by="fit", panel="approach", log_x=True, log_y=True,
            interval=("low", "high"), band=True, y_limits=EDGES,
            x_label="non-vocabulary parameters (count)",
            y_label="best vocabulary (entries; bands: 95 %, to an edge: open)",
        )
    }  # fmt: skip


def vocabularies(rows: list[Row]) -> dict[str, Figure]:
    return {
        "envelope": plots.curves(
            [{**row, "line": "N_v"} for row in rows], x="flops", y="n_v", by="line",
            log_x=True, log_y=True, joined=False, x_label="training compute (FLOPs)",
            y_label="vocabulary parameters of the best run (count)",
        )
    }  # fmt: skip


APPROACHES = {
    "isoflop": "Approach 1: equal compute",
    "derivative": "Approach 2: derivative",
    "loss": "Approach 3: loss, as released",
    "loss-consistent": "Approach 3: one covariate",
    "loss-tokens": "Approach 3: true tokens",
}


def approach(law: str) -> str:
    """The title of a law's approach, refitted or published."""
    name = law.removeprefix("tao2024-")
    fits = [known for known in APPROACHES if name == known or name.startswith(f"{known}-")]
    return APPROACHES[max(fits, key=len)] if fits else name


def fitted(law: str) -> str:
    return "published" if law.startswith("tao2024-") else "refitted"


if __name__ == "__main__":
    main(run, plot, table=table)
