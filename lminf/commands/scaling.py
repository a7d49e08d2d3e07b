"""lminf scaling: predict, fit, price and check scaling laws.

predict vocab --n-nv 7e9 [--d 4096] [--flops 2e22 | --tokens 1e12] [--law a.json,...]
predict step --n 1e9 --d 1e11 --seq-len 2048 [--law all]
predict chinchilla --flops 1e21
fit vocab|step|chinchilla|density --data FILE --out law.json
gap step --data FILE --law step,deepseek [--method linear]
loss vocab --law law.json --data FILE
check [--vocab FILE] [--step FILE] [--moe FILE] [--step-bootstrap FILE]
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console

from lminf import scaling
from lminf.errors import InputError
from lminf.run import tables as show
from lminf.scaling import (
    accounting,
    checks,
    chinchilla,
    evidence,
    gap,
    published,
    rivals,
    validation,
)
from lminf.scaling import fertility as fertilities
from lminf.scaling import tables as files
from lminf.scaling.laws import Law
from lminf.scaling.steps import StepLaw, StepPowerLaw
from lminf.scaling.vocab import VocabLaw
from lminf.scaling.vocab_derivative import VocabLaw2
from lminf.scaling.vocab_isoflop import DENSIFY, SELECTORS, VocabLaw1
from lminf.scaling.vocab_loss import BOUNDS, MODES, LossLaw, VocabLaw3

SPREAD_WARNING = 1.25  # largest over smallest V of the approaches
Row = dict[str, Any]
AnyLaw = TypeVar("AnyLaw", bound=Law)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("verb", choices=("predict", "fit", "gap", "loss", "check"))
    parser.add_argument("subject", nargs="?", help="vocab, step, chinchilla or density")
    for flag, options in FLAGS.items():
        parser.add_argument(f"--{flag}", default=None, **options)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


FLAGS: dict[str, dict[str, Any]] = {
    "n-nv": {"type": float, "help": "non-vocabulary parameters, raw: 7e9"},
    "n": {"type": float, "help": "non-embedding parameters, raw: 1e9"},
    "d": {"type": float, "help": "vocab: embedding width (channels); step: training tokens, raw"},
    "flops": {"type": float, "help": "training FLOPs, raw: 2e22"},
    "tokens": {"type": float, "help": "training tokens, raw, in place of --flops"},
    "seq-len": {"type": int, "help": "tokens per sequence (default 2048)"},
    "loss": {
        "type": float,
        "help": "loss the run will reach, nats per token, for laws that need it",
    },
    "flops-per-token": {"type": float, "help": "M with attention, for deepseek-md"},
    "law": {"help": "names or law.json files, separated by commas; all"},
    "fertility": {"help": "JSON of a measured fertility, or tao2024, tao2024-powerlaw"},
    "tensor-parallel": {
        "type": int,
        "help": "devices that share the head: V is a multiple of 128 x",
    },
    "data": {"help": "CSV file"},
    "out": {"help": "where to write the fitted law (JSON)"},
    "approach": {"type": int, "choices": (1, 2, 3), "help": "of the vocabulary law (default 3)"},
    "mode": {"help": f"approach 1: {', '.join(SELECTORS)}; approach 3: {', '.join(MODES)}"},
    "densify": {"choices": DENSIFY, "help": "approach 1: interpolation of the curves"},
    "exponents": {"choices": ("imposed", "free"), "help": "approach 1: 0.5 imposed for N_nv, H"},
    "bounds": {"choices": tuple(BOUNDS), "help": "approach 3: published [0.1, 1) or wide"},
    "flops-limit": {"type": float, "help": "approach 3: rows below it are dropped (2.18e17)"},
    "anchor-flops": {"type": float, "help": "approach 2: budget of the anchor (2.7e17)"},
    "metric": {"choices": evidence.METRICS, "help": "approach 1: loss that the envelope is of"},
    "n-nv-source": {"choices": ("as_published", "from_shapes"), "help": "parameter counts"},
    "threshold": {"type": float, "help": "step: relative excess of the runs kept (0.0025)"},
    "estimator": {"choices": ("ols", "reference"), "help": "step: reference averages row draws"},
    "target": {"choices": ("kept", "bowl"), "help": "step: near-optimal rows, or bowl minima"},
    "batch-n": {"choices": ("zero", "free"), "help": "step: whether ln N enters the batch law"},
    "fix-n": {"type": float, "help": "step: exponent of N in lr, imposed"},
    "draws": {"type": int, "help": "resampled fits (default 300; step 1000; 0: none)"},
    "bootstrap": {"type": int, "help": "the same as --draws"},
    "cluster": {"choices": ("run", "family", "group", "row"), "help": "what is resampled"},
    "seed": {"type": int, "help": "of the resampling (default 0)"},
    "method": {"choices": gap.METHODS, "help": "surface between the cells (default linear)"},
    "use-n": {"choices": ("total", "active"), "help": "gap: N of a mixture of experts"},
    "vocab": {"help": "check: vocabulary CSV"},
    "step": {"help": "check: dense learning rate x batch CSV"},
    "moe": {"help": "check: mixture-of-experts CSV"},
    "step-bootstrap": {"help": "check: CSV of the released bootstrap constants"},
}
RESAMPLE = ("draws", "bootstrap", "cluster", "seed")


def run(args: argparse.Namespace) -> None:
    key = (args.verb, args.subject)
    if key not in ACTIONS:
        valid = ", ".join(" ".join(filter(None, action)) for action in ACTIONS)
        asked = " ".join(filter(None, key))
        raise InputError(f"lminf scaling {asked!r} does not exist; use one of: {valid}")
    action, allowed, needed = ACTIONS[key]
    for flag in FLAGS:
        given = getattr(args, flag.replace("-", "_")) is not None
        if given and flag not in allowed:
            names = ", ".join(f"--{name}" for name in allowed)
            raise InputError(
                f"--{flag} means nothing to `{' '.join(filter(None, key))}`; it takes {names}"
            )
        if not given and flag in needed:
            raise InputError(
                f"`{' '.join(filter(None, key))}` needs --{flag}: {FLAGS[flag]['help']}"
            )
    result, text = action(args)
    if args.json:
        print(json.dumps(_finite(result), allow_nan=False))
    else:
        text(_console())


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def _finite(value):
    """JSON has no NaN: None says that there is no number."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _fertility(args) -> fertilities.Fertility:
    if args.fertility is None:
        return fertilities.PUBLISHED
    if args.fertility in fertilities.INSTANCES:
        return fertilities.INSTANCES[args.fertility]
    try:
        data = json.loads(Path(args.fertility).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(
            f"--fertility={args.fertility} is neither {', '.join(fertilities.INSTANCES)} nor a "
            f"readable JSON file ({error})"
        ) from error
    return fertilities.from_json(data)


def _options(args, **names: str) -> dict[str, Any]:
    """Keyword arguments for those flags that were given."""
    found = {name: getattr(args, flag) for name, flag in names.items()}
    return {name: value for name, value in found.items() if value is not None}


# --- predict ------------------------------------------------------------------------------------


def _predict_vocab(args):
    laws: list[VocabLaw] = list(published.VOCAB_LAWS.values())
    if args.law:
        laws = [_vocab_law(name) for name in args.law.split(",")]
    multiple = 128 * (args.tensor_parallel or 1)
    if multiple < 128:
        raise InputError(f"--tensor-parallel={args.tensor_parallel}: give 1 or more devices")
    query = {"n_nv": args.n_nv, **_options(args, d="d", flops="flops", tokens="tokens")}
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
    result = {
        "query": {**query, "d": rows[0]["width"], "multiple": multiple},
        "units": {"n_nv": "parameters", "flops": "FLOPs", "tokens": "tokens", "vocab": "entries"},
        "laws": rows,
        "spread": max(sizes) / min(sizes),
        "warnings": warnings,
    }

    def text(console):
        console.print(
            f"Loss-optimal vocabulary for N_nv = {args.n_nv:.4g} parameters, width "
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
            for what, cost in row.get("mistakes", {}).items():
                console.print(
                    f"    {what}: loss +{cost['excess_loss']:.4f} nats/token, as if trained with "
                    f"{100 * cost['compute_factor']:.1f} % of the FLOPs"
                )

    return result, text


def _vocab_law(name: str) -> VocabLaw:
    if name in published.VOCAB_LAWS:
        return published.VOCAB_LAWS[name]
    law = scaling.load(name) if name.endswith(".json") else None
    if law is None:
        raise InputError(
            f"law {name!r} is unknown; use {', '.join(published.VOCAB_LAWS)} or a law.json"
        )
    if not isinstance(law, VocabLaw):
        raise InputError(f"{name} holds a {law.kind} law, which says nothing about vocabularies")
    return law


def _vocab_row(law: VocabLaw, query, multiple: int) -> Row:
    found = law.optimum(**query)
    if law.draws:
        low, high, method = law.interval(**query)
    else:
        low, high, method = None, None, "none: the law was fitted without draws"
    costs = {}
    if isinstance(law, LossLaw):
        at = {"n_nv": found.n_nv, "d": found.width, "flops": found.flops}
        for what, factor in (("half of V", 0.5), ("twice V", 2.0)):
            cost = evidence.mistake(law, vocab_size=factor * found.vocab_size, **at)
            costs[what] = cost._asdict()
    return {
        "law": law.version,
        "approach": law.procedure["approach"],
        "vocab": found.vocab_size,
        "vocab_rounded": found.rounded(multiple),
        "interval": {"low": low, "high": high, "level": 0.95, "method": method},
        "n_v": found.n_v,
        "width": found.width,
        "flops": found.flops,
        "tokens": found.tokens,
        "characters": found.characters,
        "head_share": found.head_share,
        "inside_fitted_range": not any("extrapolation" in note for note in found.warnings),
        "warnings": list(found.warnings),
        **({"mistakes": costs} if costs else {}),
    }


def _span(interval: Row) -> str:
    if interval["low"] is None:
        return "none"
    return f"{interval['low']:,.0f} .. {interval['high']:,.0f}"


def _predict_step(args):
    accounting.require_raw("n", args.n, "n")
    accounting.require_raw("d", args.d, "d")
    seq_len = args.seq_len or 2048
    accounting.require_raw("seq-len", seq_len, "seq_len")
    loss, guessed = args.loss, False
    if loss is None:
        loss, guessed = float(chinchilla.REFIT.loss(n=args.n, d=args.d)), True
    query = rivals.Query(args.n, args.d, loss, args.flops_per_token)
    rows = []
    for name in _split_laws(args.law or "all"):
        rule, law = _rule(name)
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
            row["note"] += f"; loss {loss:.3f} predicted by {chinchilla.REFIT.version}, give --loss"
        if law is not None:
            spans = law.interval(n=args.n, d=args.d) if law.draws else {}
            row["intervals"] = {
                key: {"low": span.low, "high": span.high, "method": span.method}
                for key, span in spans.items()
            }
            row["warnings"] = law.outside({"n": args.n, "d": args.d})
            if law.diagnostics.get("bowl"):
                row["excess_per_mille"] = {
                    what: 1000 * law.excess(lr_factor=a, batch_factor=b)
                    for what, a, b in (("lr x 2", 2, 1), ("batch x 2", 1, 2), ("both x 2", 2, 2))
                }
        rows.append(row)
    named = [row["law"] for row in rows]
    excluded = (
        [f"{k}: {v}" for k, v in rivals.NOT_IMPLEMENTED.items()]
        if args.law in (None, "all")
        else []
    )
    result = {
        "query": {"n": args.n, "d": args.d, "seq_len": seq_len, "loss": loss},
        "units": {
            "n": "non-embedding parameters", "d": "tokens", "lr": "peak learning rate",
            "batch_tokens": "tokens", "batch_sequences": f"sequences of {seq_len} tokens",
        },
        "laws": rows,
        "not_evaluated": excluded,
    }  # fmt: skip

    def text(console):
        console.print(
            f"N = {args.n:.4g} non-embedding parameters, D = {args.d:.4g} tokens, sequences of "
            f"{seq_len} tokens; {len(named)} laws"
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

    return result, text


def _number(value) -> str:
    return "none" if value is None else f"{value:,.0f}"


def _pair(row, name, form) -> str:
    span = row.get("intervals", {}).get(name)
    return "none" if span is None else f"{span['low']:{form}} .. {span['high']:{form}}"


def _split_laws(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise InputError(f"--law is empty; use all, {', '.join(rivals.RULES)}, or law.json files")
    return list(rivals.ALL) if names == ["all"] else names


def _rule(name: str) -> tuple[rivals.Rule, StepPowerLaw | None]:
    if name.endswith(".json"):
        law = scaling.load(name)
        if not isinstance(law, StepPowerLaw):
            raise InputError(f"{name} holds a {law.kind} law, which names no learning rate")
        return rivals.from_law(law, Path(name).name), law
    if name.endswith("-best-batch") and name.removesuffix("-best-batch") in rivals.RULES:
        return rivals.without_batch(rivals.rule(name.removesuffix("-best-batch"))), None
    return rivals.rule(name), published.STEP if name == "step" else None


def _predict_chinchilla(args):
    laws = [chinchilla.HOFFMANN, chinchilla.REFIT]
    if args.law:
        laws = [_load_kind(name, chinchilla.ChinchillaFit) for name in args.law.split(",")]
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


def _load_kind(name: str, kind: type[AnyLaw]) -> AnyLaw:
    law = scaling.load(name)
    if not isinstance(law, kind):
        raise InputError(f"{name} holds a {law.kind} law; a {kind.kind} law is needed here")
    return law


# --- fit ----------------------------------------------------------------------------------------


def _fit_vocab(args):
    fertility = _fertility(args)
    source = args.n_nv_source or "as_published"
    table = scaling.read_vocab(args.data, fertility=fertility, n_nv=source)
    if args.metric:
        table = evidence.with_metric(table, args.metric)
    procedure = _vocab_procedure(args)
    law = scaling.fit(procedure, table, fertility=fertility, **_resampling(args, 300))
    without = validation.leave_one_family_out(procedure, table, fertility=fertility)
    return _fitted(args, law, "left out: one family; V at N_nv = 7e9", without)


def _vocab_procedure(args):
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
        return VocabLaw1(
            **_options(args, selector="mode", densify="densify", exponents="exponents")
        )
    if approach == 2:
        if args.mode is not None:
            raise InputError(f"--mode={args.mode}: approach 2 has no modes; leave it out")
        return VocabLaw2(**_options(args, anchor_flops="anchor_flops"))
    return VocabLaw3(**_options(args, mode="mode", bounds="bounds", flops_limit="flops_limit"))


def _resampling(args, default: int) -> dict[str, Any]:
    if args.draws is not None and args.bootstrap is not None:
        raise InputError("--draws and --bootstrap are the same; give one")
    draws = args.draws if args.draws is not None else args.bootstrap
    draws = default if draws is None else draws
    if draws < 0 or 0 < draws < 20:
        raise InputError(f"--draws={draws}: give 0 for no interval, or at least 20")
    return {"draws": draws, **_options(args, cluster="cluster", seed="seed")}


def _fit_step(args):
    table = scaling.read_step(args.data, seq_len=args.seq_len or 2048)
    procedure = StepLaw(
        **_options(
            args, threshold="threshold", estimator="estimator", target="target", batch_n="batch_n",
            fix_n="fix_n",
        )
    )  # fmt: skip
    law = scaling.fit(procedure, table, **_resampling(args, 1000))
    without = validation.leave_one_group_out(procedure, table)
    gaps = [row["gap_per_mille"] for row in without if "gap_per_mille" in row]
    title = "left out: one group"
    if gaps:
        title += f"; mean gap on the unseen group {np.mean(gaps):.2f} per mille"
    return _fitted(args, law, title, without)


def _fit_chinchilla(args):
    table = scaling.read_curves(args.data)
    law = scaling.fit(scaling.ChinchillaLaw(), table, **_resampling(args, 300))
    return _fitted(args, law, "", [])


def _fit_density(args):
    table = scaling.read_curves(args.data, needs_score=True)
    law = scaling.fit(scaling.DensityLaw(), table, **_resampling(args, 300))
    return _fitted(args, law, "", [])


def _fitted(args, law: Law, title: str, without: list[Row]):
    if args.out:
        _write(args.out, law)
    rows = []
    for name, value in law.constants.items():
        low, high = law.intervals.get(name, (None, None))
        shown = math.exp(value) if name.startswith("ln_") or name.endswith("_ln_k") else None
        rows.append({"constant": name, "value": value, "exp": shown, "low": low, "high": high})
    body = {key: value for key, value in law.to_json().items() if key != "draws"}
    result = {**body, "leave_one_out": without, "written": args.out}

    def text(console):
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


def _write(path: str, law: Law) -> None:
    """The law under its name only when it is complete."""
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    try:
        law.save(partial)
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(
            f"{path} cannot be written ({error.strerror}); choose another --out"
        ) from error


# --- gap, loss, check ---------------------------------------------------------------------------


def _gap_step(args):
    table = scaling.read_step(args.data, seq_len=args.seq_len or 2048)
    names = _split_laws(args.law or "step")
    rules = [_rule(name)[0] for name in names]
    unpriced = [rule.name for rule in rules if rule.lr is None]
    if args.law == "all":
        rules = [rule for rule in rules if rule.lr is not None]
    method = args.method or "linear"
    found = gap.gaps(table, rules, use_n=args.use_n or "total")
    laws, rows = {}, []
    for name, groups in found.items():
        means = {key: gap.mean_gap(groups, key) for key in (*gap.METHODS, gap.OTHER_DIAGONAL)}
        laws[name] = {
            "mean_per_mille": means[method][0],
            "means": {key: value for key, (value, _) in means.items()},
            "groups_priced": means[method][1],
            "groups": [
                {
                    "n": g.n, "n_active": g.n_active, "d": g.d, "lr": g.lr, "batch_tokens": g.batch,
                    "gap_per_mille": g.gap[method], "gaps": g.gap, "clipped": g.clipped,
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

    def text(console):
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


def _loss_vocab(args):
    law = _load_kind(args.law, LossLaw) if args.law.endswith(".json") else _vocab_law(args.law)
    if not isinstance(law, LossLaw):
        raise InputError(
            f"{law.version} is approach {law.procedure['approach']}, which predicts no loss; fit "
            "approach 3"
        )
    source = args.n_nv_source or "as_published"
    fertility = _fertility(args) if args.fertility else law.fertility
    table = scaling.read_vocab(args.data, fertility=fertility, n_nv=source)
    predicted = law.table_loss(table)
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
        other = law._loss(law.constants, table.n_nv, table.n_v, table.tokens) - table.loss
        summary["rmse_with_true_tokens"] = float(np.sqrt(np.mean(other**2)))
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

    def text(console):
        for key, value in summary.items():
            if key != "warnings":
                console.print(
                    f"{key:24} {value:.6g}" if isinstance(value, float) else f"{key:24} {value}"
                )
        for note in summary["warnings"]:
            console.print(f"warning: {note}")
        runs = []
        for n, v in dict.fromkeys(zip(table.n_nv, table.vocab_size, strict=True)):
            at = (table.n_nv == n) & (table.vocab_size == v)
            runs.append({
                "N_nv": f"{n:.4g}", "V": int(v), "rows": int(at.sum()),
                "final loss": float(table.loss[at][-1]), "predicted": float(predicted[at][-1]),
                "rmse": float(np.sqrt(np.mean(error[at] ** 2))),
            })  # fmt: skip
        console.print(show.rich_table(runs, title="per run (all rows: --json)"))

    return {**summary, "rows": rows}, text


def _check(args):
    found = list(checks.constants())
    skipped = []
    if args.vocab:
        found += checks.vocab_file(scaling.read_vocab(args.vocab))
    if args.step:
        columns, _, _ = files.read_columns(args.step, checks.DENSE_SHAPE_COLUMNS)
        found.append(checks.dense_shapes(columns))
        found += checks.step_file(scaling.read_step(args.step))
    if args.moe:
        columns, _, _ = files.read_columns(args.moe, checks.MOE_SHAPE_COLUMNS)
        found += checks.moe_shapes(columns)
        found += checks.moe_file(scaling.read_step(args.moe))
    if args.step_bootstrap:
        columns, _, _ = files.read_columns(args.step_bootstrap, tuple(checks.STEP_BOOTSTRAP))
        found += checks.bootstrap_file(columns)
    for flag in ("vocab", "step", "moe", "step_bootstrap"):
        if getattr(args, flag) is None:
            skipped.append(f"--{flag.replace('_', '-')} was not given: its checks did not run")
    failed = [row for row in found if row["ok"] is False]
    judged = sum(row["ok"] is not None for row in found)
    result = {
        "checks": found, "judged": judged, "failed": len(failed), "not_run": skipped,
    }  # fmt: skip
    if failed and args.json:
        print(json.dumps(_finite(result), allow_nan=False))

    def text(console):
        console.print(show.rich_table(found, digits=5))
        console.print(f"{judged} checks judged, {len(failed)} failed")
        for note in skipped:
            console.print(note)

    if failed:
        if not args.json:
            text(_console())
        first = failed[0]
        raise InputError(
            f"{len(failed)} of {judged} checks failed, the first: {first['what']} is "
            f"{first['value']:.6g}, expected {first['expected']:.6g} +- {first['tolerance']:.2g}"
        )
    return result, text


Action = tuple[Callable[..., Any], tuple[str, ...], tuple[str, ...]]
ACTIONS: dict[tuple[str, str | None], Action] = {
    ("predict", "vocab"): (
        _predict_vocab,
        ("n-nv", "d", "flops", "tokens", "law", "tensor-parallel"),
        ("n-nv",),
    ),
    ("predict", "step"): (
        _predict_step,
        ("n", "d", "seq-len", "law", "loss", "flops-per-token"),
        ("n", "d"),
    ),
    ("predict", "chinchilla"): (_predict_chinchilla, ("flops", "law"), ("flops",)),
    ("fit", "vocab"): (
        _fit_vocab,
        (
            "data", "out", "approach", "mode", "densify", "exponents", "bounds", "flops-limit",
            "anchor-flops", "metric", "n-nv-source", "fertility", *RESAMPLE,
        ),
        ("data",),
    ),
    ("fit", "step"): (
        _fit_step,
        (
            "data", "out", "threshold", "estimator", "target", "batch-n", "fix-n", "seq-len",
            *RESAMPLE,
        ),
        ("data",),
    ),
    ("fit", "chinchilla"): (_fit_chinchilla, ("data", "out", *RESAMPLE), ("data",)),
    ("fit", "density"): (_fit_density, ("data", "out", *RESAMPLE), ("data",)),
    ("gap", "step"): (_gap_step, ("data", "law", "method", "use-n", "seq-len"), ("data",)),
    ("loss", "vocab"): (
        _loss_vocab,
        ("law", "data", "n-nv-source", "fertility"),
        ("law", "data"),
    ),
    ("check", None): (_check, ("vocab", "step", "moe", "step-bootstrap"), ()),
}  # fmt: skip
