"""What every implementation of Λ-decoding receives beside the cache, and what it returns."""

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Array, Float, Int

from lminf.kernels.common.masks import GlobalDistance


class Queries(NamedTuple):
    """One token's queries: rotated for the ring, and as the globals want them."""

    near: Float[Array, "B N H"]
    far: Float[Array, "B N H"]
    sinks: Float[Array, " N"] | None


class Places(NamedTuple):
    """Which layer of a stacked cache is read, and what decides who is seen, and how far away."""

    layer: Int[Array, ""] | None
    global_count: Int[Array, "B P"] | None  # of all key heads or each; None: all rows
    head_window: Int[Array, " K"] | None  # None: the whole ring
    alibi_slopes: Float[Array, " N"] | None
    far_distance: GlobalDistance | None


@dataclass(frozen=True)
class Rules:
    """What is fixed when tracing."""

    scale: float
    soft_cap: float | None
    clip_distance: int | None = None  # tokens; ALiBi only


class DecodeResiduals(NamedTuple):
    """Output, and the logarithm of each head's softmax denominator (sinks included)."""

    out: Float[Array, "B N Hv"]
    lse: Float[Array, "B N"]
