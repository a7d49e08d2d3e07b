"""What every implementation of block-sparse attention receives: arrays, lists of blocks, rules."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lminf.kernels.common import masks


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
    window: int | None  # keys; None: all of a listed block
    num_global: int  # keys seen beyond the window, if listed
    scale: float
    soft_cap: float | None


def visible(
    rules: Rules, rows: Int[Array, "X 1"], columns: Int[Array, "1 Y"], first: Int[Array, "..."]
) -> Bool[Array, "X Y"]:
    """Which pairs of positions a listed block shows; `first` is where each key's segment starts."""
    distance = rows - columns
    shown = jnp.full(distance.shape, True)
    if rules.causal:
        shown = distance >= 0
    if rules.window is not None:
        shown &= (distance < rules.window) | (columns - first < rules.num_global)
    return shown


def same_segment(q: Int[Array, "..."], kv: Int[Array, "..."]) -> Bool[Array, "..."]:
    """Which pairs of ids see each other; the caller lines up the axes."""
    return (q == kv) & (q != masks.PADDING)
