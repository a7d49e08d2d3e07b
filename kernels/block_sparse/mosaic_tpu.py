"""Block-sparse attention on a TPU's matrix unit (Pallas, Mosaic): forward, dq, and dk with dv.

The lists are prefetched into scalar memory, where the index maps read which block comes next.
    forward, dq  grid (B N, T / C, M): a block of queries walks its list; past its count the index
                 stays on the last block, so that a step without work copies nothing
    dk with dv   grid (B K, 1, E, G): the E entries of all transposed lists of a key head, ordered
                 by block of keys, for each query head of its group. The sums are written when the
                 block of keys changes; a block that nobody listed is set to zero afterwards.
Only blocks where some pair is invisible are masked. Scores are kept keys first and in powers of
two, as in Λ-attention, whose inner products these are.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from lminf.kernels.block_sparse import lists as lists_
from lminf.kernels.block_sparse.operands import Lists, Operands, Rules
from lminf.kernels.common import compat, numerics, tpu_blocks
from lminf.kernels.common.tpu_blocks import LANES, SCALARS, HeadsFirst, Statistics
from lminf.kernels.lambda_attention.operands import Residuals

SCORES = 2**18  # of one pair of blocks: several arrays of this size must fit the vector memory


def attention(rules: Rules, operands: Operands, lists: Lists, config: object) -> Residuals:
    """Outputs and log-denominators; differentiable in `operands`, through the LSE too."""
    if config is not None:
        raise NotImplementedError("there is nothing to configure: the caller chooses the blocks")
    dtypes = {str(x.dtype) for x in operands}
    if not dtypes <= {"bfloat16", "float32"} or len(dtypes) > 1:
        raise NotImplementedError(f"{sorted(dtypes)}; it takes all bfloat16 or all float32")
    if rules.scale <= 0:
        raise NotImplementedError(f"scale={rules.scale}; it takes positive ones")
    if rules.block_q % LANES or rules.block_kv % LANES:
        raise NotImplementedError(
            f"block_q={rules.block_q}, block_kv={rules.block_kv}; it takes multiples of {LANES}"
        )
    if rules.block_q * rules.block_kv > SCORES:
        raise NotImplementedError(
            f"block_q * block_kv = {rules.block_q * rules.block_kv}; it takes at most {SCORES}"
        )
    plan = _plan(rules, operands, lists)
    if not plan.entries or not plan.key_blocks:
        raise NotImplementedError("lists without room for a block")
    if plan.scalars > SCALARS:
        raise NotImplementedError(f"lists of {plan.scalars} numbers; it takes at most {SCALARS}")
    return _attention(plan, operands, lists).result


@dataclass(frozen=True)
class Plan:
    """One call: every size that is known when tracing."""

    rules: Rules
    batch: int
    heads: int  # N
    key_heads: int  # K
    queries: int  # T
    keys: int  # S
    listed: int  # M
    block_q: int  # C
    block_k: int  # W

    @property
    def scoring(self) -> tpu_blocks.Scoring:
        return tpu_blocks.Scoring(self.rules.scale, self.rules.soft_cap)

    @property
    def group(self) -> int:
        return self.heads // self.key_heads

    @property
    def query_blocks(self) -> int:
        return pl.cdiv(self.queries, self.block_q)

    @property
    def key_blocks(self) -> int:
        return pl.cdiv(self.keys, self.block_k)

    @property
    def entries(self) -> int:
        return self.query_blocks * self.listed

    @property
    def scalars(self) -> int:
        """Of the transposed lists, which take more than the lists."""
        return self.batch * self.key_heads * (2 * self.entries + self.key_blocks + 1)

    def clear(self, i: ArrayLike, j: ArrayLike) -> Any:
        """Whether all queries of block i see all keys of block j, if it is listed."""
        end = (j + 1) * self.block_k
        seen = end <= self.keys
        if self.rules.causal:
            seen &= end - 1 <= i * self.block_q
        return seen

    def visible(self, i: ArrayLike, j: ArrayLike) -> Array:
        """Which pairs of the two blocks see each other, keys first."""
        key, query = tpu_blocks.rows_and_columns(self.block_k, self.block_q)
        key, query = key + j * self.block_k, query + i * self.block_q
        seen = key < self.keys
        return seen & (query >= key) if self.rules.causal else seen


def _plan(rules: Rules, operands: Operands, lists: Lists) -> Plan:
    batch, queries, heads, _ = operands.query.shape
    keys, key_heads = operands.key.shape[1:3]
    return Plan(
        rules, batch, heads, key_heads, queries, keys, lists.indices.shape[3],
        rules.block_q, rules.block_kv,
    )  # fmt: skip


# --- The lists as scalars -------------------------------------------------------------------------


class Walk:
    """What blocks of queries read of the lists: the counts of all, then the indices."""

    def __init__(self, plan: Plan):
        self.plan = plan

    @staticmethod
    def scalars(lists: Lists) -> Int[Array, " scalars"]:
        return jnp.concatenate([lists.counts.reshape(-1), lists.indices.reshape(-1)])

    def _list(self, head, i):
        # Heads of a group are neighbours, in all batch rows: head // G is their key head.
        return jax.lax.div(head, self.plan.group) * self.plan.query_blocks + i

    def count(self, scalars: Any, head: ArrayLike, i: ArrayLike) -> Array:
        return scalars[self._list(head, i)]

    def block(self, scalars: Any, head: ArrayLike, i: ArrayLike, step: ArrayLike) -> Array:
        """The block of keys at this step; the last one when the walk is over."""
        plan, list_index = self.plan, self._list(head, i)
        step = jnp.clip(scalars[list_index] - 1, 0, step)
        lists = plan.batch * plan.key_heads * plan.query_blocks
        return jnp.clip(scalars[lists + list_index * plan.listed + step], 0, plan.key_blocks - 1)


class Entries:
    """What blocks of keys read: each entry's block of queries, its block of keys, the starts."""

    def __init__(self, plan: Plan):
        self.plan = plan

    def scalars(self, lists: Lists) -> Int[Array, " scalars"]:
        queries, starts = lists_.transpose(lists, self.plan.key_blocks)
        entry = jnp.arange(self.plan.entries, dtype=jnp.int32)
        find = functools.partial(jnp.searchsorted, side="right")
        keys = jax.vmap(jax.vmap(lambda starts: find(starts, entry) - 1))(starts)
        return jnp.concatenate([x.astype(jnp.int32).reshape(-1) for x in (queries, keys, starts)])

    def _start(self, scalars, head, j):
        plan = self.plan
        offset = 2 * plan.batch * plan.key_heads * plan.entries
        return scalars[offset + head * (plan.key_blocks + 1) + j]

    def used(self, scalars: Any, head: ArrayLike) -> Array:
        return self._start(scalars, head, self.plan.key_blocks)

    def blocks(self, scalars: Any, head: ArrayLike, entry: ArrayLike) -> tuple[Array, Array]:
        """(block of queries, block of keys) of an entry; of the last one where they are over."""
        plan = self.plan
        entry_index = head * plan.entries + jnp.clip(self.used(scalars, head) - 1, 0, entry)
        j = scalars[plan.batch * plan.key_heads * plan.entries + entry_index]
        return scalars[entry_index], jnp.minimum(j, plan.key_blocks - 1)

    def is_first(self, scalars: Any, head: ArrayLike, entry: ArrayLike, j: ArrayLike) -> Array:
        return entry == self._start(scalars, head, j)

    def is_last(self, scalars: Any, head: ArrayLike, entry: ArrayLike, j: ArrayLike) -> Array:
        return entry == self._start(scalars, head, j + 1) - 1


