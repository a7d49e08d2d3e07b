"""Copies of one model that differ in their seed and learning rate alone, trained as one program.

Small models leave a machine idle between operations. With leading axes of copies one program does
the work of many runs: one compilation, and wider operations.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lminf import ranges
from lminf.ranges import Range
from lminf.train.batches import Batches
from lminf.train.step import State, TrainStep
from lminf.types import Params

AT_ONCE = 32  # steps of one call


@dataclass(frozen=True)
class Replicas:
    """One program for every seed and peak rate.

    Copies of one seed start alike and see the same batches.
    """

    program: TrainStep  # on one device; `learning_rate` is not read
    schedule: Any  # of lminf.train.schedules; each copy has its own `peak`
    seeds: tuple[Annotated[int, Range(min=0)], ...]
    peaks: tuple[Annotated[float, Range(above=0)], ...]
    steps: Annotated[int, Range(min=1)]

    def __post_init__(self):
        ranges.check(self)

    def init(self) -> State:
        """The state of every copy, [seeds, peaks, ...] each."""
        of_seeds = [self.program.init(key=jax.random.key(seed)) for seed in self.seeds]
        count = len(self.peaks)

        def spread(*leaves):
            return jnp.repeat(jnp.stack(leaves)[:, None], count, 1)

        return jax.jit(lambda *states: jax.tree.map(spread, *states))(*of_seeds)

    def train(
        self,
        state: State,
        data: Sequence[Batches],
        until: Sequence[int],
        *,
        progress: Callable[[int], object] = lambda done: None,
    ) -> Iterator[tuple[int, State, Float[np.ndarray, "steps seeds peaks"]]]:
        """(steps done, state, losses since the last) at each of `until`, which rise; every seed has
        its own `data`. `progress` hears of steps done in between.
        """
        done = int(state.step[0, 0])
        for stop in until:
            losses = []
            while done < stop:
                # Few lengths, so that few programs are compiled.
                count = AT_ONCE if stop - done >= AT_ONCE else 1
                batches = [[source.batch(done + i) for source in data] for i in range(count)]
                stacked = jax.tree.map(
                    lambda *leaves: np.stack(leaves), *[_stacked(of_seeds) for of_seeds in batches]
                )
                if losses:
                    losses[-1].block_until_ready()  # meanwhile the next batches were made
                    progress(done)
                state, loss = self._some(state, stacked)
                losses.append(loss)
                done += count
            yield done, state, np.concatenate([np.asarray(loss) for loss in losses])

    def nll(self, params: Params, batch: Mapping[str, Any]) -> Float[Array, "seeds peaks B T"]:
        """Nats of every token under every copy."""
        return self._nll(params, batch)

    @cached_property
    def _some(self):
        peaks = jnp.asarray(self.peaks, jnp.float32)

        def one(state: State, batch, peak):
            schedule = dataclasses.replace(self.schedule, peak=peak)
            program = dataclasses.replace(
                self.program, learning_rate=lambda step: schedule(step, self.steps)
            )
            state, metrics = program.update(state, batch)
            return state, metrics.loss

        of_one_seed = jax.vmap(one, in_axes=(0, None, 0))
        of_all = jax.vmap(of_one_seed, in_axes=(0, 0, None))
        return jax.jit(
            lambda state, batches: jax.lax.scan(lambda s, b: of_all(s, b, peaks), state, batches),
            donate_argnums=0,
        )

    @cached_property
    def _nll(self):
        def one(params, batch):
            return self.program.token_loss(params, batch).nll

        of_one_seed = jax.vmap(one, in_axes=(0, None))
        return jax.jit(jax.vmap(of_one_seed, in_axes=(0, None)))


def _stacked(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
