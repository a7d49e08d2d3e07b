"""Block-sparse attention in plain XLA: online softmax over the listed blocks, nothing else read.

A program is one block of C query positions of one key head, G * C rows. It walks its list:
    m' = max(m, max s);  p = exp(s - m');  l' = l exp(m - m') + sum p;  acc' = acc exp(m - m') + p v
The backward recomputes p from the saved LSE, with delta = sum(do * out) - d_lse:
    dq  the same walk:                       ds = p (do v^T - delta);  dq += ds k
    dkv one program for each block of keys, walking the transposed list:
                                             dv += p^T do;  dk += ds^T q
No block is touched that no list names, and the counts bound the loops.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from lminf.kernels.block_sparse import lists as lists_
from lminf.kernels.block_sparse import operands as pairs
from lminf.kernels.block_sparse.operands import Lists, Operands, Rules
from lminf.kernels.common import numerics
from lminf.kernels.lambda_attention.operands import Residuals


def attention(rules: Rules, operands: Operands, lists: Lists, config: object) -> Residuals:
    """Outputs and log-denominators; differentiable in `operands`, through the LSE too."""
    if config is not None:
        raise NotImplementedError("there is nothing to configure: the caller chooses the blocks")
    return _attention(rules, operands, lists)


class _Call:
    """One call laid out for programs: heads first, rows padded to whole blocks."""

    def __init__(self, rules: Rules, operands: Operands):
        self.rules = rules
        self.batch, self.queries, self.heads, _ = operands.query.shape
        self.keys, self.key_heads = operands.key.shape[1:3]
        self.group = self.heads // self.key_heads
        self.dtype = numerics.statistics_dtype(operands.query.dtype)
        self.query = self.queries_first(operands.query)
        self.key, self.value = (self._keys_first(x) for x in operands[1:])
        self.q_blocks = self.query.shape[2] // rules.block_q
        self.kv_blocks = self.key.shape[1] // rules.block_kv

    def queries_first(self, x: Float[Array, "B T N X"]) -> Float[Array, "M G Tp X"]:
        x = jnp.pad(x, ((0, 0), (0, -self.queries % self.rules.block_q), (0, 0), (0, 0)))
        x = x.reshape(self.batch, -1, self.key_heads, self.group, x.shape[-1])
        return x.transpose(0, 2, 3, 1, 4).reshape(-1, self.group, x.shape[1], x.shape[-1])

    def queries_last(self, x: Float[Array, "programs rows X"]) -> Float[Array, "B T N X"]:
        width = x.shape[-1]
        x = x.reshape(self.batch, self.key_heads, -1, self.group, self.rules.block_q, width)
        x = x.transpose(0, 2, 4, 1, 3, 5).reshape(self.batch, -1, self.heads, width)
        return x[:, : self.queries]

    def _keys_first(self, x: Float[Array, "B S K X"]) -> Float[Array, "M Sp X"]:
        x = jnp.pad(x, ((0, 0), (0, -self.keys % self.rules.block_kv), (0, 0), (0, 0)))
        return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])

    def keys_last(self, x: Float[Array, "programs W X"]) -> Float[Array, "B S K X"]:
        x = x.reshape(self.batch, self.key_heads, -1, x.shape[-1])
        return x.swapaxes(1, 2)[:, : self.keys]

    def rows(
        self, x: Float[Array, "M G Tp X"], head: ArrayLike, block: ArrayLike
    ) -> Float[Array, "rows X"]:
        """The G * C rows of one block of queries of an array laid out like the queries."""
        size = (1, self.group, self.rules.block_q, x.shape[3])
        zero = jnp.int32(0)
        cut = jax.lax.dynamic_slice(x, (head, zero, block * self.rules.block_q, zero), size)
        return cut.reshape(-1, x.shape[3])

    def block(
        self, x: Float[Array, "M Sp X"], head: ArrayLike, block: ArrayLike
    ) -> Float[Array, "W X"]:
        """One block of keys or values."""
        size = (1, self.rules.block_kv, x.shape[2])
        start = (head, block * self.rules.block_kv, jnp.int32(0))
        return jax.lax.dynamic_slice(x, start, size)[0]

    def scores(
        self, query: Array, key: Array, q_block: ArrayLike, kv_block: ArrayLike
    ) -> tuple[Array, Array | None]:
        """[rows, W] logits with what is invisible at MASK_VALUE, and the soft cap's bend."""
        scores = _dot(query, key, (1, 1), self.dtype) * self.rules.scale
        bend = None
        if self.rules.soft_cap is not None:
            bent = jnp.tanh(scores / self.rules.soft_cap)
            scores, bend = self.rules.soft_cap * bent, 1 - bent * bent
        rows, columns = (
            block * size + jnp.arange(size, dtype=jnp.int32)
            for block, size in ((q_block, self.rules.block_q), (kv_block, self.rules.block_kv))
        )
        columns = columns[None]
        visible = pairs.visible(self.rules, rows[:, None], columns) & (columns < self.keys)
        visible = jnp.tile(visible, (self.group, 1))
        return jnp.where(visible, scores, numerics.MASK_VALUE), bend

    def programs(self, count: int) -> tuple[Array, Array]:
        """Head and block of every program, [M * count] each."""
        heads = jnp.arange(self.batch * self.key_heads, dtype=jnp.int32)
        blocks = jnp.arange(count, dtype=jnp.int32)
        return jnp.repeat(heads, count), jnp.tile(blocks, heads.shape[0])


