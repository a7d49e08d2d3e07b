"""The linear cross-entropy as its definition says it: all logits at once, differentiated by JAX.

x = cap * tanh((e C^T + bias) / cap)
loss = lse(x) - (1 - smoothing) x[label] - smoothing * mean(x) + z_loss * lse(x)^2
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lminf.kernels.cross_entropy.operands import Losses, Operands, Rules


def losses(rules: Rules, operands: Operands, labels: Int[Array, " rows"], config: object) -> Losses:
    """Loss and LSE of every row; nothing is filtered."""
    if config is not None:
        raise NotImplementedError("there is nothing to configure")
    dtype = jax.dtypes.canonicalize_dtype(jnp.float64)
    embeddings, classifier, bias = jax.tree.map(lambda x: x.astype(dtype), operands)
    logits = jnp.matmul(embeddings, classifier.T, precision="highest")
    if bias is not None:
        logits += bias[None]
    if rules.soft_cap is not None:
        logits = rules.soft_cap * jnp.tanh(logits / rules.soft_cap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    label_logits = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    loss = (
        lse - (1 - rules.label_smoothing) * label_logits - rules.label_smoothing * logits.mean(-1)
    )
    return Losses(loss + rules.z_loss * lse * lse, lse)