# --- Kernels --------------------------------------------------------------------------------------


def _visit(plan: Plan, i, j, visited, visit) -> None:
    """`visit(None)` if all pairs see each other, else `visit` of which do."""
    clear = plan.clear(i, j)

    @pl.when(visited & clear)
    def _():
        visit(None)

    @pl.when(visited & ~clear)
    def _():
        visit(plan.visible(i, j))


def _walk(plan: Plan, scalars, visit) -> None:
    head, i, step = (pl.program_id(axis) for axis in range(3))
    walk = Walk(plan)
    j = walk.block(scalars, head, i, step)
    _visit(plan, i, j, step < walk.count(scalars, head, i), visit)


def _forward_kernel(plan: Plan, scalars, arrays, out, lse2, top, total, acc):
    @tpu_blocks.at_first(2)
    def _():
        top[...] = jnp.full_like(top, numerics.EMPTY_MAX)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def visit(visible):
        logits, _ = tpu_blocks.logits(plan.scoring, arrays.query[...], arrays.key[...], visible)
        old = top[...]
        new = jnp.maximum(old, logits.max(0, keepdims=True))
        # What is masked weighs exactly 0, also in a row that has seen nothing: EMPTY_MAX.
        weights, shrink = jnp.exp2(logits - new), jnp.exp2(old - new)
        value = arrays.value[...]
        top[...] = new
        total[...] = total[...] * shrink + weights.sum(0, keepdims=True)
        part = tpu_blocks.dot(plan.scoring, value, weights.astype(value.dtype), (0, 0))
        acc[...] = acc[...] * shrink + part

    _walk(plan, scalars, visit)

    @tpu_blocks.at_last(2)
    def _():
        empty = total[...] == 0
        denominator = jnp.where(empty, 1, total[...])
        out[...] = jnp.where(empty, 0, acc[...] / denominator).T.astype(out.dtype)
        lse2_rows = top[...] + jnp.log(denominator) * numerics.LOG2_E
        lse2[...] = jnp.where(empty, -jnp.inf, lse2_rows)


