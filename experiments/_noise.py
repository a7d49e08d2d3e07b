"""Statistics of replicate seeds: noise, optima with intervals, and which losses differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lminf.run.folder import Row

DRAWS = 1000


@dataclass(frozen=True)
class Curve:
    """A loss along one coordinate, measured with one seed or more at each point."""

    x: np.ndarray  # rising
    values: tuple[list[float], ...]  # at each x, one for each seed
    labels: tuple[Any, ...] = ()  # of the points; nothing here reads them
    noise: float | None = None  # between seeds; None: of these values

    @cached_property
    def means(self) -> np.ndarray:
        return np.array([np.mean(values) for values in self.values])

    @cached_property
    def sigma(self) -> float | None:
        return pooled(self.values) if self.noise is None else self.noise

    @cached_property
    def errors(self) -> np.ndarray | None:
        """Standard errors of the means; None without replicates."""
        if self.sigma is None:
            return None
        return self.sigma / np.sqrt([len(values) for values in self.values])


def settings(rows: Sequence[Row], keys: Sequence[str], metric: str) -> dict[tuple, list[float]]:
    """The measurements of each setting, one for each seed."""
    by_setting: dict[tuple, list[float]] = {}
    for row in rows:
        by_setting.setdefault(tuple(row[key] for key in keys), []).append(row[metric])
    return by_setting


def pooled(values: Sequence[Sequence[float]]) -> float | None:
    """Standard deviation between seeds of one setting, from all settings with two or more."""
    several = [draws for draws in values if len(draws) > 1]
    if not several:
        return None
    freedom = sum(len(draws) - 1 for draws in several)
    return float(np.sqrt(sum(np.var(draws) * len(draws) for draws in several) / freedom))


def distinguishable(one: float, another: float, error: float) -> bool:
    """Whether two losses differ by more than twice the standard error of their difference."""
    return abs(one - another) > 2 * error


def optimum(curve: Curve) -> tuple[float | None, float | None, float | None]:
    """(x, low, high): the vertex of a parabola in ln x through the best point and its neighbours,
    and 95 % of the vertices of draws with the noise of the means.

    None where the least loss is at an end: there is no optimum to name.
    """
    best = vertex(np.log(curve.x), curve.means)
    if best is None:
        return None, None, None
    if curve.errors is None:
        return float(np.exp(best[0])), None, None
    low, high = np.percentile(sampled_optima(curve), [2.5, 97.5])
    return float(np.exp(best[0])), float(low), float(high)


def sampled_optima(curve: Curve, *, seed: int = 0) -> np.ndarray:
    """Optima of `DRAWS` draws of the means; where a draw is least at an end, that end."""
    errors = curve.errors if curve.errors is not None else np.zeros(len(curve.x))
    draws = np.random.default_rng(seed).standard_normal((DRAWS, len(curve.x)))
    log_x, optima = np.log(curve.x), []
    for noise in draws:
        values = curve.means + errors * noise
        inside = vertex(log_x, values)
        optima.append(log_x[np.argmin(values)] if inside is None else inside[0])
    return np.exp(optima)


def bracket(curve: Curve) -> tuple[float | None, float | None]:
    """The nearest x below and above the best one whose losses are told apart from its; None: none,
    or no replicates to tell by."""
    if curve.errors is None:
        return None, None
    least = int(np.argmin(curve.means))
    apart = [
        distinguishable(mean, curve.means[least], float(np.hypot(error, curve.errors[least])))
        for mean, error in zip(curve.means, curve.errors, strict=True)
    ]
    below = [float(x) for x, worse in zip(curve.x[:least], apart, strict=False) if worse]
    above = [float(x) for x, worse in zip(curve.x[least:], apart[least:], strict=True) if worse]
    return (below[-1] if below else None), (above[0] if above else None)


def other_minima(curve: Curve) -> list[float]:
    """x of further minima: less than their neighbours, and between them and the best one a loss
    that is told apart from theirs."""
    if curve.errors is None:
        return []
    least, means, errors = int(np.argmin(curve.means)), curve.means, curve.errors
    minima = []
    for i, mean in enumerate(means):
        beside = [means[j] for j in (i - 1, i + 1) if 0 <= j < len(means)]
        between = range(min(i, least) + 1, max(i, least))
        if mean < min(beside) and any(
            means[j] > mean
            and distinguishable(means[j], mean, float(np.hypot(errors[i], errors[j])))
            for j in between
        ):
            minima.append(float(curve.x[i]))
    return minima


def vertex(x: np.ndarray, y: np.ndarray) -> tuple[float, float] | None:
    """(x, y) where the parabola through the least y and its neighbours is least; None at an end."""
    least = int(np.argmin(y))
    if least in (0, len(y) - 1):
        return None
    a, b, c = np.polyfit(x[least - 1 : least + 2], y[least - 1 : least + 2], 2)
    return -b / (2 * a), c - b * b / (4 * a)


def describe_minimum(curve: Curve, name: str) -> str:
    """A sentence: where the least loss lies, and which neighbours differ from it beyond noise."""
    least = int(np.argmin(curve.means))
    best, low, high = optimum(curve)
    x = f"{name} = {curve.x[least]:g}"
    if best is None:
        text = f"least ({curve.means[least]:.3f}) at {x}, an end of the grid: no optimum between"
    elif low is None:
        text = f"least ({curve.means[least]:.3f}) at {x}; one seed, so no interval"
    else:
        text = (
            f"least ({curve.means[least]:.3f}) at {x}; the parabola's optimum is {best:.3g} "
            f"(95 % {low:.3g} .. {high:.3g})"
        )
    if curve.errors is None:
        return text + "."
    apart = []
    for neighbour in (least - 1, least + 1):
        if 0 <= neighbour < len(curve.x):
            error = float(np.hypot(curve.errors[least], curve.errors[neighbour]))
            above = curve.means[neighbour] - curve.means[least]
            verdict = "told apart" if distinguishable(above, 0, error) else "not told apart"
            apart.append(f"{name} = {curve.x[neighbour]:g} is {above:.3f} above, {verdict}")
    low, high = bracket(curve)
    if low is not None and high is not None:
        apart.append(f"told apart from {low:g} below and {high:g} above")
    else:
        apart.append("not told apart from any on both sides, so no optimum is claimed")
    if minima := other_minima(curve):
        apart.append(f"no single bowl: a further minimum at {', '.join(f'{x:g}' for x in minima)}")
    return f"{text}; {'; '.join(apart)} (noise {curve.sigma:.3f})."
