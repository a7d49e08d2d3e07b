"""Attention over the blocks of keys that lists name, one list for each block of queries."""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from lminf.kernels.block_sparse import reference, xla_chunked
from lminf.kernels.block_sparse.operands import Lists, Operands, Rules
from lminf.kernels.common import arguments, dispatch, tuning
from lminf.kernels.common.config import Key
from lminf.kernels.lambda_attention.operands import Residuals

IMPLEMENTATIONS = {
    "reference": reference.attention,
    "xla_chunked": xla_chunked.attention,
    "mosaic_tpu": dispatch.lazily("lminf.kernels.block_sparse.mosaic_tpu", "attention"),
    "triton": dispatch.lazily("lminf.kernels.block_sparse.triton", "attention"),
}
ORDER = {
    "cpu": ("xla_chunked",),
    "tpu": ("mosaic_tpu", "xla_chunked"),
    "gpu": ("triton", "xla_chunked"),
}


def block_sparse_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    *,
    block_indices: Int[Array, "B L Q M"],
    block_counts: Int[Array, "B L Q"],
    block_q: int,
    block_kv: int,
    causal: bool = True,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    return_residuals: bool = False,
    implementation: dispatch.Choice = None,
    config: object = None,
) -> Array | Residuals:
    """Attention outputs [B, T, N, Hv]; with `return_residuals`, also the LSE [B, N, T].

    Queries [n * block_q, (n + 1) * block_q) see the keys of the blocks block_indices[b, l, n, :c],
    c = block_counts[b, l, n]: ascending, each once, -1 after them. L is K or 1 (one list for all
    heads). Row i of the queries stands at position i, as does row i of the keys; `causal` hides the
    keys after a query. A row that sees nothing has output 0, LSE -inf and no gradient. Lists that
    are not as they should be raise ValueError; inside jit, where they cannot, the result is
    undefined.
    """
    batch, queries, heads, width = arguments.shape("query", query, "B T N H", (None,) * 4)
    _, keys, key_heads, _ = arguments.shape("key", key, "B S K H", (batch, None, None, width))
    arguments.shape("value", value, "B S K Hv", (batch, keys, key_heads, None))
    if heads % key_heads:
        raise ValueError(f"query has {heads} heads, not a multiple of the {key_heads} of key")
    arguments.count("block_q", block_q, least=1)
    arguments.count("block_kv", block_kv, least=1)
    score_scale = width**-0.5 if scale is None else scale
    rules = Rules(block_q, block_kv, causal, score_scale, logits_soft_cap)
    lists = _lists(block_indices, block_counts, (batch, key_heads, -(-queries // block_q)))
    _check_lists(block_indices, block_counts, -(-keys // block_kv))
    key_ = Key(
        "block_sparse_attention", str(query.dtype), heads, key_heads, width, queries, keys,
        keys, 0,
    )  # fmt: skip
    result = dispatch.run(
        "block_sparse_attention", tuning.tuned(IMPLEMENTATIONS, key_), ORDER, implementation,
        rules, Operands(query, key, value), lists, config,
    )  # fmt: skip
    return result if return_residuals else result.out


def _lists(indices, counts, expected: tuple[int, int, int]) -> Lists:
    """The lists of every key head; ValueError if their shapes do not fit."""
    batch, key_heads, q_blocks = expected
    if indices.ndim != 4 or indices.shape[1] not in (1, key_heads):
        raise ValueError(
            f"block_indices has shape {indices.shape}; it must be "
            f"[B={batch}, {key_heads} or 1, {q_blocks}, M]"
        )
    heads, width = indices.shape[1], indices.shape[3]
    arguments.shape("block_indices", indices, "B L Q M", (batch, heads, q_blocks, None))
    arguments.shape("block_counts", counts, "B L Q", (batch, heads, q_blocks))
    return Lists(
        jnp.broadcast_to(indices, (batch, key_heads, q_blocks, width)).astype(jnp.int32),
        jnp.broadcast_to(jnp.minimum(counts, width), expected).astype(jnp.int32),
    )


def _check_lists(indices, counts, kv_blocks: int) -> None:
    """ValueError unless the lists are what they say; nothing inside jit."""
    if isinstance(indices, Tracer) or isinstance(counts, Tracer):
        return
    block_ids, lengths = np.asarray(indices), np.asarray(counts)
    width = block_ids.shape[-1]
    if lengths.size and (lengths.min() < 0 or lengths.max() > width):
        raise ValueError(f"block_counts runs to {lengths.max()}; the lists hold 0 to {width}")
    used = np.arange(width) < lengths[..., None]
    wrong = used & ((block_ids < 0) | (block_ids >= kv_blocks))
    if wrong.any():
        raise ValueError(f"block_indices holds {block_ids[wrong][0]}; there are {kv_blocks} blocks")
    if (used[..., 1:] & (np.diff(block_ids, axis=-1) <= 0)).any():
        raise ValueError("block_indices must ascend, each block once, in every list")
