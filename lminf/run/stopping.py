"""Asking a run to end: SIGTERM (preemption) and Ctrl-C let it save first; a second one does not."""

import contextlib
import signal
from collections.abc import Iterator


class Stopping:
    """Whether a signal has come."""

    def __init__(self):
        self.signal: signal.Signals | None = None

    def _notice(self, number, frame) -> None:
        del frame
        self.signal = signal.Signals(number)
        signal.signal(number, signal.default_int_handler)  # who asks twice does not want to wait

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stopping"]:
        before = {
            number: signal.signal(number, self._notice)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
