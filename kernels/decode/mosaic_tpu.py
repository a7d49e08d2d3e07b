"""One token of Λ-attention on a TPU (Pallas, Mosaic): one pass over the slots of a rolling cache.

Grid (B K, globals + ring): for each key head, blocks of slots one after the other; the G query
heads of the group are the rows of one product, statistics are columns [G, 1]:
    m' = max(m, max s);  p = 2^(s - m');  l' = l 2^(m - m') + sum p;  acc' = acc 2^(m - m') + p v
Blocks that nobody sees (globals still inside the window, slots not yet written) are neither copied
nor computed, and only the last block that is seen is masked.

Bytes: the slots that are seen, once. The order of slots is that of the ring, not of positions,
which a softmax does not notice. Gradients go through the plain XLA form.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from lminf.kernels.common import dispatch, numerics
from lminf.kernels.decode import cache as caches
from lminf.kernels.decode import xla
from lminf.kernels.decode.cache import RollingCache
from lminf.kernels.decode.operands import DecodeResiduals, Places, Queries, Rules


@dataclass(frozen=True)
class Config:
    """Slots in a block: a multiple of 128 on a device, of 8 in the interpreter."""

    block: int = 1024


def decode(
    rules: Rules, queries: Queries, cache: RollingCache, places: Places, config: object
) -> DecodeResiduals:
    """Outputs and log-denominators; statistics in float32."""
    config = dispatch.settled(Config, config, Config)
    if places.alibi_slopes is not None:
        raise NotImplementedError("ALiBi")
    if places.head_window is not None:
        raise NotImplementedError("head_window: what a head sees must be the ring's first slots")
    dtypes = {str(x.dtype) for x in (*queries[:2], *cache[:4])}
    if not dtypes <= {"bfloat16", "float32"} or len(dtypes) > 1:
        raise NotImplementedError(f"{sorted(dtypes)}; it takes all bfloat16 or all float32")
    plan = Plan(rules, config.block, cache.num_global, cache.window_size)
    return _decode(plan, queries, cache, places)


@dataclass(frozen=True)
class Side:
    """One kind of slots, in blocks; the last block may reach past the end."""

    slots: int
    block: int

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.slots, self.block)

    def at(self, step: Any, seen: Any) -> Any:
        """The block at this step of a walk over the first `seen` slots; then the last one."""
        last = jax.lax.div(jnp.clip(seen, 1, self.slots) - 1, self.block)
        return jnp.clip(step, 0, last)


@dataclass(frozen=True)
class Plan:
    """One call: every size that is known when tracing."""

    rules: Rules
    block: int
    num_global: int
    window: int

    @property
    def sides(self) -> tuple[Side, ...]:
        """Globals and the ring, of which there are any; always the first slots of each are seen."""
        return tuple(Side(n, min(n, self.block)) for n in (self.num_global, self.window) if n)


def _dot(a, b, contract: tuple[int, int]) -> Float[Array, "X Y"]:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def _kernel(plan: Plan, seen, sides, sinks, out, lse, top, total, acc):
    row, step = pl.program_id(0), pl.program_id(1)

    @pl.when(step == 0)
    def _():
        top[...] = jnp.full_like(top, numerics.EMPTY_MAX)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def visit(arrays, visible):
        """`visible`: how many of the block's slots are seen; None: all."""
        query, key, value = (x[...] for x in arrays)
        scores, cap = _dot(query, key, (1, 1)), plan.rules.soft_cap
        if cap is None:
            scores *= plan.rules.scale * numerics.LOG2_E
        else:
            scores = jnp.tanh(scores * (plan.rules.scale / cap)) * (cap * numerics.LOG2_E)
        if visible is not None:
            slot = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            scores = jnp.where(slot < visible, scores, numerics.MASK_VALUE)
            # Past the end of the array stands anything, and 0 * NaN is NaN.
            row = jax.lax.broadcasted_iota(jnp.int32, (value.shape[0], 1), 0)
            value = jnp.where(row < visible, value, jnp.zeros_like(value))
        old = top[...]
        new = jnp.maximum(old, scores.max(1, keepdims=True))
        weights, shrink = jnp.exp2(scores - new), jnp.exp2(old - new)
        top[...] = new
        total[...] = total[...] * shrink + weights.sum(1, keepdims=True)
        acc[...] = acc[...] * shrink + _dot(weights.astype(value.dtype), value, (1, 0))

    first_step = 0
    for which, (side, arrays) in enumerate(zip(plan.sides, sides, strict=True)):
        left = seen[which, row] - (step - first_step) * side.block
        inside = (step >= first_step) & (step < first_step + side.blocks)
        pl.when(inside & (left >= side.block))(functools.partial(visit, arrays, None))
        pl.when(inside & (left > 0) & (left < side.block))(functools.partial(visit, arrays, left))
        first_step += side.blocks

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        highest, denominator, product = top[...], total[...], acc[...]
        empty = denominator == 0
        if sinks is not None:
            sink = sinks[...] * numerics.LOG2_E
            new = jnp.maximum(highest, sink)
            shrink = jnp.exp2(highest - new)
            denominator = denominator * shrink + jnp.exp2(sink - new)
            highest, product = new, product * shrink
        denominator = jnp.where(empty, 1, denominator)
        out[...] = jnp.where(empty, 0, product / denominator).astype(out.dtype)
        log_sum = highest / numerics.LOG2_E + jnp.log(denominator)
        lse[...] = jnp.where(empty, -jnp.inf, log_sum)


