"""Scores of completions: pure functions of text and counts."""

import math
import re
from typing import NamedTuple


def first_integer(completion: str) -> int | None:
    """The first run of digits 0-9 as a number, or None. Both passkey papers score by it."""
    found = re.search(r"[0-9]+", completion)
    return int(found.group()) if found else None


class Rate(NamedTuple):
    """A share of successes with its Wilson interval, all in [0, 1]."""

    rate: float
    low: float
    high: float


def success_rate(successes: int, trials: int, *, z: float = 1.959964) -> Rate:
    """Share of successes and the Wilson score interval; z = 1.96 makes it a 95 % one.

    Unlike rate +- z * standard error, the interval stays within [0, 1] and does not shrink to a
    point at 0/n and n/n, where passkey scores usually are. Source: Wilson 1927, JASA 22:209.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes in {trials} trials")
    rate = successes / trials
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + (z / (2 * trials)) ** 2)
    spread /= 1 + z * z / trials
    return Rate(rate, max(0.0, centre - spread), min(1.0, centre + spread))
