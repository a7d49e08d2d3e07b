"""lminf scaling fit: a law from a table of runs."""

import argparse
import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console

from lminf import scaling
from lminf.atomic import atomic_write
from lminf.commands.scaling._arguments import Result, Row, fertility_of, options, resampling
from lminf.errors import InputError
from lminf.run import tables as show
from lminf.run.progress import Progress, track
from lminf.scaling import diagnostics, robust_fit
from lminf.scaling.laws import Law
from lminf.scaling.steps import StepFit
from lminf.scaling.vocab_derivative import DerivativeFit
from lminf.scaling.vocab_isoflop import IsoflopFit
from lminf.scaling.vocab_loss import LossFit


@contextlib.contextmanager
def progress_of(label: str) -> Iterator[None]:
    """A line of progress of the fits inside: on a terminal always, else every half a minute."""
    with Progress(0, label=label, unit="fits") as progress:

        def observe(stage: str, done: int, total: int) -> None:
            progress.label = f"{label}: {stage}"
            progress.show(done, total)

        token = robust_fit.OBSERVER.set(observe)
        try:
            yield
        finally:
            robust_fit.OBSERVER.reset(token)


def vocab(args: argparse.Namespace) -> Result:
    """The vocabulary law of a table, and of it without each family."""
    fertility = fertility_of(args)
    source = args.n_source or "as_published"
    table = scaling.read_vocab(args.data, fertility=fertility, n_nv=source)
    if args.metric:
        table = diagnostics.with_metric(table, args.metric)
    procedure = _vocab_procedure(args)
    sampling = resampling(args, 300, len(table))
    with progress_of(f"fit vocab, {len(table):,} rows"):
        law = scaling.fit(procedure, table, fertility=fertility, **sampling)
        without = list(diagnostics.leave_one_family_out(procedure, table, fertility=fertility))
    return _fitted(args, law, "left out: one family; V at N = 7e9", without)


def _vocab_procedure(args: argparse.Namespace) -> IsoflopFit | DerivativeFit | LossFit:
    approach = args.approach or 3
    per_approach = {
        1: ("densify", "exponents", "metric"),
        2: ("anchor_flops",),
        3: ("bounds", "flops_limit"),
    }
    for owner, names in per_approach.items():
        for name in names:
            if owner != approach and getattr(args, name) is not None:
                raise InputError(
                    f"--{name.replace('_', '-')} belongs to approach {owner}, and approach "
                    f"{approach} is fitted; add --approach {owner} or leave it out"
                )
    if approach == 1:
        return IsoflopFit(
            **options(args, selector="mode", densify="densify", exponents="exponents")
        )
    if approach == 2:
        if args.mode is not None:
            raise InputError(f"--mode={args.mode}: approach 2 has no modes; leave it out")
        return DerivativeFit(**options(args, anchor_flops="anchor_flops"))
    return LossFit(**options(args, mode="mode", bounds="bounds", flops_limit="flops_limit"))


def step(args: argparse.Namespace) -> Result:
    """The step law of a table, and of it without each group."""
    table = scaling.read_step(args.data, seq_len=args.seq_len or 2048)
    procedure = StepFit(
        **options(
            args, threshold="threshold", estimator="estimator", target="target", batch_n="batch_n",
            fix_n="fix_n",
        )
    )  # fmt: skip
    sampling = resampling(args, 1000)
    law = scaling.fit(procedure, table, **sampling)
    groups = min(np.unique(table.group).size, diagnostics.MOST_GROUPS)
    without = list(
        track(diagnostics.leave_one_group_out(procedure, table), total=groups,
              label=f"fit step, {len(table):,} rows: leaving one group out", unit="groups")
    )  # fmt: skip
    gaps = [row["gap_per_mille"] for row in without if "gap_per_mille" in row]
    title = "left out: one group"
    if gaps:
        title += f"; mean gap on the unseen group {np.mean(gaps):.2f} per mille"
    return _fitted(args, law, title, without)


def chinchilla_law(args: argparse.Namespace) -> Result:
    """The Chinchilla loss of a table of runs."""
    table = scaling.read_curves(args.data)
    sampling = resampling(args, 300, len(table))
    with progress_of(f"fit chinchilla, {len(table):,} rows"):
        law = scaling.fit(scaling.ChinchillaFit(), table, **sampling)
    return _fitted(args, law, "", [])


def density(args: argparse.Namespace) -> Result:
    """The density law of a table of reference models."""
    table = scaling.read_curves(args.data, needs_score=True)
    sampling = resampling(args, 300, len(table))
    with progress_of(f"fit density, {len(table):,} rows"):
        law = scaling.fit(scaling.DensityFit(), table, **sampling)
    return _fitted(args, law, "", [])


def _fitted(args: argparse.Namespace, law: Law, title: str, without: list[Row]) -> Result:
    if args.out:
        with atomic_write(Path(args.out)) as temporary:
            law.save(temporary)
    rows = []
    for name, value in law.constants.items():
        low, high = law.intervals.get(name, (None, None))
        exponential = math.exp(value) if name.startswith("ln_") or name.endswith("_ln_k") else None
        rows.append(
            {"constant": name, "value": value, "exp": exponential, "low": low, "high": high}
        )
    body = {key: value for key, value in law.to_json().items() if key != "draws"}
    result = {**body, "leave_one_out": without, "written": args.out}

    def text(console: Console) -> None:
        console.print(f"{law.version}  ({law.source})")
        console.print(", ".join(f"{k} in {v}" for k, v in law.units.items()))
        console.print(show.rich_table(rows, digits=5))
        console.print(f"intervals (95 %): {law.resampling or 'none'}")
        for name in ("row_intervals", "group_intervals"):
            if name in law.diagnostics:
                spans = law.diagnostics[name].items()
                lines = ", ".join(f"{k} {a:.3f}..{b:.3f}" for k, (a, b) in spans)
                console.print(f"{name.replace('_', ' ')}: {lines}")
        facts = {k: v for k, v in law.diagnostics.items() if isinstance(v, int | float | str)}
        console.print(", ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}"
                                for k, v in facts.items()))  # fmt: skip
        for note in law.warnings:
            console.print(f"warning: {note}")
        if without:
            console.print(show.rich_table(without, title=title))
        if args.out:
            console.print(f"written: {args.out}")

    return result, text
