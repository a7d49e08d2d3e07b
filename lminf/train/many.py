"""Copies of one model that differ in their learning rate alone, trained as one program.

Small models leave a machine idle between operations. With a leading axis of copies one program
does the work of many runs: one compilation, and wider operations.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lminf.train.batches import Batches
from lminf.train.step import Program, State
from lminf.types import Params

AT_ONCE = 32  # steps of one call


@dataclass(frozen=True)
class Copies:
    """One program for every peak rate. All copies start alike and see the same batches."""

    program: Program  # on one device; `rate` is not read
    schedule: Any  # of lminf.train.schedules; each copy has its own `peak`
    peaks: tuple[float, ...]
    steps: int

    def init(self, *, seed: int) -> State:
        """The state of every copy, [copies, ...] each."""
        one = self.program.init(key=jax.random.key(seed))
        count = len(self.peaks)
        return jax.jit(lambda one: jax.tree.map(lambda x: jnp.repeat(x[None], count, 0), one))(one)

    def train(
        self, state: State, data: Batches, until: Sequence[int]
    ) -> Iterator[tuple[int, State, Float[np.ndarray, "steps copies"]]]:
        """(steps done, state, losses since the last) at each of `until`, which rise."""
        done = int(state.step[0])
        for stop in until:
            losses = []
            while done < stop:
                # Few lengths, so that few programs are compiled.
                count = AT_ONCE if stop - done >= AT_ONCE else 1
                batches = [data.batch(done + i) for i in range(count)]
                stacked = {name: np.stack([b[name] for b in batches]) for name in batches[0]}
                state, loss = self._some(state, stacked)
                losses.append(loss)
                done += count
            yield done, state, np.concatenate([np.asarray(loss) for loss in losses])

    def nll(self, params: Params, batch: Mapping[str, Any]) -> Float[Array, "copies B T"]:
        """Nats of every token under every copy."""
        return self._nll(params, batch)

    @cached_property
    def _some(self):
        peaks = jnp.asarray(self.peaks, jnp.float32)

        def one(state: State, batch, peak):
            schedule = dataclasses.replace(self.schedule, peak=peak)
            program = dataclasses.replace(
                self.program, rate=lambda step: schedule(step, self.steps)
            )
            state, metrics = program.update(state, batch)
            return state, metrics.loss

        def all_copies(state, batch):
            return jax.vmap(one, in_axes=(0, None, 0))(state, batch, peaks)

        return jax.jit(
            lambda state, batches: jax.lax.scan(all_copies, state, batches), donate_argnums=0
        )

    @cached_property
    def _nll(self):
        def one(params, batch):
            return self.program.token_loss(params, batch).nll

        return jax.jit(jax.vmap(one, in_axes=(0, None)))
