"""Pieces that the TPU kernels of Λ-attention and of block-sparse attention are made of.

Scores are kept keys first, s^T [W, C]; exponents are powers of two. Kernels read arrays with the
heads of all batch rows in one axis, padded to whole blocks.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from lminf.kernels.common import compat, numerics

LANES = 128
SCALARS = 2**17  # of 4 bytes: half of what a v5e core's scalar memory holds


@dataclass(frozen=True)
class Scoring:
    """From the product of a query and a key to its logit."""

    scale: float
    soft_cap: float | None
    precision: jax.lax.PrecisionLike = None


# --- Arrays ---------------------------------------------------------------------------------------


class HeadsFirst(NamedTuple):
    """One branch as the kernels read it: padded to whole blocks, heads of all batch rows in one."""

    query: Float[Array, "BN T H"]
    key: Float[Array, "BK _ H"]
    value: Float[Array, "BK _ Hv"]


class Statistics(NamedTuple):
    """What the backward reads beside a block of queries."""

    d_out: Float[Array, "BN T Hv"]
    delta: Float[Array, "BN 1 T"]
    lse2: Float[Array, "BN 1 T"]


def heads_first(x: Float[Array, "B T N X"], block: int) -> Float[Array, "BN Tp X"]:
    x = jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, -x.shape[1] % block), (0, 0)))
    return x.reshape(-1, *x.shape[2:])


def heads_last(x: Float[Array, "BN Tp X"], like: Float[Array, "B T N _"]) -> Array:
    batch, length, heads, _ = like.shape
    x = x.reshape(batch, heads, *x.shape[1:])[:, :, :length]
    return x.transpose(0, 2, 1, 3)


def like(x: Array) -> jax.ShapeDtypeStruct:
    return compat.output_like(x.shape, x.dtype, x)


# --- Calls ----------------------------------------------------------------------------------------


def block_of(x: Array | jax.ShapeDtypeStruct, rows: int, index: Callable) -> pl.BlockSpec:
    """Blocks of `rows` rows of a [heads, rows, X] array, or columns of a [heads, 1, rows] one;
    `index` maps the grid to (head, block).
    """
    if x.shape[1] == 1:
        return pl.BlockSpec((None, 1, rows), lambda *grid: (index(*grid)[0], 0, index(*grid)[1]))
    return pl.BlockSpec((None, rows, x.shape[2]), lambda *grid: (*index(*grid), 0))


def statistics_blocks(block_q: int, statistics: Statistics, query_at: Callable) -> Any:
    return jax.tree.map(lambda x: block_of(x, block_q, query_at), statistics)


def call(
    kernel: Callable,
    grid: Any,
    scalars: Any,
    inputs: Any,
    in_specs: Any,
    outputs: Any,
    out_specs: Any,
    scratch: Any,
    name: str,
    flops: int,
) -> Any:
    """A pallas_call whose grid is parallel in its first two axes and sequential in the others."""
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel") + ("arbitrary",) * (len(grid) - 2)
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops,
            transcendentals=0,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(inputs)),
        ),
        name=name,
    )(scalars, *inputs)


# --- Inside a kernel ------------------------------------------------------------------------------


def rows_and_columns(rows: int, columns: int) -> list[Array]:
    return [jax.lax.broadcasted_iota(jnp.int32, (rows, columns), axis) for axis in (0, 1)]


def at_first(*axes: int) -> Any:
    """Runs what it decorates at the first step of these axes of the grid."""
    return pl.when(functools.reduce(jnp.logical_and, [pl.program_id(a) == 0 for a in axes]))


def at_last(*axes: int) -> Any:
    ends = [pl.program_id(a) == pl.num_programs(a) - 1 for a in axes]
    return pl.when(functools.reduce(jnp.logical_and, ends))


def dot(scoring: Scoring, a: Array, b: Array, contract: tuple[int, int]) -> Float[Array, "X Y"]:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = scoring.precision
    if precision is None and a.dtype == jnp.float32:
        precision = jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def logits(
    scoring: Scoring, query: Array, key: Array, visible: Array | None
) -> tuple[Array, Array | None]:
    """Exponents of 2 [W, C], and d(logit)/d(score) where a soft cap bends it."""
    scores, cap = dot(scoring, key, query, (1, 1)), scoring.soft_cap
    bend = None
    if cap is None:
        scores *= scoring.scale * numerics.LOG2_E
    else:
        bent = jnp.tanh(scores * (scoring.scale / cap))
        scores, bend = bent * (cap * numerics.LOG2_E), 1 - bent * bent
    if visible is not None:
        scores = jnp.where(visible, scores, numerics.MASK_VALUE)
    return scores, bend


def gradient(scoring: Scoring, branch: Any, statistics: Any, visible: Array | None) -> Any:
    """Weights p and d(scores) [W, C] of one block."""
    exponents, bend = logits(scoring, branch.query[...], branch.key[...], visible)
    weights = jnp.exp2(exponents - statistics.lse2[...])
    d_weights = dot(scoring, branch.value[...], statistics.d_out[...], (1, 1))
    d_scores = weights * (d_weights - statistics.delta[...])
    return weights, d_scores if bend is None else d_scores * bend