def _dot(a, b, contract: tuple[int, int], dtype) -> Float[Array, "X Y"]:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    if a.dtype != b.dtype:
        a, b = a.astype(dtype), b.astype(dtype)
    return jax.lax.dot_general(a, b, dims, preferred_element_type=dtype)


def _compute(rules: Rules, operands: Operands, lists: Lists) -> Residuals:
    call = _Call(rules, operands)
    indices, counts = _by_head(lists)

    def program(index):
        head, q_block = index
        query = call.rows(call.query, head, q_block)

        def visit(t, carry):
            top, total, out = carry
            kv_block = indices[head, q_block, t]
            key, value = (call.block(x, head, kv_block) for x in (call.key, call.value))
            scores, _ = call.scores(query, key, q_block, kv_block)
            new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
            shrink, weights = jnp.exp(top - new_top), jnp.exp(scores - new_top)
            total = total * shrink + weights.sum(-1, keepdims=True)
            part = _dot(weights.astype(value.dtype), value, (1, 0), call.dtype)
            return new_top, total, out * shrink + part

        start = jnp.zeros((query.shape[0], 1), call.dtype)
        carry = (
            start + numerics.EMPTY_MAX,
            start,
            jnp.zeros((query.shape[0], call.value.shape[2]), call.dtype),
        )
        count = counts[head, q_block]
        top, total, out = jax.lax.fori_loop(jnp.int32(0), count, visit, carry)
        empty = total == 0
        total = jnp.where(empty, 1, total)
        return out / total, jnp.where(empty, -jnp.inf, top + jnp.log(total))

    out, lse = jax.lax.map(program, call.programs(call.q_blocks))
    lse = call.queries_last(lse)[..., 0].swapaxes(1, 2)
    return Residuals(call.queries_last(out).astype(operands.query.dtype), lse)


def _by_head(lists: Lists) -> Lists:
    return Lists(*(x.reshape(-1, *x.shape[2:]) for x in lists))


def _forward(rules: Rules, operands: Operands, lists: Lists):
    result = _compute(rules, operands, lists)
    return result, (operands, lists, result)


class _Rows(NamedTuple):
    """What the backward knows of every row, laid out like the queries."""

    d_out: Float[Array, "M G Tp Hv"]
    lse: Float[Array, "M G Tp 1"]  # 0 where the row is empty: exp(MASK_VALUE - 0) is 0
    delta: Float[Array, "M G Tp 1"]


def _backward(rules: Rules, saved, cotangents: Residuals):
    operands, lists, result = saved
    call = _Call(rules, operands)
    by_head = _by_head(lists)
    d_out = cotangents.out.astype(call.dtype)
    delta = (d_out * result.out.astype(call.dtype)).sum(-1) - cotangents.lse.swapaxes(1, 2)
    lse = jnp.where(jnp.isneginf(result.lse), 0, result.lse).swapaxes(1, 2)
    rows = _Rows(
        call.queries_first(cotangents.out.astype(operands.query.dtype)),
        *(call.queries_first(x[..., None]) for x in (lse, delta)),
    )

    def weights(head, q_block, kv_block):
        """p and ds of one pair of blocks, and what they were made of."""
        query, d_out, lse, delta = (call.rows(x, head, q_block) for x in (call.query, *rows))
        key, value = (call.block(x, head, kv_block) for x in (call.key, call.value))
        scores, bend = call.scores(query, key, q_block, kv_block)
        p = jnp.exp(scores - lse)
        ds = p * (_dot(d_out, value, (1, 1), call.dtype) - delta)
        if bend is not None:
            ds = ds * bend
        return p, (ds * rules.scale).astype(query.dtype), query, key, d_out

    def d_query(index):
        head, q_block = index

        def visit(t, total):
            _, ds, _, key, _ = weights(head, q_block, by_head.indices[head, q_block, t])
            return total + _dot(ds, key, (1, 0), call.dtype)

        shape = (call.group * rules.block_q, call.key.shape[2])
        count = by_head.counts[head, q_block]
        return jax.lax.fori_loop(jnp.int32(0), count, visit, jnp.zeros(shape, call.dtype))

    transposed = lists_.transpose(lists, call.kv_blocks)
    q_of, starts = (x.reshape(-1, x.shape[2]) for x in transposed)

    def d_key_value(index):
        head, kv_block = index

        def visit(t, totals):
            p, ds, query, _, d_out = weights(head, q_of[head, t], kv_block)
            return (
                totals[0] + _dot(ds, query, (0, 0), call.dtype),
                totals[1] + _dot(p.astype(d_out.dtype), d_out, (0, 0), call.dtype),
            )

        zeros = tuple(
            jnp.zeros((rules.block_kv, x.shape[2]), call.dtype) for x in (call.key, call.value)
        )
        span = starts[head, kv_block], starts[head, kv_block + 1]
        return jax.lax.fori_loop(*span, visit, zeros)

    d_query_ = jax.lax.map(d_query, call.programs(call.q_blocks))
    d_key, d_value = jax.lax.map(d_key_value, call.programs(call.kv_blocks))
    grads = Operands(call.queries_last(d_query_), call.keys_last(d_key), call.keys_last(d_value))
    return jax.tree.map(lambda g, x: g.astype(x.dtype), grads, operands), None


_attention = jax.custom_vjp(_compute, nondiff_argnums=(0,))
_attention.defvjp(_forward, _backward)
