"""Λ-attention in plain XLA: online softmax over key tiles, O(T * (w + g)) time, O(T * H) memory.

A program is one block of C query positions of one key head: G * C rows. It walks the tiles of the
globals and then those of its window, keeping (maximum, sum, accumulator) for each row, in powers
of two (s = q k^T * scale * log2 e, folded into q):
    m' = max(m, max s);  p = 2^(s - m');  l' = l 2^(m - m') + sum p;  acc' = acc 2^(m - m') + p v
Only tiles on an edge of the window are masked, and tiles that nobody sees are never visited: the
same walk over all keys is causal attention at half the dense cost. The backward recomputes p from
the saved LSE, with delta = sum(do * out):
    dv = p^T do;  ds = p (do v^T - delta);  dk = ds^T q;  dq = ds k
It works on p^T and ds^T, so that two of its three accumulating products read them as they lie
(a product over the leading axis costs twice as much on a CPU).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.common import numerics
from kernels.lambda_attention import tiles
from kernels.lambda_attention.operands import Branch, Operands, Places, Residuals, Rules

Config = tiles.Config


def attention(rules: Rules, operands: Operands, places: Places, config: Config | None) -> Residuals:
    """Outputs and log-denominators; differentiable in `operands`, through the LSE too."""
    queries, keys = operands.near.query.shape[1], operands.near.key.shape[1]
    config = config or _default_config(rules, operands, places)
    block_q = min(config.block_q, queries)
    if places.segments is not None and operands.far is not None:
        # With blocks no longer than the window, all globals that a block sees belong to the
        # segment of its first row: an earlier one has ended, a later one has w keys to go.
        block_q = min(block_q, rules.window)
    block_k = min(config.block_k, keys)
    edge_k = min(max(config.edge_k, block_q), block_k)
    return _attention(rules, Config(block_q, block_k, edge_k), operands, places).result


def _default_config(rules: Rules, operands: Operands, places: Places) -> Config:
    """The tile of 320..640 keys that best fills the window, and 512 or 128 positions a block.

    Measured with 3 query heads a key head: 256 and 1024 keys cost 5-20 % more, widths that are no
    multiple of 64 cost 10 %. Blocks of 512 keep two cores busier than blocks of 128 (wall time
    per pair 0.72 over all keys, 0.76 in a window of 4096, 0.83 in one of 2048), where there are
    enough positions and the window is long beside them.
    """
    queries, keys = operands.near.query.shape[1], operands.near.key.shape[1]
    long = queries >= 2048 and min(rules.window, keys) >= 2048 and places.segments is None
    block_q = 512 if long else 128
    interior = rules.window - block_q
    if keys <= 512:
        # One tile of 512 would hold them all: those of 256 leave out what no query of a block
        # sees (33 ms for 46 at 4 x 512 tokens of 5 heads, with gradients).
        return Config(block_q, 256)
    if rules.window >= keys or interior < 320:
        return Config(block_q, 512)
    widths = [512, 448, 384, 320, 576, 640]
    return Config(block_q, min(widths, key=lambda width: interior % width))


class Saved(NamedTuple):
    """The result, and the LSE in powers of two as the backward wants it."""

    result: Residuals
    lse2: Float[Array, "B N T"]


def _attend(rules: Rules, config: Config, operands: Operands, places: Places) -> Saved:
    plan = tiles.plan(rules, config, operands, places)
    index = jnp.arange(plan.programs, dtype=jnp.int32)
    out, lse2 = jax.lax.map(functools.partial(_forward_block, plan, operands.sinks), index)
    batch, length = operands.near.query.shape[:2]
    out = tiles.blocks_last(out, plan, batch, length)
    lse2 = tiles.blocks_last(lse2, plan, batch, length)[..., 0].transpose(0, 2, 1)
    return Saved(Residuals(out, lse2 / numerics.LOG2_E), lse2)


def _forward_block(plan: tiles.Plan, sinks, index):
    """Output [G, C, Hv] and LSE [G, C, 1] of one program."""
    program = tiles.Program(plan, index)
    dtype, precision = plan.dtype, plan.rules.precision

    def visit(query, carry, tile, start):
        top, total, out = carry
        scores = tiles.dot(query, tile.key, (1, 1), dtype, precision)
        cube = scores.reshape(plan.group, plan.block_q, -1)
        logits = program.logits(cube, tile, keys_first=False)[0].reshape(scores.shape)
        new_top = jnp.maximum(top, logits.max(-1, keepdims=True))
        weights = numerics.exp2(logits - new_top)
        shrink = jnp.exp2(top - new_top)  # not numerics.exp2: it hands on a NaN
        total = total * shrink + weights.sum(-1, keepdims=True)
        product = tiles.dot(weights.astype(tile.value.dtype), tile.value, (1, 0), dtype, precision)
        return new_top, total, out * shrink + product

    rows = plan.group * plan.block_q
    carry = (
        jnp.full((rows, 1), numerics.EMPTY_MAX, dtype),
        jnp.zeros((rows, 1), dtype),
        jnp.zeros((rows, plan.value_width), dtype),
    )
    for side in (plan.far, plan.near):
        if side is not None:
            carry = program.walk(side, functools.partial(visit, program.query(side)), carry)
    top, total, out = carry

    empty = total == 0
    if sinks is not None:
        sink = program.per_row(sinks) * numerics.LOG2_E
        new_top = jnp.maximum(top, sink)
        shrink = jnp.exp2(top - new_top)
        top, out = new_top, out * shrink
        total = total * shrink + jnp.exp2(sink - new_top)
    total = jnp.where(empty, 1, total)
    out = jnp.where(empty, 0, out / total).astype(plan.near.query.dtype)
    lse2 = jnp.where(empty, -jnp.inf, top + jnp.log2(total))
    cube = (plan.group, plan.block_q, -1)
    return out.reshape(cube), lse2.reshape(cube)


def _forward(rules: Rules, config: Config, operands: Operands, places: Places):
    saved = _attend(rules, config, operands, places)
    return saved, (operands, places, saved.result.out, saved.lse2)


def _backward(rules: Rules, config: Config, saved, cotangents: Saved):
    operands, places, out, lse2 = saved
    # Its accumulators of keys and values stay in the cache beside blocks of 128, not of 512.
    config = dataclasses.replace(config, block_q=min(config.block_q, 128))
    plan = tiles.plan(rules, config, operands, places)
    dtype = plan.dtype
    batch, length = operands.near.query.shape[:2]

    d_out, d_lse = cotangents.result
    # d(lse) joins delta: ds = p * (do v^T - delta), and d(lse)/ds = p.
    delta = (d_out.astype(dtype) * out.astype(dtype)).sum(-1) - d_lse.transpose(0, 2, 1)
    # A row that saw nothing weighs nothing: 2^(MASK_VALUE - 1e38) is 0.
    lse2 = jnp.where(jnp.isneginf(lse2), -numerics.EMPTY_MAX, lse2).transpose(0, 2, 1)
    first = functools.partial(tiles.queries_first, key_heads=plan.key_heads, block=config.block_q)
    statistics = Statistics(
        first(d_out), first(delta[..., None]), first(lse2[..., None], fill=-numerics.EMPTY_MAX)
    )

    sides = [side for side in (plan.near, plan.far) if side is not None]
    totals = [
        (jnp.zeros(side.key.shape, dtype), jnp.zeros(side.value.shape, dtype)) for side in sides
    ]
    totals, d_queries = jax.lax.scan(
        functools.partial(_backward_block, plan, sides, statistics),
        totals,
        jnp.arange(plan.programs, dtype=jnp.int32),
    )

    def branch(given: Branch, d_query, d_key, d_value) -> Branch:
        d_query = tiles.blocks_last(d_query, plan, batch, length) * rules.scale
        # The queries in ds^T q carry score_scale where the gradient asks for scale.
        factor = rules.scale / plan.score_scale if plan.prescaled else rules.scale
        return Branch(
            d_query.astype(given.query.dtype),
            tiles.keys_last(d_key * factor, given.key),
            tiles.keys_last(d_value, given.value),
        )

    branches = [
        branch(given, d_query, *total)
        for given, d_query, total in zip(
            (b for b in (operands.near, operands.far) if b is not None),
            d_queries,
            totals,
            strict=True,
        )
    ]
    d_sinks = None
    if operands.sinks is not None:
        # The sink is one more logit, whose value is nothing: ds = p * (0 - delta).
        sinks2 = operands.sinks.astype(dtype) * numerics.LOG2_E
        share = jnp.exp2(sinks2[None, None] - lse2)
        d_sinks = -(share * delta).sum((0, 1)).astype(operands.sinks.dtype)
    near, far = branches if len(branches) == 2 else (branches[0], None)
    return Operands(near, far, d_sinks), None


class Statistics(NamedTuple):
    """What the backward reads beside a block's queries, laid out like them."""

    d_out: Float[Array, "M G T Hv"]
    delta: Float[Array, "M G T 1"]
    lse2: Float[Array, "M G T 1"]


