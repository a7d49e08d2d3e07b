"""lminf scaling gap and loss: what a law costs, or predicts, on runs that were measured."""

import argparse

import numpy as np
from rich.console import Console

from lminf import scaling
from lminf.commands.scaling._arguments import (
    Result,
    fertility_of,
    load_kind,
    rule_and_law,
    split_laws,
    vocab_law,
)
from lminf.errors import InputError
from lminf.run import tables as show
from lminf.scaling import (
    regret,
)
from lminf.scaling.vocab_loss import LossLaw, loss_of


def gap_of_step_laws(args: argparse.Namespace) -> Result:
    """Regret of each law's setting in every group of measured runs, per mille."""
    table = scaling.read_step(args.data, seq_len=args.seq_len or 2048)
    names = split_laws(args.law or "step")
    rules = [rule_and_law(name)[0] for name in names]
    unpriced = [rule.name for rule in rules if rule.lr is None]
    if args.law == "all":
        rules = [rule for rule in rules if rule.lr is not None]
    method = args.method or "linear"
    regrets = regret.regrets(table, rules, use_n=args.use_n or "total")
    laws, rows = {}, []
    for name, groups in regrets.items():
        means = {
            key: regret.mean_regret(groups, key) for key in (*regret.METHODS, regret.OTHER_DIAGONAL)
        }
        laws[name] = {
            "mean_per_mille": means[method][0],
            "means": {key: value for key, (value, _) in means.items()},
            "groups_priced": means[method][1],
            "groups": [
                {
                    "n": g.n, "n_active": g.n_active, "d": g.d, "lr": g.lr, "batch_tokens": g.batch,
                    "gap_per_mille": g.regret[method], "gaps": g.regret, "clipped": g.clipped,
                }
                for g in groups
            ],
        }  # fmt: skip
        rows.append(
            {"law": name} | {key: value for key, (value, _) in means.items()}
            | {"groups": len(groups), "clipped": sum(g.clipped for g in groups)}
        )  # fmt: skip
    result = {
        "unit": "per mille of the group's lowest loss",
        "method": method,
        "use_n": args.use_n or "total",
        "groups": len(np.unique(table.group)),
        "laws": laws,
        "not_priced": unpriced if args.law == "all" else [],
    }

    def text(console: Console) -> None:
        console.print(f"Loss above the group's best, per mille; mean of {result['groups']} groups")
        console.print(show.rich_table(rows))
        detail = [
            {"law": name, "N": f"{g['n']:.4g}", "D": f"{g['d']:.4g}", "lr": f"{g['lr']:.3e}",
             "batch (tokens)": round(g["batch_tokens"]), "gap": g["gap_per_mille"],
             "clipped": g["clipped"]}
            for name, law in laws.items() for g in law["groups"]
        ]  # fmt: skip
        console.print(show.rich_table(detail, title=f"{method}, per group"))
        for name in result["not_priced"]:
            console.print(f"{name}: names no learning rate, so it has no point to price")

    return result, text


def loss_of_vocab_law(args: argparse.Namespace) -> Result:
    """L_u that a law predicts for every row of a table, beside the measured one."""
    law = load_kind(args.law, LossLaw) if args.law.endswith(".json") else vocab_law(args.law)
    if not isinstance(law, LossLaw):
        raise InputError(
            f"{law.version} is approach {law.procedure['approach']}, which predicts no loss; fit "
            "approach 3"
        )
    source = args.n_source or "as_published"
    fertility = fertility_of(args) if args.fertility else law.fertility
    table = scaling.read_vocab(args.data, fertility=fertility, n_nv=source)
    predicted = law.loss(table)
    error = predicted - table.loss
    limit = float(law.procedure.get("flops_limit", 0.0))
    late = table.flops >= limit
    summary = {
        "law": law.version,
        "mode": law.mode,
        "unit": "L_u, nats per token",
        "rows_scored": len(table),
        "rmse": float(np.sqrt(np.mean(error**2))),
        "mean_error": float(np.mean(error)),
        "rows_above_flops_limit": int(late.sum()),
        "rmse_above_flops_limit": float(np.sqrt(np.mean(error[late] ** 2))) if late.any() else None,
        "flops_limit": limit,
        "warnings": list(law.warnings),
    }
    if law.mode == "reference":
        residuals = loss_of(law.constants, table.n_nv, table.n_v, table.tokens) - table.loss
        summary["rmse_with_true_tokens"] = float(np.sqrt(np.mean(residuals**2)))
        summary["warnings"].append(
            "the loss uses the covariate that was fitted, H f(V/1000); the optimum of this mode "
            "uses true tokens, with which the loss is off by rmse_with_true_tokens"
        )
    rows = [
        {"row": i + 1, "n_nv": n, "vocab_size": v, "flops": f, "loss": y, "predicted": p}
        for i, (n, v, f, y, p) in enumerate(
            zip(table.n_nv, table.vocab_size, table.flops, table.loss, predicted, strict=True)
        )
    ]

    def text(console: Console) -> None:
        for key, value in summary.items():
            if key != "warnings":
                console.print(
                    f"{key:24} {value:.6g}" if isinstance(value, float) else f"{key:24} {value}"
                )
        for note in summary["warnings"]:
            console.print(f"warning: {note}")
        runs = []
        for n, v in dict.fromkeys(zip(table.n_nv, table.vocab_size, strict=True)):
            of_run = (table.n_nv == n) & (table.vocab_size == v)
            runs.append({
                "N_nv": f"{n:.4g}", "V": int(v), "rows": int(of_run.sum()),
                "final loss": float(table.loss[of_run][-1]),
                "predicted": float(predicted[of_run][-1]),
                "rmse": float(np.sqrt(np.mean(error[of_run] ** 2))),
            })  # fmt: skip
        console.print(show.rich_table(runs, title="per run (all rows: --json)"))

    return {**summary, "rows": rows}, text
