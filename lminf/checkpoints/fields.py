"""Fields of a config.json, each read once or refused by name. A null field is as good as absent."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from lminf.errors import InputError

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


class Fields:
    """Fields of a config.json; notes which were read, so that the rest can be refused."""

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = ""):
        self.values, self.source, self.prefix = values, source, prefix
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise self._missing(name)
        return value

    def get(self, name: str, absent: Any = None) -> Any:
        """The field, or what its absence means in transformers' own reading."""
        self.read.add(name)
        value = self.values.get(name)
        return absent if value is None else value

    def stated(self, name: str) -> Any:
        """The field, which may be null but must be there: transformers' default for its absence
        is one model's value."""
        if name not in self.values:
            raise self._missing(name)
        return self.get(name)

    def ignored(self, name: str, instead: Any = None) -> Any:
        """Marks a field that has no effect beside the others as read."""
        self.read.add(name)
        return instead

    def only(self, name: str, *allowed: Any) -> None:
        """Refuses a field that asks for something else than the allowed values, the first of
        which its absence means."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise InputError(
                f"{self.source} has {self.prefix}{name} = {value!r}, which is not supported; only "
                f"{' or '.join(repr(a) for a in allowed)} is"
            )

    def activation(self, name: str) -> Activation:
        value = self[name]
        if value not in ACTIVATIONS:
            raise InputError(
                f"{self.source} has {name} = {value!r}, which is not known; known are "
                f"{', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[value]

    def _missing(self, name: str) -> InputError:
        return InputError(
            f"{self.source} has no {self.prefix}{name}, which only the checkpoint can say; "
            f"fetch the file again"
        )

    def part(self, name: str) -> "Fields":
        """The fields of a nested section."""
        return Fields(self.get(name, {}), self.source, f"{self.prefix}{name}.")

    def refuse_others(self, irrelevant: frozenset[str] = frozenset()) -> None:
        for name, value in self.values.items():
            if value is not None and name not in self.read | irrelevant:
                raise InputError(
                    f"{self.source} has {self.prefix}{name} = {str(value)[:60]}, which is not "
                    f"understood; only checkpoints whose every field is understood are read"
                )
