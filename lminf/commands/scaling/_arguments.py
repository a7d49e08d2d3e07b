"""The words that several verbs of `lminf scaling` share, and how they are read."""

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from lminf import scaling
from lminf.atomic import read_bytes
from lminf.errors import InputError
from lminf.scaling import (
    baselines,
    published,
)
from lminf.scaling import fertility as fertilities
from lminf.scaling.laws import Law
from lminf.scaling.steps import StepLaw
from lminf.scaling.vocab import VocabLaw

Row = dict[str, Any]
# What a command gives: the object of --json, and what prints it.
Result = tuple[Row, Callable[[Console], None]]
LONG_TABLE = 4096  # rows
SUFFIXES = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def number(text: str) -> float:
    """A finite number: 3000000000, 3e9, 3B (K, M, B, T: powers of a thousand) or 2^30."""
    match = re.fullmatch(r"(.*?)([KMBT]?)", text.strip(), re.IGNORECASE | re.DOTALL)
    assert match is not None
    try:
        base, power, exponent = match[1].replace(",", "_").partition("^")
        value = float(base) * SUFFIXES[match[2].upper()]
        value = value ** float(exponent) if power else value
    except (ValueError, OverflowError, ZeroDivisionError):
        value = math.nan
    if isinstance(value, complex) or not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number; write 3e9, 3B or 2^30")
    return value


def whole(text: str) -> int:
    """A number without a fraction."""
    value = number(text)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number")
    return int(value)


AnyLaw = TypeVar("AnyLaw", bound=Law)


def fertility_of(args: argparse.Namespace) -> fertilities.Fertility:
    """The fertility of --fertility, else the one that `collect` wrote beside the data, else the
    published one."""
    name = args.fertility
    beside = Path(args.data).with_suffix(".fertility.json")
    if name is None:
        name = str(beside) if beside.is_file() else fertilities.PUBLISHED.name
    if name in fertilities.INSTANCES:
        return fertilities.INSTANCES[name]
    try:
        data = json.loads(read_bytes(Path(name)).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"--fertility={name} is neither {', '.join(fertilities.INSTANCES)} nor a "
            f"readable JSON file ({error})"
        ) from error
    return fertilities.from_json(data)


def options(args: argparse.Namespace, **names: str) -> dict[str, Any]:
    """Keyword arguments for those flags that were given."""
    given = {name: getattr(args, flag) for name, flag in names.items()}
    return {name: value for name, value in given.items() if value is not None}


def resampling(args: argparse.Namespace, default: int, rows: int = 0) -> dict[str, Any]:
    """Keyword arguments of a fit; a long table has a third of the draws by default."""
    default = default // 3 if rows > LONG_TABLE else default
    if args.draws is not None and args.bootstrap is not None:
        raise InputError("--draws and --bootstrap are the same; give one")
    draws = args.draws if args.draws is not None else args.bootstrap
    draws = default if draws is None else draws
    if draws < 0 or 0 < draws < 20:
        raise InputError(f"--draws={draws}: give 0 for no interval, or at least 20")
    return {"draws": draws, **options(args, cluster="cluster", seed="seed")}


def vocab_law(name: str) -> VocabLaw:
    """The vocabulary law of a published version or of a JSON file."""
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


def load_kind(name: str, kind: type[AnyLaw]) -> AnyLaw:
    """The law of a JSON file; InputError unless it is of that kind."""
    law = scaling.load(name)
    if not isinstance(law, kind):
        raise InputError(f"{name} holds a {law.kind} law; a {kind.kind} law is needed here")
    return law


def split_laws(text: str) -> list[str]:
    """Names of the laws of --law, each once."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise InputError(
            f"--law is empty; use all, {', '.join(baselines.RULES)}, or law.json files"
        )
    return list(baselines.ALL) if names == ["all"] else names


def rule_and_law(name: str) -> tuple[baselines.Rule, StepLaw | None]:
    """The rule of a name or JSON file, and the fitted or published law behind it."""
    if name.endswith(".json"):
        law = scaling.load(name)
        if not isinstance(law, StepLaw):
            raise InputError(f"{name} holds a {law.kind} law, which names no learning rate")
        return baselines.from_law(law, Path(name).name), law
    if name.endswith("-best-batch") and name.removesuffix("-best-batch") in baselines.RULES:
        return baselines.without_batch(baselines.rule(name.removesuffix("-best-batch"))), None
    return baselines.rule(name), published.STEP if name == "step" else None
