"""Λ-attention on a TPU's matrix unit (Pallas, Mosaic): forward, dq, and dk with dv.

Tiling. The forward and dq walk, for each query head and block of C queries, the blocks of globals
and then those of the window: grid (B N, T / C, globals + window). dk and dv walk, for each key head
and block of W keys, the queries of its group that see it: grid (B K, S / W, G, queries), once for
each branch. All index maps name the next block that is seen, and stay on the last one when a row of
the grid has seen its share, so that steps without work copy nothing either. Only blocks on an edge
of the window, or of the globals, are masked.

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
from jaxtyping import Array, Float, Int

from kernels.common import compat, numerics
from kernels.lambda_attention.operands import Branch, Operands, Places, Residuals, Rules

LANES = 128


@dataclass(frozen=True)
class Config:
    """Sizes of the blocks, in positions: multiples of 128 on a device, of 8 in the interpreter."""

    block_q: int = 512
    block_k: int = 512


def attention(rules: Rules, operands: Operands, places: Places, config: object) -> Residuals:
    """Outputs and log-denominators; differentiable in `operands`, through the LSE too."""
    config = config or Config()
    if not isinstance(config, Config):
        raise NotImplementedError(f"{type(config).__module__}.Config is another's")
    if places.segments is not None:
        raise NotImplementedError("segments: every block would need a mask and a range of its own")
    if places.alibi_slopes is not None:
        raise NotImplementedError("ALiBi: distances cost as much as the masks that it avoids")
    dtypes = {str(x.dtype) for x in jax.tree.leaves((operands.near, operands.far))}
    if not dtypes <= {"bfloat16", "float32"} or len(dtypes) > 1:
        raise NotImplementedError(f"{sorted(dtypes)}; it takes all bfloat16 or all float32")
    if rules.scale <= 0:
        raise NotImplementedError(f"scale={rules.scale}; it takes positive ones")
    plan = _plan(rules, operands, config)
    scalars = jnp.concatenate([places.query_offset[None], places.key_start])
    return _attention(plan, operands, scalars).result


# --- Which blocks see each other ------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One call: every size that is known when tracing."""

    rules: Rules
    heads: int  # N
    key_heads: int  # K
    queries: int  # T
    keys: int  # S
    globals: int  # R, at most num_global
    block_q: int  # C
    block_k: int  # W
    block_g: int

    @property
    def group(self) -> int:
        return self.heads // self.key_heads

    @property
    def query_blocks(self) -> int:
        return pl.cdiv(self.queries, self.block_q)

    @property
    def sides(self) -> "tuple[Near | Far, ...]":
        """The branches in the order in which blocks of queries walk them."""
        return (Far(self), Near(self)) if self.globals else (Near(self),)


def _plan(rules: Rules, operands: Operands, config: Config) -> Plan:
    _, queries, heads, _ = operands.near.query.shape
    keys, key_heads = operands.near.key.shape[1:3]
    rows = 0 if operands.far is None else min(operands.far.key.shape[1], rules.num_global)

    def block(size, rows):
        return min(size, max(rows + -rows % LANES, LANES))

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
    )


class Span(NamedTuple):
    """Rows from `first` to `last`, both seen; last < first: none."""

    first: Any
    last: Any

    def block(self, step, size: int, count: int):
        """The block of `size` rows at this step of a walk; the last one when the walk is over."""
        first, last = (jax.lax.div(jnp.clip(x, 0, count * size - 1), size) for x in self)
        return jnp.minimum(first + jnp.maximum(step, 0), jnp.maximum(first, last))

    def visits(self, step, size: int):
        """Whether the walk has a block at this step."""
        first, last = (jax.lax.div(jnp.maximum(x, 0), size) for x in self)
        return (step >= 0) & (self.first <= self.last) & (first + step <= last)


