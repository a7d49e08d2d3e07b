"""Small models that differ in their seed, trained side by side; means and intervals over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np
from ml_collections import ConfigDict
from scipy import stats

from lminf.attention.policy import FULL
from lminf.config import parse_choice
from lminf.data.tokenizers import ByteTokenizer
from lminf.evals import score
from lminf.evals.score import Interval
from lminf.lm.lm import LM
from lminf.models import spec
from lminf.models.spec import ModelSpec
from lminf.objectives.terms import CrossEntropy, Term
from lminf.parallel import mesh, partition
from lminf.run.folder import Row
from lminf.run.progress import Progress
from lminf.train import schedules
from lminf.train.batches import Batches
from lminf.train.ensemble import Replicas
from lminf.train.optim import OPTIMIZERS
from lminf.train.schedules import SCHEDULES
from lminf.train.step import State, TrainStep
from lminf.types import Params


def seeds(c: ConfigDict) -> tuple[int, ...]:
    return tuple(range(c.seed, c.seed + c.replicates))


def shape_of(c: ConfigDict) -> ModelSpec:
    return spec.llama(
        vocab_size=ByteTokenizer().vocab_size, trained_length=c.length, **c.model.to_dict()
    )


def program(
    c: ConfigDict, *, schedule: str, steps: int, objective: tuple[Term, ...] = (CrossEntropy(),)
) -> TrainStep:
    """The step of a run of so many steps on one device, in full attention."""
    shape, rate = shape_of(c), parse_choice(schedule, SCHEDULES, what="schedule")
    schedules.check_steps(rate, steps)
    return TrainStep(
        shape,
        (FULL,) * shape.num_layers,
        mesh.single(),
        partition.STRATEGIES["data"],
        parse_choice(c.optimizer, OPTIMIZERS, what="optimizer").build(),
        lambda step: rate(step, steps),
        objective=objective,
    )


@dataclass(frozen=True)
class Training:
    """Trainings of a model of every seed, compiled once for all that have this many steps."""

    c: ConfigDict
    schedule: str
    steps: int

    @cached_property
    def copies(self) -> Replicas:
        step = program(self.c, schedule=self.schedule, steps=self.steps)
        return Replicas(step, seeds(self.c), (self.rate.peak,))

    @property
    def rate(self) -> schedules.Schedule:
        return parse_choice(self.schedule, SCHEDULES, what="schedule")

    def run(
        self, data: Sequence[Batches], *, label: str, start: Sequence[LM] | None = None
    ) -> list[LM]:
        """The models, each trained on its own data; from those of `start`, or fresh ones."""
        state = self.copies.init() if start is None else self._started(start)
        with Progress(self.steps, label=label) as progress:
            state, _ = self.copies.train(
                state, data, until=self.steps, schedule=self.rate, steps=self.steps,
                progress=progress.update,
            )  # fmt: skip
        params = jax.device_get(state.params)
        return [language_model(self.c, jax.tree.map(lambda x, i=i: x[i, 0], params))
                for i in range(len(data))]  # fmt: skip

    def _started(self, models: Sequence[LM]) -> State:
        params = jax.tree.map(lambda *x: np.stack(x)[:, None], *(each.params for each in models))
        return jax.vmap(jax.vmap(self.copies.program.state_of))(params)


@dataclass(frozen=True)
class DrawnRows:
    """Batches whose rows are drawn anew for each step, so every row is a document of its own."""

    length: int
    rows: int
    seed: int

    def documents(self, step: int) -> Sequence[int]:
        return range(step * self.rows, (step + 1) * self.rows)


def language_model(c: ConfigDict, params: Params) -> LM:
    return LM(shape_of(c), params, ByteTokenizer())


# --- Seeds ----------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> Interval:
    """Mean over seeds with its 95 % interval by Student's t; unbounded for one seed."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean, -math.inf, math.inf)
    half = stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count)
    return Interval(mean, float(mean - half), float(mean + half))


def interval_text(values: Sequence[float]) -> str:
    """`0.931 (0.670 to 1.192)`: the mean over seeds and its 95 % interval."""
    return score.value_text(interval(values), digits=3)


def over_seeds(rows: Sequence[Row], by: Sequence[str], value: str) -> dict[tuple, Interval]:
    """Mean and interval of `value` for every combination of the columns `by`."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row[value])
    return {key: interval(values) for key, values in groups.items()}
