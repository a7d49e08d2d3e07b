"""Where the time of a run went, over all its restarts."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

PARTS = ("compile", "train", "eval", "save")
_PREFIX = "seconds_"


class PhaseTimer:
    """Seconds by part. What nobody claims is training.

    split = PhaseTimer(earlier)                  # {"seconds_train": 12.5, …} of an interrupted run
    with split.part("eval"): …
    split.seconds()                         # the same, now
    """

    def __init__(
        self,
        earlier: Mapping[str, Any] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.clock, self.started = clock, clock()
        self.spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for part in PARTS:
            seconds = (earlier or {}).get(_PREFIX + part)
            if isinstance(seconds, int | float):  # what else a file holds is no time
                self.spent[part] = float(seconds)
        self.depth = 0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the block as `name`; inside another block it belongs to that one."""
        if self.depth:
            yield
            return
        self.spent["train"] += self.clock() - self.started
        self.depth, self.started = 1, self.clock()
        try:
            yield
        finally:
            self.spent[name] += self.clock() - self.started
            self.depth, self.started = 0, self.clock()

    def compiling(self, call: Callable, key: Callable[..., Any]) -> Callable:
        """`call`, whose first run for each `key(*arguments)` counts as compiling."""
        seen = set()

        def timed(*arguments):
            signature = key(*arguments)
            if signature in seen:
                return call(*arguments)
            with self.part("compile"):
                result = call(*arguments)
            seen.add(signature)
            return result

        return timed

    def seconds(self) -> dict[str, float]:
        now = dict(self.spent)
        if not self.depth:
            now["train"] += self.clock() - self.started
        return {_PREFIX + part: now[part] for part in PARTS}
