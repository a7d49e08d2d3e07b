"""Stages: one run whose rows, data, rotary base and learning rates change at chosen steps.

    Stage(tokens=20_000, length=64, batch=32, schedule=Constant(1e-3))
    Stage(tokens=20_000, length=512, batch=4, schedule=Cosine(1e-3, 1e-4, 5), rope_base=1e6)

What a step computes follows from its number alone: the stage that it is in, and how many steps of
that stage came before. Weights and optimiser state go through all stages as they are: a rotary
base is no parameter. Source of the recipe: Gao et al. 2024, "How to train long-context language
models (effectively)", arXiv:2410.02660.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

from lminf import ranges
from lminf.attention.rope import Base, Learnt, Rotary
from lminf.errors import InputError
from lminf.models.spec import ModelSpec
from lminf.ranges import Range
from lminf.train import schedules
from lminf.train.batches import Batch, Batches
from lminf.train.schedules import SCHEDULES, Schedule
from lminf.train.step import TrainStep


@dataclass(frozen=True)
class Stage:
    """Some steps of a run that are alike."""

    tokens: Annotated[int, Range(min=1, max=2**63 - 1)]  # at least; whole steps are taken
    length: Annotated[int, Range(min=2, max=2**31 - 1)]  # tokens of a row
    batch: Annotated[int, Range(min=1, max=2**31 - 1)]  # rows of a step
    schedule: Schedule  # of the learning rate, over this stage's steps
    plan: str = ""  # the data plan, such as mixture:weights=(3,1); "": that of the run
    transforms: str = ""  # of its rows; "": those of the run
    rope_base: Base | None = None  # None: that of the stage before

    def __post_init__(self):
        ranges.check(self)
        schedules.check_steps(self.schedule, self.steps)

    @property
    def steps(self) -> int:
        return -(-self.tokens // (self.batch * self.length))

    def shape(self, spec: ModelSpec) -> ModelSpec:
        """The model of the stage before, as this one trains it: of the same parameters."""
        changes = {}
        if self.rope_base is not None:
            if not isinstance(spec.encoding, Rotary):
                raise InputError(
                    f"rope_base={self.rope_base:g}: the model has no rotary positions but "
                    f"{type(spec.encoding).__name__}; leave rope_base out"
                )
            changes["encoding"] = dataclasses.replace(spec.encoding, base=float(self.rope_base))
        if isinstance(spec.encoding, Learnt) and self.length > spec.encoding.length:
            raise InputError(
                f"a stage has rows of {self.length:,} tokens, but the model has "
                f"{spec.encoding.length:,} learnt positions; give stages of at most that length"
            )
        if self.length > spec.context_length:
            changes["trained_length"] = self.length
        return dataclasses.replace(spec, **changes)


STAGES = {"stage": Stage, **SCHEDULES}  # names in the text of a stage


@dataclass(frozen=True)
class Stages:
    """A whole run."""

    stages: tuple[Stage, ...]

    def __post_init__(self):
        if not self.stages:
            raise InputError("a run has no stage; give at least one")

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The number of steps done at the end of each stage."""
        return tuple(itertools.accumulate(stage.steps for stage in self.stages))

    @property
    def steps(self) -> int:
        return self.ends[-1]

    def find(self, step: int) -> tuple[int, int]:
        """(stage, how many of its steps come before) of a step; of steps after the end, the last
        stage's."""
        index = next((i for i, end in enumerate(self.ends) if step < end), len(self.ends) - 1)
        return index, step - self._first(index)

    def tokens(self, steps: int) -> int:
        """Tokens of so many steps, padding with them."""
        return sum(
            stage.batch * stage.length * min(max(steps - self._first(i), 0), stage.steps)
            for i, stage in enumerate(self.stages)
        )

    def _first(self, index: int) -> int:
        return self.ends[index] - self.stages[index].steps

    def programs(self, program: TrainStep) -> tuple[TrainStep, ...]:
        """The step of each stage, of which `program` says all that stages do not. Their states are
        alike, so one goes on from where another stopped."""
        made, spec = [], program.spec
        for index, stage in enumerate(self.stages):
            spec = stage.shape(spec)
            rate = _Rate(stage.schedule, self._first(index), stage.steps)
            made.append(dataclasses.replace(program, spec=spec, learning_rate=rate))
        return tuple(made)


@dataclass(frozen=True)
class _Rate:
    """The learning rate of a step of the whole run, by the schedule of the stage that it is in."""

    schedule: Schedule
    first: int
    steps: int

    def __call__(self, step):
        return self.schedule(step - self.first, self.steps)


@dataclass(frozen=True)
class StagedBatches:
    """The batches of a run from those of its stages, each of which begins with its own step 0."""

    stages: Stages
    data: Sequence[Batches]

    def batch(self, step: int) -> Batch:
        index, within = self.stages.find(step)
        return self.data[index].batch(within)

    def documents(self, step: int) -> Sequence[int]:
        index, within = self.stages.find(step)
        return self.data[index].documents(within)
