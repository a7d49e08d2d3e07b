"""Progress of something that counts: one self-overwriting line, or plain lines now and then."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console

Item = TypeVar("Item")

REFRESH_SECONDS = 0.2  # on a terminal or in a notebook
PLAIN_SECONDS = 30.0  # in a log file


class Progress:
    """Steps done, rate and time left of one loop, as a context manager. A `total` of 0 is unknown.

    with Progress(length, label="Full", unit="tokens") as progress:
        progress.update(4096, nll=2.31)
    """

    def __init__(
        self,
        total: int,
        *,
        label: str,
        unit: str = "steps",
        start: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        # A notebook paints stderr red; elsewhere stdout is for results.
        self.console = console or Console(stderr=not Console().is_jupyter, highlight=False)
        self.overwrites = self.console.is_terminal or self.console.is_jupyter
        self.total, self.label, self.unit, self.clock = total, label, unit, clock
        self.done = self.first = start  # what was done before does not count for the rate
        self.values: dict[str, float] = {}
        self.started = self.shown = clock()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *failure: Any) -> None:
        # Nothing happened, or one sentence that says what did not will follow.
        if self.done == self.first or (not self.overwrites and failure[0] is not None):
            return
        self._show()
        if self.overwrites:
            self._write("\n")

    def update(self, done: int, **values: float) -> None:
        """Sets how much is done, and the latest values to show beside it."""
        self.done, self.values = done, values
        period = REFRESH_SECONDS if self.overwrites else PLAIN_SECONDS
        if self.clock() - self.shown >= period:
            self._show()

    def show(self, done: int, total: int) -> None:
        """`update` for those who report the total each time, as a download does."""
        self.total = total
        self.update(done)

    def line(self) -> str:
        """`Full  4,096/16,384 tokens  2.1k tokens/s  0:06 left  nll 2.31`"""
        seconds = self.clock() - self.started
        rate = (self.done - self.first) / seconds if seconds > 0 else 0.0
        total = f"/{_short(self.total)}" if self.total else ""
        parts = [self.label, f"{_short(self.done)}{total} {self.unit}"]
        if rate:
            parts.append(f"{_short(rate)} {self.unit}/s")
        if self.done >= self.total > 0:
            parts.append(f"{_clock(seconds)} in all")
        elif rate and self.total:
            parts.append(f"{_clock((self.total - self.done) / rate)} left")
        parts += [f"{name} {value:.4g}" for name, value in self.values.items()]
        return "  ".join(parts)

    def _show(self) -> None:
        self.shown = self.clock()
        if self.overwrites:
            width = self.console.width - 1
            # Spaces rather than an escape code to clear: notebooks know only the carriage return.
            self._write("\r" + self.line()[:width].ljust(width))
        else:
            self._write(self.line() + "\n")

    def _write(self, text: str) -> None:
        # A closed pipe or a full log must not end hours of work.
        try:
            stream = sys.stdout if self.console.is_jupyter else self.console.file
            stream.write(text)
            stream.flush()
        except OSError:
            pass


def track(items: Iterable[Item], *, total: int, label: str, unit: str = "steps") -> Iterator[Item]:
    """`items` one by one, showing how many have been handed out and finished."""
    with Progress(total, label=label, unit=unit) as progress:
        for count, item in enumerate(items, 1):
            yield item
            progress.update(count)


def _short(number: float) -> str:
    """Counts in full up to a million; beyond, and for rates, three digits and a letter."""
    if isinstance(number, int) and number < 1_000_000:
        return f"{number:,}"
    for suffix in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g}{suffix}"
        number /= 1000
    return f"{number:.3g}T"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
