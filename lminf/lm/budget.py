"""How much a text may hold, in tokens of a named tokenizer or in characters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lminf.errors import InputError


@dataclass(frozen=True)
class Budget:
    """The most that a prompt may hold, in tokens of a named tokenizer or in characters."""

    size: int
    encode: Callable[[str], Sequence[Any]]  # text -> its units, as the model reads them
    unit: str  # "tokens of smollm2-135m-instruct", "characters"

    def __post_init__(self):
        if self.size < 1:
            raise InputError(
                f"a budget of {self.size} {self.unit} holds no prompt; give at least 1"
            )

    @classmethod
    def characters(cls, size: int) -> "Budget":
        """A budget that needs no tokenizer."""
        return cls(size, str, "characters")

    def count(self, text: str) -> int:
        """The units that the text takes."""
        return len(self.encode(text))

    def holds(self, text: str) -> bool:
        """Whether the text takes no more than the budget."""
        return self.count(text) <= self.size
