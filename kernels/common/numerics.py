"""The dtypes, sentinel values and exponential that every softmax in this package shares."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lminf.kernels.common import platforms

LOG2_E = math.log2(math.e)

# Logits of invisible pairs. Finite, so that the difference of two of them is 0 and not NaN.
MASK_VALUE = float(-0.7 * np.finfo(np.float32).max)

# Where a running maximum starts: far below any real logit, yet far enough above MASK_VALUE that
# exp(MASK_VALUE - EMPTY_MAX) is exactly 0. A row that never sees a key then keeps the sum 0.
EMPTY_MAX = MASK_VALUE / 2


def statistics_dtype(dtype: Any) -> jnp.dtype:
    """The dtype of logits, maxima, sums and accumulators: float32, float64 for float64 inputs."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


# 2^f on [-1/2, 1/2] to 2e-7 relative: interpolation at the Chebyshev nodes.
_POWERS_OF_TWO = (
    np.polynomial.Chebyshev.interpolate(np.exp2, 5, domain=[-0.5, 0.5])
    .convert(kind=np.polynomial.Polynomial)
    .coef.astype(np.float32)
)
_ROUND = np.float32(1.5 * 2**23)  # x + _ROUND holds round(x) in its lowest mantissa bits


def exp2(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """2^x for x <= 1, to 3e-7 relative in float32; exactly 0 below -126. NaN does not survive.

    On a CPU the exponential is a fifth of attention's time. This one needs no range checks for
    large x and takes 2/3 of the time of XLA's. Carry a NaN through the row maximum instead.
    """
    if x.dtype != jnp.float32 or platforms.current() != "cpu":
        return jnp.exp2(x)
    integer = jax.lax.bitcast_convert_type(x + _ROUND, jnp.int32) - int(_ROUND.view(np.int32))
    fraction = x - integer.astype(jnp.float32)
    power = jnp.full_like(x, _POWERS_OF_TWO[-1])
    for coefficient in _POWERS_OF_TWO[-2::-1]:
        power = power * fraction + coefficient
    bits = jax.lax.bitcast_convert_type(power, jnp.int32) + (integer << 23)
    return jnp.where(x < -126, 0, jax.lax.bitcast_convert_type(bits, jnp.float32))
