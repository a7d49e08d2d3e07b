"""Λ-attention by its dense definition, for texts so short that tiles cost more than they save.

All logits of a call exist at once (and once more in the backward), so it refuses beyond LIMIT of
them. A 64-token batch of 32 rows trains several times faster through it than tile by tile.
"""

from kernels.common import numerics
from kernels.lambda_attention import reference
from kernels.lambda_attention.operands import Operands, Places, Residuals, Rules

LIMIT = 2**22  # logits: 16 MB


def attention(rules: Rules, operands: Operands, places: Places, config: None) -> Residuals:
    """Outputs and log-denominators, in float32 arithmetic (float64 for float64 inputs)."""
    if config is not None:
        raise NotImplementedError("the dense form has nothing to configure")
    batch, queries, heads, _ = operands.query.shape
    far = 0 if operands.key_global is None else operands.key_global.shape[1]
    logits = batch * heads * queries * (operands.key.shape[1] + far)
    if logits > LIMIT:
        raise NotImplementedError(f"{logits} logits at once; it takes up to {LIMIT}")
    dtype = numerics.statistics_dtype(operands.query.dtype)
    return reference.dense(rules, operands, places, dtype)
