"""The type checker behind the shape annotations: beartype, for which an int is also a float."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable) -> Callable:
    # Dataclasses that are pytrees are rebuilt with whatever a transformation leaves in their
    # fields: shapes without values, sentinels.
    if function.__qualname__.endswith(".__init__"):
        return function
    # Functions within functions are decorated at every call, most of them without annotations.
    if all(hint is Any for hint in function.__annotations__.values()):
        return function
    return _beartype(function)
