"""Named values of a checkpoint (config.json, GGUF metadata), of which each is read or refused.

What a value may be is declared in a table, name -> type, and checked when the values are opened:
nothing that is read afterwards can be of another kind or outside its range. A null value is as good
as absent.
"""

import types
import typing
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np

from lminf.errors import InputError
from lminf.ranges import Range, shown

Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "relu"]

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


ACTIVATION_NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}

TokenId: TypeAlias = Annotated[int, Range(min=-(2**31), max=2**32 - 1)]  # -1 in both: no token

_WORDS = {
    bool: "true or false", str: "a text", dict: "an object", int: "a whole number",
    float: "a number",
}  # fmt: skip
_PLURALS = {str: "texts", dict: "objects", int: "whole numbers", float: "numbers"}
_ARRAY_KINDS = {int: "iu", float: "iuf"}  # of numpy

Meaningless: TypeAlias = Mapping[str, Collection[Any] | None]
"""Field -> the values at which it changes nothing, as if it were absent; None: any value."""


def problem(value: Any, hint: Any) -> str | None:
    """What belongs in place of the value; None where it is of the hinted type.

    Hints are what JSON and GGUF can hold: `bool`, `str`, `dict`, numbers in a range, lists (in GGUF
    arrays) of one of them, and alternatives.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        array = isinstance(value, np.ndarray)  # which a range does not look at
        return (
            str(arguments[1]) if array else arguments[1].problem(value, whole=arguments[0] is int)
        )
    if origin is types.UnionType or origin is typing.Union:
        problems = [problem(value, argument) for argument in arguments]
        return None if None in problems else " or ".join(map(str, problems))
    if origin is not list:
        return None if isinstance(value, int | float if hint is float else hint) else _WORDS[hint]
    item = arguments[0]
    if isinstance(value, np.ndarray):
        fits = value.dtype.kind in _ARRAY_KINDS.get(item, "")
    else:
        fits = isinstance(value, list) and all(problem(one, item) is None for one in value)
    return None if fits else f"a list of {_PLURALS.get(item, 'whole numbers in their range')}"


class Fields:
    """Values by name; notes which were read, so that the rest can be refused."""

    def __init__(
        self,
        values: Mapping[str, Any],
        source: str,
        shape: Mapping[str, Any],
        meaningless: Meaningless,
        prefix: str = "",
    ):
        self.source, self.shape, self.prefix = source, shape, prefix
        self.named, self.read = frozenset(values), set[str]()
        self.values = {
            name: value
            for name, value in values.items()
            if value is not None and not _among(value, meaningless.get(name, ()))
        }
        for name, value in self.values.items():
            if name in shape and (expectation := problem(value, shape[name])):
                raise InputError(
                    f"{source} has {prefix}{name} = {shown(value)}, which no model can have: give "
                    f"{expectation}, or fetch the file again"
                )

    def __getitem__(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise self._missing(name)
        return value

    def get(self, name: str, absent: Any = None) -> Any:
        """The value, or what its absence means to the program that wrote the format."""
        assert name in self.shape, f"no type is declared for {name}"
        self.read.add(name)
        return self.values.get(name, absent)

    def stated(self, name: str) -> Any:
        """The value, which may be null but must be there: transformers' default for its absence
        is one model's value."""
        if name not in self.named:
            raise self._missing(name)
        return self.get(name)

    def ignored(self, name: str, instead: Any = None) -> Any:
        """Marks a value that has no effect beside the others as read."""
        self.read.add(name)
        return instead

    def only(self, name: str, *allowed: Any) -> None:
        """Refuses a value other than the allowed ones, the first of which its absence means."""
        self.read.add(name)
        value = self.values.get(name)
        if value is not None and not _among(value, allowed):
            raise InputError(
                f"{self.source} has {self.prefix}{name} = {shown(value)}, which is not supported; "
                f"only {' or '.join(repr(a) for a in allowed)} is"
            )

    def same(self, name: str, value: Any) -> None:
        """Refuses a second name of a value that says something else than the first."""
        self.read.add(name)
        again = self.values.get(name)
        if again is not None and again != value:
            raise InputError(
                f"{self.source} has {self.prefix}{name} = {shown(again)} beside {value!r} under "
                f"the usual name; take the wrong one out"
            )

    def activation(self, name: str) -> Activation:
        value = self[name]
        if value not in ACTIVATIONS:
            raise InputError(
                f"{self.source} has {name} = {shown(value)}, which is not known; known are "
                f"{', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[value]

    def _missing(self, name: str) -> InputError:
        return InputError(
            f"{self.source} has no {self.prefix}{name}, which only the checkpoint can say; "
            f"fetch the file again"
        )

    def part(self, name: str, shape: Mapping[str, Any], meaningless: Meaningless) -> "Fields":
        """The values of a nested section."""
        section = f"{self.prefix}{name}."
        return Fields(self.get(name, {}), self.source, shape, meaningless, section)

    def refuse_others(self) -> None:
        """Refuses what was not read and does not mean nothing."""
        for name in (name for name in self.values if name not in self.read):
            raise InputError(
                f"{self.source} has {shown(self.prefix + name)[1:-1]} = "
                f"{shown(self.values[name])}, which is not understood; only checkpoints whose "
                f"every setting is understood are read"
            )


def _among(value: Any, allowed: Collection[Any] | None) -> bool:
    if allowed is None:
        return True
    # 0 and False are equal but say different things; an array is equal to nothing.
    return any(
        isinstance(value, bool) == isinstance(one, bool) and value == one
        for one in allowed
        if not isinstance(value, np.ndarray)
    )
