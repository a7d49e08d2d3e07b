"""What every implementation of Λ-attention receives: arrays to differentiate, arrays that only
place them, and numbers known when tracing. Defaults are already filled in; shapes are checked.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int

from lminf.kernels.common.masks import GlobalDistance, SegmentIds


class Branch(NamedTuple):
    """One branch's operands. The local branch has the S keys; the global branch R rows: the first
    g keys, or, where there are segments, one row beside each key.
    """

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K Hv"]


class Operands(NamedTuple):
    """The arrays that receive gradients."""

    near: Branch
    far: Branch | None  # None: no globals
    sinks: Float[Array, " N"] | None


class Places(NamedTuple):
    """Query row i stands at key_start + query_offset + i, key row j at key_start + j."""

    key_start: Int[Array, " B"]
    query_offset: Int[Array, ""]
    segments: SegmentIds | None
    alibi_slopes: Float[Array, " N"] | None
    far_distance: GlobalDistance | None
    # Of every global, one list for all key heads or one for each; None: row r is at position r.
    far_positions: Int[Array, "B P R"] | None = None


@dataclass(frozen=True)
class Rules:
    """What is fixed when tracing."""

    window: int  # keys
    num_global: int  # keys; of each segment, where there are segments
    scale: float
    soft_cap: float | None
    clip_distance: int | None  # tokens; ALiBi only
    precision: jax.lax.PrecisionLike
    query_offset: int | None = None  # as in Places, where it is known when tracing


class Residuals(NamedTuple):
    """Output, and the logarithm of each row's softmax denominator (sinks included)."""

    out: Float[Array, "B T N Hv"]
    lse: Float[Array, "B N T"]
