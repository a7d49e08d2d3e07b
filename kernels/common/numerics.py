"""The dtypes and sentinel values that every softmax in this package shares."""

import jax.numpy as jnp
import numpy as np

# Logits of invisible pairs. Finite, so that the difference of two of them is 0 and not NaN.
MASK_VALUE = float(-0.7 * np.finfo(np.float32).max)

# Where a running maximum starts: far below any real logit, yet far enough above MASK_VALUE that
# exp(MASK_VALUE - EMPTY_MAX) is exactly 0. A row that never sees a key then keeps the sum 0.
EMPTY_MAX = MASK_VALUE / 2


def statistics_dtype(dtype) -> jnp.dtype:
    """The dtype of logits, maxima, sums and accumulators: float32, float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)