class Near:
    """The keys of the window. Scalars: the query offset, then where each batch row's keys start."""

    def __init__(self, plan: Plan):
        self.plan, self.block, self.rows = plan, plan.block_k, plan.keys
        self.window = min(plan.rules.window, 2**30)  # beyond every position, sums stay in int32

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.rows, self.block)

    @property
    def key_steps(self) -> int:
        """Blocks of keys that a block of queries visits, at most."""
        offset = self.plan.rules.query_offset
        first = None if offset is None else offset - self.window + 1
        length = self.plan.block_q + self.window - 1
        return min(self.blocks, _touched(first, length, self.block, every=self.plan.block_q))

    @property
    def query_steps(self) -> int:
        """Blocks of queries that a block of keys visits, at most."""
        offset = self.plan.rules.query_offset
        first = None if offset is None else -offset
        length = self.block + self.window - 1
        touched = _touched(first, length, self.plan.block_q, every=self.block)
        return min(self.plan.query_blocks, touched)

    def keys_of(self, scalars, batch, i) -> Span:
        """Rows of keys that some query of block i sees."""
        at, start = scalars[0] + i * self.plan.block_q, scalars[batch + 1]
        first = jnp.maximum(jnp.maximum(at - self.window + 1, -start), 0)
        return Span(first, jnp.minimum(at + self.plan.block_q, self.rows) - 1)

    def queries_of(self, scalars, batch, j) -> Span:
        """Rows of queries that see some key of block j."""
        offset, start = scalars[0], scalars[batch + 1]
        first = jnp.maximum(j * self.block, -start)
        end = jnp.minimum((j + 1) * self.block, self.rows)
        last = jnp.where(first < end, end + self.window - 2 - offset, -1)
        return Span(jnp.maximum(first - offset, 0), jnp.minimum(last, self.plan.queries - 1))

    def clear(self, scalars, batch, i, j):
        """Whether all queries of block i see all keys of block j."""
        at, first = scalars[0] + i * self.plan.block_q, j * self.block
        seen = (first + self.block - 1 <= at) & (at + self.plan.block_q - first <= self.window)
        return seen & (first >= -scalars[batch + 1]) & (first + self.block <= self.rows)

    def visible(self, scalars, batch, i, j):
        """Which pairs of the two blocks see each other, keys first."""
        key, query = _rows_and_columns(self.block, self.plan.block_q)
        key += j * self.block
        distance = scalars[0] + i * self.plan.block_q + query - key
        seen = (distance >= 0) & (distance < self.window)
        return seen & (key >= -scalars[batch + 1]) & (key < self.rows)


class Far:
    """The globals, row r at position r; as Near."""

    def __init__(self, plan: Plan):
        self.plan, self.block, self.rows = plan, plan.block_g, plan.globals
        self.window = min(plan.rules.window, 2**30)

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.rows, self.block)

    @property
    def key_steps(self) -> int:
        return self.blocks

    @property
    def query_steps(self) -> int:
        return self.plan.query_blocks

    def _beyond(self, scalars, batch, i):
        """Globals up to this one are beyond the window of block i's first query."""
        return scalars[0] + i * self.plan.block_q + scalars[batch + 1] - self.window

    def keys_of(self, scalars, batch, i) -> Span:
        last = self._beyond(scalars, batch, i) + self.plan.block_q - 1
        return Span(jnp.int32(0), jnp.minimum(last, self.rows - 1))

    def queries_of(self, scalars, batch, j) -> Span:
        first = j * self.block + self.window - scalars[batch + 1] - scalars[0]
        return Span(jnp.maximum(first, 0), jnp.int32(self.plan.queries - 1))

    def clear(self, scalars, batch, i, j):
        end = (j + 1) * self.block
        return (end <= self.rows) & (end - 1 <= self._beyond(scalars, batch, i))

    def visible(self, scalars, batch, i, j):
        row, query = _rows_and_columns(self.block, self.plan.block_q)
        row += j * self.block
        return (row <= self._beyond(scalars, batch, i) + query) & (row < self.rows)


def _touched(first: int | None, length: int, size: int, *, every: int) -> int:
    """Blocks of `size` rows that `length` rows touch, at most, if they start at
    first + n * every for some n; None: anywhere.
    """
    if first is None or every % size:
        return (length + size - 2) // size + 1
    return (first % size + length - 1) // size + 1


def _rows_and_columns(rows: int, columns: int):
    return (jax.lax.broadcasted_iota(jnp.int32, (rows, columns), axis) for axis in (0, 1))


# --- Kernels --------------------------------------------------------------------------------------


def _dot(plan: Plan, a, b, contract: tuple[int, int]) -> Float[Array, "X Y"]:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = plan.rules.precision
    if precision is None and a.dtype == jnp.float32:
        precision = jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def _logits(plan: Plan, query, key, visible) -> tuple[Array, Array | None]:
    """Exponents of 2 [W, C], and d(logit)/d(score) where a soft cap bends it."""
    scores, cap = _dot(plan, key, query, (1, 1)), plan.rules.soft_cap
    bend = None
    if cap is None:
        scores *= plan.rules.scale * numerics.LOG2_E
    else:
        bent = jnp.tanh(scores * (plan.rules.scale / cap))
        scores, bend = bent * (cap * numerics.LOG2_E), 1 - bent * bent
    if visible is not None:
        scores = jnp.where(visible, scores, numerics.MASK_VALUE)
    return scores, bend