def _compute(plan: Plan, queries: Queries, cache: RollingCache, places: Places) -> DecodeResiduals:
    batch, heads, _ = queries.near.shape
    key_heads, value_width = cache.v_ring.shape[-3], cache.v_ring.shape[-1]
    group = heads // key_heads
    rows = batch * key_heads

    seen = caches.seen(cache.of(places.layer), places)
    # Of each side, for each row of the grid, and the layer.
    scalars = [
        count.reshape(rows)
        for count, slots in zip((seen.far, seen.near), (plan.num_global, plan.window), strict=True)
        if slots
    ]
    layer = jnp.int32(0) if places.layer is None else places.layer
    scalars = jnp.stack([*scalars, jnp.broadcast_to(layer, rows)])  # fmt: skip

    given = [
        (query.reshape(rows, group, -1), *(x.reshape(-1, *x.shape[-2:]) for x in slots))
        for query, *slots in (
            (queries.far, cache.k_global, cache.v_global),
            (queries.near, cache.k_ring, cache.v_ring),
        )
        if slots[0].shape[-2]
    ]

    def all_of(x) -> pl.BlockSpec:
        return pl.BlockSpec((None, *x.shape[1:]), lambda row, step, scalars: (row, 0, 0))

    def slots_of(x, which: int, side: Side, first_step: int) -> pl.BlockSpec:
        def index(row, step, scalars):
            block = side.at(step - first_step, scalars[which, row])
            return scalars[len(plan.sides), row] * rows + row, block, 0

        return pl.BlockSpec((None, side.block, x.shape[2]), index)

    inputs, specs, steps = [], [], 0
    for which, (side, arrays) in enumerate(zip(plan.sides, given, strict=True)):
        query, key, value = arrays
        inputs.append(arrays)
        specs.append(
            (all_of(query), slots_of(key, which, side, steps), slots_of(value, which, side, steps))
        )
        steps += side.blocks
    arguments: list[Any] = [inputs]
    argument_specs: list[Any] = [specs]
    if queries.sinks is not None:
        sinks = queries.sinks.astype(jnp.float32).reshape(key_heads, group, 1)
        arguments.append(sinks)
        argument_specs.append(
            pl.BlockSpec(
                (None, group, 1), lambda row, step, scalars: (jax.lax.rem(row, key_heads), 0, 0)
            )
        )

    def kernel(scalars, sides, *rest):
        sinks = None if queries.sinks is None else rest[0]
        _kernel(plan, scalars, sides, sinks, *rest[len(arguments) - 1 :])

    outputs = (
        jax.ShapeDtypeStruct((rows, group, value_width), queries.near.dtype),
        jax.ShapeDtypeStruct((rows, group, 1), jnp.float32),
    )
    out, lse = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows, steps),
            in_specs=argument_specs,
            out_specs=tuple(all_of(x) for x in outputs),
            scratch_shapes=[
                pltpu.VMEM((group, 1), jnp.float32),
                pltpu.VMEM((group, 1), jnp.float32),
                pltpu.VMEM((group, value_width), jnp.float32),
            ],
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="lambda_decode",
    )(scalars, *arguments)
    return DecodeResiduals(out.reshape(batch, heads, -1), lse.reshape(batch, heads))


def _forward(plan: Plan, *operands):
    return _compute(plan, *operands), operands


def _backward(plan: Plan, saved, cotangents: DecodeResiduals):
    return xla.gradients(plan.rules, saved, cotangents)


_decode = jax.custom_vjp(_compute, nondiff_argnums=(0,))
_decode.defvjp(_forward, _backward)
