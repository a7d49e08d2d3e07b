"""Small Llama shapes trained many at a time: what one cell of a sweep runs."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from lminf.attention import policy as policies
from lminf.config import parse_choice
from lminf.data import windows
from lminf.errors import InputError
from lminf.experiments._training import experts_of, optimizer_of, transfer_of
from lminf.models import spec
from lminf.models.spec import ModelSpec
from lminf.objectives import terms
from lminf.parallel import mesh, partition
from lminf.run.progress import Progress
from lminf.train import schedules
from lminf.train.ensemble import Replicas
from lminf.train.schedules import SCHEDULES
from lminf.train.step import State, TrainStep

EVALUATED = 2048  # held-out tokens of one batch


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
    shape = spec.llama(
        vocab_size=vocab_size,
        trained_length=c.data.length,
        moe=experts_of(c.get("experts")),
        **c.model.to_dict(),
    )
    transfer = transfer_of(c)
    return transfer.spec(shape) if transfer else shape


def program_of(c: ConfigDict, shape: ModelSpec) -> TrainStep:
    """The step of such a model on one device, in full attention; every copy has its own rate."""
    return TrainStep(
        shape,
        (policies.FULL,) * shape.num_layers,
        mesh.single(),
        partition.parse("data"),
        optimizer_of(c, shape),
        learning_rate=lambda step: step,
        clip=c.clip or None,
        objective=terms.language_modeling(shape),
    )


def check(c: ConfigDict, *, budgets: Sequence[int]) -> None:
    """Refuses a schedule that the runs of these budgets (tokens) would not follow."""
    steps = steps_of(c, budgets)
    schedule = schedule_of(c, steps[0], steps[0])
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
    schedules.check_steps(schedule, steps[-1])


def steps_of(c: ConfigDict, budgets: Sequence[int]) -> list[int]:
    """Steps after which so many tokens were read."""
    return [max(1, round(budget / (c.data.batch * c.data.length))) for budget in budgets]


def schedule_of(c: ConfigDict, steps: int, first: int) -> schedules.Schedule:
    """The schedule of a run of so many steps; a phase for which it says 0 steps has its share of
    them. The warm-up's is of the `first` budget's steps, so that runs of all budgets begin alike.
    """
    schedule = parse_choice(c.schedule, SCHEDULES, what="schedule")
    shares = {"warmup": c.warmup * first, "decay": c.get("decay", 0.0) * steps}
    return dataclasses.replace(schedule, **{
        name: max(1, round(share)) for name, share in shares.items()
        if share and getattr(schedule, name) == 0
    })  # fmt: skip


def train(
    c: ConfigDict,
    shape: ModelSpec,
    tokens: np.ndarray,
    held_out: np.ndarray,
    *,
    budgets: Sequence[int],
) -> Iterator[Measured]:
    """Every copy at each of `budgets` (tokens, rising); c.rates and c.replicates side by side.

    With c.decay a budget is a branch of one trunk of constant rate: its last steps are trained
    from a copy of the trunk with a falling rate, as warm-up-stable-decay from the start would.
    A copy that diverged is left out: a hole in the grid.
    """
    per_step = c.data.batch * c.data.length
    stops = steps_of(c, budgets)
    if stops[-1] * per_step > len(tokens):
        raise InputError(
            f"{stops[-1] * per_step} tokens are asked for and the text has {len(tokens)}; take a "
            f"smaller budget: no token is read twice"
        )
    seeds = tuple(range(c.seed, c.seed + c.replicates))
    copies = Replicas(program_of(c, shape), seeds, tuple(c.rates))
    data = [Once(tokens, c.data.length, c.data.batch, seed) for seed in seeds]
    trunk, seen = copies.init(), []
    with Progress(stops[-1], label="training side by side") as progress:
        for stop in stops:
            schedule = schedule_of(c, stop, stops[0])
            settings: dict = {"schedule": schedule, "progress": progress.update}
            branch = stop - getattr(schedule, "decay", 0)
            # A cosine has its one end; a trunk does not fall before a branch leaves it.
            steps = stops[-1] if branch == stop else stop
            trunk, losses = copies.train(trunk, data, until=branch, steps=steps, **settings)
            seen.append(losses)
            state, losses = trunk, np.concatenate(seen)
            if branch < stop:
                state, last = copies.train(
                    jax.tree.map(jnp.copy, trunk), data, until=stop, steps=stop, **settings
                )
                losses = np.concatenate([losses, last])
            progress.update(stop)
            train_loss = losses[-max(1, math.ceil(stop / 20)) :].mean(0)
            nll, targets = held_out_nll(copies, state, held_out, c.data.length)
            for (s, seed), (r, rate) in itertools.product(enumerate(seeds), enumerate(c.rates)):
                if np.isfinite(nll[s, r]).all():
                    yield Measured(
                        seed, rate, stop * per_step, float(train_loss[s, r]), nll[s, r], targets
                    )


def held_out_nll(
    copies: Replicas, state: State, held_out: np.ndarray, length: int
) -> tuple[Float[np.ndarray, "seeds peaks T"], Int[np.ndarray, " T"]]:
    """(nats of every token under every copy, the tokens): rows of `length`, one after another,
    to the end of the text but for what fills no row."""
    measured = windows.consecutive(held_out, length=length, rows=1, at_most=len(held_out))
    rows = max(1, EVALUATED // length)
    tokens, targets = (np.concatenate([batch[name] for batch in measured])
                       for name in ("tokens", "targets"))  # fmt: skip
    scored = []
    for start in range(0, len(tokens), rows):
        batch = np.arange(start, start + rows) % len(tokens)  # one shape, so one program
        nll = copies.nll(state.params, {"tokens": tokens[batch], "targets": targets[batch]})
        scored.append(np.asarray(nll))
    nll = np.concatenate(scored, 2)[:, :, : len(tokens)]
    return nll.reshape(*nll.shape[:2], -1), targets.ravel()


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
