"""lminf scaling predict step and chinchilla: rates, batches and shapes by each law."""

import argparse
import dataclasses
import math

from rich.console import Console

from lminf.commands.scaling._arguments import Result, Row, load_kind, rule_and_law, split_laws
from lminf.run import tables as show
from lminf.scaling import (
    accounting,
    baselines,
    chinchilla,
    published,
    recommend_step,
)


def step(args: argparse.Namespace) -> Result:
    """Peak learning rate and batch (tokens) by each law."""
    accounting.require_raw("n", args.n, "n")
    accounting.require_raw("tokens", args.tokens, "tokens")
    seq_len = args.seq_len or 2048
    accounting.require_raw("seq-len", seq_len, "seq_len")
    loss, guessed = args.loss, False
    if loss is None:
        loss, guessed = float(published.REFIT.loss(n=args.n, d=args.tokens)), True
    query = baselines.Query(args.n, args.tokens, loss, args.flops_per_token)
    rows = []
    for name in split_laws(args.law or "all"):
        rule, law = rule_and_law(name)
        lr, batch = rule.setting(query)
        row: Row = {
            "law": rule.name,
            "lr": lr,
            "batch_tokens": batch,
            "batch_sequences": None if batch is None else batch / seq_len,
            "note": rule.note,
            "warnings": [],
        }
        if guessed and "loss" in rule.needs:
            row["note"] += f"; loss {loss:.3f} predicted by {published.REFIT.version}, give --loss"
        if law is not None:
            spans = law.interval(n=args.n, d=args.tokens) if law.draws else {}
            row["intervals"] = {
                key: {"low": span.low, "high": span.high, "method": span.method}
                for key, span in spans.items()
            }
            row["warnings"] = law.outside({"n": args.n, "d": args.tokens})
            if law.diagnostics.get("bowl"):
                row["excess_per_mille"] = {
                    what: 1000 * law.excess(lr_factor=a, batch_factor=b)
                    for what, a, b in (("lr x 2", 2, 1), ("batch x 2", 1, 2), ("both x 2", 2, 2))
                }
        rows.append(row)
    named = [row["law"] for row in rows]
    excluded = (
        [f"{k}: {v}" for k, v in baselines.NOT_IMPLEMENTED.items()]
        if args.law in (None, "all")
        else []
    )
    chosen = None if args.law else recommend_step.recommend(n=args.n, d=args.tokens)
    result = {
        "query": {"n": args.n, "tokens": args.tokens, "seq_len": seq_len, "loss": loss},
        "units": {
            "n": "non-embedding parameters", "tokens": "tokens", "lr": "peak learning rate",
            "batch_tokens": "tokens", "batch_sequences": f"sequences of {seq_len} tokens",
        },
        "laws": rows,
        "recommendation": chosen and {**dataclasses.asdict(chosen),
                                      "sentences": chosen.sentences(seq_len)},
        "not_evaluated": excluded,
    }  # fmt: skip

    def text(console: Console) -> None:
        console.print(
            f"N = {args.n:.4g} non-embedding parameters, D = {args.tokens:.4g} tokens, sequences "
            f"of {seq_len} tokens; {len(named)} laws"
        )
        console.print(
            show.rich_table(
                [
                    {
                        "law": row["law"],
                        "peak lr": "none" if math.isnan(row["lr"]) else f"{row['lr']:.3e}",
                        "lr 95 %": _pair(row, "lr", ".2e"),
                        "batch (tokens)": _number(row["batch_tokens"]),
                        "batch 95 %": _pair(row, "batch", ",.0f"),
                        "batch (sequences)": _number(row["batch_sequences"]),
                    }
                    for row in rows
                ]
            )
        )
        for row in rows:
            console.print(f"  {row['law']}: {row['note']}")
            for note in row["warnings"]:
                console.print(f"    warning: {note}")
            for span in row.get("intervals", {}).values():
                console.print(f"    interval: {span['method']}")
                break
            if "excess_per_mille" in row:
                costs = ", ".join(f"{k} {v:.1f}" for k, v in row["excess_per_mille"].items())
                console.print(f"    cost of a mistake (loss above the optimum, per mille): {costs}")
        for line in excluded:
            console.print(f"  not evaluated: {line}")
        for sentence in chosen.sentences(seq_len) if chosen else ():
            console.print(sentence)

    return result, text


def _number(value) -> str:
    return "none" if value is None else f"{value:,.0f}"


def _pair(row, name, form) -> str:
    span = row.get("intervals", {}).get(name)
    return "none" if span is None else f"{span['low']:{form}} .. {span['high']:{form}}"


def chinchilla_shape(args: argparse.Namespace) -> Result:
    """Loss-optimal parameters and tokens at a budget of FLOPs."""
    laws = [published.HOFFMANN, published.REFIT]
    if args.law:
        laws = [load_kind(name, chinchilla.ChinchillaLaw) for name in args.law.split(",")]
    rows = []
    for law in laws:
        n, d, loss = law.optimum(flops=args.flops)
        row: Row = {"law": law.version, "n": n, "d": d, "d_over_n": d / n, "loss": loss}
        if law.draws:
            row["n_low"], row["n_high"], row["method"] = law.interval(flops=args.flops)
        rows.append(row)
    units = {"n": "parameters", "d": "tokens", "loss": "nats per token", "flops": "FLOPs = 6 N D"}
    result = {"query": {"flops": args.flops}, "units": units, "laws": rows}
    return result, lambda console: console.print(show.rich_table(rows))
