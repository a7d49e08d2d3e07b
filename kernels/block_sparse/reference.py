"""Block-sparse attention by its definition: a dense mask from the lists, one masked softmax.

Pair (i, j) is visible if block j // block_kv is listed for block i // block_q, and j <= i where
causal. In float64 wherever that is switched on; differentiated by JAX.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from lminf.kernels.block_sparse import operands as pairs
from lminf.kernels.block_sparse.operands import Lists, Operands, Rules
from lminf.kernels.common import numerics
from lminf.kernels.lambda_attention.operands import Residuals


def attention(rules: Rules, operands: Operands, lists: Lists, config: object) -> Residuals:
    """Outputs and log-denominators, computed densely."""
    if config is not None:
        raise NotImplementedError("there is nothing to configure")
    dtype = jax.dtypes.canonicalize_dtype(jnp.float64)
    query, key, value = (x.astype(dtype) for x in operands)
    group = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, group, 2) for x in (key, value))
    seen = jnp.repeat(_mask(rules, operands, lists), group, 1)

    logits = jnp.einsum("btnh,bsnh->bnts", query, key, precision="highest") * rules.scale
    if rules.soft_cap is not None:
        logits = rules.soft_cap * jnp.tanh(logits / rules.soft_cap)
    logits = jnp.where(seen, logits, numerics.MASK_VALUE)
    top = jax.lax.stop_gradient(logits.max(-1))
    weights = jnp.where(seen, jnp.exp(logits - top[..., None]), 0)
    empty = ~seen.any(-1)
    total = jnp.where(empty, 1, weights.sum(-1))
    out = jnp.einsum("bnts,bsnh->btnh", weights / total[..., None], value, precision="highest")
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    given = operands.query.dtype
    return Residuals(out.astype(given), lse.astype(numerics.statistics_dtype(given)))


def _mask(rules: Rules, operands: Operands, lists: Lists) -> Bool[Array, "B K T S"]:
    queries, keys = operands.query.shape[1], operands.key.shape[1]
    width, kv_blocks = lists.indices.shape[3], -(-keys // rules.block_kv)

    def along_last(count: int):
        return jnp.arange(count, dtype=jnp.int32).reshape(1, 1, 1, -1)

    used = along_last(width) < lists.counts[..., None]
    named = lists.indices[..., None] == along_last(kv_blocks)[..., None, :]
    listed = (named & used[..., None]).any(-2)
    listed = jnp.repeat(jnp.repeat(listed, rules.block_q, 2), rules.block_kv, 3)
    listed = listed[:, :, :queries, :keys]

    rows = jnp.arange(queries, dtype=jnp.int32)[:, None]
    columns = jnp.arange(keys, dtype=jnp.int32)[None]
    return listed & pairs.visible(rules, rows, columns)[None, None]
