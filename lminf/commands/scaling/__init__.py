"""lminf scaling: predict, fit and price scaling laws.

predict vocab --n 7B [--width 4096] [--flops 2e22 | --tokens 1T] [--law a.json,...]
predict step --n 1B --tokens 100B --seq-len 2048 [--law all]
predict chinchilla --flops 1e21
fit vocab|step|chinchilla|density --data FILE --out law.json
gap step --data FILE --law step,deepseek [--method linear]
loss vocab --law law.json --data FILE
plan vocab|step [--flops 1e13] [--hours 0.25] [--out plan.py]
collect vocab|step --runs DIR --out FILE.csv [--where corpus=library]

`lminf scaling fit --help` and `lminf scaling predict vocab --help` list their flags.
All quantities are raw: 3B, 3e9 and 3000000000 are the same number; 2^20 is read too.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lminf import scaling
from lminf.atomic import check_space, read_bytes
from lminf.commands.scaling import collect, fit, plan, predict_step, predict_vocab, price
from lminf.commands.scaling._arguments import Result, number, whole
from lminf.errors import InputError
from lminf.ranges import Range
from lminf.scaling import diagnostics, regret
from lminf.scaling.vocab_isoflop import DENSIFY, SELECTORS
from lminf.scaling.vocab_loss import BOUNDS, MODES

VERBS = ("predict", "fit", "gap", "loss", "plan", "collect")
FLAGS: dict[str, dict[str, Any]] = {
    "n": {"type": number, "help": "parameters without the vocabulary's: 7B"},
    "width": {"type": number, "help": "channels of the embedding: 4096"},
    "flops": {"type": number, "help": "training FLOPs: 2e22"},
    "tokens": {"type": number, "help": "training tokens: 300B"},
    "seq-len": {"type": whole, "help": "tokens per sequence (default 2048)"},
    "loss": {
        "type": number,
        "help": "loss the run will reach, nats per token, for laws that need it",
    },
    "flops-per-token": {"type": number, "help": "M with attention, for deepseek-md"},
    "law": {"help": "names or law.json files, separated by commas; all"},
    "fertility": {
        "help": "JSON of tokens per character, or tao2024, tao2024-powerlaw (fit vocab: "
        "FILE.fertility.json where it stands beside FILE.csv, as collect writes it)"
    },
    "tensor-parallel": {
        "type": whole,
        "help": "devices that share the head: V is a multiple of 128 x",
    },
    "data": {"help": "CSV file"},
    "out": {"help": "where to write the fitted law (JSON)"},
    "approach": {"type": int, "choices": (1, 2, 3), "help": "of the vocabulary law (default 3)"},
    "mode": {"help": f"approach 1: {', '.join(SELECTORS)}; approach 3: {', '.join(MODES)}"},
    "densify": {"choices": DENSIFY, "help": "approach 1: interpolation of the curves"},
    "exponents": {"choices": ("imposed", "free"), "help": "approach 1: 0.5 imposed for N_nv, H"},
    "bounds": {"choices": tuple(BOUNDS), "help": "approach 3: published [0.1, 1) or wide"},
    "flops-limit": {
        "type": number,
        "help": "approach 3: rows with fewer FLOPs are dropped (2.18e17 where rows reach it)",
    },
    "anchor-flops": {"type": number, "help": "approach 2: FLOPs of the anchor (2.7e17)"},
    "metric": {"choices": diagnostics.METRICS, "help": "approach 1: loss that the envelope is of"},
    "n-source": {"choices": ("as_published", "from_shapes"), "help": "of the parameter counts"},
    "threshold": {"type": number, "help": "step: relative excess of the runs kept (0.0025)"},
    "estimator": {"choices": ("ols", "reference"), "help": "step: reference averages row draws"},
    "target": {"choices": ("kept", "bowl"), "help": "step: near-optimal rows, or bowl minima"},
    "batch-n": {"choices": ("zero", "free"), "help": "step: whether ln N enters the batch law"},
    "fix-n": {"type": number, "help": "step: exponent of N in lr, imposed"},
    "draws": {"type": whole, "help": "resampled fits (default 300; step 1000; 0: none)"},
    "bootstrap": {"type": whole, "help": "the same as --draws"},
    "cluster": {"choices": ("run", "family", "group", "row"), "help": "what is resampled"},
    "seed": {"type": whole, "help": "of the resampling (default 0)"},
    "method": {"choices": regret.METHODS, "help": "surface between the cells (default linear)"},
    "use-n": {"choices": ("total", "active"), "help": "gap: N of a mixture of experts"},
    "hours": {"type": number, "help": "hours on this machine, whose speed is measured"},
    "runs": {"help": "collect: folders of sweeps, separated by commas"},
    "where": {"help": "collect: only rows with field=value, separated by commas"},
}


# Ranges of the numbers that are no counts of --n, --width, --flops, --tokens.
RANGES = {
    "seq-len": Range(min=1, max=1e8),
    "tensor-parallel": Range(min=1, max=1e6),
    "loss": Range(min=1e-3, max=100),
    "flops-per-token": Range(min=1, max=1e20),
    "flops-limit": Range(min=0, max=1e32),
    "anchor-flops": Range(above=0, max=1e32),
    "draws": Range(min=0, max=1e5),
    "bootstrap": Range(min=0, max=1e5),
    "seed": Range(min=0, max=2**63),
    "hours": Range(above=0, max=1e6),
}
RESAMPLE = ("draws", "bootstrap", "cluster", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb, its subject and the flags of all verbs."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("-h", "--help", action="store_true", help="help of a verb, or this")
    parser.add_argument("verb", choices=VERBS, nargs="?", help=", ".join(VERBS))
    parser.add_argument("subject", nargs="?", help="vocab, step, chinchilla or density")
    for flag, options in FLAGS.items():
        parser.add_argument(f"--{flag}", default=None, **{**options, "help": argparse.SUPPRESS})
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(overview=parser.format_help)


def helped(args: argparse.Namespace) -> str:
    """The overview, or the flags of every action of the verb (and subject) that was named."""
    chosen = [key for key in ACTIONS if key[0] == args.verb and args.subject in (None, key[1])]
    if not chosen:
        return args.overview()
    parts = []
    for key in chosen:
        _, allowed, needed = ACTIONS[key]
        name = " ".join(filter(None, key))
        parser = argparse.ArgumentParser(prog=f"lminf scaling {name}", add_help=False)
        for flag in allowed:
            options = {**FLAGS[flag], "help": _meaning(flag, key[1])}
            parser.add_argument(f"--{flag}", required=flag in needed, **options)
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        parts.append(parser.format_help())
    return "\n".join(parts)


def run(args: argparse.Namespace) -> None:
    """Runs a verb and prints its result."""
    if args.help or args.verb is None:
        print(helped(args))
        raise SystemExit(0)
    key = (args.verb, args.subject)
    if key not in ACTIONS:
        valid = ", ".join(" ".join(filter(None, action)) for action in ACTIONS)
        command = " ".join(filter(None, key))
        raise InputError(f"lminf scaling {command!r} does not exist; use one of: {valid}")
    action, allowed, needed = ACTIONS[key]
    for flag in FLAGS:
        given = getattr(args, flag.replace("-", "_")) is not None
        if given and flag not in allowed:
            names = ", ".join(f"--{name}" for name in allowed)
            raise InputError(
                f"--{flag} means nothing to `{' '.join(filter(None, key))}`; it takes {names}"
            )
        if given and flag in RANGES:
            value = getattr(args, flag.replace("-", "_"))
            if problem := RANGES[flag].problem(value):
                raise InputError(f"--{flag}={value}: give {problem}")
        if not given and flag in needed:
            raise InputError(
                f"`{' '.join(filter(None, key))}` needs --{flag}: {_meaning(flag, args.subject)}"
            )
    _check_output(args)
    result, text = action(args)
    if args.json:
        print(json.dumps(_finite(result), allow_nan=False))
    else:
        text(Console(width=None if sys.stdout.isatty() else 160, highlight=False))


def _is_a_law(path: Path) -> bool:
    try:
        scaling.load(path)
    except InputError:
        return False
    return True


# Whether this verb wrote the file that --out names; a table of `collect` looks like one's own.
WRITTEN_BY: dict[str, Callable[[Path], bool]] = {
    "fit": _is_a_law,
    "plan": lambda path: b"by lminf scaling plan." in read_bytes(path)[:200],
    "collect": lambda path: False,
}


def _check_output(args: argparse.Namespace) -> None:
    """Refuses before the work what would replace a file that this verb did not write."""
    if args.out is None:
        return
    outputs = [Path(args.out)]
    if (args.verb, args.subject) == ("collect", "vocab"):
        outputs.append(outputs[0].with_suffix(".fertility.json"))
    for path in outputs:
        if path.is_dir():
            raise InputError(f"--out={path} is a folder; name a file")
        if path.exists() and not WRITTEN_BY[args.verb](path):
            raise InputError(
                f"{path} exists, and nothing says that `lminf scaling {args.verb}` wrote it; name "
                f"another file with --out"
            )
        check_space(path, 0)


def _meaning(flag: str, subject: str | None) -> str:
    """What a flag is, to this subject where it is something else to another."""
    meaning = FLAGS[flag]["help"]
    meanings = [part for part in meaning.split("; ") if part.startswith(f"{subject}: ")]
    return meanings[0].removeprefix(f"{subject}: ") if meanings else meaning


def _finite(value: Any) -> Any:
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


# (what runs, the flags it takes, the flags it needs)
Action = tuple[Callable[[argparse.Namespace], Result], tuple[str, ...], tuple[str, ...]]


ACTIONS: dict[tuple[str, str | None], Action] = {
    ("predict", "vocab"): (
        predict_vocab.predict,
        ("n", "width", "flops", "tokens", "law", "tensor-parallel"),
        ("n",),
    ),
    ("predict", "step"): (
        predict_step.step,
        ("n", "tokens", "seq-len", "law", "loss", "flops-per-token"),
        ("n", "tokens"),
    ),
    ("predict", "chinchilla"): (predict_step.chinchilla_shape, ("flops", "law"), ("flops",)),
    ("fit", "vocab"): (
        fit.vocab,
        (
            "data", "out", "approach", "mode", "densify", "exponents", "bounds", "flops-limit",
            "anchor-flops", "metric", "n-source", "fertility", *RESAMPLE,
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
        ("law", "data", "n-source", "fertility"),
        ("law", "data"),
    ),
    ("plan", "vocab"): (plan.plan, ("flops", "hours", "out"), ()),
    ("plan", "step"): (plan.plan, ("flops", "hours", "out"), ()),
    ("collect", "vocab"): (collect.collect, ("runs", "where", "out"), ("runs", "out")),
    ("collect", "step"): (collect.collect, ("runs", "where", "out"), ("runs", "out")),
}  # fmt: skip
