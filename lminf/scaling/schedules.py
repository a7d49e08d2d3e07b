"""Learning-rate schedules for continued training: pure functions of an integer step, traceable.

`step` counts the current phase from 0. Continuous at every boundary, and resuming needs the step
and nothing else. Source: Ibrahim et al. 2024, arXiv:2403.08763.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from lminf.errors import InputError


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up to `peak`, then a cosine to `floor` at `steps`, then `floor`.

    Restarted with about 1 % warm-up at the start of new data this is re-warming and re-decaying;
    `peak` trades adaptation against forgetting.
    """

    peak: float
    floor: float
    warmup: int  # steps
    steps: int

    def __post_init__(self):
        if not 0 <= self.warmup < self.steps:
            raise InputError(
                f"warmup={self.warmup} must be at least 0 and below steps={self.steps}"
            )

    def __call__(self, step) -> Float[Array, "..."]:
        t = jnp.asarray(step, jnp.float32)
        part = jnp.clip((t - self.warmup) / (self.steps - self.warmup), 0.0, 1.0)
        decayed = self.floor + (self.peak - self.floor) / 2 * (1 + jnp.cos(jnp.pi * part))
        return jnp.where(t < self.warmup, self.peak * t / max(self.warmup, 1), decayed)


@dataclass(frozen=True)
class Infinite:
    """Warm-up, cool-down to `constant`, constant of any length, exponential annealing to `floor`.

    New data continues from the state before annealing, at `constant`: no re-warming.
    """

    peak: float
    constant: float
    floor: float
    warmup_end: int
    cooldown_end: int
    constant_end: int
    anneal_end: int
    cooldown: Literal["cosine", "inverse_sqrt"] = "cosine"
    steepness: float = 10.0  # s > 0 of the inverse square root

    def __post_init__(self):
        ends = (0, self.warmup_end, self.cooldown_end, self.constant_end, self.anneal_end)
        if any(late <= early for early, late in itertools.pairwise(ends[1:])):
            raise InputError(f"the ends of the four phases must increase, found {ends[1:]}")

    def __call__(self, step) -> Float[Array, "..."]:
        t = jnp.asarray(step, jnp.float32)
        warm = self.peak * t / max(self.warmup_end, 1)
        x = jnp.clip((t - self.warmup_end) / (self.cooldown_end - self.warmup_end), 0.0, 1.0)
        cool = self.peak + (self.constant - self.peak) * self._fall(x)
        y = jnp.clip((t - self.constant_end) / (self.anneal_end - self.constant_end), 0.0, 1.0)
        # Divided by the phase's length: the floor is reached exactly at anneal_end.
        anneal = self.constant * (self.floor / self.constant) ** y
        late = jnp.where(t < self.cooldown_end, cool, anneal)
        return jnp.where(t < self.warmup_end, warm, late)

    def _fall(self, x):
        if self.cooldown == "cosine":
            return (1 - jnp.cos(jnp.pi * x)) / 2
        at_end = (1 + self.steepness) ** -0.5 - 1
        return (1 / jnp.sqrt(1 + self.steepness * x) - 1) / at_end