def _walk_keys(plan: Plan, scalars, visits) -> None:
    """Calls, at this step of the grid, the visit of the branch whose block it is, if any."""
    head, i, step = (pl.program_id(axis) for axis in range(3))
    batch = jax.lax.div(head, plan.heads)
    for side, visit in zip(plan.sides, visits, strict=True):
        span = side.keys_of(scalars, batch, i)
        j = span.block(step, side.block, side.blocks)
        _visit(side, scalars, batch, i, j, span.visits(step, side.block), visit)
        step -= side.key_steps


def _visit(side: Near | Far, scalars, batch, i, j, visited, visit) -> None:
    """`visit(None)` if all pairs see each other, else `visit` of which do."""
    clear = side.clear(scalars, batch, i, j)

    @pl.when(visited & clear)
    def _():
        visit(None)

    @pl.when(visited & ~clear)
    def _():
        visit(side.visible(scalars, batch, i, j))


def _at_first(*axes: int):
    """Runs what it decorates at the first step of these axes of the grid."""
    return pl.when(functools.reduce(jnp.logical_and, [pl.program_id(a) == 0 for a in axes]))


def _at_last(*axes: int):
    ends = [pl.program_id(a) == pl.num_programs(a) - 1 for a in axes]
    return pl.when(functools.reduce(jnp.logical_and, ends))


def _forward_kernel(plan: Plan, scalars, branches, sinks, out, lse2, top, total, acc):
    @_at_first(2)
    def _():
        top[...] = jnp.full_like(top, numerics.EMPTY_MAX)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def visit(branch, visible):
        logits, _ = _logits(plan, branch.query[...], branch.key[...], visible)
        old = top[...]
        new = jnp.maximum(old, logits.max(0, keepdims=True))
        # What is masked weighs exactly 0, also in a row that has seen nothing: EMPTY_MAX.
        weights, shrink = jnp.exp2(logits - new), jnp.exp2(old - new)
        value = branch.value[...]
        top[...] = new
        total[...] = total[...] * shrink + weights.sum(0, keepdims=True)
        acc[...] = acc[...] * shrink + _dot(plan, value, weights.astype(value.dtype), (0, 0))

    _walk_keys(plan, scalars, [functools.partial(visit, branch) for branch in branches])

    @_at_last(2)
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
        found = highest + jnp.log(denominator) * numerics.LOG2_E
        lse2[...] = jnp.where(empty, -jnp.inf, found)


def _gradient(plan: Plan, branch, statistics, visible):
    """Weights p and d(scores) [W, C] of one block."""
    logits, bend = _logits(plan, branch.query[...], branch.key[...], visible)
    weights = jnp.exp2(logits - statistics.lse2[...])
    d_weights = _dot(plan, branch.value[...], statistics.d_out[...], (1, 1))
    d_scores = weights * (d_weights - statistics.delta[...])
    return weights, d_scores if bend is None else d_scores * bend


def _d_query_kernel(plan: Plan, scalars, branches, statistics, *outputs_and_accumulators):
    d_queries = outputs_and_accumulators[: len(branches)]
    accs = outputs_and_accumulators[len(branches) :]

    @_at_first(2)
    def _():
        for acc in accs:
            acc[...] = jnp.zeros_like(acc)

    def visit(branch, acc, visible):
        _, d_scores = _gradient(plan, branch, statistics, visible)
        key = branch.key[...]
        acc[...] += _dot(plan, key, d_scores.astype(key.dtype), (0, 0))

    _walk_keys(
        plan,
        scalars,
        [functools.partial(visit, *pair) for pair in zip(branches, accs, strict=True)],
    )

    @_at_last(2)
    def _():
        for acc, d_query in zip(accs, d_queries, strict=True):
            d_query[...] = (acc[...] * plan.rules.scale).T.astype(d_query.dtype)


