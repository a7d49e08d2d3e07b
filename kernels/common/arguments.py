"""Checks of what callers pass: errors that name the argument, what it is and what it must be."""

from typing import Any


def shape(name: str, x: Any, letters: str, expected: tuple[int | None, ...]) -> tuple[int, ...]:
    """The shape of an argument; ValueError if it is not the one expected (None: any)."""
    fits = x.ndim == len(expected) and all(
        e is None or e == n for e, n in zip(expected, x.shape, strict=True)
    )
    if not fits:
        known = " ".join(
            letter if e is None else f"{letter}={e}"
            for letter, e in zip(letters.split(), expected, strict=True)
        )
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [{known}]")
    return x.shape


def count(name: str, value: int, *, least: int) -> None:
    """ValueError unless `value` is an int of at least `least`."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be an int of at least {least}")
