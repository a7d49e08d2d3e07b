"""Lists of blocks the other way round: for every block of keys, the blocks of queries."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lminf.kernels.block_sparse.operands import Lists


class Transposed(NamedTuple):
    """Key block j is walked by queries[starts[j] : starts[j + 1]], ascending, of its head."""

    queries: Int[Array, "B K E"]
    starts: Int[Array, "B K kv_blocks_and_one"]


def transpose(lists: Lists, kv_blocks: int) -> Transposed:
    """The transposed lists, by a counting sort: count, sum up, put every entry in its place."""
    _, _, q_blocks, width = lists.indices.shape

    def of_head(indices: Int[Array, "Q M"], counts: Int[Array, " Q"]):
        used = jnp.arange(width, dtype=jnp.int32)[None] < counts[:, None]
        target = jnp.where(used, indices, kv_blocks).reshape(-1)  # what is unused comes last
        order = jnp.argsort(target, stable=True)
        queries = jnp.repeat(jnp.arange(q_blocks, dtype=jnp.int32), width)[order]
        totals = jnp.zeros(kv_blocks + 1, jnp.int32).at[target].add(1)[:kv_blocks]
        return queries, jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(totals)])

    queries, starts = jax.vmap(jax.vmap(of_head))(lists.indices, lists.counts)
    return Transposed(queries, starts.astype(jnp.int32))
