"""The loop around a step that only counts."""

from typing import NamedTuple

import pytest

from lminf.errors import InputError
from lminf.train.loop import Hook, fit
from lminf.train.step import Metrics


class Counter(NamedTuple):
    step: int


def counting(events, bad=()):
    def step(state, batch):
        assert batch == state.step
        events.append(f"run {state.step}")
        number = float(state.step)
        return Counter(state.step + 1), Metrics(number, number, 0.1, state.step not in bad, {})

    return step


def test_metrics_are_read_after_the_next_step_is_on_its_way():
    events = []
    watch = lambda done, metrics: events.append(f"look {done}")  # noqa: E731
    fit(counting(events), Counter(0), lambda step: step, steps=3, watch=watch)
    assert events == ["run 0", "run 1", "look 1", "run 2", "look 2", "look 3"]


def test_a_hook_sees_only_what_has_been_looked_at():
    events = []
    fit(
        counting(events), Counter(3), lambda step: step, steps=6,
        watch=lambda done, _: events.append(f"look {done}"),
        hooks=[Hook(2, lambda done, state: events.append(f"save {done} {state.step}"))],
    )  # fmt: skip
    assert events == [
        "run 3", "look 4", "save 4 4", "run 4", "run 5", "look 5", "look 6", "save 6 6"
    ]  # fmt: skip


def test_it_ends_when_asked():
    state = fit(counting([]), Counter(0), lambda step: step, steps=9, stop=lambda done: done == 4)
    assert state.step == 4


def test_a_loss_that_is_not_finite_is_never_silent():
    with pytest.raises(InputError, match=r"the loss of step 1 is 1\.0"):
        fit(counting([], bad={1}), Counter(0), lambda step: step, steps=5)
    seen = []
    fit(
        counting([], bad={1, 3}), Counter(0), lambda step: step, steps=5,
        not_finite=lambda done, _: seen.append(done),
    )  # fmt: skip
    assert seen == [2, 4]
