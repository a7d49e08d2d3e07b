"""What decides visibility beside the arguments of an operation: segments and distances."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

PADDING = -1  # the segment id of rows that see nothing and are seen by nobody


class SegmentIds(NamedTuple):
    """Documents packed into one row: pairs with different ids do not see each other.

    A segment is one contiguous run of equal ids; -1 marks padding. Query row i stands beside key
    row query_offset + i and has the same id.
    """

    q: Int[Array, "B T"]
    kv: Int[Array, "B S"]


class GlobalDistance(NamedTuple):
    """How far away the global branch seems to ALiBi: (query_i - key_r) * scale, in tokens.

    The difference is taken in int32, so positions past 2^24 lose nothing.
    """

    query: Int[Array, "#B T"]
    key: Int[Array, "#B R"]
    scale: float | Float[Array, ""] = 1.0

    def checked(self, batch: int, queries: int, rows: int) -> "GlobalDistance":
        """In int32 and float32; ValueError if it does not belong to these."""
        for name, array, length in (("query", self.query, queries), ("key", self.key, rows)):
            if array.shape not in ((1, length), (batch, length)):
                raise ValueError(
                    f"global_distance.{name} has shape {array.shape}; "
                    f"it must be [1, {length}] or [{batch}, {length}]"
                )
        query, key = (jnp.asarray(x, jnp.int32) for x in self[:2])
        return GlobalDistance(query, key, jnp.asarray(self.scale, jnp.float32))


def run_starts(ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """For every row, the index of the first row of its run of equal ids."""
    index = jnp.arange(ids.shape[-1], dtype=jnp.int32)
    new = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], 1)
    return jax.lax.cummax(jnp.where(new, index[None], 0), axis=1)
