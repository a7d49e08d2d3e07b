"""MoBA: every query of every head attends to its own block of keys and to the best earlier ones.

Source: Lu et al. 2025, arXiv:2502.13189; docs/policies.md has the mathematics. The choice has no
gradient, and attention over what is chosen has: a model can be trained with it.
"""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf import kernels
from lminf.attention import cache as caches
from lminf.attention import rope, scores, sparse
from lminf.attention.policy import Count, register
from lminf.errors import InputError

MAX_BLOCK_Q = 128  # rows that one program of the kernel reads


@register("moba")
@dataclass(frozen=True)
class MoBA(sparse.SparsePolicy):
    """The query's own block and the best earlier ones. Source: Lu et al. 2025, arXiv:2502.13189."""

    block: Count = 128  # tokens; a TPU's kernel takes multiples of 128
    topk: Count = 4  # blocks that a query sees, its own included

    num_sinks = 0
    window_field = "block"
    group = sparse.WHOLE_CALL  # no query waits for another: each chooses by itself
    one_by_one = property(lambda self: self)
    accumulates = True
    selected_distance = "true"
    ranks_by_products = True
    window = property(attrgetter("block"))
    max_selected = property(lambda self: (self.topk - 1) * self.block)

    def init_state(self, shape: caches.CacheShape) -> dict[str, Array]:
        """The sum of the rotated keys of each block of a text of so many tokens."""
        count = max(shape.slots // self.block, 1)
        return {"sums": jnp.zeros((shape.batch, count, shape.kv_heads, shape.head_dim))}

    def select(self, state: Any, query: sparse.Query) -> tuple[Int[Array, "B N R M"], Any]:
        """The earlier blocks that each query sees; -1 for none."""
        encoding = query.config.encoding
        if isinstance(encoding, rope.Rotary) and encoding.scaling.follows_length:
            raise InputError(
                f"{self.name} keeps means of rotated keys, but {type(encoding.scaling).__name__} "
                f"rotates keys anew as the text grows; use NTKAware or YaRN"
            )
        row = jnp.arange(len(query.q), dtype=jnp.int32)[:, None]
        k, q = (
            query.placement.at(jax.lax.stop_gradient(x), query.rows_pos).astype(jnp.float32)
            for x in (query.rows(query.kv.k, query.pos), query.q)
        )
        sums = state["sums"]
        block = jnp.where(query.pos >= 0, query.pos // self.block, sums.shape[2])
        sums = sums.at[query.layer, row, block].add(k, mode="drop")
        gate = scores.dot(q, sums[query.layer])  # of the means, times `block`
        complete = (
            jnp.arange(sums.shape[2], dtype=jnp.int32)[None, None]
            < query.pos[..., None] // self.block
        )
        gate = jnp.where(complete[:, None], gate, -jnp.inf)
        return sparse.best_of(gate, min(self.topk - 1, sums.shape[2])), {"sums": sums}

    def attend(self, query: sparse.Query, selected: Int[Array, "B N R M"]) -> tuple[Array, None]:
        if query.q.shape[1] > 1:
            return attend_blocks(query, selected, self.block), None
        own_block = query.pos[:, None] // self.block
        own_block = jnp.broadcast_to(own_block, (*selected.shape[:2], 1))
        block_ids = jnp.concatenate([selected[:, :, 0], own_block], 2)
        return sparse.attend_list(self, query, sparse.block_positions(block_ids, self.block)), None


def attend_blocks(
    query: sparse.Query, block_ids: Int[Array, "B N R M"], size: int
) -> Float[Array, "B R N H"]:
    """Attention outputs over the queries' own blocks and the earlier ones listed, -1 for none.

    Each pair of a query and a block that it selected is a row; rows are sorted by block, so that a
    block of keys is read once for all rows of a list. The parts of a query are merged by their LSE.
    """
    placement, (batch, rows, heads, width) = query.placement, query.q.shape
    options = {"return_residuals": True, **query.config.for_kernel()}
    placed = placement.at(query.q, query.rows_pos)
    k_pos = caches.first_positions(batch, query.slots)
    k = placement.at(query.kv.k[query.layer].astype(query.q.dtype), k_pos)
    v = query.kv.v[query.layer].astype(query.q.dtype)

    # A query's own block: the blocks that the queries stand in are rows of a batch.
    touched = min((rows + size - 2) // size + 1, -(-query.slots // size))
    start = query.first[:, None] // size * size
    own_pos = start + jnp.arange(touched * size, dtype=jnp.int32)[None]
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]

    def folded(x: Array, index: Int[Array, "B X"]) -> Array:
        x = x[row, jnp.clip(index, 0, x.shape[1] - 1)]
        return x.reshape(batch * touched, size, *x.shape[2:])

    near = kernels.lambda_attention(
        folded(placed, own_pos - query.first[:, None]), folded(k, own_pos), folded(v, own_pos),
        num_global=0, window_size=size, **options,
    )  # fmt: skip
    assert isinstance(near, kernels.Residuals)
    place = jnp.clip(jnp.maximum(query.rows_pos, 0) - start, 0, touched * size - 1)
    out = near.out.reshape(batch, -1, heads, width)[row, place]  # [B, R, N, H]
    lse = near.lse.swapaxes(1, 2).reshape(batch, -1, heads)[row, place].swapaxes(1, 2)  # [B, N, R]
    count = block_ids.shape[3]
    if not count:
        return out

    block_q, kv_heads = min(size, MAX_BLOCK_Q), query.kv_heads
    routed = route(block_ids.reshape(batch, kv_heads, -1), max(query.slots // size, 1), block_q)
    row, head = row[..., None], jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
    q = placed.swapaxes(1, 2).reshape(batch, kv_heads, -1, width)[row, head, routed.pair // count]
    far = kernels.block_sparse_attention(
        q.swapaxes(1, 2), k, v, block_indices=routed.block_ids[..., None],
        block_counts=(routed.block_ids >= 0).astype(jnp.int32),
        block_q=block_q, block_kv=size, causal=False, **options,
    )  # fmt: skip
    assert isinstance(far, kernels.Residuals)
    place = jnp.minimum(routed.row, q.shape[2] - 1)
    far_out = far.out.swapaxes(1, 2)[row, head, place].reshape(*block_ids.shape, -1)
    far_lse = far.lse[row, head, place].reshape(block_ids.shape)
    far_lse = jnp.where(block_ids >= 0, far_lse, -jnp.inf)
    parts = [(far_out[..., i, :].swapaxes(1, 2), far_lse[..., i]) for i in range(count)]
    return scores.merge((out, lse), *parts)[0]


class Routed(NamedTuple):
    """Pairs of a query and a block as rows sorted by block, in lists of `block_q` rows."""

    pair: Int[Array, "B K X"]  # that a row holds; any where it holds none
    row: Int[Array, "B K P"]  # that holds a pair; past the end where the pair names no block
    block_ids: Int[Array, "B K Q"]  # that all rows of a list read; -1 for none


def route(block_ids: Int[Array, "B K *P"], blocks: int, block_q: int) -> Routed:
    """Rows for the pairs of every key head, as many lists as there can ever be."""
    pairs = block_ids.reshape(*block_ids.shape[:2], -1)
    lists = pairs.shape[2] // block_q + blocks

    def of_head(block_ids: Int[Array, " P"]) -> Routed:
        target = jnp.where(block_ids < 0, blocks, block_ids)  # what names no block comes last
        order = jnp.argsort(target, stable=True).astype(jnp.int32)
        counts = jnp.zeros(blocks, jnp.int32).at[target].add(1, mode="drop")
        lists_of = -(-counts // block_q)
        ends = jnp.cumsum(lists_of)
        shift = (ends - lists_of) * block_q - (jnp.cumsum(counts) - counts)
        row_of = jnp.append(shift, jnp.int32(2**30))[target[order]]
        row_of += jnp.arange(len(order), dtype=jnp.int32)
        pair = jnp.zeros(lists * block_q, jnp.int32).at[row_of].set(order, mode="drop")
        row = jnp.zeros_like(order).at[order].set(row_of)
        named = jnp.searchsorted(ends, jnp.arange(lists, dtype=jnp.int32), side="right")
        return Routed(pair, row, jnp.where(named < blocks, named.astype(jnp.int32), -1))

    return jax.vmap(jax.vmap(of_head))(pairs)
