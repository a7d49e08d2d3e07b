"""Steps one after another, with the device never waiting for the host to look at a loss."""

import math
from collections.abc import Callable, Mapping

from jaxtyping import Array

from lminf.errors import InputError
from lminf.train.step import State

Watch = Callable[[int, float], None]  # (steps done, loss of the last one in nats per token)


def fit(
    step: Callable,
    state: State,
    batch_at: Callable[[int], Mapping[str, Array]],
    *,
    steps: int,
    watch: Watch | None = None,
) -> State:
    """The state after `steps` steps. A loss is read once the next step has been dispatched."""
    waiting = None
    for index in range(steps):
        state, value = step(state, batch_at(index))
        if waiting is not None:
            _look(index, waiting, watch)
        waiting = value
    if waiting is not None:
        _look(steps, waiting, watch)
    return state


def _look(done: int, value, watch: Watch | None) -> None:
    number = float(value)
    if not math.isfinite(number):
        raise InputError(
            f"the loss of step {done - 1} is {number}; lower the learning rate or look at its batch"
        )
    if watch:
        watch(done, number)
