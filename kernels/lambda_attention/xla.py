"""Λ-attention by its dense definition, for texts so short that tiles cost more than they save.

All logits of a call exist at once (and once more in the backward), so it refuses beyond LIMIT of
them. From 128 keys on tiles are faster: 4.3 ms for 2.4 (32 x 128 tokens of 4 heads), 56 for 7.7
(16 x 16 queries of 9 heads behind 1,084 keys). At 64 keys it trains a fifth faster (2.0 ms for 2.5)
and in bfloat16 up to nine times, for tiles so narrow are slow there.
"""

from lminf.kernels.common import numerics
from lminf.kernels.lambda_attention import reference
from lminf.kernels.lambda_attention.operands import Operands, Places, Residuals, Rules

KEYS = 64
LIMIT = 2**22  # logits: 16 MB


def attention(rules: Rules, operands: Operands, places: Places, config: object) -> Residuals:
    """Outputs and log-denominators, in float32 arithmetic (float64 for float64 inputs)."""
    if config is not None:
        raise NotImplementedError("there is nothing to configure")
    near, far, _ = operands
    batch, queries, heads, _ = near.query.shape
    keys = near.key.shape[1]
    if keys > KEYS:
        raise NotImplementedError(f"{keys} keys; it takes up to {KEYS}")
    keys += 0 if far is None else far.key.shape[1]
    if (count := batch * heads * queries * keys) > LIMIT:
        raise NotImplementedError(f"{count} logits at once; it takes up to {LIMIT}")
    dtype = numerics.statistics_dtype(near.query.dtype)
    return reference.dense(rules, operands, places, dtype)
