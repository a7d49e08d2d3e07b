"""Learning-rate and batch rules that compete with the step law, by name.

N non-embedding parameters, D tokens, C = 6 N D FLOPs unless said, L the loss reached in nats per
token, M FLOPs per token with attention; batches in tokens.
Source: the comparison of arXiv:2503.04715, each constant checked against its own paper; where the
two differ the note says so.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lminf.errors import InputError
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


def compute(query: Query) -> float:
    """C = 6 N D, FLOPs."""
    return 6 * query.n * query.d


def attention_compute(query: Query) -> float:
    """C = M D, FLOPs with attention."""
    return float(query.flops_per_token or np.nan) * query.d


def loss(query: Query) -> float:
    """L in nats per token; NaN where it is not known."""
    return float(query.loss or np.nan)


def openai_lr(query: Query) -> float:
    """Peak learning rate of Kaplan et al."""
    return 0.003239 - 0.0001395 * np.log(query.n)


RULES = {
    rule.name: rule
    for rule in (
        Rule(
            "step",
            lambda q: 1.79 * q.n**-0.713 * q.d**0.307,
            lambda q: 0.58 * q.d**0.571,
            "constants as printed; N is the total for mixtures of experts",
        ),
        Rule(
            "step-unrounded",
            lambda q: float(np.exp(0.586308 - 0.712922 * np.log(q.n) + 0.307491 * np.log(q.d))),
            lambda q: float(np.exp(-0.543542 + 0.570944 * np.log(q.d))),
            "mean of the released 1,000 bootstrap rows",
        ),
        Rule(
            "openai",
            openai_lr,
            lambda q: 2e8 * loss(q) ** (-1 / 0.21),
            "2e8 is the original; the comparison table prints 2e18",
            needs=("loss",),
        ),
        Rule("openai-lr", openai_lr, None, "learning rate only"),
        Rule(
            "microsoft",
            lambda q: 1.55e-3 * (q.n / 1e9) ** -0.23 * (q.d / 1e9) ** -0.32,
            None,
            "trained at 0.5M tokens; N and D in billions (printed for raw units, without sense)",
        ),
        Rule(
            "deepseek",
            lambda q: 0.3118 * compute(q) ** -0.1250,
            lambda q: 0.2920 * compute(q) ** 0.3271,
            "C = 6 N D; 0.3118 is the original, 0.3188 is printed",
        ),
        Rule(
            "deepseek-md",
            lambda q: 0.3118 * attention_compute(q) ** -0.1250,
            lambda q: 0.2920 * attention_compute(q) ** 0.3271,
            "C = M D, as in the original",
            needs=("flops_per_token",),
        ),
        Rule(
            "porian",
            lambda q: 3.7 * q.n**-0.36,
            lambda q: 0.7576 * q.n**0.703,
            "its N includes the head",
        ),
        Rule(
            "minicpm",
            None,
            lambda q: 1.21e9 * loss(q) ** -6.24,
            "learning rate constant under muP; 1.21e9 is the original, 2e18 is printed",
            needs=("loss",),
        ),
        Rule(
            "moonlight",
            lambda q: 0.0127 * compute(q) ** -0.057,
            lambda q: 0.0065 * compute(q) ** 0.4138,
            "C = 6 N D",
        ),
        Rule(
            "fixed",
            lambda _: 2.0**-9,
            lambda _: 192 * 2048.0,
            "one setting for every model: what a law has to beat",
        ),
    )
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
