"""Λ-attention in plain XLA: online softmax over key tiles, O(T * (w + g)) time, O(T * H) memory.

A program is one block of C query positions of one key head: G * C rows. It walks the tiles of the
globals and then those of its window, keeping (maximum, sum, accumulator) for each row, in powers
of two (s = q k^T * scale * log2 e, folded into q):
    m' = max(m, max s);  p = 2^(s - m');  l' = l 2^(m - m') + sum p;  acc' = acc 2^(m - m') + p v
Only tiles on an edge of the window are masked, and tiles that nobody sees are never visited: the
same walk over all keys is causal attention at half the dense cost. The backward recomputes p from
the saved LSE, with delta = sum(do * out):
    dv = p^T do;  ds = p (do v^T - delta);  dk = ds^T q;  dq = ds k
It works on s^T = k q^T, for two of its three accumulating products then read p^T and ds^T as they
lie: a product over the first axis of its left operand runs at half the rate on a CPU. The third is
computed as dq^T = k^T ds^T, from a copy of the head's keys that lies the other way.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lminf.kernels.common import dispatch, numerics
from lminf.kernels.lambda_attention import tiles
from lminf.kernels.lambda_attention.operands import Branch, Operands, Places, Residuals, Rules

Config = tiles.Config


def attention(rules: Rules, operands: Operands, places: Places, config: object) -> Residuals:
    """Outputs and log-denominators; differentiable in `operands`, through the LSE too."""
    queries, keys = operands.near.query.shape[1], operands.near.key.shape[1]
    config = dispatch.settled(Config, config, lambda: _default_config(rules, operands, places))
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
    sides = [side for side in (plan.far, plan.near) if side is not None]
    batch, length, heads, _ = operands.near.query.shape

    def head(results, index):
        head = tiles.Head(plan, index)
        branch_rows = [(s, head.rows(s.key), head.rows(s.value)) for s in sides]

        def block(results, index):
            return _forward_block(
                tiles.Program(head, index), branch_rows, operands.sinks, results
            ), None

        return jax.lax.scan(block, results, plan.blocks)

    nothing = (
        jnp.zeros((batch, plan.length, heads, plan.value_width), operands.near.query.dtype),
        jnp.zeros((batch, heads, plan.length), plan.dtype),
    )
    (out, lse2), _ = jax.lax.scan(head, nothing, plan.heads)
    lse2 = lse2[..., :length]
    return Saved(Residuals(out[:, :length], lse2 / numerics.LOG2_E), lse2)


def _forward_block(program: tiles.Program, branch_rows, sinks, results):
    """Outputs and LSE with those of one program in their place."""
    plan = program.plan
    dtype, precision = plan.dtype, plan.rules.precision

    def visit(query, keys, values, carry, tile):
        top, total, out = carry
        key, value = tile.rows(keys), tile.rows(values)
        scores = tiles.dot(query, key, (1, 1), dtype, precision)
        logits, _ = program.logits(scores, tile, keys_first=False)
        new_top = jnp.maximum(top, logits.max(-1, keepdims=True))
        weights = numerics.exp2(logits - new_top)
        shrink = jnp.exp2(top - new_top)  # not numerics.exp2: it hands on a NaN
        total = total * shrink + weights.sum(-1, keepdims=True)
        product = tiles.dot(weights.astype(value.dtype), value, (1, 0), dtype, precision)
        return new_top, total, out * shrink + product

    rows = plan.group * plan.block_q
    carry = (
        jnp.full((rows, 1), numerics.EMPTY_MAX, dtype),
        jnp.zeros((rows, 1), dtype),
        jnp.zeros((rows, plan.value_width), dtype),
    )
    for side, keys, values in branch_rows:
        query = program.query(side)
        carry = program.walk(side, functools.partial(visit, query, keys, values), carry)
    top, total, out = carry

    empty = total == 0
    if sinks is not None:
        sink = program.per_row(sinks) * numerics.LOG2_E
        new_top = jnp.maximum(top, sink)
        shrink = jnp.exp2(top - new_top)
        top, out = new_top, out * shrink
        total = total * shrink + jnp.exp2(sink - new_top)
    total = jnp.where(empty, 1, total)
    out = jnp.where(empty, 0, out / total)
    lse2 = jnp.where(empty, -jnp.inf, top + jnp.log2(total))
    return program.put_rows(results[0], out), program.put_statistic(results[1], lse2)


def _forward(rules: Rules, config: Config, operands: Operands, places: Places):
    saved = _attend(rules, config, operands, places)
    return saved, (operands, places, saved.result.out, saved.lse2)


def _backward(rules: Rules, config: Config, saved, cotangents: Saved):
    operands, places, out, lse2 = saved
    # Its accumulators of keys and values stay in the cache beside blocks of 128, not of 512.
    config = dataclasses.replace(config, block_q=min(config.block_q, 128))
    plan = tiles.plan(rules, config, operands, places)
    d_out, d_lse = cotangents.result
    # A row that saw nothing weighs nothing: 2^(MASK_VALUE - 1e38) is 0.
    lse2 = jnp.where(jnp.isneginf(lse2), -numerics.EMPTY_MAX, lse2)
    beyond = ((0, 0), (0, 0), (0, -lse2.shape[2] % config.block_q))
    statistics = Statistics(
        tiles.whole_blocks(out, config.block_q),
        tiles.whole_blocks(d_out, config.block_q),
        jnp.pad(lse2, beyond, constant_values=-numerics.EMPTY_MAX),
        jnp.pad(d_lse, beyond),
    )
    sides = [side for side in (plan.near, plan.far) if side is not None]

    def head(gradients, index):
        head = tiles.Head(plan, index)
        # XLA would fold the transposition into a product, which its CPU backend lacks in bfloat16.
        apart = jax.lax.optimization_barrier
        branch_rows = [
            BranchRows(s, head.rows(s.key), apart(head.rows(s.key).T), head.rows(s.value))
            for s in sides
        ]

        def block(carry, index):
            program = tiles.Program(head, index)
            return _backward_block(program, branch_rows, statistics, *carry), None

        totals = [
            tuple(jnp.zeros(x.shape, plan.dtype) for x in (h.key, h.value)) for h in branch_rows
        ]
        d_queries = [g.query for g in gradients]
        (d_queries, totals), _ = jax.lax.scan(block, (d_queries, totals), plan.blocks)
        # The queries in ds^T q carry score_scale where the gradient asks for scale.
        factor = rules.scale / plan.score_scale if plan.prescaled else rules.scale
        return [
            Branch(query, head.put_rows(g.key, key * factor), head.put_rows(g.value, value))
            for g, query, (key, value) in zip(gradients, d_queries, totals, strict=True)
        ], None

    nothing = [Branch(*map(jnp.zeros_like, (s.query, s.key, s.value))) for s in sides]
    branches, _ = jax.lax.scan(head, nothing, plan.heads)
    length = out.shape[1]
    branches = [b._replace(query=b.query[:, :length]) for b in branches]
    near, far = branches if len(branches) == 2 else (branches[0], None)
    return Operands(near, far, _d_sinks(operands, cotangents.result, out, lse2)), None


def _d_sinks(operands: Operands, cotangents: Residuals, out, lse2) -> Float[Array, " N"] | None:
    """The sink is one more logit, whose value is nothing: ds = p * (0 - delta)."""
    if operands.sinks is None:
        return None
    dtype = lse2.dtype
    delta = (cotangents.out.astype(dtype) * out.astype(dtype)).sum(-1).swapaxes(1, 2)
    sinks2 = operands.sinks.astype(dtype)[None, :, None] * numerics.LOG2_E
    d_sinks = -(jnp.exp2(sinks2 - lse2) * (delta - cotangents.lse)).sum((0, 2))
    return d_sinks.astype(operands.sinks.dtype)


class Statistics(NamedTuple):
    """What the backward reads beside a block's queries."""

    out: Float[Array, "B Tp N Hv"]
    d_out: Float[Array, "B Tp N Hv"]
    lse2: Float[Array, "B N Tp"]
    d_lse: Float[Array, "B N Tp"]


