"""Λ-attention forward for Hopper (sm_90), written for its own units: TMA copies and wgmma.

No GPU has run this kernel, so its results are not proved. What is: it compiles for an H100 without
a spilled register, and its steps, masks and sums, which are functions in `gpu_steps`, give the
right numbers when they are replayed on a CPU. Copies, barriers and products are not tried by that.
It is in no default order; ask for it by name. Its gradients are computed by the Triton kernels.

    m' = max(m, max s);  p = 2^(s - m');  l' = l 2^(m - m') + sum p;  acc' = acc 2^(m - m') + p v

Tiling. One program for each head and 128 queries: two consumer warpgroups with 64 queries each, and
a producer whose one thread issues the copies. All three walk the same blocks of keys, those that
any of the 128 queries sees: first the globals, then the window. Keys and values stand in a ring of
`stages` blocks in shared memory; a slot is filled when both consumers have released it. Only blocks
that some query does not wholly see are masked. The consumers take turns: while one multiplies, the
other takes exponentials.

Bytes: queries and outputs once, keys and values of a window once for each 128 queries of each head
(heads that share them run side by side, so all but the first find them in the L2 cache). Copies
that reach past an array's end are cut by the copy engine, which fills in zeros; arrays are padded
only to multiples of 8 rows, which the layout in shared memory asks for.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lminf.kernels.common import compat, dispatch, launch, numerics
from lminf.kernels.lambda_attention import triton
from lminf.kernels.lambda_attention.gpu_steps import (
    BLOCK_Q,
    CONSUMERS,
    ROWS,
    Place,
    Plan,
    Walk,
    finish,
    initial_maximum,
    limits,
    masked_score,
    seen,
    walk,
    weigh,
)
from lminf.kernels.lambda_attention.operands import Branch, Operands, Places, Residuals, Rules

TILE_ROWS = 8  # shared memory holds matrices in tiles of 8 rows
# Of the 65,536 registers, 384 threads start with 168 each; then 2 x 232 and 40.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40
SHARED_BYTES = 227 * 1024  # what one program may have on sm_90


@dataclass(frozen=True)
class Config:
    """The ring of keys and values. Not tuned: no GPU has run it."""

    block_kv: int = 128  # positions
    stages: int = 2  # blocks


def attention(rules: Rules, operands: Operands, places: Places, config: object) -> Residuals:
    """Outputs and log-denominators; gradients are those of the Triton kernels."""
    _require_device()
    config = dispatch.settled(Config, config, Config)
    _refuse(rules, operands, places)
    plan = make_plan(rules, operands, config)
    if plan.shared_bytes > SHARED_BYTES:
        raise NotImplementedError(
            f"{config} takes {plan.shared_bytes} bytes of shared memory; there are {SHARED_BYTES}"
        )
    return _attention(plan, rules, operands, places)


def miscompiles(cuda: int) -> bool:
    """Whether the assembler of this CUDA release (12080: 12.8) may break causal masks.

    12.8.0 to 12.9.0 do. The number of a release leaves out its patches: 12.9.1 is refused as well.
    """
    return 12080 <= cuda <= 12090


def _require_device() -> None:
    capability = compat.compute_capability()
    if capability != 90:
        device = "none" if capability is None else f"one of compute capability {capability}"
        raise NotImplementedError(f"it needs a GPU of compute capability 90, and found {device}")
    cuda = compat.cuda_version()
    if cuda is None:
        raise NotImplementedError("jax's CUDA plugin is not installed")
    if miscompiles(cuda):
        raise NotImplementedError(
            f"CUDA {cuda // 1000}.{cuda % 1000 // 10}: the assembler of 12.8.0 to 12.9.0 "
            "miscompiles masks"
        )


def _refuse(rules: Rules, operands: Operands, places: Places) -> None:
    """NotImplementedError for what the kernel does not compute."""
    near, far, sinks = operands
    for name, given in (
        ("segment_ids", places.segments), ("global_positions", places.far_positions),
        ("alibi_slopes", places.alibi_slopes),
        ("logits_soft_cap", rules.soft_cap), ("sinks", sinks),
    ):  # fmt: skip
        if given is not None:
            raise NotImplementedError(name)
    dtypes = {str(x.dtype) for branch in (near, far) if branch is not None for x in branch}
    if dtypes not in ({"bfloat16"}, {"float16"}):
        raise NotImplementedError(f"{sorted(dtypes)}; it takes all bfloat16 or all float16")
    widths = {near.query.shape[3], near.value.shape[3]}
    if not widths <= {64, 128}:
        raise NotImplementedError(f"heads {sorted(widths)} wide; it takes 64 and 128")
    if rules.scale <= 0:
        raise NotImplementedError(f"scale={rules.scale}: the running maximum needs a positive one")


def make_plan(rules: Rules, operands: Operands, config: Config) -> Plan:
    near, far, _ = operands
    _, queries, heads, width = near.query.shape
    _, keys, key_heads, value_width = near.value.shape
    return Plan(
        queries, keys,
        globals=0 if far is None else min(far.key.shape[1], rules.num_global),
        window=min(rules.window, 2**30),  # beyond every position, and sums stay in int32
        heads=heads, key_heads=key_heads, width=width, value_width=value_width,
        block_kv=config.block_kv, stages=config.stages, unit=rules.scale * numerics.LOG2_E,
    )  # fmt: skip


# --- Differentiation ------------------------------------------------------------------------------


def _attend(plan: Plan, rules: Rules, operands: Operands, places: Places) -> Residuals:
    batch = operands.near.query.shape[0]
    where = jnp.stack([places.key_start, jnp.broadcast_to(places.query_offset, (batch,))], 1)
    call = launch.folding_batches(functools.partial(_forward, plan))
    return Residuals(*call(operands.near, operands.far, where))


def _attend_saving(plan: Plan, rules: Rules, operands: Operands, places: Places):
    launch.require()  # the backward is Triton's; better to hear of it now
    result = _attend(plan, rules, operands, places)
    return result, (operands, places, result)


def _backward(plan: Plan, rules: Rules, saved, cotangents: Residuals):
    operands, places, result = saved
    return triton.gradients(rules, operands, places, result, cotangents), None


_attention = jax.custom_vjp(_attend, nondiff_argnums=(0, 1))
_attention.defvjp(_attend_saving, _backward)


# --- Kernel ---------------------------------------------------------------------------------------


def _forward(
    plan: Plan, near: Branch, far: Branch | None, where: Int[Array, "B 2"]
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    import jax.experimental.pallas.mosaic_gpu as plgpu

    near, far = jax.tree.map(_whole_tiles, (near, far if plan.globals else None))
    batch, rows, *_ = near.query.shape
    dtype = near.query.dtype
    blocks = math.ceil(plan.queries / BLOCK_Q)
    tiles = (plgpu.TilingTransform((TILE_ROWS, 64)), plgpu.SwizzleTransform(128))
    branches = 2 if plan.globals else 1
    of_output = {}  # the output takes the place of the queries, where it has their width
    if plan.width != plan.value_width:
        of_output["out_smem"] = plgpu.SMEM(
            (CONSUMERS, ROWS, plan.value_width), dtype, transforms=tiles
        )
    out, lse = plgpu.kernel(
        functools.partial(_program, plan),
        out_type=(
            compat.output_like((batch, rows, plan.heads, plan.value_width), dtype, near.query),
            # Whole blocks: rows of a copied array must be multiples of 16 bytes.
            compat.output_like((batch, plan.heads, blocks * BLOCK_Q), jnp.float32, near.query),
        ),
        scratch_types={
            "q_smem": plgpu.SMEM((CONSUMERS, branches, ROWS, plan.width), dtype, transforms=tiles),
            "k_smem": plgpu.SMEM((plan.stages, plan.block_kv, plan.width), dtype, transforms=tiles),
            "v_smem": plgpu.SMEM(
                (plan.stages, plan.block_kv, plan.value_width), dtype, transforms=tiles
            ),
            "lse_smem": plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
            "q_ready": plgpu.Barrier(num_barriers=CONSUMERS * branches),
            "k_ready": plgpu.Barrier(num_barriers=plan.stages),
            "v_ready": plgpu.Barrier(num_barriers=plan.stages),
            "k_free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=plan.stages),
            "v_free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=plan.stages),
            "turn": plgpu.Barrier(num_arrivals=CONSUMERS),
            **of_output,
        },
        # Heads first: those that share keys run at the same time.
        grid=(plan.heads, blocks, batch),
        grid_names=("head", "block", "batch"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="lambda_attention_forward",
    )(*near, *(far or ()), where)
    return out[:, : plan.queries], lse[:, :, : plan.queries]


def _whole_tiles(x: Float[Array, "B T N H"]) -> Float[Array, "B T2 N H"]:
    """With zeros up to a multiple of TILE_ROWS rows."""
    extra = -x.shape[1] % TILE_ROWS
    return jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) if extra else x


def _program(plan: Plan, *refs, **scratch) -> None:
    """One program's three warpgroups."""
    import jax.experimental.pallas.mosaic_gpu as plgpu
    from jax.experimental import pallas as pl

    *inputs, where, out, lse = refs
    branches = [Branch(*inputs[i : i + 3]) for i in range(0, len(inputs), 3)]  # near, then far
    batch, warpgroup = lax.axis_index("batch"), lax.axis_index("warpgroup")
    place = Place(where[batch, 0], where[batch, 1])
    steps = walk(plan, lax.axis_index("block"), place)

    @pl.when(warpgroup < CONSUMERS)
    def _consumer():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        _consume(plan, place, steps, [b.query for b in branches], out, lse, **scratch)

    @pl.when(warpgroup == CONSUMERS)
    def _producer():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _produce(plan, steps, branches, **scratch)


