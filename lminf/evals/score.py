"""Scores of completions, and tables of them: pure functions of text, counts and rows."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats


def first_integer(completion: str) -> int | None:
    """The first run of digits 0-9 as a number, or None. Both passkey papers score by it."""
    match = re.search(r"[0-9]+", completion)
    return int(match.group()) if match else None


class Interval(NamedTuple):
    """The mean of some scores and its 95 % interval."""

    mean: float
    low: float
    high: float


def success_rate(successes: int, trials: int, *, z: float = 1.959964) -> Interval:
    """Share of successes and the Wilson score interval; z = 1.96 makes it a 95 % one.

    Unlike rate +- z * standard error, the interval stays within [0, 1] and does not shrink to a
    point at 0/n and n/n, where passkey scores usually are. Source: Wilson 1927, JASA 22:209.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes in {trials} trials")
    return _wilson(successes / trials, trials, z)


def _wilson(rate: float, trials: float, z: float = 1.959964) -> Interval:
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + (z / (2 * trials)) ** 2)
    spread /= 1 + z * z / trials
    return Interval(rate, max(0.0, centre - spread), min(1.0, centre + spread))


def of_groups(scores: Sequence[float], size: int) -> Interval:
    """Mean of scores in [0, 1] of which each `size` in turn belong together, as questions about one
    text do, with its 95 % interval; the last group may be smaller.

    Scores of 0 and 1 have Wilson's interval of as many independent trials as would have the
    variance that the groups show: at least one a group, at most one a score (the design effect,
    Kish 1965). Of other scores it is the bootstrap over groups.
    """
    groups = [np.asarray(scores[i : i + size], np.float64) for i in range(0, len(scores), size)]
    rate, count = float(np.mean(scores)), len(groups)
    if not all(score in (0, 1) for score in scores):
        _, low, high = over_documents([group.mean() for group in groups])
        return Interval(rate, max(low, 0.0), min(high, 1.0))
    # Of a ratio of sums, as groups may differ in size (Cochran 1977, equation 6.9).
    residuals = np.array([group.sum() - rate * len(group) for group in groups])
    variance = float((residuals**2).sum()) * count / max(count - 1, 1) / len(scores) ** 2
    trials = rate * (1 - rate) / variance if variance > 0 else len(scores)
    if rate in (0, 1):  # no variance to compare
        trials = count
    return _wilson(rate, min(max(trials, count), len(scores)))


def mean_score(scores: Sequence[float], *, resamples: int = 4000, seed: int = 0) -> Interval:
    """Mean of scores in [0, 1] with its 95 % bootstrap interval (percentiles of resampled means).

    One or two scores say nothing of their spread: the interval is all of [0, 1].
    """
    if not len(scores):
        raise ValueError("no scores to average")
    mean, low, high = over_documents(scores, resamples=resamples, seed=seed)
    return Interval(mean, max(low, 0.0), min(high, 1.0))


def over_documents(values: Sequence[float], *, resamples: int = 4000, seed: int = 0) -> Interval:
    """Mean of one value a document with its 95 % bootstrap interval over documents.

    The value may have any unit. What a document has several of (depths, tokens) enters as its
    mean, because they are no independent samples. Two policies on the same documents are compared
    by the differences document by document, which makes it the paired bootstrap. Of fewer than
    three documents the interval is unbounded. Percentiles are expanded for small samples, which
    else cover too little: Hesterberg 2015, The American Statistician 69:371, section 4.
    """
    sample, count = np.asarray(values, np.float64), len(values)
    if count < 3:
        return Interval(float(sample.mean()), -math.inf, math.inf)
    drawn = np.random.default_rng(seed).integers(0, count, (resamples, count))
    tail = stats.norm.cdf(math.sqrt(count / (count - 1)) * stats.t.ppf(0.025, count - 1))
    low, high = np.percentile(sample[drawn].mean(1), [100 * tail, 100 * (1 - tail)])
    return Interval(float(sample.mean()), float(low), float(high))


def ends(interval: Interval) -> dict[str, float | None]:
    """The columns `low` and `high` of a figure's rows; None where there is no interval."""
    low, high = (end if math.isfinite(end) else None for end in interval[1:])
    return {"low": low, "high": high}


def value_text(interval: Interval, *, digits: int = 2) -> str:
    """`0.93 (0.67 to 1.19)`, or the mean alone where there are too few documents."""
    mean, low, high = interval
    if not math.isfinite(low):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def pooled(rows: Sequence[Mapping[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """One row for all that agree in the columns `by`: these, `instances`, and `score` with its
    interval `low` to `high`. For tasks whose answers are right or wrong.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    lines = []
    for columns, group in groups.items():
        instances = sum(row["instances"] for row in group)
        interval = success_rate(sum(map(correct, group)), instances)
        lines.append({
            **dict(zip(by, columns, strict=True)), "instances": instances,
            "score": interval.mean, "low": interval.low, "high": interval.high,
        })  # fmt: skip
    return lines


def correct(row: Mapping[str, Any]) -> int:
    """The right answers of a row."""
    return round(row["score"] * row["instances"])


def count_text(row: Mapping[str, Any]) -> str:
    """`19/20`, the right answers and all."""
    return f"{correct(row)}/{row['instances']}"


def interval_text(row: Mapping[str, Any]) -> str:
    """`19/20 = 0.95 (0.76–0.99)`, with the 95 % interval of the share."""
    return f"{count_text(row)} = {row['score']:.2f} ({row['low']:.2f}–{row['high']:.2f})"
