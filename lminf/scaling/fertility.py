"""Fertility: tokens per character as a function of vocabulary size.

The published parabola is one named instance, not the truth: against its own 24 pairs it is 1.3 %
high at 10K and 3.4 % low at 96K. A sweep with tokenizers of its own measures its own instance.
Source: Tao et al. 2024, arXiv:2407.13623, appendix; pairs measured there on SlimPajama text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from lminf.errors import InputError
from lminf.scaling import stored

KINDS = ("quadlog", "powerlaw", "table")


@dataclass(frozen=True)
class Fertility:
    """f(V) in tokens per character.

    quadlog   a ln(V)^2 + b ln V + c, constant above V = `cap` (the parabola turns up)
    powerlaw  k V^-g + f0
    table     linear in ln V between measured pairs; no value outside them
    """

    name: str
    kind: Literal["quadlog", "powerlaw", "table"]
    constants: tuple[float, ...]  # (a, b, c), (k, g, f0) or (V1, f1, V2, f2, ...)
    fitted_range: tuple[float, float]  # smallest and largest vocabulary measured
    cap: float  # vocabulary above which f is constant; inf: none

    def __post_init__(self):
        if self.kind not in KINDS:
            raise InputError(f"fertility kind {self.kind!r} is unknown; use one of {KINDS}")

    def tokens_per_character(self, vocab_size: ArrayLike) -> Float[np.ndarray, "..."]:
        """f(V); InputError outside a table."""
        size = np.asarray(vocab_size, np.float64)
        if self.kind == "quadlog":
            a, b, c = self.constants
            log_size = np.log(np.minimum(size, self.cap))
            return a * log_size**2 + b * log_size + c
        if self.kind == "powerlaw":
            k, g, floor = self.constants
            return k * np.minimum(size, self.cap) ** -g + floor
        sizes, values = np.asarray(self.constants[0::2]), np.asarray(self.constants[1::2])
        inside = (size >= sizes[0]) & (size <= sizes[-1])
        if not np.all(inside):
            outside = np.asarray(size)[~inside].ravel()[0]
            raise InputError(
                f"fertility {self.name!r} was measured at V={sizes[0]:g}..{sizes[-1]:g}, not at "
                f"V={outside:g}; measure there or use a fitted kind"
            )
        return np.interp(np.log(size), np.log(sizes), values)

    def slope(self, vocab_size: ArrayLike) -> Float[np.ndarray, "..."]:
        """df/dV in tokens per character per vocabulary entry; 0 above the cap."""
        size = np.asarray(vocab_size, np.float64)
        if self.kind == "quadlog":
            a, b, _ = self.constants
            return np.where(size < self.cap, (2 * a * np.log(size) + b) / size, 0.0)
        if self.kind == "powerlaw":
            k, g, _ = self.constants
            return np.where(size < self.cap, -g * k * size ** (-g - 1), 0.0)
        step = 1e-4
        up, down = size * (1 + step), size * (1 - step)
        return (self.tokens_per_character(up) - self.tokens_per_character(down)) / (up - down)

    def to_json(self) -> dict[str, Any]:
        """Plain values, which `from_json` reads."""
        data = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}
        cap = None if np.isinf(self.cap) else self.cap
        return data | {"cap": cap, "unit": "tokens per character"}


def from_json(data: Mapping[str, Any]) -> Fertility:
    """The fertility that `to_json` stored."""
    missing = {"name", "kind", "constants", "fitted_range"} - set(data)
    if missing:
        raise InputError(f"fertility JSON lacks {sorted(missing)}; found {sorted(data)}")
    cap, (low, high) = data.get("cap"), map(float, data["fitted_range"])
    return Fertility(
        data["name"], data["kind"], tuple(map(float, data["constants"])), (low, high),
        np.inf if cap is None else float(cap),
    )  # fmt: skip


INSTANCES = {data["name"]: from_json(data) for data in stored.read("fertility.json")}
PUBLISHED = INSTANCES["tao2024"]
# The 24 measured ratios, not the parabola: bits per character need what was measured.
MEASURED = INSTANCES["tao2024-measured"]
POWERLAW = INSTANCES["tao2024-powerlaw"]  # within 1.5 % of all 24 pairs; never turns up