def _d_key_kernel(
    plan: Plan, side: Near | Far, scalars, branch, statistics, d_key, d_value, key_acc, value_acc
):
    head, j, step = pl.program_id(0), pl.program_id(1), pl.program_id(3)
    batch = jax.lax.div(head, plan.key_heads)
    span = side.queries_of(scalars, batch, j)
    i = span.block(step, plan.block_q, plan.query_blocks)

    @_at_first(2, 3)
    def _():
        key_acc[...] = jnp.zeros_like(key_acc)
        value_acc[...] = jnp.zeros_like(value_acc)

    def visit(visible):
        weights, d_scores = _gradient(plan, branch, statistics, visible)
        query, d_out = branch.query[...], statistics.d_out[...]
        key_acc[...] += _dot(plan, d_scores.astype(query.dtype), query, (1, 0))
        value_acc[...] += _dot(plan, weights.astype(d_out.dtype), d_out, (1, 0))

    _visit(side, scalars, batch, i, j, span.visits(step, plan.block_q), visit)

    @_at_last(2, 3)
    def _():
        d_key[...] = (key_acc[...] * plan.rules.scale).astype(d_key.dtype)
        d_value[...] = value_acc[...].astype(d_value.dtype)


# --- Calls ----------------------------------------------------------------------------------------


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


class Saved(NamedTuple):
    """The result, and the LSE in powers of two as the backward wants it."""

    result: Residuals
    lse2: Float[Array, "BN 1 T"]


def _heads_first(x: Float[Array, "B T N X"], block: int) -> Float[Array, "BN Tp X"]:
    x = jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, -x.shape[1] % block), (0, 0)))
    return x.reshape(-1, *x.shape[2:])


def _heads_last(x: Float[Array, "BN Tp X"], like: Float[Array, "B T N _"]):
    batch, length, heads, _ = like.shape
    x = x.reshape(batch, heads, *x.shape[1:])[:, :, :length]
    return x.transpose(0, 2, 1, 3)


def _branches(plan: Plan, operands: Operands) -> list[HeadsFirst]:
    """The arrays of `plan.sides`, heads first, padded to whole blocks."""
    given = [operands.near] if len(plan.sides) == 1 else [operands.far, operands.near]
    return [
        HeadsFirst(
            _heads_first(branch.query, plan.block_q),
            _heads_first(branch.key[:, : side.rows], side.block),
            _heads_first(branch.value[:, : side.rows], side.block),
        )
        for side, branch in zip(plan.sides, given, strict=True)
    ]


def _block_of(x: Array | jax.ShapeDtypeStruct, rows: int, index) -> pl.BlockSpec:
    """Blocks of `rows` rows of a [heads, rows, X] array, or columns of a [heads, 1, rows] one;
    `index` maps the grid to (head, block).
    """
    if x.shape[1] == 1:
        return pl.BlockSpec((None, 1, rows), lambda *at: (index(*at)[0], 0, index(*at)[1]))
    return pl.BlockSpec((None, rows, x.shape[2]), lambda *at: (*index(*at), 0))


def _by_queries(plan: Plan, branches: list[HeadsFirst]) -> tuple[tuple[int, ...], Any, list[Any]]:
    """Grid, index map of queries, and block specs of the branches, for a walk over keys."""

    def query_at(head, i, step, scalars):
        return head, i

    def key_at(side, before, head, i, step, scalars):
        span = side.keys_of(scalars, jax.lax.div(head, plan.heads), i)
        # Heads of a group are neighbours, in all batch rows: head // G is their key head.
        group = jax.lax.div(head, plan.group)
        return group, span.block(step - before, side.block, side.blocks)

    specs, steps = [], 0
    for side, branch in zip(plan.sides, branches, strict=True):
        at = functools.partial(key_at, side, steps)
        specs.append(
            branch._replace(
                query=_block_of(branch.query, plan.block_q, query_at),
                key=_block_of(branch.key, side.block, at),
                value=_block_of(branch.value, side.block, at),
            )
        )
        steps += side.key_steps
    return (branches[0].query.shape[0], plan.query_blocks, steps), query_at, specs


def _call(kernel, grid, scalars, inputs, in_specs, outputs, out_specs, scratch, name, flops):
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


def _flops(plan: Plan, heads: int, *products: int) -> int:
    """Of the blocks that a long text visits: `products` are the widths of what is multiplied."""
    pairs = plan.query_blocks * plan.block_q * sum(s.key_steps * s.block for s in plan.sides)
    return 2 * heads * pairs * sum(products)


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return compat.output_like(x.shape, x.dtype, x)


