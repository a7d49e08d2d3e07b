"""Λ-attention on a TPU's matrix unit (Pallas, Mosaic): forward, dq, and dk with dv.

Tiling. The forward and dq walk, for each query head and block of C queries, the blocks of globals
and then those of the window: grid (B N, T / C, globals + window). dk and dv walk, for each key head
and block of W keys, the queries of its group that see it: grid (B K, S / W, G, queries), once for
each branch. All index maps name the next block that is seen, and stay on the last one when a row of
the grid has seen its share, so that steps without work copy nothing either. Only blocks on an edge
of the window, or of the globals, are masked. With segments, or globals at listed positions, the
same walks read from scalar memory where they begin and end (`tpu_packing`).

Scores are kept keys first, s^T [W, C]: maxima and sums then run down the sublanes, statistics are
rows [1, C] that are stored as they are (no padding to 128 lanes), and dk, dv need no transposition.
    forward   m' = max(m, max s);  p = 2^(s - m');  l' = l 2^(m - m') + sum p;
              acc^T' = acc^T 2^(m - m') + v^T p
    backward  p = 2^(s - lse);  ds = p (v do^T - delta);  dq^T = k^T ds;  dk = ds q;  dv = p do
with s in powers of two and delta = sum(do * out) - d_lse.

Bytes: queries and outputs once, keys and values of a window once for each block of queries.
bfloat16 operands are multiplied as they are and summed in float32.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from lminf.kernels.common import compat, dispatch, numerics, tpu_blocks
from lminf.kernels.common.tpu_blocks import HeadsFirst, Statistics
from lminf.kernels.lambda_attention import tpu_packing
from lminf.kernels.lambda_attention.operands import Branch, Operands, Places, Residuals, Rules
from lminf.kernels.lambda_attention.tpu_packing import Where
from lminf.kernels.lambda_attention.tpu_spans import Plan, Ranges, Side


@dataclass(frozen=True)
class Config:
    """Sizes of the blocks, in positions: multiples of 128 on a device, of 8 in the interpreter."""

    block_q: int = 512
    block_k: int = 512


def attention(rules: Rules, operands: Operands, places: Places, config: object) -> Residuals:
    """Outputs and log-denominators; differentiable in `operands`, through the LSE too."""
    config = dispatch.settled(Config, config, Config)
    if places.alibi_slopes is not None:
        raise NotImplementedError("ALiBi: distances cost as much as the masks that it avoids")
    dtypes = {str(x.dtype) for x in jax.tree.leaves((operands.near, operands.far))}
    if not dtypes <= {"bfloat16", "float32"} or len(dtypes) > 1:
        raise NotImplementedError(f"{sorted(dtypes)}; it takes all bfloat16 or all float32")
    if rules.scale <= 0:
        raise NotImplementedError(f"scale={rules.scale}; it takes positive ones")
    plan = _plan(rules, operands, config, places)
    if plan.packed is None:
        where = Where(jnp.concatenate([places.query_offset[None], places.key_start]))
    else:
        operands, where = tpu_packing.pack(plan, operands, places)
        if where.scalars.size > tpu_blocks.SCALARS:
            raise NotImplementedError(
                f"segments or lists in blocks placed by {where.scalars.size} numbers; "
                f"it takes at most {tpu_blocks.SCALARS}"
            )
    return _attention(plan, operands, where).result


def _plan(rules: Rules, operands: Operands, config: Config, places: Places) -> Plan:
    batch, queries, heads, _ = operands.near.query.shape
    keys, key_heads = operands.near.key.shape[1:3]
    rows, packed = 0, places.segments is not None
    lists = None if places.far_positions is None else places.far_positions.shape[1]
    if operands.far is not None:
        most = tpu_packing.most_globals(rules, keys) if packed else rules.num_global
        rows = min(operands.far.key.shape[1], most)

    def block(size, rows):
        return min(size, max(rows + -rows % tpu_blocks.LANES, tpu_blocks.LANES))

    return Plan(
        rules,
        heads,
        key_heads,
        queries,
        keys,
        rows,
        block(config.block_q, queries),
        block(config.block_k, keys),
        block(config.block_k, rows),
        batch * (lists or 1) if packed or lists else None,
        lists,
    )


# --- Kernels --------------------------------------------------------------------------------------


def _walk_keys(plan: Plan, where: Where, visits) -> None:
    """Calls, at this step of the grid, the visit of the branch whose block it is, if any."""
    head, i, step = (pl.program_id(axis) for axis in range(3))
    batch, scalars = jax.lax.div(head, plan.range_heads[0]), where.scalars
    ranges = where.ranges or (None,) * len(plan.sides)
    for side, range_, visit in zip(plan.sides, ranges, visits, strict=True):
        span = side.keys_of(scalars, batch, i)
        j = span.block(step, side.block, side.blocks)
        _visit(side, scalars, range_, batch, i, j, span.visits(step, side.block), visit)
        step -= side.key_steps


def _visit(side: Side, scalars, ranges: Ranges | None, batch, i, j, visited, visit) -> None:
    """`visit(None)` if all pairs see each other, else `visit` of which do."""
    clear = side.clear(scalars, batch, i, j)

    @pl.when(visited & clear)
    def _():
        visit(None)

    @pl.when(visited & ~clear)
    def _():
        visit(side.visible(scalars, batch, i, j, ranges))


def _forward_kernel(plan: Plan, where: Where, branches, sinks, out, lse2, top, total, acc):
    @tpu_blocks.at_first(2)
    def _():
        top[...] = jnp.full_like(top, numerics.EMPTY_MAX)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def visit(branch, visible):
        logits, _ = tpu_blocks.logits(plan.scoring, branch.query[...], branch.key[...], visible)
        old = top[...]
        new = jnp.maximum(old, logits.max(0, keepdims=True))
        # What is masked weighs exactly 0, also in a row that has seen nothing: EMPTY_MAX.
        weights, shrink = jnp.exp2(logits - new), jnp.exp2(old - new)
        value = branch.value[...]
        top[...] = new
        total[...] = total[...] * shrink + weights.sum(0, keepdims=True)
        part = tpu_blocks.dot(plan.scoring, value, weights.astype(value.dtype), (0, 0))
        acc[...] = acc[...] * shrink + part

    _walk_keys(plan, where, [functools.partial(visit, branch) for branch in branches])

    @tpu_blocks.at_last(2)
    def _():
        highest, denominator, product = top[...], total[...], acc[...]
        empty = denominator == 0
        if sinks is not None:
            sink = sinks[jax.lax.rem(pl.program_id(0), plan.heads)] * numerics.LOG2_E
            new = jnp.maximum(highest, sink)
            shrink = jnp.exp2(highest - new)
            denominator = denominator * shrink + jnp.exp2(sink - new)
            highest, product = new, product * shrink
        denominator = jnp.where(empty, 1, denominator)
        out[...] = jnp.where(empty, 0, product / denominator).T.astype(out.dtype)
        log_sum = highest + jnp.log(denominator) * numerics.LOG2_E
        lse2[...] = jnp.where(empty, -jnp.inf, log_sum)


def _d_query_kernel(plan: Plan, scalars, branches, ranges, statistics, *outputs_and_accumulators):
    d_queries = outputs_and_accumulators[: len(branches)]
    accs = outputs_and_accumulators[len(branches) :]

    @tpu_blocks.at_first(2)
    def _():
        for acc in accs:
            acc[...] = jnp.zeros_like(acc)

    def visit(branch, acc, visible):
        _, d_scores = tpu_blocks.gradient(plan.scoring, branch, statistics, visible)
        key = branch.key[...]
        acc[...] += tpu_blocks.dot(plan.scoring, key, d_scores.astype(key.dtype), (0, 0))

    _walk_keys(
        plan,
        Where(scalars, ranges),
        [functools.partial(visit, *pair) for pair in zip(branches, accs, strict=True)],
    )

    @tpu_blocks.at_last(2)
    def _():
        for acc, d_query in zip(accs, d_queries, strict=True):
            d_query[...] = (acc[...] * plan.rules.scale).T.astype(d_query.dtype)


def _d_key_kernel(
    plan: Plan, side: Side, scalars, branch, ranges, statistics,
    d_key, d_value, key_acc, value_acc,
):  # fmt: skip
    head, j, step = pl.program_id(0), pl.program_id(1), pl.program_id(3)
    batch = jax.lax.div(head, plan.range_heads[1])
    span = side.queries_of(scalars, batch, j)
    i = span.block(step, plan.block_q, plan.query_blocks)

    @tpu_blocks.at_first(2, 3)
    def _():
        key_acc[...] = jnp.zeros_like(key_acc)
        value_acc[...] = jnp.zeros_like(value_acc)

    def visit(visible):
        weights, d_scores = tpu_blocks.gradient(plan.scoring, branch, statistics, visible)
        query, d_out = branch.query[...], statistics.d_out[...]
        key_acc[...] += tpu_blocks.dot(plan.scoring, d_scores.astype(query.dtype), query, (1, 0))
        value_acc[...] += tpu_blocks.dot(plan.scoring, weights.astype(d_out.dtype), d_out, (1, 0))

    _visit(side, scalars, ranges, batch, i, j, span.visits(step, plan.block_q), visit)

    @tpu_blocks.at_last(2, 3)
    def _():
        d_key[...] = (key_acc[...] * plan.rules.scale).astype(d_key.dtype)
        d_value[...] = value_acc[...].astype(d_value.dtype)


# --- Calls ----------------------------------------------------------------------------------------


class Saved(NamedTuple):
    """The result, and the LSE in powers of two as the backward wants it."""

    result: Residuals
    lse2: Float[Array, "BN 1 T"]


def _branches(plan: Plan, operands: Operands) -> list[HeadsFirst]:
    """The arrays of `plan.sides`, heads first, padded to whole blocks."""
    given = [operands.near] if len(plan.sides) == 1 else [operands.far, operands.near]
    return [
        HeadsFirst(
            tpu_blocks.heads_first(branch.query, plan.block_q),
            tpu_blocks.heads_first(branch.key[:, : side.rows], side.block),
            tpu_blocks.heads_first(branch.value[:, : side.rows], side.block),
        )
        for side, branch in zip(plan.sides, given, strict=True)
    ]


class Walk(NamedTuple):
    """A grid that walks keys for each block of queries, and which blocks it reads."""

    grid: tuple[int, ...]
    query_at: Any  # index map
    branches: list[Any]
    ranges: Any


def _by_queries(plan: Plan, branches: list[HeadsFirst], where: Where) -> Walk:
    """The walk of the forward and of dq."""

    def query_at(head, i, step, scalars):
        return head, i

    def key_at(side, first_step, head, i, step, scalars):
        span = side.keys_of(scalars, jax.lax.div(head, plan.range_heads[0]), i)
        # Heads of a group are neighbours, in all batch rows: head // G is their key head.
        group = jax.lax.div(head, plan.group)
        return group, span.block(step - first_step, side.block, side.blocks)

    specs, steps = [], 0
    for side, branch in zip(plan.sides, branches, strict=True):
        index = functools.partial(key_at, side, steps)
        specs.append(
            branch._replace(
                query=tpu_blocks.block_of(branch.query, plan.block_q, query_at),
                key=tpu_blocks.block_of(branch.key, side.block, index),
                value=tpu_blocks.block_of(branch.value, side.block, index),
            )
        )
        steps += side.key_steps
    ranges = _ranges_blocks(plan, where.ranges, plan.range_heads[0], query_at)
    return Walk((branches[0].query.shape[0], plan.query_blocks, steps), query_at, specs, ranges)


def _ranges_blocks(plan: Plan, ranges, heads: int, query_at) -> Any:
    """Block specs of ranges, of which so many heads share a row."""

    def at(head, *grid):
        return jax.lax.div(head, heads), query_at(head, *grid)[1]

    return jax.tree.map(lambda x: tpu_blocks.block_of(x, plan.block_q, at), ranges)


def _flops(plan: Plan, heads: int, *products: int) -> int:
    """Of the blocks that a long text visits: `products` are the widths of what is multiplied."""
    pairs = plan.query_blocks * plan.block_q * sum(s.key_steps * s.block for s in plan.sides)
    return 2 * heads * pairs * sum(products)


def _attend(plan: Plan, operands: Operands, where: Where) -> Saved:
    branches = _branches(plan, operands)
    walk = _by_queries(plan, branches, where)
    query = branches[0].query
    heads, rows, width = query.shape
    value_width = operands.near.value.shape[3]
    outputs = (
        compat.output_like((heads, rows, value_width), query.dtype, query),
        compat.output_like((heads, 1, rows), jnp.float32, query),
    )
    inputs, in_specs = (branches, where.ranges), (walk.branches, walk.ranges)
    if operands.sinks is not None:
        inputs += (operands.sinks.astype(jnp.float32),)
        in_specs += (pl.BlockSpec(memory_space=pltpu.SMEM),)

    def kernel(scalars, branches, ranges, *rest):
        sinks = None if operands.sinks is None else rest[0]
        _forward_kernel(plan, Where(scalars, ranges), branches, sinks, *rest[len(inputs) - 2 :])

    out, lse2 = tpu_blocks.call(
        kernel,
        walk.grid,
        where.scalars,
        inputs,
        in_specs,
        outputs,
        tuple(tpu_blocks.block_of(x, plan.block_q, walk.query_at) for x in outputs),
        [
            pltpu.VMEM((1, plan.block_q), jnp.float32),
            pltpu.VMEM((1, plan.block_q), jnp.float32),
            pltpu.VMEM((value_width, plan.block_q), jnp.float32),
        ],
        "lambda_forward",
        _flops(plan, heads, width, value_width),
    )
    batch = operands.near.query.shape[0]
    lse = lse2.reshape(batch, plan.heads, -1)[..., : plan.queries] / numerics.LOG2_E
    return Saved(Residuals(tpu_blocks.heads_last(out, operands.near.query), lse), lse2)


def _forward(plan: Plan, operands: Operands, where: Where):
    saved = _attend(plan, operands, where)
    return saved, (operands, where, saved.result.out, saved.lse2)


def _backward(plan: Plan, saved, cotangents: Saved):
    operands, where, out, lse2 = saved
    d_out, d_lse = cotangents.result
    branches = _branches(plan, operands)
    # d(lse) joins delta: ds = p * (v do^T - delta), and d(lse)/ds = p.
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).transpose(0, 2, 1) - d_lse
    padding = -plan.queries % plan.block_q
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, padding))).reshape(lse2.shape)
    # A row that saw nothing weighs nothing: 2^(MASK_VALUE - 1e38) is 0.
    lse2 = jnp.where(jnp.isneginf(lse2), -numerics.EMPTY_MAX, lse2)
    statistics = Statistics(tpu_blocks.heads_first(d_out, plan.block_q), delta, lse2)

    d_queries = _d_queries(plan, where, branches, statistics)
    d_keys = [
        _d_keys(plan, side, where.scalars, branch, ranges, statistics)
        for side, branch, ranges in zip(
            plan.sides, branches, where.ranges or (None,) * len(branches), strict=True
        )
    ]

    def gradient(given: Branch, d_query, d_key_value) -> Branch:
        d_key, d_value = (
            _rows_like(tpu_blocks.heads_last(d, like), like)
            for d, like in zip(d_key_value, given[1:], strict=True)
        )
        return Branch(tpu_blocks.heads_last(d_query, given.query), d_key, d_value)

    d_near = gradient(operands.near, d_queries[-1], d_keys[-1])
    d_far = operands.far and gradient(operands.far, d_queries[0], d_keys[0])
    d_sinks = None
    if operands.sinks is not None:
        # The sink is one more logit, whose value is nothing: ds = p * (0 - delta).
        heads = (operands.near.query.shape[0], plan.heads, -1)
        sinks2 = operands.sinks.astype(jnp.float32)[None, :, None] * numerics.LOG2_E
        share = jnp.exp2(sinks2 - lse2.reshape(heads))
        d_sinks = -(share * delta.reshape(heads)).sum((0, 2)).astype(operands.sinks.dtype)
    return Operands(d_near, d_far, d_sinks), None


def _rows_like(x: Float[Array, "B _ K X"], like: Float[Array, "B R K X"]):
    """With zero rows for globals that nobody was shown."""
    return jnp.pad(x, ((0, 0), (0, like.shape[1] - x.shape[1]), (0, 0), (0, 0)))


def _d_queries(plan: Plan, where: Where, branches: list[HeadsFirst], statistics: Statistics):
    walk = _by_queries(plan, branches, where)
    outputs = [tpu_blocks.like(branch.query) for branch in branches]
    width, value_width = branches[0].query.shape[2], statistics.d_out.shape[2]
    return tpu_blocks.call(
        functools.partial(_d_query_kernel, plan),
        walk.grid,
        where.scalars,
        (branches, where.ranges, statistics),
        (
            walk.branches,
            walk.ranges,
            tpu_blocks.statistics_blocks(plan.block_q, statistics, walk.query_at),
        ),
        outputs,
        [tpu_blocks.block_of(x, plan.block_q, walk.query_at) for x in outputs],
        [pltpu.VMEM((width, plan.block_q), jnp.float32) for _ in branches],
        "lambda_d_query",
        _flops(plan, walk.grid[0], width, width, value_width),
    )


def _d_keys(
    plan: Plan,
    side: Side,
    scalars,
    branch: HeadsFirst,
    ranges: Ranges | None,
    statistics: Statistics,
):
    def query_at(head, j, member, step, scalars):
        span = side.queries_of(scalars, jax.lax.div(head, plan.range_heads[1]), j)
        return head * plan.group + member, span.block(step, plan.block_q, plan.query_blocks)

    def key_at(head, j, member, step, scalars):
        return head, j

    outputs = (tpu_blocks.like(branch.key), tpu_blocks.like(branch.value))
    width, value_width = branch.key.shape[2], branch.value.shape[2]
    grid = (branch.key.shape[0], side.blocks, plan.group, side.query_steps)
    steps = grid[0] * grid[1] * grid[2] * grid[3]
    return tpu_blocks.call(
        functools.partial(_d_key_kernel, plan, side),
        grid,
        scalars,
        (branch, ranges, statistics),
        (
            branch._replace(
                query=tpu_blocks.block_of(branch.query, plan.block_q, query_at),
                key=tpu_blocks.block_of(branch.key, side.block, key_at),
                value=tpu_blocks.block_of(branch.value, side.block, key_at),
            ),
            _ranges_blocks(plan, ranges, plan.range_heads[1], query_at),
            tpu_blocks.statistics_blocks(plan.block_q, statistics, query_at),
        ),
        outputs,
        tuple(tpu_blocks.block_of(x, side.block, key_at) for x in outputs),
        [pltpu.VMEM((side.block, size), jnp.float32) for size in (width, value_width)],
        f"lambda_d_key_{side.name}",
        4 * steps * plan.block_q * side.block * (width + value_width),
    )


_attention = jax.custom_vjp(_attend, nondiff_argnums=(0,))
_attention.defvjp(_forward, _backward)
