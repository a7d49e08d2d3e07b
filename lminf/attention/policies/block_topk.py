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
    selected_distance = "true"
    ranks_by_products = True
    window = property(attrgetter("block"))

    @property
    def max_selected(self) -> int:
        return (self.topk - 1) * self.block

    def init_state(self, shape: caches.CacheShape) -> dict[str, Array]:
        """The sum of the rotated keys of each block of a text of so many tokens."""
        count = max(shape.slots // self.block, 1)
        return {"sums": jnp.zeros((shape.batch, count, shape.kv_heads, shape.head_dim))}

    def select(self, state: Any, query: sparse.Query) -> tuple[Any, Any]:
        encoding = query.config.encoding
        if isinstance(encoding, rope.Rotary) and isinstance(encoding.scaling, rope.DynamicNTK):
            raise InputError(
                f"{self.name} keeps means of rotated keys, but DynamicNTK rotates keys anew as the "
                f"text grows; use NTKAware or YaRN"
            )
        group, row = query.group, jnp.arange(len(query.q), dtype=jnp.int32)[:, None]
        k = jax.lax.stop_gradient(query.rows(query.kv.k, group.pos))
        k = query.placement.at(k, group.rows_pos).astype(jnp.float32)
        sums = state["sums"]
        block = jnp.where(group.pos >= 0, group.pos // self.block, sums.shape[2])
        sums = sums.at[query.layer, row, block].add(k, mode="drop")
        q = jax.lax.stop_gradient(query.placement.at(query.q, group.rows_pos))
        gate = scores.dot(q.astype(jnp.float32), sums[query.layer])  # of the means, times `block`
        complete = (
            jnp.arange(sums.shape[2], dtype=jnp.int32)[None, None]
            < group.pos[..., None] // self.block
        )
        gate = jnp.where(complete[:, None, None], gate, -jnp.inf)
        best, block_ids = jax.lax.top_k(gate, min(self.topk - 1, sums.shape[2]))
        block_ids = jnp.where(jnp.isneginf(best), -1, block_ids.astype(jnp.int32))
        state, tokens = {"sums": sums}, query.q.shape[1]
        if tokens > 1:
            return block_ids, state
        pos = sparse.block_positions(
            block_ids.reshape(len(q), -1, block_ids.shape[-1]), self.block
        )  # [B, N, X]
        start = jnp.maximum(group.base, 0) // self.block * self.block
        return sparse.Selected(pos, start, self.block), state

    def attend(self, query: sparse.Query, selected: Any) -> tuple[Array, Any]:
        if query.q.shape[1] == 1:
            return super().attend(query, selected)
        return attend_blocks(query, selected, self.block), None


def attend_blocks(
    query: sparse.Query, block_ids: Int[Array, "B K G R M"], size: int
) -> Float[Array, "B R N H"]:
    """Attention outputs over the queries' own blocks and the earlier ones listed, -1 for none.

    Each pair of a query and a block that it selected is a row; rows are sorted by block, so that a
    block of keys is read once for all rows of a list. The parts of a query are merged by their LSE.
    """
    group, placement, config = query.group, query.placement, query.config
    (batch, rows, heads, _), pos = query.q.shape, jnp.maximum(group.rows_pos, 0)
    options = {"scale": config.scale, "logits_soft_cap": config.soft_cap, "return_residuals": True}
    placed = placement.at(query.q, group.rows_pos)
    k = placement.rotate(query.kv.k[query.layer].astype(query.q.dtype), query.table)
    v = query.kv.v[query.layer].astype(query.q.dtype)

    # A query's own block: the blocks that the queries stand in are rows of a batch.
    touched = min((rows + size - 2) // size + 1, -(-query.slots // size))
    start = group.first[:, None] // size * size
    own_pos = start + jnp.arange(touched * size, dtype=jnp.int32)[None]
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]

    def folded(x: Array, index: Int[Array, "B X"]) -> Array:
        x = x[row, jnp.clip(index, 0, x.shape[1] - 1)]
        return x.reshape(batch * touched, size, *x.shape[2:])

    out, lse = kernels.lambda_attention(
        folded(placed, own_pos - group.base[:, None]),
        folded(k, own_pos), folded(v, own_pos), num_global=0, window_size=size, **options,
    )  # fmt: skip
    place = jnp.clip(pos - start, 0, touched * size - 1)
    out = out.reshape(batch, -1, *out.shape[2:])[row, place]  # [B, R, N, H]
    lse = lse.swapaxes(1, 2).reshape(batch, -1, heads)[row, place]  # [B, R, N]
    count = block_ids.shape[-1]
    if not count:
        return out

    block_q = min(size, MAX_BLOCK_Q)
    routed = route(block_ids, max(query.slots // size, 1), block_q)
    batch_row, head = row[..., None], jnp.arange(k.shape[2], dtype=jnp.int32)[None, :, None]
    q = scores.rows_of_key_heads(placed, k.shape[2]).reshape(batch, k.shape[2], -1, k.shape[3])
    q = q[batch_row, head, routed.pair // count]
    far, far_lse = kernels.block_sparse_attention(
        q.swapaxes(1, 2), k, v, block_indices=routed.block_ids[..., None],
        block_counts=(routed.block_ids >= 0).astype(jnp.int32),
        block_q=block_q, block_kv=size, causal=False, **options,
    )  # fmt: skip
    place = jnp.minimum(routed.row, q.shape[2] - 1)
    far = far.swapaxes(1, 2)[batch_row, head, place].reshape(*block_ids.shape, -1)
    far_lse = far_lse[batch_row, head, place].reshape(block_ids.shape)
    far_lse = jnp.where(block_ids >= 0, far_lse, -jnp.inf)

    def by_head(x: Array) -> Array:
        return x.reshape(batch, heads, *x.shape[3:]).swapaxes(1, 2)

    weights = jax.nn.softmax(jnp.concatenate([lse[..., None], by_head(far_lse)], -1), -1)
    parts = jnp.concatenate([out[..., None, :], by_head(far)], -2).astype(jnp.float32)
    return jnp.einsum("btnm,btnmh->btnh", weights, parts)


class Routed(NamedTuple):
    """Pairs of a query and a block as rows sorted by block, in lists of `block_q` rows."""

    pair: Int[Array, "B K X"]  # that a row holds; any where it holds none
    row: Int[Array, "B K P"]  # that holds a pair; past the end where the pair names no block
    block_ids: Int[Array, "B K Q"]  # that all rows of a list read; -1 for none


def route(block_ids: Int[Array, "B K G R M"], blocks: int, block_q: int) -> Routed:
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