def _d_query_kernel(plan: Plan, scalars, arrays, statistics, d_query, acc):
    @tpu_blocks.at_first(2)
    def _():
        acc[...] = jnp.zeros_like(acc)

    def visit(visible):
        _, d_scores = tpu_blocks.gradient(plan.scoring, arrays, statistics, visible)
        key = arrays.key[...]
        acc[...] += tpu_blocks.dot(plan.scoring, key, d_scores.astype(key.dtype), (0, 0))

    _walk(plan, scalars, visit)

    @tpu_blocks.at_last(2)
    def _():
        d_query[...] = (acc[...] * plan.rules.scale).T.astype(d_query.dtype)


def _d_key_kernel(plan: Plan, scalars, arrays, statistics, d_key, d_value, key_acc, value_acc):
    head, entry, member = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    entries = Entries(plan)
    i, j = entries.blocks(scalars, head, entry)
    visited = entry < entries.used(scalars, head)

    @pl.when(visited & (member == 0) & entries.is_first(scalars, head, entry, j))
    def _():
        key_acc[...] = jnp.zeros_like(key_acc)
        value_acc[...] = jnp.zeros_like(value_acc)

    def visit(visible):
        weights, d_scores = tpu_blocks.gradient(plan.scoring, arrays, statistics, visible)
        query, d_out = arrays.query[...], statistics.d_out[...]
        key_acc[...] += tpu_blocks.dot(plan.scoring, d_scores.astype(query.dtype), query, (1, 0))
        value_acc[...] += tpu_blocks.dot(plan.scoring, weights.astype(d_out.dtype), d_out, (1, 0))

    _visit(plan, i, j, visited, visit)

    @pl.when(visited & (member == plan.group - 1) & entries.is_last(scalars, head, entry, j))
    def _():
        d_key[...] = (key_acc[...] * plan.rules.scale).astype(d_key.dtype)
        d_value[...] = value_acc[...].astype(d_value.dtype)


# --- Calls ----------------------------------------------------------------------------------------


class Saved(NamedTuple):
    """The result, and the LSE in powers of two as the backward wants it."""

    result: Residuals
    lse2: Float[Array, "BN 1 T"]


def _arrays(plan: Plan, operands: Operands) -> HeadsFirst:
    sizes = (plan.block_q, plan.block_k, plan.block_k)
    return HeadsFirst(*map(tpu_blocks.heads_first, operands, sizes))


def _blocks(plan: Plan, arrays: HeadsFirst, query_at, key_at) -> Any:
    return arrays._replace(
        query=tpu_blocks.block_of(arrays.query, plan.block_q, query_at),
        key=tpu_blocks.block_of(arrays.key, plan.block_k, key_at),
        value=tpu_blocks.block_of(arrays.value, plan.block_k, key_at),
    )


def _by_queries(plan: Plan, arrays: HeadsFirst):
    """Grid, index map of queries and block specs for a walk over the lists."""

    def query_at(head, i, step, scalars):
        return head, i

    def key_at(head, i, step, scalars):
        return jax.lax.div(head, plan.group), Walk(plan).block(scalars, head, i, step)

    grid = (plan.batch * plan.heads, plan.query_blocks, plan.listed)
    return grid, query_at, _blocks(plan, arrays, query_at, key_at)


def _flops(plan: Plan, *products: int) -> int:
    """If all lists were full; `products` are the widths of what is multiplied."""
    pairs = plan.entries * plan.block_q * plan.block_k
    return 2 * plan.batch * plan.heads * pairs * sum(products)


