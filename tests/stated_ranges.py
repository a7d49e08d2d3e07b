"""Which numbers of a dataclass have no stated range, and values just outside the stated ones."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

from lminf.ranges import Range


def without_range(kind: type) -> list[str]:
    """Fields of a dataclass that hold numbers, alone or in tuples, and state no Range."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return [
        f"{kind.__name__}.{field.name}"
        for field in dataclasses.fields(kind)
        if field.init and any(stated is None for _, stated in _numbers(hints[field.name]))
    ]


def outside(kind: type) -> Iterator[tuple[str, Any]]:
    """(field, value outside its range): a step past every bound, NaN, the infinities, text."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        for wrap, stated in _numbers(hints[field.name]) if field.init else ():
            for value in _past(stated):
                yield field.name, wrap(value)


def _past(stated: Range | None) -> Iterator[Any]:
    assert stated is not None
    yield from (math.nan, "text", True)
    yield from () if stated.infinite else (math.inf, -math.inf, 10**400)
    yield from (bound - 1 for bound in (stated.min,) if bound is not None)
    yield from (bound + 1 for bound in (stated.max,) if bound is not None)
    yield from (bound for bound in (stated.above, stated.below) if bound is not None)


def _numbers(hint: Any) -> Iterator[tuple[Any, Range | None]]:
    """(how a number is put into the field, its range) of every number that a hint allows."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (int, float):
        yield (lambda value: value), None
    elif origin is Annotated and any(isinstance(extra, Range) for extra in arguments[1:]):
        yield (
            (lambda value: value),
            next(extra for extra in arguments[1:] if isinstance(extra, Range)),
        )
    elif origin in (typing.Union, types.UnionType):
        for member in arguments:
            yield from _numbers(member)
    elif origin is tuple:
        for wrap, stated in _numbers(arguments[0]):
            yield (lambda value, wrap=wrap: (wrap(value),)), stated
