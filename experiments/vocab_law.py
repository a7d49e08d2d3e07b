"""Fits all three approaches, calibrates them on the curves, and shows what each choice changes."""

import dataclasses

import numpy as np

from lminf import scaling
from lminf.errors import InputError
from lminf.experiments import _tables
from lminf.experiments._main import main
from lminf.run import plots, style, tables
from lminf.run.progress import track
from lminf.scaling import evidence, published, synthetic, validation
from lminf.scaling import fertility as fertilities
from lminf.scaling.vocab_derivative import VocabLaw2
from lminf.scaling.vocab_isoflop import VocabLaw1, envelope, measured
from lminf.scaling.vocab_loss import VocabLaw3, profile

SEPARATE = ("calibration", "sensitivity", "leave one family out", "exponent by metric")


def run(c, out):
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


def measure(c, out):
    fertility = fertilities.PUBLISHED
    table = (
        scaling.read_vocab(_tables.found(c.data, "vocab_law"))
        if c.data
        else synthetic.vocab_sweep(noise=0.005, seed=c.seed)
    )
    procedures = [VocabLaw1(), VocabLaw2(), VocabLaw3("reference"), VocabLaw3("tokens")]
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
    for row in evidence.calibration(table, laws):
        yield {"part": "calibration", **row}
    for row in evidence.metric_exponents(table):
        yield {"part": "exponent by metric", **row}
    for row in profile(VocabLaw3("tokens"), table, fertility=fertility, grid=c.profile):
        yield {"part": "profile of alpha2, tokens", **row}
    for procedure in (VocabLaw1(), VocabLaw3("reference"), VocabLaw3("tokens")):
        for row in validation.leave_one_family_out(procedure, table, fertility=fertility):
            name = getattr(procedure, "mode", "isoflop")
            keep = ("left_out_n_nv", "alpha_nv", "alpha2", "vocab", "rmse_left_out", "note")
            yield {"part": "leave one family out", "law": name,
                   **{key: row[key] for key in keep if key in row}}  # fmt: skip
    if c.sensitivity:
        sources = {"as_published": table}
        if c.data:
            sources["from_shapes"] = scaling.read_vocab(c.data, n_nv="from_shapes")
        for row in evidence.sensitivity(sources, fertility, n_nv=7e9):
            yield {"part": "sensitivity", **row}
    kept = envelope(measured(table))
    for n, v, f, loss in zip(kept.n_nv, kept.n_v, kept.flops, kept.loss, strict=True):
        yield {"part": "envelope", "n_nv": n, "n_v": v, "flops": f, "loss": loss}
    yield from isoflop_rows(table)


def predictions(law, sizes):
    for n_nv in sizes:
        row = {"part": "prediction", "law": law.version, "n_nv": n_nv}
        try:
            found = law.optimum(n_nv=n_nv)
            low, high = law.interval(n_nv=n_nv)[:2] if law.draws else (None, None)
            row |= {"vocab": found.vocab_size, "low": low, "high": high, "flops": found.flops}
        except InputError as error:
            row["note"] = str(error)
        yield row


def isoflop_rows(table):
    for family in np.unique(table.n_nv):
        budget = evidence.common_budget(table, family)
        for metric in evidence.METRICS:
            curve = evidence.isoflop_curve(table, family, budget, metric)
            above = curve.loss - curve.loss.min()
            for v, loss in zip(curve.vocab_size, above, strict=True):
                yield {"part": "isoflop", "n_nv": family, "flops": budget, "metric": metric,
                       "vocab": v, "excess": loss, "optimum": curve.optimum}  # fmt: skip


def table(rows):
    """Predicted V by law and size; the other parts are in rows.jsonl and files of their own."""
    return [
        {
            "law": row["law"],
            "N_nv": f"{row['n_nv']:.3g}",
            **{name: row.get(name) and round(row[name]) for name in ("vocab", "low", "high")},
            "note": row.get("note", ""),
        }
        for row in rows
        if row["part"] == "prediction"
    ]


def plot(rows):
    """A figure for each part that the rows hold: what repeats published losses is not kept here."""
    drawn = {"isoflop": isoflops, "prediction": approaches, "envelope": vocabularies}
    figures = {}
    for part, draw in drawn.items():
        own = [row for row in rows if row["part"] == part]
        figures |= draw(own) if own else {}
    return figures


def isoflops(rows):
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


def approaches(rows):
    """Each approach refitted and as published, with the intervals of its draws."""
    named = [{**row, "approach": approach(row["law"]), "fit": fitted(row["law"])} for row in rows]
    return {
        "approaches": plots.curves(
            named, x="n_nv", y="vocab", by="fit", panel="approach", log_x=True, log_y=True,
            interval=("low", "high"), band=True, y_limits=(2e3, 5e6),
            x_label="non-vocabulary parameters (count)",
            y_label="best vocabulary (entries; bands: 95 %)",
        )
    }  # fmt: skip


def vocabularies(rows):
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


def approach(law):
    """The title of a law's approach, refitted or published."""
    name = law.removeprefix("tao2024-")
    fits = [own for own in APPROACHES if name == own or name.startswith(f"{own}-")]
    return APPROACHES[max(fits, key=len)] if fits else name


def fitted(law):
    return "published" if law.startswith("tao2024-") else "refitted"


if __name__ == "__main__":
    main(run, plot, table=table)
