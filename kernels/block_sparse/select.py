"""Choosing blocks by content: one score for each pair of blocks, the best of them listed."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lminf.kernels.block_sparse.operands import Lists
from lminf.kernels.common import arguments

Kind = Literal["mean", "max_norm", "top_k"]


def representatives(
    x: Float[Array, "B S K H"], block: int, kind: Kind, *, count: int = 1
) -> Float[Array, "B K blocks count H"]:
    """What stands for each block of rows: their mean, the row of the largest norm, or the `count`
    rows of the largest norms. A last block that is not full counts what it has; where it has fewer
    rows than `count`, the others are 0.
    """
    arguments.count("block", block, least=1)
    arguments.count("count", count, least=1)
    if kind not in ("mean", "max_norm", "top_k"):
        raise ValueError(f"kind={kind!r} must be 'mean', 'max_norm' or 'top_k'")
    if count > block or (count > 1 and kind != "top_k"):
        raise ValueError(f"count={count} needs kind='top_k' and a block of at least as many rows")
    batch, rows, heads, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -rows % block), (0, 0), (0, 0)))
    x = x.reshape(batch, -1, block, heads, width).transpose(0, 3, 1, 2, 4)
    if kind == "mean":
        held = jnp.minimum(rows - jnp.arange(x.shape[2]) * block, block)
        total = x.astype(jnp.float32).sum(3, keepdims=True)
        return (total / held[None, None, :, None, None].astype(jnp.float32)).astype(x.dtype)
    norms = jnp.square(x.astype(jnp.float32)).sum(-1)
    _, best = jax.lax.top_k(norms, count)  # ties: the lower row
    return jnp.take_along_axis(x, best[..., None], 3)


def scores(
    query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], *,
    block_q: int, block_kv: int, kind: Kind = "mean", count: int = 1,
) -> Float[Array, "B K Q blocks"]:  # fmt: skip
    """How much each block of queries wants each block of keys, float32.

    The mean query of a block and of the heads that share a key head, times the block's best
    representative.
    """
    batch, length, heads, width = query.shape
    key_heads = key.shape[2]
    grouped = query.reshape(batch, length, key_heads, heads // key_heads, width)
    mean = representatives(grouped.astype(jnp.float32).mean(3), block_q, "mean")[:, :, :, 0]
    stands = representatives(key, block_kv, kind, count=count).astype(jnp.float32)
    return jnp.einsum("bkqh,bknch->bkqnc", mean, stands, precision="highest").max(-1)


def choose(
    scored: Float[Array, "B K Q blocks"], count: int, *,
    block_q: int, block_kv: int, global_blocks: int = 0, local_blocks: int = 1,
) -> Lists:  # fmt: skip
    """Lists of at most `count` blocks, all causal: the first `global_blocks`, the last
    `local_blocks` up to the queries' own, and the best scored of the others.

    Equal scores: the lower index. Ascending, -1 after the last, as `block_sparse_attention` wants.
    """
    arguments.count("count", count, least=1)
    arguments.count("global_blocks", global_blocks, least=0)
    arguments.count("local_blocks", local_blocks, least=0)
    if global_blocks + local_blocks > count:
        raise ValueError(
            f"count={count} is less than the forced {global_blocks} global and {local_blocks} local"
        )
    q_blocks, kv_blocks = scored.shape[2:]
    seen, forced = _causal_and_forced(
        q_blocks, kv_blocks, block_q, block_kv, global_blocks, local_blocks
    )
    ranked = jnp.where(forced, jnp.inf, scored.astype(jnp.float32))
    ranked = jnp.where(seen, jnp.nan_to_num(ranked, nan=-jnp.inf, posinf=jnp.inf), -jnp.inf)
    count = min(count, kv_blocks)
    _, best = jax.lax.top_k(ranked, count)  # ties: the lower index
    allowed = jnp.broadcast_to(seen, scored.shape)
    best = jnp.where(jnp.take_along_axis(allowed, best, 3), best, kv_blocks)
    best = jnp.sort(best.astype(jnp.int32), axis=-1)
    counts = (best < kv_blocks).sum(-1, dtype=jnp.int32)
    return Lists(jnp.where(best < kv_blocks, best, -1), counts)


def _causal_and_forced(
    q_blocks: int,
    kv_blocks: int,
    block_q: int,
    block_kv: int,
    global_blocks: int,
    local_blocks: int,
) -> tuple[Bool[Array, "1 1 Q blocks"], Bool[Array, "1 1 Q blocks"]]:
    q = jnp.arange(q_blocks, dtype=jnp.int32)[:, None]
    kv = jnp.arange(kv_blocks, dtype=jnp.int32)[None]
    own = jnp.minimum(((q + 1) * block_q - 1) // block_kv, kv_blocks - 1)
    seen = kv <= own
    forced = seen & ((kv < global_blocks) | (kv > own - local_blocks))
    return seen[None, None], forced[None, None]
