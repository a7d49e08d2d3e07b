"""What every implementation of Λ-decoding receives beside the cache, and what it returns."""

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Array, Float


class Queries(NamedTuple):
    """One token's queries: rotated for the ring, and as the globals want them."""

    near: Float[Array, "B N H"]
    far: Float[Array, "B N H"]
    sinks: Float[Array, " N"] | None


@dataclass(frozen=True)
class Rules:
    """What is fixed when tracing."""

    scale: float
    soft_cap: float | None


class DecodeResiduals(NamedTuple):
    """Output, and the logarithm of each head's softmax denominator (sinks included)."""

    out: Float[Array, "B N Hv"]
    lse: Float[Array, "B N"]
