"""Λ-attention in plain XLA: online softmax over key tiles, O(T * (w + g)) time, O(T * H) memory.

A program is one block of C query positions of one key head: G * C rows. It walks the tiles of the
globals and then those of its window, keeping (maximum, sum, accumulator) for each row:
    s = q k^T * scale;  m' = max(m, max s);  p = exp(s - m')
    l' = l exp(m - m') + sum p;  acc' = acc exp(m - m') + p v
Only tiles on an edge of the window are masked. Tiles that nobody sees are never visited, so the
same walk over all keys is causal attention at half the dense cost. The backward recomputes p from
the saved LSE, with delta = sum(do * out):
    dv = p^T do;  ds = p (do v^T - delta);  dq = ds k;  dk = ds^T q
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels.common import numerics
from kernels.lambda_attention import tiles
from kernels.lambda_attention.operands import Operands, Places, Residuals, Rules


@dataclass(frozen=True)
class Config:
    """Sizes of the tiles, in positions."""

    block_q: int = 128
    block_k: int = 512


def attention(rules: Rules, operands: Operands, places: Places, config: Config | None) -> Residuals:
    """Outputs and log-denominators; differentiable in `operands`, through the LSE too."""
    config = config or Config()
    block_q = min(config.block_q, operands.query.shape[1])
    if places.segment_q is not None and operands.key_global is not None:
        # With blocks no longer than the window, all globals that a block sees belong to the
        # segment of its first row: an earlier one has ended, a later one has w keys to go.
        block_q = min(block_q, rules.window)
    block_k = min(config.block_k, tiles.round_up(operands.key.shape[1], 16))
    return _attention(rules, Config(block_q, block_k), operands, places)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(rules: Rules, config: Config, operands: Operands, places: Places) -> Residuals:
    return _forward(rules, config, operands, places)[0]


def _forward(rules: Rules, config: Config, operands: Operands, places: Places):
    plan = tiles.plan(rules, config.block_q, config.block_k, operands, places)
    blocks = jax.lax.map(
        functools.partial(_forward_block, plan), jnp.arange(plan.programs, dtype=jnp.int32)
    )
    out, lse = (tiles.blocks_last(x, plan, operands.query.shape[:2]) for x in blocks)
    result = Residuals(out, lse[..., 0].transpose(0, 2, 1))
    return result, (operands, places, result)


def _forward_block(plan: tiles.Plan, index):
    """Output [G, C, Hv] and LSE [G, C, 1] of one program."""
    program = tiles.Program(plan, index)
    dtype, precision = plan.dtype, plan.rules.precision

    def visit(carry, start, masked, query, tile_of):
        top, total, out = carry
        key, value, logits_of = tile_of(start)
        logits, _ = logits_of(query, key, start, masked)
        new_top = jnp.maximum(top, logits.max(-1, keepdims=True))
        weights = jnp.exp(logits - new_top)
        shrink = jnp.exp(top - new_top)
        total = total * shrink + weights.sum(-1, keepdims=True)
        out = out * shrink + tiles.dot(weights.astype(value.dtype), value, (1, 0), dtype, precision)
        return new_top, total, out

    rows = plan.rows
    carry = (
        jnp.full((rows, 1), numerics.EMPTY_MAX, dtype),
        jnp.zeros((rows, 1), dtype),
        jnp.zeros((rows, plan.layout.value.shape[2]), dtype),
    )
    if plan.far_width:
        query = program.scaled_rows(plan.layout.query_global)
        carry = tiles.walk(
            program.far_span(), plan.far_width, plan.has_clear_tiles,
            lambda c, start, masked: visit(c, start, masked, query, program.far_tile), carry,
        )  # fmt: skip
    query = program.scaled_rows(plan.layout.query)
    top, total, out = tiles.walk(
        program.near_span(), plan.near_width, plan.has_clear_tiles,
        lambda c, start, masked: visit(c, start, masked, query, program.near_tile), carry,
    )  # fmt: skip

    empty = total == 0
    if plan.layout.sinks is not None:
        sink = program.per_row(plan.layout.sinks)
        new_top = jnp.maximum(top, sink)
        shrink = jnp.exp(top - new_top)
        top, out = new_top, out * shrink
        total = total * shrink + jnp.exp(sink - new_top)
    total = jnp.where(empty, 1, total)
    out = jnp.where(empty, 0, out / total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    shape = (-1, plan.block_q)
    return out.reshape(*shape, out.shape[1]).astype(plan.layout.query.dtype), lse.reshape(*shape, 1)


def _backward(rules: Rules, config: Config, saved, cotangents: Residuals):
    operands, places, result = saved
    plan = tiles.plan(rules, config.block_q, config.block_k, operands, places)
    dtype = plan.dtype
    key_heads = operands.key.shape[2]

    # d(lse) joins delta: ds = p * (do v^T - delta), and d(lse)/ds = p.
    delta = (cotangents.out.astype(dtype) * result.out.astype(dtype)).sum(-1)
    delta -= cotangents.lse.transpose(0, 2, 1)
    # A row that saw nothing weighs nothing: exp(MASK_VALUE - 1e38) is 0.
    lse = jnp.where(jnp.isneginf(result.lse), -numerics.EMPTY_MAX, result.lse).transpose(0, 2, 1)
    first = functools.partial(tiles.queries_first, key_heads=key_heads, block=plan.block_q)
    statistics = (
        first(cotangents.out),
        first(delta[..., None]),
        first(lse[..., None], fill=-numerics.EMPTY_MAX),
    )

    def zeros(x):
        return None if x is None else jnp.zeros(x.shape, dtype)

    layout = plan.layout
    carry = (
        zeros(layout.key), zeros(layout.value), zeros(layout.key_global), zeros(layout.value_global)
    )  # fmt: skip
    (d_key, d_value, d_key_global, d_value_global), (d_query, d_query_global) = jax.lax.scan(
        functools.partial(_backward_block, plan, statistics),
        carry,
        jnp.arange(plan.programs, dtype=jnp.int32),
    )

    def queries(x):
        return tiles.blocks_last(x, plan, operands.query.shape[:2]).astype(operands.query.dtype)

    d_sinks = None
    if operands.sinks is not None:
        # The sink is one more logit, whose value is nothing: ds = p * (0 - delta).
        share = jnp.exp(operands.sinks.astype(dtype) - lse)
        d_sinks = -(share * delta).sum((0, 1)).astype(operands.sinks.dtype)
    far = operands.key_global is not None
    grads = Operands(
        queries(d_query),
        tiles.keys_last(d_key, operands.key),
        tiles.keys_last(d_value, operands.value),
        queries(d_query_global) if far else None,
        tiles.keys_last(d_key_global, operands.key_global) if far else None,
        tiles.keys_last(d_value_global, operands.value_global) if far else None,
        d_sinks,
    )
    return grads, None


def _backward_block(plan: tiles.Plan, statistics, carry, index):
    """Adds one program's share to the gradients of keys and values; yields those of its queries."""
    program = tiles.Program(plan, index)
    dtype, precision = plan.dtype, plan.rules.precision
    d_out, delta, lse = (program.rows(x) for x in statistics)

    def visit(carry, start, masked, query, tile_of):
        d_query, d_keys, d_values = carry
        key, value, logits_of = tile_of(start)
        logits, bend = logits_of(query, key, start, masked)
        weights = jnp.exp(logits - lse)
        d_value = tiles.dot(weights.astype(value.dtype), d_out, (0, 0), dtype, precision)
        d_weights = tiles.dot(d_out, value, (1, 1), dtype, precision)
        d_logits = weights * (d_weights - delta)
        if bend is not None:
            d_logits = d_logits * bend
        d_logits = d_logits.astype(key.dtype)
        d_query = d_query + tiles.dot(d_logits, key, (1, 0), dtype, precision)
        d_key = tiles.dot(d_logits, query, (0, 0), dtype, precision)
        return d_query, program.add(d_keys, start, d_key), program.add(d_values, start, d_value)

    d_keys, d_values, d_keys_global, d_values_global = carry
    nothing = jnp.zeros((plan.rows, plan.layout.query.shape[3]), dtype)
    shape = (-1, plan.block_q, nothing.shape[1])
    d_query_global = None
    if plan.far_width:
        query_global = program.scaled_rows(plan.layout.query_global)
        d_query_global, d_keys_global, d_values_global = tiles.walk(
            program.far_span(), plan.far_width, plan.has_clear_tiles,
            lambda c, start, masked: visit(c, start, masked, query_global, program.far_tile),
            (nothing, d_keys_global, d_values_global),
        )  # fmt: skip
        d_query_global = (d_query_global * plan.rules.scale).reshape(shape)
    query = program.scaled_rows(plan.layout.query)
    d_query, d_keys, d_values = tiles.walk(
        program.near_span(), plan.near_width, plan.has_clear_tiles,
        lambda c, start, masked: visit(c, start, masked, query, program.near_tile),
        (nothing, d_keys, d_values),
    )  # fmt: skip
    d_query = (d_query * plan.rules.scale).reshape(shape)
    return (d_keys, d_values, d_keys_global, d_values_global), (d_query, d_query_global)


_attention.defvjp(_forward, _backward)
