"""Small inputs that once went wrong, with their right values: ../shared/cases, where present."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.monitoring
import pytest

CASES = Path(__file__).parents[1] / ".." / "shared" / "cases"


def path(name: str) -> Path:
    """The file or folder of that name below the cases; the test is skipped without it."""
    if not (CASES / name).exists():
        pytest.skip(f"{name} is absent: expected at ../shared/cases/{name}")
    return CASES / name


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the functions that are compiled while it is entered."""
    names: list[str] = []
    _listeners.append(names)
    try:
        yield names
    finally:
        _listeners.remove(names)


_listeners: list[list[str]] = []


def _compiled(event: str, seconds: float, *, fun_name: str = "", **details: object) -> None:
    del seconds, details
    if event == "/jax/core/compile/backend_compile_duration":
        for listener in _listeners:
            listener.append(fun_name)


jax.monitoring.register_event_duration_secs_listener(_compiled)