def _produce(
    plan: Plan, steps: Walk, branches: list[Any],
    *, k_smem, v_smem, k_ready, v_ready, k_free, v_free, **_,
) -> None:  # fmt: skip
    """Copies the blocks of all steps into the ring, as slots become free."""
    import jax.experimental.pallas.mosaic_gpu as plgpu
    from jax.experimental import pallas as pl

    batch = lax.axis_index("batch")
    head = lax.div(lax.axis_index("head"), plan.heads // plan.key_heads)

    def copy(branch, block, step) -> None:
        slot = lax.rem(step, plan.stages)
        rows = pl.ds(block * plan.block_kv, plan.block_kv)
        for source, ring, ready, free in (
            (branch.key, k_smem, k_ready, k_free),
            (branch.value, v_smem, v_ready, v_free),
        ):

            @pl.when(step >= plan.stages)
            def _released(free=free):
                plgpu.barrier_wait(free.at[slot])

            plgpu.copy_gmem_to_smem(source.at[batch, rows, head], ring.at[slot], ready.at[slot])

    if plan.globals:

        @pl.loop(0, steps.far)
        def _globals(step):
            copy(branches[1], step, step)

    @pl.loop(steps.far, steps.steps)
    def _window(step):
        copy(branches[0], steps.first + step - steps.far, step)


class _Softmax(NamedTuple):
    """Of 64 queries, so far; maxima in powers of two."""

    acc: Array
    maximum: Array
    total: Array


def _consume(
    plan: Plan, place: Place, steps: Walk, queries, out, lse,
    *, q_smem, k_smem, v_smem, lse_smem, q_ready, k_ready, v_ready, k_free, v_free, turn,
    out_smem=None,
) -> None:  # fmt: skip
    """Attention of one warpgroup's 64 queries."""
    import jax.experimental.pallas.mosaic_gpu as plgpu
    from jax.experimental import pallas as pl

    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    warpgroup = lax.axis_index("warpgroup")
    first_row = lax.axis_index("block") * BLOCK_Q + warpgroup * ROWS
    rows = pl.ds(first_row, ROWS)
    dtype = q_smem.dtype
    wgmma = plgpu.Layout.WGMMA

    for i, query in enumerate(queries):
        ready = q_ready.at[warpgroup * len(queries) + i]
        plgpu.copy_gmem_to_smem(query.at[batch, rows, head], q_smem.at[warpgroup, i], ready)
    for i in range(len(queries)):
        plgpu.barrier_wait(q_ready.at[warpgroup * len(queries) + i])

    def take_turns():
        """Both warpgroups arrive here; the second is one arrival ahead, hence out of phase."""
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def filled(shape, value, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def step(is_masked: bool, t, so_far: _Softmax) -> _Softmax:
        slot = lax.rem(t, plan.stages)
        is_far = t < steps.far
        branch = is_far.astype(jnp.int32) if len(queries) > 1 else 0

        def multiply(scores):
            q, k = q_smem.at[warpgroup, branch], k_smem.at[slot]
            plgpu.wgmma(scores, q, plgpu.transpose_ref(k, (1, 0)))
            take_turns()
            return scores[...]

        scores = pl.run_scoped(
            multiply, plgpu.WGMMAAccumulatorRef((ROWS, plan.block_kv), jnp.float32)
        )
        plgpu.barrier_arrive(k_free.at[slot])

        if is_masked:
            block = jnp.where(is_far, t, steps.first + t - steps.far)
            shape = (ROWS, plan.block_kv)
            query_rows, key_rows = (
                plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=wgmma) for axis in (0, 1)
            )
            visible = seen(
                limits(plan, is_far, place),
                query_rows + first_row,
                key_rows + block * plan.block_kv,
            )
            scores = jnp.where(visible, scores, masked_score(plan))

        weights, decay, maximum, total = weigh(plan, scores, so_far.maximum, so_far.total)
        acc = so_far.acc * lax.broadcast_in_dim(decay, so_far.acc.shape, [0])
        # All of the above before the wait below: it is the other warpgroup's time to multiply.
        acc, maximum, total, weights = lax.optimization_barrier(
            (acc, maximum, total, weights.astype(dtype))
        )
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(v_ready.at[slot])
        plgpu.barrier_wait(turn)

        def accumulate(acc):
            plgpu.wgmma(acc, weights, v_smem.at[slot])

            @pl.when(t + 1 < steps.steps)
            def _next():
                plgpu.barrier_wait(k_ready.at[lax.rem(t + 1, plan.stages)])

        acc: Any = pl.run_state(accumulate)(plgpu.WGMMAAccumulatorRef.init(acc))
        plgpu.barrier_arrive(v_free.at[slot])
        return _Softmax(acc, maximum, total)

    state = _Softmax(
        filled((ROWS, plan.value_width), 0, wgmma),
        filled((ROWS,), initial_maximum(plan), wgmma.reduce(1)),
        filled((ROWS,), 0, wgmma.reduce(1)),
    )

    @pl.when(steps.steps > 0)
    def _first():
        plgpu.barrier_wait(k_ready.at[0])

    pl.when(warpgroup == 1)(take_turns)
    bounds = (0, steps.far_plain, steps.plain, steps.masked, steps.steps)
    for i, is_masked in enumerate((False, True, False, True)):
        if i or plan.globals:
            state = lax.fori_loop(
                bounds[i], bounds[i + 1], functools.partial(step, is_masked), state
            )
    pl.when(warpgroup == 0)(take_turns)

    inverse, natural = finish(state.maximum, state.total)
    result = state.acc * lax.broadcast_in_dim(inverse, state.acc.shape, [0])
    result_smem = q_smem.at[warpgroup, 0] if out_smem is None else out_smem.at[warpgroup]
    result_smem[...] = result.astype(dtype)
    lse_smem.at[warpgroup][...] = natural
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(result_smem, out.at[batch, rows, head])
    plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse.at[batch, head, rows])
    plgpu.wait_smem_to_gmem(0)
