"""What every implementation of block-sparse attention receives: arrays, lists of blocks, rules."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Operands(NamedTuple):
    """The arrays that receive gradients."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K Hv"]


class Lists(NamedTuple):
    """Of every block of queries, the blocks of keys that it walks: the first `counts` of M."""

    indices: Int[Array, "B K Q M"]
    counts: Int[Array, "B K Q"]


@dataclass(frozen=True)
class Rules:
    """What is fixed when tracing."""

    block_q: int
    block_kv: int
    causal: bool
    scale: float
    soft_cap: float | None


def visible(
    rules: Rules, rows: Int[Array, "X 1"], columns: Int[Array, "1 Y"]
) -> Bool[Array, "X Y"]:
    """Which pairs of positions a listed block shows."""
    return rows >= columns if rules.causal else jnp.full((rows.size, columns.size), True)
