"""Small Llama shapes trained many at a time: what one cell of a sweep runs."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np
from ml_collections import ConfigDict

from lminf.attention import policy as policies
from lminf.config import parse_choice
from lminf.data import windows
from lminf.errors import InputError
from lminf.experiments._training import experts_of
from lminf.models import spec
from lminf.models.spec import ModelSpec
from lminf.objectives import terms
from lminf.parallel import mesh, partition
from lminf.run.progress import Progress
from lminf.scaling import accounting
from lminf.train import schedules
from lminf.train.ensemble import Replicas
from lminf.train.optim import OPTIMIZERS
from lminf.train.schedules import SCHEDULES
from lminf.train.step import TrainStep

EVALUATED = 2048  # held-out tokens of one batch; the rest of the text that fills none is left out


@dataclass(frozen=True)
class Measured:
    """One copy after some tokens."""

    seed: int
    lr: float  # the peak
    tokens: int
    train_loss: float  # nats per token, mean of the last twentieth of the steps
    nll: np.ndarray  # [held-out tokens], nats
    targets: np.ndarray  # [held-out tokens]


def shape_of(c: ConfigDict, vocab_size: int) -> ModelSpec:
    return spec.llama(
        vocab_size=vocab_size,
        trained_length=c.data.length,
        moe=experts_of(c.get("experts")),
        **c.model.to_dict(),
    )


def parameters(shape: ModelSpec, *, active: bool = False) -> int:
    """N: all but the vocabulary, as both laws count it; `active`: what one token uses of it."""
    return accounting.spec_parameters(shape, active=active)


def check(c: ConfigDict, *, budgets: Sequence[int]) -> None:
    """Refuses a schedule that the runs of these budgets (tokens) would not follow."""
    schedule = parse_choice(c.schedule, SCHEDULES, what="schedule")
    if schedule.peak != 1:
        raise InputError(
            f"--config.schedule={c.schedule}: peaks are those of --config.rates, and nothing reads "
            f"this one; write peak=1"
        )
    floor = getattr(schedule, "floor", 0.0)
    if min(c.rates) < floor:
        raise InputError(
            f"--config.rates: a peak of {min(c.rates)} is below the floor of {c.schedule}; give "
            f"higher peaks, or a lower floor"
        )
    schedules.check_steps(schedule, steps_of(c, budgets)[-1])


def steps_of(c: ConfigDict, budgets: Sequence[int]) -> list[int]:
    """Steps after which so many tokens were read."""
    return [max(1, round(budget / (c.data.batch * c.data.length))) for budget in budgets]


def train(
    c: ConfigDict,
    shape: ModelSpec,
    tokens: np.ndarray,
    held_out: np.ndarray,
    *,
    budgets: Sequence[int],
) -> Iterator[Measured]:
    """Every copy at each of `budgets` (tokens, rising); c.rates and c.replicates side by side.

    A copy that diverged is left out: a hole in the grid.
    """
    per_step = c.data.batch * c.data.length
    stops = steps_of(c, budgets)
    if stops[-1] * per_step > len(tokens):
        raise InputError(
            f"{stops[-1] * per_step} tokens are asked for and the text has {len(tokens)}; take a "
            f"smaller budget: no token is read twice"
        )
    schedule = parse_choice(c.schedule, SCHEDULES, what="schedule")
    program = TrainStep(
        shape,
        (policies.FULL,) * shape.num_layers,
        mesh.make(mesh.MeshShape(), jax.devices()[:1]),
        partition.parse("data"),
        parse_choice(c.optimizer, OPTIMIZERS, what="optimizer").build(),
        learning_rate=lambda step: step,  # every copy has its own
        clip=c.clip or None,
        objective=terms.language_modeling(shape),
    )
    seeds = tuple(range(c.seed, c.seed + c.replicates))
    copies = Replicas(program, schedule, seeds, tuple(c.rates), stops[-1])
    data = [Once(tokens, c.data.length, c.data.batch, seed) for seed in seeds]
    rows = max(1, EVALUATED // c.data.length)
    measured = windows.consecutive(held_out, length=c.data.length, rows=rows, at_most=len(held_out))
    targets = np.concatenate([batch["targets"].ravel() for batch in measured])
    seen = []
    with Progress(stops[-1], label="training side by side") as progress:
        for done, state, losses in copies.train(
            copies.init(), data, stops, progress=progress.update
        ):
            progress.update(done)
            seen.append(losses)
            last = np.concatenate(seen)[-max(1, math.ceil(done / 20)) :].mean(0)
            scored = [np.asarray(copies.nll(state.params, batch)) for batch in measured]
            nll = np.concatenate([part.reshape(*last.shape, -1) for part in scored], -1)
            for (s, seed), (r, rate) in itertools.product(enumerate(seeds), enumerate(c.rates)):
                if np.isfinite(nll[s, r]).all():
                    yield Measured(
                        seed, rate, done * per_step, float(last[s, r]), nll[s, r], targets
                    )


@dataclass(frozen=True)
class Once:
    """Windows of a text in a mixed order, each at most once: the first steps of a longer run and a
    shorter run see the same.
    """

    tokens: np.ndarray
    length: int
    rows: int
    seed: int

    @cached_property
    def _order(self) -> np.ndarray:
        count = (len(self.tokens) - 1) // self.length
        return np.random.default_rng(self.seed).permutation(count)

    def documents(self, step: int) -> np.ndarray:
        indices = np.arange(step * self.rows, (step + 1) * self.rows)
        return self._order[indices % len(self._order)] * self.length

    def batch(self, step: int) -> dict[str, np.ndarray]:
        rows = self.tokens[self.documents(step)[:, None] + np.arange(self.length + 1)]
        return {"tokens": rows[:, :-1].astype(np.int32), "targets": rows[:, 1:].astype(np.int32)}
