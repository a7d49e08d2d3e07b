"""Copies of one model that differ in their seed and learning rate alone, trained as one program.

Small models leave a machine idle between operations. With leading axes of copies one program does
the work of many runs: one compilation, and wider operations.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lminf import ranges
from lminf.ranges import Range
from lminf.train.batches import Batches
from lminf.train.schedules import Schedule
from lminf.train.step import State, TrainStep
from lminf.types import Params

AT_ONCE = 32  # steps of one call, at most


@dataclass(frozen=True)
class Replicas:
    """One program for every seed and peak rate.

    Copies of one seed start alike and see the same batches.
    """

    program: TrainStep  # on one device; `learning_rate` is not read
    seeds: tuple[Annotated[int, Range(min=0)], ...]
    peaks: tuple[Annotated[float, Range(above=0)], ...]

    def __post_init__(self):
        ranges.check(self)

    def init(self) -> State:
        """The state of every copy, [seeds, peaks, ...] each."""
        keys = jnp.stack([jax.random.key(seed) for seed in self.seeds])
        count = len(self.peaks)

        # It runs once: optimising it took longer than all else that a small run compiles.
        @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
        def fresh(keys):
            states = jax.vmap(lambda key: self.program.init(key=key))(keys)
            return jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], count, 1), states)

        return fresh(keys)

    def train(
        self,
        state: State,
        data: Sequence[Batches],
        *,
        until: int,
        schedule: Schedule,
        steps: int,
        progress: Callable[[int], object] = lambda done: None,
    ) -> tuple[State, Float[np.ndarray, "steps seeds peaks"]]:
        """(state after step `until`, losses of its steps) on the way to the end of the schedule,
        each copy with its own `peak` of it, each seed with its own `data`. The state given is
        consumed; `progress` hears of steps done in between.
        """
        done = int(state.step[0, 0])
        losses = [np.zeros((0, len(self.seeds), len(self.peaks)), np.float32)]
        while done < until:
            count = min(AT_ONCE, until - done)
            steps_of_chunk = np.minimum(np.arange(done, done + AT_ONCE), until - 1)
            batches = [[source.batch(step) for source in data] for step in steps_of_chunk]
            stacked = jax.tree.map(
                lambda *leaves: np.stack(leaves), *[_stacked(of_seeds) for of_seeds in batches]
            )
            rates = [dataclasses.replace(schedule, peak=p)(jnp.asarray(steps_of_chunk), steps)
                     for p in self.peaks]  # fmt: skip
            if len(losses) > 1:
                jax.block_until_ready(losses[-1])  # meanwhile the next batches were made
                progress(done)
            state, loss = self._some(state, stacked, jnp.stack(rates, 1), count)
            losses.append(loss[:count])
            done += count
        return state, np.concatenate([np.asarray(loss) for loss in losses])

    def nll(self, params: Params, batch: Mapping[str, Any]) -> Float[Array, "seeds peaks B T"]:
        """Nats of every token under every copy."""
        return self._nll(params, batch)

    @cached_property
    def _some(self):
        def one(state: State, batch, rate):
            program = dataclasses.replace(self.program, learning_rate=lambda step: rate)
            state, metrics = program.update(state, batch)
            return state, metrics.loss

        of_one_seed = jax.vmap(one, in_axes=(0, None, 0))
        of_all = jax.vmap(of_one_seed, in_axes=(0, 0, None))

        def some(state: State, batches, rates, count):
            def body(i, carry):
                state, losses = carry
                batch = jax.tree.map(lambda leaf: leaf[i], batches)
                state, loss = of_all(state, batch, rates[i])
                return state, losses.at[i].set(loss)

            losses = jnp.zeros((AT_ONCE, len(self.seeds), len(self.peaks)))
            # The count is no constant of the program: one is compiled for all of them.
            return jax.lax.fori_loop(0, count, body, (state, losses))

        return jax.jit(some, donate_argnums=0)

    @cached_property
    def _nll(self):
        def one(params, batch):
            return self.program.token_loss(params, batch).nll

        of_one_seed = jax.vmap(one, in_axes=(0, None))
        return jax.jit(jax.vmap(of_one_seed, in_axes=(0, None)))


def _stacked(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
