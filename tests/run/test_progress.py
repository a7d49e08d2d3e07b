"""One self-overwriting line on a terminal, a plain line now and then in a log."""

import io

import pytest
from rich.console import Console

from lminf.run.progress import Progress, track


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def shown(*, terminal: bool, seconds: float, steps: int = 100) -> str:
    """What a loop of `steps` steps prints when each takes so many seconds."""
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=terminal, width=70)
    with Progress(steps, label="Full", unit="tokens", console=console, clock=clock) as progress:
        for step in range(1, steps + 1):
            clock.now += seconds
            progress.update(step, nll=2.5)
    return stream.getvalue()


def test_a_terminal_sees_one_line_that_is_overwritten():
    text = shown(terminal=True, seconds=0.125)
    assert text.count("\n") == 1
    lines = text.rstrip("\n").split("\r")[1:]
    assert len(lines) == 51  # every quarter of a second, and at the end
    assert {len(line) for line in lines} == {69}  # so that each covers the one before


def test_a_log_file_gets_a_plain_line_every_half_minute():
    text = shown(terminal=False, seconds=1.0)
    assert "\r" not in text
    assert len(text.splitlines()) == 4  # at 30, 60 and 90 seconds, and at the end


def test_a_line_tells_steps_rate_and_time_left():
    first, *_, last = shown(terminal=False, seconds=1.0).splitlines()
    assert first == "Full  30/100 tokens  1 tokens/s  1:10 left  nll 2.5"
    assert last == "Full  100/100 tokens  1 tokens/s  1:40 in all  nll 2.5"


@pytest.mark.parametrize(("done", "text"), [(5000, "5k steps/s"), (2_500_000, "2.5M steps/s")])
def test_large_rates_are_short(done, text):
    clock = Clock()
    progress = Progress(10**9, label="", console=Console(file=io.StringIO()), clock=clock)
    clock.now = 1.0
    progress.update(done)
    assert text in progress.line()


def test_a_closed_log_does_not_end_the_loop():
    stream = io.StringIO()
    stream.write = lambda text: (_ for _ in ()).throw(BrokenPipeError())
    progress = Progress(2, label="", console=Console(file=stream, force_terminal=True))
    progress.update(2)
    progress.__exit__()


def test_track_hands_out_every_item(capsys):
    assert list(track([3, 4, 5], total=3, label="items")) == [3, 4, 5]
    assert "3/3" in capsys.readouterr().err


def test_a_log_gets_no_line_beside_the_sentence_of_a_failure():
    stream = io.StringIO()

    def fail(progress):
        progress.update(3)
        raise ValueError("no")

    with (
        pytest.raises(ValueError, match="no"),
        Progress(9, label="", console=Console(file=stream)) as progress,
    ):
        fail(progress)
    assert stream.getvalue() == ""
