"""The steps of the Hopper kernel's programs, who is seen in them, and their softmax.

This is the part of that kernel which a CPU can replay.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lminf.kernels.common import numerics

ROWS = 64  # queries of a warpgroup: what one wgmma multiplies
CONSUMERS = 2
BLOCK_Q = ROWS * CONSUMERS


# --- Which blocks are walked, and what is seen in them --------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One call: every size that is known when tracing."""

    queries: int  # T
    keys: int  # S
    globals: int  # rows of the global branch that count
    window: int
    heads: int  # N
    key_heads: int  # K
    width: int  # H
    value_width: int  # Hv
    block_kv: int
    stages: int
    unit: float  # from a raw score to the exponent of 2

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one program, with a margin of 4 KiB for barriers and reductions."""
        query_copies = 2 if self.globals else 1
        of_queries = BLOCK_Q * 2 * (query_copies * self.width + self.value_width)
        if self.width == self.value_width:  # the output takes the place of the queries
            of_queries -= BLOCK_Q * 2 * self.value_width
        ring = self.stages * self.block_kv * 2 * (self.width + self.value_width)
        return of_queries + ring + BLOCK_Q * 4 + 4096


class Walk(NamedTuple):
    """The steps of one program. Step t < far is block t of the globals; after those come the keys
    from block `first` on. Steps [0, far_plain) and [plain, masked) need no mask.
    """

    far_plain: Any
    far: Any
    plain: Any
    masked: Any
    steps: Any
    first: Any


class Place(NamedTuple):
    """Where one batch row stands, as in Places."""

    key_start: Any
    query_offset: Any


def walk(plan: Plan, block: Any, place: Place) -> Walk:
    """The steps of the program that has the queries of this block (of BLOCK_Q)."""
    size = plan.block_kv
    # The keys beside the first query and the last.
    low = block * BLOCK_Q + place.query_offset
    high = jnp.minimum(block * BLOCK_Q + BLOCK_Q, plan.queries) - 1 + place.query_offset

    def blocks_of(rows):
        return lax.div(jnp.maximum(rows, 0), size)

    # Globals seen by some query, and by every one, are those before these.
    seen_by_some = jnp.minimum(place.key_start + high - plan.window + 1, plan.globals)
    seen_by_all = jnp.minimum(place.key_start + low - plan.window + 1, plan.globals)
    far, far_plain = blocks_of(seen_by_some + size - 1), blocks_of(seen_by_all)

    # Keys seen by some query, [start, stop), and by every one.
    first_real = jnp.maximum(-place.key_start, 0)
    start = jnp.maximum(low - plan.window + 1, first_real)
    stop = jnp.minimum(high + 1, plan.keys)
    first = blocks_of(start)
    last = jnp.maximum(blocks_of(stop + size - 1), first)  # after the last one
    last = jnp.where(start < stop, last, first)
    every_start = jnp.maximum(high - plan.window + 1, first_real)
    every_stop = jnp.minimum(low + 1, plan.keys)
    plain = jnp.clip(blocks_of(every_start + size - 1), first, last)
    masked = jnp.clip(blocks_of(every_stop), plain, last)
    return Walk(
        far_plain, far, far + plain - first, far + masked - first, far + last - first, first
    )


class Limits(NamedTuple):
    """Query row i sees the key rows from max(i + low, least) to min(i + high, most)."""

    low: Any
    least: Any
    high: Any
    most: Any


def limits(plan: Plan, is_far: Any, place: Place) -> Limits:
    """What the queries see of one branch."""
    beside = place.query_offset
    return Limits(
        low=jnp.where(is_far, -(2**30), beside - plan.window + 1),
        least=jnp.where(is_far, 0, -place.key_start),
        high=jnp.where(is_far, place.key_start + beside - plan.window, beside),
        most=jnp.where(is_far, plan.globals - 1, plan.keys - 1),
    )


def seen(of: Limits, query_rows: Any, key_rows: Any) -> Any:
    """The mask of a block, from the absolute rows of its queries and keys."""
    return (key_rows >= jnp.maximum(query_rows + of.low, of.least)) & (
        key_rows <= jnp.minimum(query_rows + of.high, of.most)
    )


# --- Softmax, block by block ----------------------------------------------------------------------


class Weights(NamedTuple):
    """What a block of keys does to a running softmax; maxima are exponents of 2."""

    block: Float[Array, "C W"]  # of this block's values
    decay: Float[Array, " C"]  # of all before
    maximum: Float[Array, " C"]
    total: Float[Array, " C"]


def masked_score(plan: Plan) -> float:
    """Of an invisible pair: still finite when it is multiplied by the unit."""
    return numerics.MASK_VALUE / max(plan.unit, 1)


def initial_maximum(plan: Plan) -> float:
    """Far below every real exponent and far above a masked one, whose weight is then 2^-huge = 0
    even in a row that has seen nothing yet.
    """
    return masked_score(plan) * plan.unit / 2


def weigh(
    plan: Plan, scores: Float[Array, "C W"], maximum: Float[Array, " C"], total: Float[Array, " C"]
) -> Weights:
    """The block's weights, and the statistics with this block in them."""
    higher = jnp.maximum(maximum, scores.max(axis=1) * plan.unit)
    decay = jnp.exp2(maximum - higher)
    block = jnp.exp2(scores * plan.unit - lax.broadcast_in_dim(higher, scores.shape, [0]))
    return Weights(block, decay, higher, total * decay + block.sum(axis=1))


def finish(
    maximum: Float[Array, " C"], total: Float[Array, " C"]
) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    """(What to multiply the sum of values with, LSE); 0 and -inf for a row that saw nothing."""
    empty = total == 0
    inverse = jnp.where(empty, 0.0, 1 / jnp.where(empty, 1.0, total))
    lse = (maximum + jnp.log2(total)) / numerics.LOG2_E
    return inverse, jnp.where(empty, -jnp.inf, lse)
