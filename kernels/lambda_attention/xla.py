"""Λ-attention by its dense definition, for texts so short that tiles cost more than they save.

All logits of a call exist at once (and once more in the backward), so it refuses beyond LIMIT of
them. A 64-token batch of 32 rows trains several times faster through it than tile by tile.
"""

from lminf.kernels.common import numerics
from lminf.kernels.lambda_attention import reference
from lminf.kernels.lambda_attention.operands import Operands, Places, Residuals, Rules

LIMIT = 2**22  # logits: 16 MB


def attention(rules: Rules, operands: Operands, places: Places, config: object) -> Residuals:
    """Outputs and log-denominators, in float32 arithmetic (float64 for float64 inputs)."""
    if config is not None:
        raise NotImplementedError("there is nothing to configure")
    near, far, _ = operands
    batch, queries, heads, _ = near.query.shape
    keys = near.key.shape[1] + (0 if far is None else far.key.shape[1])
    if batch * heads * queries * keys > LIMIT:
        count = batch * heads * queries * keys
        raise NotImplementedError(f"{count} logits at once; it takes up to {LIMIT}")
    dtype = numerics.statistics_dtype(near.query.dtype)
    return reference.dense(rules, operands, places, dtype)
