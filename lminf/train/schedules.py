"""Learning rates: pure functions of the step, so that a resumed run needs nothing but its step.

`schedule(step, steps)` is the rate of update `step` (from 0) of a run of `steps`; `step` may be
traced. All are continuous at every boundary. Source: scaling_laws.md §7.
"""

import itertools
import numbers
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float

from lminf import ranges
from lminf.errors import InputError
from lminf.ranges import Range

Rate: TypeAlias = Annotated[float, Range(min=0)]
Steps: TypeAlias = Annotated[int, Range(min=0, max=2**31 - 1)]


def _share(step, start: float, end: float) -> Float[Array, ""]:
    """How far `step` is from start (0) to end (1), not beyond."""
    step = jnp.asarray(step).astype(jnp.float32)
    return jnp.clip((step - start) / max(end - start, 1e-9), 0.0, 1.0)


def _cosine(share) -> Float[Array, ""]:
    """1 at share 0, 0 at share 1."""
    return (1.0 + jnp.cos(jnp.pi * share)) / 2.0


def _check_falling(schedule: "Schedule", *names: str) -> None:
    """Refuses a rate above the one that it should fall from, in the order of `names`."""
    for above, below in itertools.pairwise(names):
        high, low = getattr(schedule, above), getattr(schedule, below)
        # A peak of many copies is an array that is not known yet.
        if isinstance(high, numbers.Real) and isinstance(low, numbers.Real) and low > high:
            kind = type(schedule).__name__
            raise InputError(
                f"{kind}.{below} is {low}, above {kind}.{above}={high}; rates fall from the "
                f"{above} to the {below}"
            )


def check_steps(schedule: "Schedule", steps: int) -> None:
    """Refuses phases that do not fit into a run of so many steps."""
    phases = {
        name: getattr(schedule, name, 0) for name in ("warmup", "cooldown", "decay", "anneal")
    }
    if sum(phases.values()) > steps:
        named = " + ".join(f"{name}={count}" for name, count in phases.items() if count)
        raise InputError(
            f"the schedule's {named} is more than the {steps} steps of the run; give phases that "
            f"fit, or more steps"
        )
    if isinstance(schedule, Rewarm) and schedule.starts and schedule.starts[-1] >= steps:
        raise InputError(
            f"Rewarm.starts={schedule.starts}: the run ends after {steps} steps, before the last "
            f"data begin; give smaller starts, or more steps"
        )


@dataclass(frozen=True)
class Constant:
    """Linear warm-up, then one rate."""

    peak: Annotated[float, Range(above=0)]
    warmup: Steps = 0  # steps

    def __post_init__(self):
        ranges.check(self)

    def __call__(self, step, steps: int) -> Float[Array, ""]:
        return self.peak * _warm(step, self.warmup)


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then half a cosine down to the floor at the last step."""

    peak: Annotated[float, Range(above=0)]
    floor: Rate
    warmup: Steps  # steps

    def __post_init__(self):
        ranges.check(self)
        _check_falling(self, "peak", "floor")

    def __call__(self, step, steps: int) -> Float[Array, ""]:
        down = self.floor + (self.peak - self.floor) * _cosine(_share(step, self.warmup, steps))
        return jnp.where(step < self.warmup, self.peak * _warm(step, self.warmup), down)


@dataclass(frozen=True)
class WSD:
    """Warm-up, stable, linear decay over the last `decay` steps."""

    peak: Annotated[float, Range(above=0)]
    floor: Rate
    warmup: Steps  # steps
    decay: Steps  # steps

    def __post_init__(self):
        ranges.check(self)
        _check_falling(self, "peak", "floor")

    def __call__(self, step, steps: int) -> Float[Array, ""]:
        fallen = (self.peak - self.floor) * _share(step, steps - self.decay, steps)
        return self.peak * _warm(step, self.warmup) - fallen


@dataclass(frozen=True)
class Infinite:
    """Warm-up, cool-down to `constant`, constant for as long as data comes, exponential annealing.

    With anneal = 0 the run ends at `constant`: the state that new data continues from.
    Source: Ibrahim et al. 2024, arXiv:2403.08763.
    """

    peak: Annotated[float, Range(above=0)]
    constant: Annotated[float, Range(above=0)]
    floor: Rate
    warmup: Steps  # steps
    cooldown: Steps  # steps
    anneal: Steps  # steps, the last ones
    shape: Literal["cosine", "inverse_sqrt"] = "cosine"
    steepness: Annotated[float, Range(above=0)] = 10.0  # of inverse_sqrt

    def __post_init__(self):
        ranges.check(self)
        _check_falling(self, "peak", "constant", "floor")

    def __call__(self, step, steps: int) -> Float[Array, ""]:
        x = _share(step, self.warmup, self.warmup + self.cooldown)
        if self.shape == "cosine":
            fallen = 1.0 - _cosine(x)
        else:
            fallen = (1 / jnp.sqrt(1 + self.steepness * x) - 1) / ((1 + self.steepness) ** -0.5 - 1)
        cooled = self.peak + (self.constant - self.peak) * fallen
        rate = jnp.where(step < self.warmup, self.peak * _warm(step, self.warmup), cooled)
        return rate * (self.floor / self.constant) ** _share(step, steps - self.anneal, steps)


@dataclass(frozen=True)
class Rewarm:
    """The cosine schedule again for each new data set: re-warm to the same peak, decay again.

    Later warm-ups rise from the floor where the last decay ended, so that nothing jumps.
    Source: Ibrahim et al. 2024, arXiv:2403.08763.
    """

    peak: Annotated[float, Range(above=0)]
    floor: Rate
    starts: tuple[
        Annotated[int, Range(min=1, max=2**31 - 1)], ...
    ]  # steps at which new data begin; the first data begin at 0
    warm_share: Annotated[float, Range(min=0, max=1)] = 0.01  # of each phase's steps

    def __post_init__(self):
        ranges.check(self)
        _check_falling(self, "peak", "floor")
        if list(self.starts) != sorted(set(self.starts)):
            raise InputError(f"Rewarm.starts is {self.starts}; give steps that rise")

    def __call__(self, step, steps: int) -> Float[Array, ""]:
        starts = (0, *self.starts)
        rate = jnp.float32(0)
        for start, end in zip(starts, (*self.starts, steps), strict=True):
            warm_end = start + self.warm_share * (end - start)
            low = self.floor if start else 0.0
            up = low + (self.peak - low) * _share(step, start, warm_end)
            down = self.floor + (self.peak - self.floor) * _cosine(_share(step, warm_end, end))
            rate = jnp.where(step >= start, jnp.where(step < warm_end, up, down), rate)
        return rate


def _warm(step, warmup: int) -> Float[Array, ""]:
    return _share(step, 0, warmup) if warmup else jnp.ones(jnp.shape(step), jnp.float32)


Schedule: TypeAlias = Constant | Cosine | WSD | Infinite | Rewarm
SCHEDULES = {
    "constant": Constant,
    "cosine": Cosine,
    "wsd": WSD,
    "infinite": Infinite,
    "rewarm": Rewarm,
}