def _attend(plan: Plan, operands: Operands, scalars: Int[Array, " scalars"]) -> Saved:
    branches = _branches(plan, operands)
    grid, query_at, specs = _by_queries(plan, branches)
    query = branches[0].query
    heads, rows, width = query.shape
    value_width = operands.near.value.shape[3]
    outputs = (
        compat.output_like((heads, rows, value_width), query.dtype, query),
        compat.output_like((heads, 1, rows), jnp.float32, query),
    )
    inputs, in_specs = (branches,), (specs,)
    if operands.sinks is not None:
        inputs += (operands.sinks.astype(jnp.float32),)
        in_specs += (pl.BlockSpec(memory_space=pltpu.SMEM),)

    def kernel(scalars, branches, *rest):
        sinks = None if operands.sinks is None else rest[0]
        _forward_kernel(plan, scalars, branches, sinks, *rest[len(inputs) - 1 :])

    out, lse2 = _call(
        kernel,
        grid,
        scalars,
        inputs,
        in_specs,
        outputs,
        tuple(_block_of(x, plan.block_q, query_at) for x in outputs),
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
    return Saved(Residuals(_heads_last(out, operands.near.query), lse), lse2)


def _forward(plan: Plan, operands: Operands, scalars):
    saved = _attend(plan, operands, scalars)
    return saved, (operands, scalars, saved.result.out, saved.lse2)


def _backward(plan: Plan, saved, cotangents: Saved):
    operands, scalars, out, lse2 = saved
    d_out, d_lse = cotangents.result
    branches = _branches(plan, operands)
    # d(lse) joins delta: ds = p * (v do^T - delta), and d(lse)/ds = p.
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).transpose(0, 2, 1) - d_lse
    padding = -plan.queries % plan.block_q
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, padding))).reshape(lse2.shape)
    # A row that saw nothing weighs nothing: 2^(MASK_VALUE - 1e38) is 0.
    lse2 = jnp.where(jnp.isneginf(lse2), -numerics.EMPTY_MAX, lse2)
    statistics = Statistics(_heads_first(d_out, plan.block_q), delta, lse2)

    d_queries = _d_queries(plan, scalars, branches, statistics)
    d_keys = [
        _d_keys(plan, side, scalars, branch, statistics)
        for side, branch in zip(plan.sides, branches, strict=True)
    ]

    def gradient(given: Branch, d_query, d_key_value) -> Branch:
        d_key, d_value = (
            _rows_like(_heads_last(d, like), like)
            for d, like in zip(d_key_value, given[1:], strict=True)
        )
        return Branch(_heads_last(d_query, given.query), d_key, d_value)

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


def _statistics_blocks(plan: Plan, statistics: "Statistics", query_at) -> Any:
    return jax.tree.map(lambda x: _block_of(x, plan.block_q, query_at), statistics)


def _d_queries(plan: Plan, scalars, branches: list[HeadsFirst], statistics: Statistics):
    grid, query_at, specs = _by_queries(plan, branches)
    outputs = [_like(branch.query) for branch in branches]
    width, value_width = branches[0].query.shape[2], statistics.d_out.shape[2]
    return _call(
        functools.partial(_d_query_kernel, plan),
        grid,
        scalars,
        (branches, statistics),
        (specs, _statistics_blocks(plan, statistics, query_at)),
        outputs,
        [_block_of(x, plan.block_q, query_at) for x in outputs],
        [pltpu.VMEM((width, plan.block_q), jnp.float32) for _ in branches],
        "lambda_d_query",
        _flops(plan, grid[0], width, width, value_width),
    )


def _d_keys(plan: Plan, side: Near | Far, scalars, branch: HeadsFirst, statistics: Statistics):
    def query_at(head, j, member, step, scalars):
        span = side.queries_of(scalars, jax.lax.div(head, plan.key_heads), j)
        return head * plan.group + member, span.block(step, plan.block_q, plan.query_blocks)

    def key_at(head, j, member, step, scalars):
        return head, j

    outputs = (_like(branch.key), _like(branch.value))
    width, value_width = branch.key.shape[2], branch.value.shape[2]
    grid = (branch.key.shape[0], side.blocks, plan.group, side.query_steps)
    steps = grid[0] * grid[1] * grid[2] * grid[3]
    return _call(
        functools.partial(_d_key_kernel, plan, side),
        grid,
        scalars,
        (branch, statistics),
        (
            branch._replace(
                query=_block_of(branch.query, plan.block_q, query_at),
                key=_block_of(branch.key, side.block, key_at),
                value=_block_of(branch.value, side.block, key_at),
            ),
            _statistics_blocks(plan, statistics, query_at),
        ),
        outputs,
        tuple(_block_of(x, side.block, key_at) for x in outputs),
        [pltpu.VMEM((side.block, size), jnp.float32) for size in (width, value_width)],
        f"lambda_d_key_{type(side).__name__.lower()}",
        4 * steps * plan.block_q * side.block * (width + value_width),
    )


_attention = jax.custom_vjp(_attend, nondiff_argnums=(0,))
_attention.defvjp(_forward, _backward)
