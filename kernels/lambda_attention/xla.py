"""Λ-attention by its dense definition, for so few keys that tiles cost more than they save.

All logits of a call exist at once (and once more in the backward), so it refuses beyond LIMIT.
"""

from lminf.kernels.common import numerics
from lminf.kernels.lambda_attention import reference
from lminf.kernels.lambda_attention.operands import Operands, Places, Residuals, Rules

KEYS, LIMIT = 64, 2**22  # from 128 keys on tiles are faster; logits of 16 MB


def attention(rules: Rules, operands: Operands, places: Places, config: object) -> Residuals:
    """Outputs and log-denominators, in float32 arithmetic (float64 for float64 inputs)."""
    if config is not None:
        raise NotImplementedError("there is nothing to configure")
    near, far, _ = operands
    batch, queries, heads, _ = near.query.shape
    keys, far_keys = near.key.shape[1], 0 if far is None else far.key.shape[1]
    count = batch * heads * queries * (keys + far_keys)
    if keys > KEYS or count > LIMIT:
        raise NotImplementedError(f"{keys} keys, {count} logits at once; up to {KEYS} and {LIMIT}")
    return reference.dense(rules, operands, places, numerics.statistics_dtype(near.query.dtype))
