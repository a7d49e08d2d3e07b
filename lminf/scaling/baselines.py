"""Learning-rate and batch rules that compete with the step law, by name.

N non-embedding parameters, D tokens, C = 6 N D FLOPs unless said, L the loss reached in nats per
token, M FLOPs per token with attention; batches in tokens.
Source: the comparison of arXiv:2503.04715, each constant of rules.json checked against its own
paper; where the two differ the note says so.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lminf.errors import InputError
from lminf.scaling import stored
from lminf.scaling.steps import Setting, StepLaw


@dataclass(frozen=True)
class Query:
    """What a rule may need; None where it is not known."""

    n: float
    d: float
    loss: float | None
    flops_per_token: float | None


@dataclass(frozen=True)
class Rule:
    name: str
    lr: Callable[[Query], float] | None  # None: the law gives none
    batch: Callable[[Query], float] | None
    note: str
    needs: tuple[str, ...] = ()  # fields of Query that may not be None

    def setting(self, query: Query) -> Setting:
        """Learning rate, NaN where the law gives none, and batch in tokens."""
        missing = [name for name in self.needs if getattr(query, name) is None]
        if missing:
            raise InputError(f"law {self.name!r} needs {' and '.join(missing)}; give it")
        lr = self.lr(query) if self.lr else np.nan
        return Setting(lr, self.batch(query) if self.batch else None)


QUANTITIES: Mapping[str, Callable[[Query], float]] = {
    "n": lambda query: query.n,
    "d": lambda query: query.d,
    "n_billions": lambda query: query.n / 1e9,
    "d_billions": lambda query: query.d / 1e9,
    "compute": lambda query: 6 * query.n * query.d,
    "attention_compute": lambda query: float(query.flops_per_token or np.nan) * query.d,
    "loss": lambda query: float(query.loss or np.nan),
}


def _formula(terms: Mapping[str, float]) -> Callable[[Query], float]:
    """k times powers of QUANTITIES, or the same from ln k; with an intercept, linear in their
    logarithms."""

    def value(query: Query) -> float:
        powers = [(QUANTITIES[name](query), power) for name, power in terms.items()
                  if name in QUANTITIES]  # fmt: skip
        if "k" in terms:
            return math.prod((amount**power for amount, power in powers), start=terms["k"])
        line = terms["ln_k"] if "ln_k" in terms else terms["intercept"]
        for amount, power in powers:
            line += power * np.log(amount)
        return float(np.exp(line) if "ln_k" in terms else line)

    return value


RULES = {
    data["name"]: Rule(
        data["name"],
        _formula(data["lr"]) if "lr" in data else None,
        _formula(data["batch"]) if "batch" in data else None,
        data["note"],
        tuple(data.get("needs", ())),
    )
    for data in stored.read("rules.json")
}
NOT_IMPLEMENTED = {"meituan": "a power law in the loss whose constants were not published"}
ALL = ("step", "openai", "microsoft", "deepseek", "porian", "minicpm", "moonlight")


def rule(name: str) -> Rule:
    """The rule of that name."""
    if name in NOT_IMPLEMENTED:
        raise InputError(f"law {name!r} cannot be evaluated: {NOT_IMPLEMENTED[name]}")
    if name not in RULES:
        raise InputError(f"law {name!r} is unknown; use {', '.join(RULES)}, all, or a law.json")
    return RULES[name]


def from_law(law: StepLaw, name: str) -> Rule:
    """A fitted law as a rule."""
    return Rule(
        name,
        lambda q: law.setting(n=q.n, d=q.d).lr,
        lambda q: float(law.setting(n=q.n, d=q.d).batch or np.nan),
        f"fitted: {law.version}",
    )


def without_batch(one: Rule) -> Rule:
    """The same learning rate; the comparison then takes the best batch."""
    return Rule(f"{one.name}-best-batch", one.lr, None, f"{one.note}; best batch", one.needs)
