"""Values over time: written one step late, so that the device never waits for Python."""

from collections.abc import Mapping
from typing import Any

from lminf.run.folder import RunFolder


class MetricsLog:
    """Appends to metrics.jsonl. Reading an array waits for the step that computes it, so the
    values of a step are read when the next step's arrive, after that one has been dispatched.

    with MetricsLog(out) as log:
        for step in range(steps):
            state, loss = train_step(state, batch(step))
            log.add(step, {"loss": loss})
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.waiting: tuple[int, Mapping[str, Any]] | None = None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *failure) -> None:
        self._write()

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        self._write()
        self.waiting = (step, values)

    def _write(self) -> None:
        if self.waiting is not None:
            step, values = self.waiting
            self.waiting = None
            self.folder.append_metrics(step, values)


class Smoothed:
    """Exponential average whose start is unbiased: the mean of the values seen, weighted to recent.

    A value's weight halves every `half_life` values.
    """

    def __init__(self, half_life: float):
        self.decay = 0.5 ** (1 / half_life)
        self.total = self.weight = 0.0

    def add(self, value: float) -> float:
        self.total = self.decay * self.total + value
        self.weight = self.decay * self.weight + 1.0
        return self.total / self.weight
