"""Steps one after another, with the device never waiting for the host to look at a loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from jaxtyping import Array

from lminf.errors import InputError
from lminf.train.step import Metrics, State

Watch = Callable[[int, Metrics], None]  # (steps done, metrics of the last one)


class Hook(NamedTuple):
    """`call(steps done, state)` after every `every_steps` steps."""

    every_steps: int
    call: Callable[[int, State], None]


def refuse(done: int, metrics: Metrics) -> None:
    """What happens to a step without a finite loss and gradient, unless something else is asked."""
    raise InputError(
        f"the loss of step {done - 1} is {float(metrics.loss)}, its gradient's norm "
        f"{float(metrics.grad_norm)}; lower the learning rate or look at its batch"
    )


def fit(
    step: Callable[[State, Mapping[str, Array]], tuple[State, Metrics]],
    state: State,
    batch_at: Callable[[int], Mapping[str, Array]],
    *,
    steps: int,
    watch: Watch | None = None,
    not_finite: Watch = refuse,
    hooks: Sequence[Hook] = (),
    stop: Callable[[int], bool] | None = None,
) -> State:
    """The state after step number `steps`, from wherever `state` is.

    Metrics are read once the next step has been dispatched, or before a hook runs: no hook sees a
    state whose metrics have not been looked at. `stop(steps done)` ends it early.
    """
    waiting = None

    def look():
        nonlocal waiting
        if waiting is None:
            return
        done, metrics = waiting
        waiting = None
        if not metrics.finite:
            not_finite(done, metrics)
        if watch:
            watch(done, metrics)

    for index in range(int(state.step), steps):
        state, metrics = step(state, batch_at(index))
        look()
        waiting = (index + 1, metrics)
        for hook in hooks:
            if (index + 1) % hook.every_steps == 0:
                look()
                hook.call(index + 1, state)
        if stop and stop(index + 1):
            break
    look()
    return state
