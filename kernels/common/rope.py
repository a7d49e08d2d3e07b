"""Rotary operands of Λ-attention, exact at any position up to 16M.

position * frequency in float32 is off by 0.05 rad at 1M tokens. Cosines and sines come from two
tables made in float64 instead, of 4096 positions each, and are composed:
    R(4096 a + b) = R(4096 a) R(b)
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Float32, Int

from lminf.kernels.common import arguments

STEP = 4096  # positions in the fine table, and entries of the coarse one
LIMIT = STEP * STEP  # positions


class LambdaOperands(NamedTuple):
    """What `lambda_attention` takes: query, query_global, key, key_global."""

    q_local: Float[Array, "B T N H"]
    q_global: Float[Array, "B T N H"]
    k_local: Float[Array, "B T K H"]
    k_global: Float[Array, "B R K H"]


def rope_lambda(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    positions: Int[Array, "#B T"],
    *,
    base: float,
    num_global: int,
    clip_distance: int | None,
) -> LambdaOperands:
    """Both branches' operands: rotated to their positions, and as if `clip_distance` apart.

    Channel c turns with c + H/2. `q_global` has one rotation, by `clip_distance`, for every row and
    `k_global` is the first `num_global` keys as given; without a clip distance both are the local
    ones. A position that is negative or past 16M raises ValueError; inside jit it gives NaN.
    """
    batch, length, _, width = arguments.shape("q", q, "B T N H", (None,) * 4)
    arguments.shape("k", k, "B T K H", (batch, length, None, width))
    arguments.count("num_global", num_global, least=0)
    if width % 2:
        raise ValueError(f"q has {width} channels; a rotation needs pairs of them")
    if positions.shape not in ((1, length), (batch, length)):
        raise ValueError(
            f"positions has shape {positions.shape}; "
            f"it must be [1, {length}] or [{batch}, {length}]"
        )
    cos, sin = angles(positions, base=base, width=width)
    q_local, k_local = rotate(q, cos, sin), rotate(k, cos, sin)
    if clip_distance is None:
        return LambdaOperands(q_local, q_local, k_local, k_local[:, :num_global])
    arguments.count("clip_distance", clip_distance, least=1)
    fixed = _turns(np.array([[clip_distance]]), base, width)
    q_global = rotate(q, *(jnp.asarray(x) for x in fixed))
    return LambdaOperands(q_local, q_global, k_local, k[:, :num_global])


def angles(
    positions: Int[Array, "B T"], *, base: float, width: int
) -> tuple[Float32[Array, "B T P"], Float32[Array, "B T P"]]:
    """cos and sin of every position and pair of channels, to 1e-6 up to 16M positions."""
    if not isinstance(positions, Tracer):
        found = np.asarray(positions)
        if found.size and (found.min() < 0 or found.max() >= LIMIT):
            raise ValueError(
                f"positions run from {found.min()} to {found.max()}; they must be in [0, {LIMIT})"
            )

    def rows(table, index):
        return jnp.take(jnp.asarray(table), index, axis=0, mode="fill", fill_value=jnp.nan)

    positions = positions.astype(jnp.int32)
    # A negative index counts from the end; one past the end is filled with NaN.
    above, below = jnp.where(positions < 0, STEP, positions // STEP), positions % STEP
    coarse, fine = _tables(base, width)
    cos_a, sin_a = (rows(x, above) for x in coarse)
    cos_b, sin_b = (rows(x, below) for x in fine)
    return cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b


def rotate(
    x: Float[Array, "B T N H"], cos: Float32[Array, "#B #T P"], sin: Float32[Array, "#B #T P"]
) -> Float[Array, "B T N H"]:
    """x turned; the same dtype, the arithmetic in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, -1).astype(x.dtype)


@functools.lru_cache(maxsize=8)
def _tables(base: float, width: int):
    """cos and sin of 4096 a for a < 4096, and of b for b < 4096: 4 MB for a width of 128."""
    index = np.arange(STEP)
    return _turns(index * STEP, base, width), _turns(index, base, width)


def _turns(positions: np.ndarray, base: float, width: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [*positions, P] in float32, computed in float64."""
    frequency = base ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    turned = positions[..., None] * frequency
    return np.cos(turned).astype(np.float32), np.sin(turned).astype(np.float32)