class BranchRows(NamedTuple):
    """A key head of a branch, its keys both ways: products read fast along the last axis only."""

    side: tiles.Side
    key: Float[Array, "S H"]
    key_columns: Float[Array, "H S"]
    value: Float[Array, "S Hv"]


def _backward_block(
    program: tiles.Program, branch_rows: list[BranchRows], statistics, d_queries, totals
):
    """Gradients of queries with those of one program in their place, and its share added to those
    of the head's keys and values.
    """
    plan = program.plan
    dtype, precision = plan.dtype, plan.rules.precision
    d_out, lse2 = program.rows(statistics.d_out), program.statistic(statistics.lse2)
    # d(lse) joins delta: ds = p * (do v^T - delta), and d(lse)/ds = p.
    delta = (d_out.astype(dtype) * program.rows(statistics.out).astype(dtype)).sum(-1)[None]
    delta = delta - program.statistic(statistics.d_lse)

    def visit(branch, query, carry, tile):
        d_query, d_keys, d_values = carry
        key = tile.rows(branch.key)
        scores = tiles.dot(key, query, (1, 1), dtype, precision)
        logits, bend = program.logits(scores, tile, keys_first=True)
        weights = numerics.exp2(logits - lse2)
        value = tile.rows(branch.value)
        d_weights = tiles.dot(value, d_out, (1, 1), dtype, precision)
        d_logits = weights * (d_weights - delta)
        if bend is not None:
            d_logits = d_logits * bend
        d_logits = d_logits.astype(key.dtype)
        d_value = tiles.dot(weights.astype(d_out.dtype), d_out, (1, 0), dtype, precision)
        d_key = tiles.dot(d_logits, query, (1, 0), dtype, precision)
        columns = tile.columns(branch.key_columns)
        d_query = d_query + tiles.dot(columns, d_logits, (1, 0), dtype, precision)
        return d_query, tile.add(d_keys, d_key), tile.add(d_values, d_value)

    new_queries, new_totals = [], []
    for branch, d_query, total in zip(branch_rows, d_queries, totals, strict=True):
        query = program.query(branch.side)
        nothing = jnp.zeros(query.shape[::-1], dtype)
        visit_one = functools.partial(visit, branch, query)
        columns, *total = program.walk(branch.side, visit_one, (nothing, *total))
        new_queries.append(program.put_rows(d_query, columns.T * plan.rules.scale))
        new_totals.append(tuple(total))
    return new_queries, new_totals


_attention = jax.custom_vjp(_attend, nondiff_argnums=(0, 1))
_attention.defvjp(_forward, _backward)
