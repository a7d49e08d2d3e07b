"""What every implementation of Λ-attention receives: arrays to differentiate, arrays that only
place them, and numbers known when tracing. Defaults are already filled in; shapes are checked.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int


class Operands(NamedTuple):
    """The arrays that receive gradients. R rows of globals: g, or S where there are segments."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K Hv"]
    query_global: Float[Array, "B T N H"] | None  # None: there is no global branch
    key_global: Float[Array, "B R K H"] | None
    value_global: Float[Array, "B R K Hv"] | None
    sinks: Float[Array, " N"] | None


class Places(NamedTuple):
    """Query row i stands at key_start + query_offset + i, key row j at key_start + j."""

    key_start: Int[Array, " B"]
    query_offset: Int[Array, ""]
    segment_q: Int[Array, "B T"] | None
    segment_kv: Int[Array, "B S"] | None
    alibi_slopes: Float[Array, " N"] | None
    distance_query: Int[Array, "B|1 T"] | None
    distance_key: Int[Array, "B|1 R"] | None
    distance_scale: Float[Array, ""] | None


@dataclass(frozen=True)
class Rules:
    """What is fixed when tracing."""

    window: int  # keys
    num_global: int  # keys; of each segment, where there are segments
    scale: float
    soft_cap: float | None
    clip_distance: int | None  # tokens; ALiBi only
    precision: jax.lax.PrecisionLike


class Residuals(NamedTuple):
    """Output and the logarithm of each row's softmax denominator (sinks included)."""

    out: Float[Array, "B T N Hv"]
    lse: Float[Array, "B N T"]


Implementation = Any  # (Rules, Operands, Places, config) -> Residuals
