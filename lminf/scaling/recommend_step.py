"""One learning rate, batch and weight decay for N and D, and how far practice is from the rules.

Rate and batch are the step law's, weight decay follows from them by the AdamW timescale. Inside the
fitted range their intervals are over the groups of runs; outside, where the law's form is a guess,
they are widened to twice what an independent replication was off by.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lminf.scaling import baselines, hyperparameters, practice, published
from lminf.scaling.steps import StepLaw

PLATEAU = 0.0025  # relative loss above the least, as of the runs that the step law is fitted to
COMPARED = ("step", "deepseek", "moonlight", "porian", "microsoft")
Span = tuple[float, float]


class Distance(NamedTuple):
    """Root-mean-square distance of a rule in factors of two; NaN: it names none."""

    rule: str
    practice_lr: float  # of public models
    practice_batch: float
    replication_lr: float  # NaN also where the replication was not compared with the rule
    replication_batch: float


@dataclass(frozen=True)
class Recommendation:
    lr: float
    batch: float  # tokens
    weight_decay: float
    lr_interval: Span
    batch_interval: Span
    lr_plateau: Span  # rates that cost at most PLATEAU, at this batch
    batch_plateau: Span
    outside: tuple[str, ...]  # the fitted range, one sentence each
    distances: tuple[Distance, ...]

    def sentences(self, seq_len: int) -> list[str]:
        """The recommendation, its plateau, and what contradicts it."""
        rate = " to ".join(f"{v:.2g}" for v in self.lr_plateau)
        batch = " to ".join(f"{v / 1e6:.2g}M" for v in self.batch_plateau)
        spans = [" to ".join(f"{v:.2g}" for v in self.lr_interval),
                 " to ".join(f"{v / 1e6:.2g}M" for v in self.batch_interval)]  # fmt: skip
        sequences = round(self.batch / seq_len)
        lines = [
            f"Take a peak learning rate of {self.lr:.2g}, a batch of {self.batch / 1e6:.2g}M "
            f"tokens ({sequences:,} sequences) and AdamW weight decay {self.weight_decay:.2g} "
            f"(known at second hand). Rates {rate} and batches {batch} cost at most "
            f"{1000 * PLATEAU:g} per mille of the loss. Intervals (95 %): rate {spans[0]}, batch "
            f"{spans[1]}."
        ]
        if self.outside:
            lines.append(
                f"Outside the range that the law was fitted in ({'; '.join(self.outside)}), so the "
                "intervals are twice what an independent replication was off by; run a few rates "
                "around it before a long run."
            )
        rows = [
            f"{d.rule} {_two(d.practice_lr, d.practice_batch)} / "
            f"{_two(d.replication_lr, d.replication_batch)}"
            for d in self.distances
        ]
        lines.append(
            f"Distance in factors of two, rate and batch, from {len(practice.MODELS)} public "
            "models (of reports, as remembered) / from 18 optima of a replication: "
            f"{'; '.join(rows)}."
        )
        return lines


def _two(lr: float, batch: float) -> str:
    return " and ".join("none" if np.isnan(value) else f"{value:.1f}" for value in (lr, batch))


def recommend(*, n: float, d: float, law: StepLaw = published.STEP) -> Recommendation:
    """Peak learning rate, batch (tokens) and weight decay for N parameters and D tokens."""
    setting = law.setting(n=n, d=d)
    batch = float(setting.batch or np.nan)
    intervals = [span[:2] for span in law.interval(n=n, d=d).values()]
    outside = tuple(law.outside({"n": n, "d": d}))
    if outside:
        intervals = [
            (min(low, value / 4**off), max(high, value * 4**off))
            for (low, high), value, off in zip(
                intervals, (setting.lr, batch), practice.REPLICATION["step"], strict=True
            )
        ]
    bowl = law.diagnostics["bowl"]
    # excess = h o^2 / 2 at o factors of two
    lr_off, batch_off = (2 ** np.sqrt(2 * PLATEAU / bowl[name]) for name in ("lr", "batch"))
    return Recommendation(
        setting.lr,
        batch,
        hyperparameters.weight_decay(lr=setting.lr, batch=batch, n=n, d=d),
        intervals[0],
        intervals[1],
        (setting.lr / lr_off, setting.lr * lr_off),
        (batch / batch_off, batch * batch_off),
        outside,
        tuple(distance(name) for name in COMPARED),
    )


def distance(name: str) -> Distance:
    """How far a rule is from what public models used, and from the replication."""
    rule = baselines.rule(name)
    rates, batches = [], []
    for model in practice.MODELS:
        setting = rule.setting(baselines.Query(model.n_nv, model.tokens, None, None))
        rates.append(np.log2(setting.lr / model.lr))
        if setting.batch is not None and model.batch is not None:
            batches.append(np.log2(setting.batch / model.batch))
    replicated = practice.REPLICATION.get(name, (np.nan, np.nan))
    return Distance(name, _rms(rates), _rms(batches), *replicated)


def _rms(values: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values else float("nan")
