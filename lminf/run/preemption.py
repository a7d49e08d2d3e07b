"""Asking a run to end: SIGTERM (preemption) and Ctrl-C let it save first; a second one does not."""

import contextlib
import signal
from collections.abc import Iterator

from lminf.run.exits import Terminated


class Preemption:
    """Whether a signal has come."""

    def __init__(self):
        self.signal: signal.Signals | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def notice(number, frame):
            del frame
            self.signal = signal.Signals(number)
            signal.signal(number, previous[number])  # who asks twice does not want to wait

        for number in previous:
            signal.signal(number, notice)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def ending(self) -> KeyboardInterrupt:
        """What to raise once all is saved; without a signal here, another process had SIGTERM."""
        return KeyboardInterrupt() if self.signal == signal.SIGINT else Terminated()