def _backward_block(plan: tiles.Plan, sides, statistics: Statistics, totals, index):
    """Adds one program's share to the gradients of keys and values; yields those of its queries."""
    program = tiles.Program(plan, index)
    dtype, precision = plan.dtype, plan.rules.precision
    d_out = program.rows(statistics.d_out)
    delta, lse2 = (program.rows(x).reshape(1, -1) for x in statistics[1:])

    def visit(query, carry, tile, start):
        d_query, d_keys, d_values = carry
        scores = tiles.dot(tile.key, query, (1, 1), dtype, precision)
        cube = scores.reshape(-1, plan.group, plan.block_q)
        logits, bend = program.logits(cube, tile, keys_first=True)
        weights = numerics.exp2(logits.reshape(scores.shape) - lse2)
        d_weights = tiles.dot(tile.value, d_out, (1, 1), dtype, precision)
        d_logits = weights * (d_weights - delta)
        if bend is not None:
            d_logits = d_logits * bend.reshape(scores.shape)
        d_logits = d_logits.astype(tile.key.dtype)
        d_value = tiles.dot(weights.astype(d_out.dtype), d_out, (1, 0), dtype, precision)
        d_key = tiles.dot(d_logits, query, (1, 0), dtype, precision)
        d_query = d_query + tiles.dot(d_logits, tile.key, (0, 0), dtype, precision)
        return d_query, program.add(d_keys, start, d_key), program.add(d_values, start, d_value)

    new_totals, d_queries = [], []
    for side, total in zip(sides, totals, strict=True):
        nothing = jnp.zeros((plan.group * plan.block_q, side.query.shape[3]), dtype)
        visit_side = functools.partial(visit, program.query(side))
        d_query, *total = program.walk(side, visit_side, (nothing, *total))
        new_totals.append(tuple(total))
        d_queries.append(d_query.reshape(plan.group, plan.block_q, -1))
    return new_totals, d_queries


_attention = jax.custom_vjp(_attend, nondiff_argnums=(0, 1))
_attention.defvjp(_forward, _backward)
