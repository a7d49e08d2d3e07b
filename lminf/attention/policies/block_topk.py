"""MoBA: every query of every head attends to its own block of keys and to the best earlier ones.

Source: Lu et al. 2025, arXiv:2502.13189. The text is cut into blocks of `block` tokens. A query
sees its own block up to itself, and of the complete blocks before it the `topk` - 1 with the
largest

    <q, mean of the keys of the block>

with queries and keys rotated to their positions; all at their true distance, under one softmax. The
choice has no gradient, and attention over what is chosen has: a model can be trained with it.

Several queries are read as the release does. Each pair of a query and a block it chose is a row;
rows are sorted by block, so that `kernels.block_sparse_attention` reads a block of keys once for
all the rows of a list, and a query's parts are merged by their LSE.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lminf import kernels
from lminf.attention import cache as caches
from lminf.attention import rope, scores, sparse
from lminf.attention.policy import Held, register
from lminf.errors import InputError

MAX_BLOCK_Q = 128  # rows that one program of the kernel reads


@register("moba")
@dataclass(frozen=True)
class MoBA(sparse.SparsePolicy):
    """The query's own block and the best earlier ones. Source: Lu et al. 2025, arXiv:2502.13189."""

    block: Held = 128  # tokens; a TPU's kernel takes multiples of 128
    topk: Held = 4  # blocks that a query sees, its own included

    num_sinks = 0
    window_field = "block"
    group = sparse.WHOLE_CALL  # no query waits for another: each chooses by itself
    selected_distance = "true"
    ranks_by_products = True

    @property
    def window(self) -> int:
        return self.block

    @property
    def max_selected(self) -> int:
        return (self.topk - 1) * self.block

    def init_state(self, shape: caches.CacheShape) -> dict[str, Array]:
        """The sum of the rotated keys of each block of a text of so many tokens."""
        blocks = max(shape.slots // self.block, 1)
        return {"sums": jnp.zeros((shape.batch, blocks, shape.kv_heads, shape.head_dim))}

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
        state = {"sums": sums}
        if query.q.shape[1] > 1:
            return block_ids, state
        inside = jnp.arange(self.block, dtype=jnp.int32)[None, None, None]
        block_ids = block_ids.reshape(len(q), -1, block_ids.shape[-1], 1)  # [B, N, M, 1]
        pos = jnp.where(block_ids >= 0, block_ids * self.block + inside, -1)
        start = jnp.maximum(group.base, 0) // self.block * self.block
        return sparse.Selected(pos.reshape(*pos.shape[:2], -1), start, self.block), state

    def attend(self, query: sparse.Query, selected: Any) -> tuple[Array, Any]:
        if query.q.shape[1] == 1:
            return super().attend(query, selected)
        pos, block, config = query.group.rows_pos, self.block, query.config
        batch, tokens, heads, _ = query.q.shape
        q = query.placement.at(query.q, pos)
        shared = {"scale": config.scale, "logits_soft_cap": config.soft_cap}
        k = query.placement.rotate(query.kv.k[query.layer].astype(q.dtype), query.table)
        v = query.kv.v[query.layer].astype(q.dtype)

        # A query's own block: the blocks that the call touches are rows of a batch.
        first = jnp.maximum(pos[:, :1], 0) // block * block  # [B, 1]
        blocks = min((tokens + block - 2) // block + 1, -(-query.slots // block))
        own_pos = first + jnp.arange(blocks * block, dtype=jnp.int32)[None]
        row = jnp.arange(batch, dtype=jnp.int32)[:, None]
        index = {"q": jnp.clip(own_pos - pos[:, :1], 0, tokens - 1)}
        index["k"] = jnp.minimum(own_pos, query.slots - 1)

        def folded(x, of):
            return x[row, index[of]].reshape(batch * blocks, block, *x.shape[2:])

        out, lse = kernels.lambda_attention(
            folded(q, "q"), folded(k, "k"), folded(v, "k"), num_global=0, window_size=block,
            return_residuals=True, **shared,
        )  # fmt: skip
        at = jnp.clip(pos - first, 0, blocks * block - 1)
        out = out.reshape(batch, -1, *out.shape[2:])[row, at]  # [B, T, N, H]
        lse = lse.swapaxes(1, 2).reshape(batch, -1, heads)[row, at]  # [B, T, N]
        if not selected.shape[-1]:
            return out, None

        # The blocks that it chose, [B, K, G T M] pairs of both.
        routed = route(selected, max(query.slots // block, 1), min(block, MAX_BLOCK_Q))
        grouped = scores.rows_of_key_heads(q, k.shape[2])
        grouped = grouped.reshape(*grouped.shape[:2], -1, grouped.shape[-1])  # [B, K, G T, H]
        row, head = jnp.arange(batch)[:, None, None], jnp.arange(k.shape[2])[None, :, None]
        rows = grouped[row, head, routed.pair // selected.shape[-1]].swapaxes(1, 2)
        far, far_lse = kernels.block_sparse_attention(
            rows, k, v, block_indices=routed.block_ids[..., None],
            block_counts=(routed.block_ids >= 0).astype(jnp.int32),
            block_q=min(block, MAX_BLOCK_Q), block_kv=block, causal=False, return_residuals=True,
            **shared,
        )  # fmt: skip
        place = jnp.minimum(routed.row, rows.shape[1] - 1)
        far = far.swapaxes(1, 2)[row, head, place].reshape(*selected.shape, -1)
        far_lse = jnp.where(
            selected >= 0, far_lse[row, head, place].reshape(selected.shape), -jnp.inf
        )

        def by_head(x):  # [B, K, G, T, ...]
            return x.reshape(batch, heads, *x.shape[3:]).swapaxes(1, 2)

        weights = jax.nn.softmax(jnp.concatenate([lse[..., None], by_head(far_lse)], -1), -1)
        parts = jnp.concatenate([out[..., None, :], by_head(far)], -2).astype(jnp.float32)
        return jnp.einsum("btnm,btnmh->btnh", weights, parts), None


class Routed(NamedTuple):
    """Pairs of a query and a block as rows sorted by block, in lists of `block_q` rows."""

    pair: Int[Array, "B K R"]  # that a row holds; any where it holds none
    row: Int[Array, "B K P"]  # that holds a pair; past the end where the pair names no block
    block_ids: Int[Array, "B K Q"]  # that all rows of a list read; -1 for none


def route(block_ids: Int[Array, "B K G T M"], blocks: int, block_q: int) -> Routed:
    """Rows for the pairs of every key head, as many lists as there can ever be."""
    pairs = block_ids.reshape(*block_ids.shape[:2], -1)
    lists = pairs.shape[2] // block_q + blocks

    def of_head(block_ids: Int[Array, " P"]) -> Routed:
        target = jnp.where(block_ids < 0, blocks, block_ids)  # what names no block comes last
        order = jnp.argsort(target, stable=True).astype(jnp.int32)
        counts = jnp.zeros(blocks, jnp.int32).at[target].add(1, mode="drop")
        ends = jnp.cumsum(-(-counts // block_q))  # in lists
        shift = (ends - -(-counts // block_q)) * block_q - (jnp.cumsum(counts) - counts)
        rank = jnp.arange(len(pairs[0, 0]), dtype=jnp.int32)
        row_of = jnp.append(shift, jnp.int32(2**30))[target[order]] + rank
        pair = jnp.zeros(lists * block_q, jnp.int32).at[row_of].set(order, mode="drop")
        row = jnp.zeros_like(order).at[order].set(row_of)
        named = jnp.searchsorted(ends, jnp.arange(lists, dtype=jnp.int32), side="right")
        return Routed(pair, row, jnp.where(named < blocks, named.astype(jnp.int32), -1))

    return jax.vmap(jax.vmap(of_head))(pairs)
