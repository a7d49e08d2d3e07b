"""Ranges of numbers, stated where a field is declared and checked where its value is built.

    @dataclass(frozen=True)
    class Decay:
        rate: Annotated[float, Range(above=0)]
        steps: Annotated[int, Range(min=1)] | None = None
        starts: tuple[Annotated[int, Range(min=0)], ...] = ()

        def __post_init__(self):
            ranges.check(self)

The check runs for whoever builds the value: a command line, a config file, a checkpoint's reader or
a user of the library.
"""

import dataclasses
import functools
import math
import numbers
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from lminf.errors import InputError

SHOWN = 60  # characters of a value in an error message


@dataclass(frozen=True)
class Range:
    """Finite numbers between bounds: `min` and `max` are allowed themselves, `above` and `below`
    are not. With `infinite`, an infinity between the bounds is allowed too; NaN never is."""

    min: float | None = None
    max: float | None = None
    above: float | None = None
    below: float | None = None
    infinite: bool = False

    def __contains__(self, value: Any) -> bool:
        return (
            (math.isfinite(value) or (self.infinite and not math.isnan(value)))
            and (self.min is None or value >= self.min)
            and (self.max is None or value <= self.max)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """`a finite number of at least 0 and below 1`."""
        bounds = [
            f"{words} {bound}"
            for words, bound in (
                ("of at least", self.min),
                ("above", self.above),
                ("of at most" if self.min is None and self.above is None else "at most", self.max),
                ("below", self.below),
            )
            if bound is not None
        ]
        number = "a number" if self.infinite else "a finite number"
        return f"{number} {' and '.join(bounds)}".rstrip()

    def problem(self, value: Any, *, whole: bool = False) -> str | None:
        """What to give instead of `value`; None if it may stay. `whole`: no fractions.

        Arrays and traced values are not looked at: their numbers are not known yet.
        """
        if hasattr(value, "dtype") and not isinstance(value, numbers.Number):
            return None
        kind = numbers.Integral if whole else numbers.Real
        try:
            allowed = isinstance(value, kind) and not isinstance(value, bool) and value in self
        except OverflowError:  # a whole number that no float holds
            allowed = False
        if allowed:
            return None
        return str(self).replace("a finite", "a whole") if whole else str(self)


def check(value: Any) -> None:
    """Raises InputError for the first field of a dataclass instance that is outside its range."""
    for name, hint in _hints(type(value)).items():
        item = getattr(value, name)
        if expectation := _problem(item, hint):
            raise InputError(f"{type(value).__name__}.{name} is {shown(item)}; give {expectation}")


def shown(value: Any) -> str:
    """The value as it is written in an error message."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        text = hex(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _problem(value: Any, hint: Any) -> str | None:
    """What the type hint wants in place of `value`; None where it states no range that is broken.

    Only ranges are checked. What else a field may be is the business of whoever reads it.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        stated = next((extra for extra in arguments[1:] if isinstance(extra, Range)), None)
        return _problem(value, arguments[0]) if stated is None else _outside(value, hint, stated)
    if origin in (typing.Union, types.UnionType):
        return _outside_all(value, arguments)
    if origin is tuple and isinstance(value, (tuple, list)):
        each = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        problems = (_problem(item, of) for item, of in zip(value, each, strict=False))
        return next((f"{problem} for each item" for problem in problems if problem), None)
    return None


def _outside(value: Any, hint: Any, stated: Range) -> str | None:
    inner = typing.get_args(hint)[0]
    members = typing.get_args(inner) or (inner,)  # Annotated[int | None, Range()] is allowed
    if value is None and types.NoneType in members:
        return None
    return stated.problem(value, whole=float not in members)


def _outside_all(value: Any, members: tuple[Any, ...]) -> str | None:
    """What the first member of a union with a range wants; None if another member fits."""
    expectation = None
    for member in members:
        origin = typing.get_origin(member)
        if origin is Literal:
            fits = value in typing.get_args(member)
        elif origin is tuple:
            fits = isinstance(value, (tuple, list)) and _problem(value, member) is None
        elif origin is None:
            fits = isinstance(member, type) and isinstance(value, member)
        else:
            fits = _problem(value, member) is None
        if fits:
            return None
        expectation = expectation or _problem(value, member)
    return expectation
