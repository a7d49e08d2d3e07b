"""Aggregates of rows: scores pooled over levels, and the effective length of a policy."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lminf.evals import score
from lminf.evals.score import Interval

Rows = Sequence[Mapping[str, Any]]


def interval(rows: Rows) -> Interval:
    """The mean score of all instances of the rows, with its 95 % interval.

    Wilson's over all of them where every answer is right or wrong. Else the rows' own intervals,
    which are of independent draws: their distances from the means add up as squares do.
    """
    total = sum(row["instances"] for row in rows)
    if all(is_share(row) for row in rows):
        return score.success_rate(sum(map(score.correct, rows)), total)
    weights = [row["instances"] / total for row in rows]
    mean = sum(w * row["score"] for w, row in zip(weights, rows, strict=True))
    below, above = (
        math.hypot(*(w * (row[end] - row["score"]) for w, row in zip(weights, rows, strict=True)))
        for end in ("low", "high")
    )
    return Interval(mean, max(0.0, mean - below), min(1.0, mean + above))


def is_share(row: Mapping[str, Any]) -> bool:
    """Whether a row is of answers that are right or wrong, as its interval tells."""
    wilson = score.success_rate(score.correct(row), row["instances"])
    return all(
        math.isclose(row[name], value, abs_tol=1e-9)
        for name, value in zip(("score", "low", "high"), wilson, strict=True)
    )


def effective_length(rows: Rows) -> int | None:
    """The longest length up to which the interval of a score reaches that of the shortest length:
    longer prompts are known to be answered worse. None: there is one length only, or the score of
    the shortest may be nought.
    """
    by_length = {length: [row for row in rows if row["length"] == length]
                 for length in sorted({row["length"] for row in rows})}  # fmt: skip
    intervals = {length: interval(members) for length, members in by_length.items()}
    lengths = list(intervals)
    low = intervals[lengths[0]].low
    if len(lengths) < 2 or low <= 0:
        return None
    longest = lengths[0]
    for length in lengths[1:]:
        if intervals[length].high < low:
            break
        longest = length
    return longest