def _attend(plan: Plan, operands: Operands, lists: Lists) -> Saved:
    arrays = _arrays(plan, operands)
    grid, query_at, specs = _by_queries(plan, arrays)
    heads, rows, width = arrays.query.shape
    value_width = arrays.value.shape[2]
    outputs = (
        compat.output_like((heads, rows, value_width), arrays.query.dtype, arrays.query),
        compat.output_like((heads, 1, rows), jnp.float32, arrays.query),
    )
    out, lse2 = tpu_blocks.call(
        functools.partial(_forward_kernel, plan),
        grid,
        Walk.scalars(lists),
        (arrays,),
        (specs,),
        outputs,
        tuple(tpu_blocks.block_of(x, plan.block_q, query_at) for x in outputs),
        [
            pltpu.VMEM((1, plan.block_q), jnp.float32),
            pltpu.VMEM((1, plan.block_q), jnp.float32),
            pltpu.VMEM((value_width, plan.block_q), jnp.float32),
        ],
        "block_sparse_forward",
        _flops(plan, width, value_width),
    )
    lse = lse2.reshape(plan.batch, plan.heads, -1)[..., : plan.queries] / numerics.LOG2_E
    return Saved(Residuals(tpu_blocks.heads_last(out, operands.query), lse), lse2)


def _forward(plan: Plan, operands: Operands, lists: Lists):
    saved = _attend(plan, operands, lists)
    return saved, (operands, lists, saved.result.out, saved.lse2)


def _backward(plan: Plan, saved, cotangents: Saved):
    operands, lists, out, lse2 = saved
    d_out, d_lse = cotangents.result
    # d(lse) joins delta: ds = p * (v do^T - delta), and d(lse)/ds = p.
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).transpose(0, 2, 1) - d_lse
    padding = -plan.queries % plan.block_q
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, padding))).reshape(lse2.shape)
    # A row that saw nothing weighs nothing: 2^(MASK_VALUE - 1e38) is 0.
    lse2 = jnp.where(jnp.isneginf(lse2), -numerics.EMPTY_MAX, lse2)
    statistics = Statistics(tpu_blocks.heads_first(d_out, plan.block_q), delta, lse2)
    arrays = _arrays(plan, operands)
    gradients = (
        _d_queries(plan, lists, arrays, statistics),
        *_d_keys(plan, lists, arrays, statistics),
    )
    return Operands(*map(tpu_blocks.heads_last, gradients, operands)), None


def _d_queries(plan: Plan, lists: Lists, arrays: HeadsFirst, statistics: Statistics):
    grid, query_at, specs = _by_queries(plan, arrays)
    output = tpu_blocks.like(arrays.query)
    width, value_width = arrays.query.shape[2], arrays.value.shape[2]
    (d_query,) = tpu_blocks.call(
        functools.partial(_d_query_kernel, plan),
        grid,
        Walk.scalars(lists),
        (arrays, statistics),
        (specs, tpu_blocks.statistics_blocks(plan.block_q, statistics, query_at)),
        (output,),
        (tpu_blocks.block_of(output, plan.block_q, query_at),),
        [pltpu.VMEM((width, plan.block_q), jnp.float32)],
        "block_sparse_d_query",
        _flops(plan, width, width, value_width),
    )
    return d_query


def _d_keys(plan: Plan, lists: Lists, arrays: HeadsFirst, statistics: Statistics):
    entries = Entries(plan)

    def query_at(head, _, entry, member, scalars):
        return head * plan.group + member, entries.blocks(scalars, head, entry)[0]

    def key_at(head, _, entry, member, scalars):
        return head, entries.blocks(scalars, head, entry)[1]

    outputs = tuple(tpu_blocks.like(x) for x in arrays[1:])
    width, value_width = arrays.key.shape[2], arrays.value.shape[2]
    scalars = entries.scalars(lists)
    gradients = tpu_blocks.call(
        functools.partial(_d_key_kernel, plan),
        # No two programs may hold one block of keys: one that is parallel has all of a head.
        (plan.batch * plan.key_heads, 1, plan.entries, plan.group),
        scalars,
        (arrays, statistics),
        (
            _blocks(plan, arrays, query_at, key_at),
            tpu_blocks.statistics_blocks(plan.block_q, statistics, query_at),
        ),
        outputs,
        tuple(tpu_blocks.block_of(x, plan.block_k, key_at) for x in outputs),
        [pltpu.VMEM((plan.block_k, size), jnp.float32) for size in (width, value_width)],
        "block_sparse_d_key",
        _flops(plan, width, width, value_width, value_width),
    )
    starts = scalars[2 * plan.batch * plan.key_heads * plan.entries :]
    listed = jnp.diff(starts.reshape(plan.batch * plan.key_heads, -1)) > 0
    listed = jnp.repeat(listed, plan.block_k, 1)[..., None]
    return tuple(jnp.where(listed, x, jnp.zeros_like(x)) for x in gradients)


_attention = jax.custom_vjp(_attend, nondiff_argnums=(0,))
_attention.defvjp(_forward, _backward)
