"""lminf scaling: predict, fit, price and check scaling laws.

predict vocab --n-nv 7e9 [--d 4096] [--flops 2e22 | --tokens 1e12] [--law a.json,...]
predict step --n 1e9 --d 1e11 --seq-len 2048 [--law all]
predict chinchilla --flops 1e21
fit vocab|step|chinchilla|density --data FILE --out law.json
gap step --data FILE --law step,deepseek [--method linear]
loss vocab --law law.json --data FILE
plan vocab|step [--flops 1e13] [--hours 0.25] [--out plan.py]
collect vocab|step --runs DIR --out FILE.csv [--where corpus=library]
check [--vocab FILE] [--step FILE] [--moe FILE] [--step-bootstrap FILE]
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console

from lminf.commands.scaling import check, collect, fit, plan, predict_step, predict_vocab, price
from lminf.errors import InputError
from lminf.scaling import evidence, gap
from lminf.scaling.vocab_isoflop import DENSIFY, SELECTORS
from lminf.scaling.vocab_loss import BOUNDS, MODES

VERBS = ("predict", "fit", "gap", "loss", "plan", "collect", "check")
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
    "hours": {"type": float, "help": "plan: time on this machine, whose speed is measured"},
    "runs": {"help": "collect: folders of sweeps, separated by commas"},
    "where": {"help": "collect: only rows with field=value, separated by commas"},
    "vocab": {"help": "check: vocabulary CSV"},
    "step": {"help": "check: dense learning rate x batch CSV"},
    "moe": {"help": "check: mixture-of-experts CSV"},
    "step-bootstrap": {"help": "check: CSV of the released bootstrap constants"},
}


RESAMPLE = ("draws", "bootstrap", "cluster", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("subject", nargs="?", help="vocab, step, chinchilla or density")
    for flag, options in FLAGS.items():
        parser.add_argument(f"--{flag}", default=None, **options)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


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
                f"`{' '.join(filter(None, key))}` needs --{flag}: {_meaning(flag, args.subject)}"
            )
    result, text, *complaint = action(args)
    if args.json:
        print(json.dumps(_finite(result), allow_nan=False))
    else:
        text(Console(width=None if sys.stdout.isatty() else 160, highlight=False))
    if complaint:
        raise InputError(*complaint)


def _meaning(flag: str, subject: str | None) -> str:
    """What a flag is, to this subject where it is something else to another."""
    meaning = FLAGS[flag]["help"]
    own = [part for part in meaning.split("; ") if part.startswith(f"{subject}: ")]
    return own[0].removeprefix(f"{subject}: ") if own else meaning


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


# (what runs, the flags it takes, the flags it needs); it gives (a result for --json, a function
# that prints it) and, if the command must fail, a sentence that says why.
Action = tuple[Callable[..., Any], tuple[str, ...], tuple[str, ...]]


ACTIONS: dict[tuple[str, str | None], Action] = {
    ("predict", "vocab"): (
        predict_vocab.predict,
        ("n-nv", "d", "flops", "tokens", "law", "tensor-parallel"),
        ("n-nv",),
    ),
    ("predict", "step"): (
        predict_step.step,
        ("n", "d", "seq-len", "law", "loss", "flops-per-token"),
        ("n", "d"),
    ),
    ("predict", "chinchilla"): (predict_step.chinchilla_shape, ("flops", "law"), ("flops",)),
    ("fit", "vocab"): (
        fit.vocab,
        (
            "data", "out", "approach", "mode", "densify", "exponents", "bounds", "flops-limit",
            "anchor-flops", "metric", "n-nv-source", "fertility", *RESAMPLE,
        ),
        ("data",),
    ),
    ("fit", "step"): (
        fit.step,
        (
            "data", "out", "threshold", "estimator", "target", "batch-n", "fix-n", "seq-len",
            *RESAMPLE,
        ),
        ("data",),
    ),
    ("fit", "chinchilla"): (fit.chinchilla_law, ("data", "out", *RESAMPLE), ("data",)),
    ("fit", "density"): (fit.density, ("data", "out", *RESAMPLE), ("data",)),
    ("gap", "step"): (
        price.gap_of_step_laws,
        ("data", "law", "method", "use-n", "seq-len"),
        ("data",),
    ),
    ("loss", "vocab"): (
        price.loss_of_vocab_law,
        ("law", "data", "n-nv-source", "fertility"),
        ("law", "data"),
    ),
    ("plan", "vocab"): (plan.plan, ("flops", "hours", "out"), ()),
    ("plan", "step"): (plan.plan, ("flops", "hours", "out"), ()),
    ("collect", "vocab"): (collect.collect, ("runs", "where", "out"), ("runs", "out")),
    ("collect", "step"): (collect.collect, ("runs", "where", "out"), ("runs", "out")),
    ("check", None): (check.check, ("vocab", "step", "moe", "step-bootstrap"), ()),
}  # fmt: skip
