"""lminf scaling predict vocab: one size or why there is none, and the size of each law."""

import argparse
import dataclasses
import math

from rich.console import Console

from lminf.commands.scaling._arguments import Result, Row, options, vocab_law
from lminf.errors import InputError
from lminf.run import tables as show
from lminf.scaling import (
    accounting,
    published,
    recommend_vocab,
)
from lminf.scaling.vocab import VocabLaw

SPREAD_WARNING = 1.25  # largest over smallest V of the approaches


def predict(args: argparse.Namespace) -> Result:
    """The recommended vocabulary (entries) or that there is none, and each law's own optimum."""
    laws: list[VocabLaw] = list(published.VOCAB_LAWS.values())
    if args.law:
        laws = [vocab_law(name) for name in args.law.split(",")]
    multiple = 128 * (args.tensor_parallel or 1)
    if multiple < 128:
        raise InputError(f"--tensor-parallel={args.tensor_parallel}: give 1 or more devices")
    accounting.require_raw("n", args.n, "n_nv")
    if args.width is not None:
        accounting.require_raw("width", args.width, "width")
    query = {"n_nv": args.n, **options(args, d="width", flops="flops", tokens="tokens")}
    rows = [_vocab_row(law, query, multiple) for law in laws]
    sizes = [row["vocab"] for row in rows]
    warnings = []
    if len(sizes) > 1 and max(sizes) / min(sizes) > SPREAD_WARNING:
        low, high = (rows[sizes.index(pick(sizes))] for pick in (min, max))
        warnings.append(
            f"the laws disagree by a factor of {max(sizes) / min(sizes):.2f}: "
            f"{low['law']} says {low['vocab']:,.0f}, {high['law']} says {high['vocab']:,.0f}"
        )
    outside = sorted({note for row in rows for note in row["warnings"] if "extrapolation" in note})
    warnings += outside[:1]
    chosen = None
    if not args.law:
        chosen = recommend_vocab.recommend(recommend_vocab.published_refits(), **query)
    result = {
        "query": {
            "n": args.n,
            "width": rows[0]["width"],
            **options(args, flops="flops", tokens="tokens"),
            "multiple": multiple,
        },
        "units": {"n": "parameters", "flops": "FLOPs", "tokens": "tokens", "vocab": "entries"},
        "laws": rows,
        "recommendation": chosen
        and {
            **dataclasses.asdict(chosen),
            "interval": chosen.interval,
            "sentences": chosen.sentences(multiple),
        },
        "spread": max(sizes) / min(sizes),
        "warnings": warnings,
    }

    def text(console: Console) -> None:
        console.print(
            f"Loss-optimal vocabulary for N = {args.n:.4g} parameters, width "
            f"{rows[0]['width']:g}; budgets in FLOPs, D in tokens; "
            f"V rounded up to a multiple of {multiple}"
        )
        console.print(
            show.rich_table(
                [
                    {
                        "law": row["law"],
                        "V": round(row["vocab"]),
                        "rounded": row["vocab_rounded"],
                        "95 % interval": _span(row["interval"]),
                        "N_v": f"{row['n_v']:.3g}",
                        "FLOPs": f"{row['flops']:.3g}",
                        "D": f"{row['tokens']:.3g}",
                        "head's share": f"{100 * row['head_share']:.2g} %",
                    }
                    for row in rows
                ]
            )
        )
        for note in warnings:
            console.print(f"warning: {note}")
        for row in rows:
            console.print(f"  {row['law']}")
            console.print(f"    interval: {row['interval']['method']}")
            for note in row["warnings"]:
                if note not in outside:  # said once above
                    console.print(f"    {note}")
        for sentence in chosen.sentences(multiple) if chosen else ():
            console.print(sentence)

    return result, text


def _vocab_row(law: VocabLaw, query, multiple: int) -> Row:
    optimum = law.optimum(**query)
    if law.draws:
        low, high, method = law.interval(**query)
    else:
        low, high, method = None, None, "none: the law was fitted without draws"
    return {
        "law": law.version,
        "approach": law.procedure["approach"],
        "vocab": optimum.vocab_size,
        "vocab_rounded": optimum.rounded(multiple),
        "interval": {"low": low, "high": high, "level": 0.95, "method": method},
        "n_v": optimum.n_v,
        "width": optimum.width,
        "flops": optimum.flops,
        "tokens": optimum.tokens,
        "characters": optimum.characters,
        "head_share": optimum.head_share,
        "inside_fitted_range": not any("extrapolation" in note for note in optimum.warnings),
        "warnings": list(optimum.warnings),
    }


def _span(interval: Row) -> str:
    if interval["low"] is None:
        return "none"
    ends = (interval["low"], interval["high"])
    return " .. ".join(f"{end:,.0f}" if math.isfinite(end) else "open" for end in ends)
