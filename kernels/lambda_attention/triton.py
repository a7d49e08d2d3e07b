"""Λ-attention in Triton, for NVIDIA and AMD GPUs: grids, tile sizes and the gradient's formula.

The kernels are in `triton_kernels`; this file decides what they are launched on. Nothing is padded
or transposed beforehand: arrays are read as the caller has them, and edges are masked inside. The
backward recomputes the weights p = 2^(s - lse2) and forms, with delta = sum(do * out) - d_lse,
    ds = p (do v^T - delta);  dq = ds k;  dk = ds^T q;  dv = p^T do
in one kernel that owns its queries and one that owns its keys, so two runs agree bit for bit.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf.kernels.common import dispatch, launch, masks, numerics
from lminf.kernels.lambda_attention.operands import Branch, Operands, Places, Residuals, Rules


@dataclass(frozen=True)
class Tile:
    """Sizes of one kernel's tiles in positions, and what the compiler is told."""

    block_q: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """Tiles of the three kernels; flat, as tuning tables keep it."""

    forward_block_q: int = 128
    forward_block_k: int = 64
    forward_warps: int = 8
    forward_stages: int = 3
    queries_block_q: int = 64  # gradient of the queries
    queries_block_k: int = 64
    queries_warps: int = 8
    queries_stages: int = 2
    keys_block_q: int = 32  # gradients of keys and values
    keys_block_k: int = 64
    keys_warps: int = 8
    keys_stages: int = 2

    def tile(self, kernel: str) -> Tile:
        names = (f"{kernel}_{field.name}" for field in dataclasses.fields(Tile))
        return Tile(*(getattr(self, name) for name in names))


def config_of(forward: Tile, queries: Tile, keys: Tile) -> Config:
    """The config with these tiles."""
    return Config(*(x for tile in (forward, queries, keys) for x in dataclasses.astuple(tile)))


def attention(rules: Rules, operands: Operands, places: Places, config: object) -> Residuals:
    """Outputs and log-denominators; differentiable in `operands`, through the LSE too."""
    launch.require()
    _refuse(rules, operands)
    config = dispatch.settled(Config, config, lambda: default_config(operands, places))
    return Residuals(*_attention(rules, config, operands, _where(rules, operands, places)))


def gradients(
    rules: Rules, operands: Operands, places: Places, result: Residuals, cotangents: Residuals
) -> Operands:
    """Gradients of Λ-attention, from the result of whichever forward computed it."""
    launch.require()
    _refuse(rules, operands)
    saved = (operands, _where(rules, operands, places), *result)
    return _backward(rules, default_config(operands, places), saved, cotangents)[0]


def _refuse(rules: Rules, operands: Operands) -> None:
    """NotImplementedError for what the kernels do not compute."""
    arrays = jax.tree.leaves((operands.near, operands.far))
    # In float32 the products of wider heads do not fit the registers.
    launch.refuse_operands(arrays, rules.scale, widest=256, float32=128)


def default_config(operands: Operands, places: Places) -> Config:
    """Tiles that compile without spilling a register for sm_80, sm_90 and sm_100.

    Not tuned: no GPU has run them yet.
    """
    widest = max(operands.near.query.shape[3], operands.near.value.shape[3])
    wide = operands.near.query.dtype == jnp.float32
    config = _TILES[wide, launch.padded(max(widest, 64))]
    costly = (places.segments, places.alibi_slopes, places.far_positions)
    if any(x is not None for x in costly):  # these take registers
        config = dataclasses.replace(
            config, forward_block_q=min(64, config.forward_block_q), forward_stages=2
        )
    return config


_TILES = {
    # (float32, padded width)
    (False, 64): config_of(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    (False, 128): config_of(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
    (False, 256): config_of(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (True, 64): config_of(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (True, 128): config_of(Tile(16, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 4, 1)),
}


class _Alibi(NamedTuple):
    """Slopes in units of raw scores, and how far away the globals seem where that is given."""

    slopes: Float[Array, "B N"]
    far_at: Int[Array, "B T"] | None
    far_from: Int[Array, "B R"] | None
    far_unit: Float[Array, " B"] | None


class _Where(NamedTuple):
    """What places the operands, with the batch axis first."""

    places: Int[Array, "B 2"]  # key_start, query_offset
    segments: masks.SegmentIds | None
    starts: Int[Array, "B S"] | None  # of every key's run of equal ids
    ends: Int[Array, "B S"] | None
    alibi: _Alibi | None
    listed: Int[Array, "B P R"] | None  # positions of the globals, and how many rows of each list
    list_ends: Int[Array, "B P"] | None  # there are up to the last one that is not hidden

    def pointers(self) -> list[Array]:
        """As the kernels name them, from `places` on; they never read the ones missing."""
        ids, alibi = self.segments or (None,) * 2, self.alibi or (None,) * 4
        given = (*ids, self.starts, self.ends, *alibi, self.listed, self.list_ends)
        return [self.places] + [self.places if x is None else x for x in given]


def _alibi(rules: Rules, operands: Operands, places: Places) -> _Alibi | None:
    if places.alibi_slopes is None:
        return None
    batch, queries, heads, _ = operands.near.query.shape
    slopes = places.alibi_slopes.astype(jnp.float32) / rules.scale
    slopes, far = jnp.broadcast_to(slopes, (batch, heads)), places.far_distance
    if far is None or operands.far is None:
        return _Alibi(slopes, None, None, None)
    return _Alibi(
        slopes,
        jnp.broadcast_to(far.query, (batch, queries)),
        jnp.broadcast_to(far.key, (batch, far.key.shape[1])),
        jnp.broadcast_to(jnp.asarray(far.scale, jnp.float32), (batch,)),
    )


def _where(rules: Rules, operands: Operands, places: Places) -> _Where:
    batch = operands.near.query.shape[0]
    starts = ends = list_ends = None
    listed = places.far_positions
    if listed is not None:
        row = jnp.arange(listed.shape[2], dtype=jnp.int32)[None, None]
        list_ends = jnp.where(listed >= 0, row + 1, 0).max(-1)
    if places.segments is not None:
        starts = masks.run_starts(places.segments.kv)
        # Seen from the back, a run's last row is its first one.
        ends = places.segments.kv.shape[1] - masks.run_starts(places.segments.kv[:, ::-1])[:, ::-1]
    return _Where(
        jnp.stack([places.key_start, jnp.broadcast_to(places.query_offset, (batch,))], 1),
        places.segments,
        starts,
        ends,
        _alibi(rules, operands, places),
        listed,
        list_ends,
    )


class _Sizes(NamedTuple):
    batch: int
    queries: int
    heads: int
    keys: int
    key_heads: int
    far_rows: int


def _sizes(near: Branch, far: Branch | None) -> _Sizes:
    batch, queries, heads, _ = near.query.shape
    _, keys, key_heads, _ = near.key.shape
    return _Sizes(batch, queries, heads, keys, key_heads, 0 if far is None else far.key.shape[1])


def _unit(rules: Rules) -> float:
    """From a raw score to the exponent of 2."""
    return (rules.scale if rules.soft_cap is None else rules.soft_cap) * numerics.LOG2_E


def _constants(rules: Rules, near: Branch, where: _Where, tile: Tile) -> dict:
    unit = _unit(rules)
    exact = near.query.dtype == jnp.float32 and rules.precision is not None
    return {
        "HEADS": near.query.shape[2],
        "KEY_HEADS": near.key.shape[2],
        "WIDTH": near.query.shape[3],
        "VALUE_WIDTH": near.value.shape[3],
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "BLOCK_H": launch.padded(near.query.shape[3]),
        "BLOCK_V": launch.padded(near.value.shape[3]),
        "UNIT": unit,
        "INNER": None if rules.soft_cap is None else rules.scale / rules.soft_cap,
        # An exponent of MASK_VALUE, or somewhat above: MASK * UNIT must not overflow.
        "MASK": numerics.MASK_VALUE / max(unit, 1),
        # float32 products on tensor cores: three of tf32 each, as exact as one of float32.
        "PRECISION": "ieee" if exact else "tf32x3",
        "SEGMENTS": where.segments is not None,
        "ALIBI": where.alibi is not None,
        "GIVEN": where.alibi is not None and where.alibi.far_at is not None,
        "LISTS": 0 if where.listed is None else where.listed.shape[1],
    }


MOST = 2**30  # positions, and sums of two of them, are int32


def _window(rules: Rules) -> int:
    return min(rules.window, MOST)


def _clip(rules: Rules) -> int:
    return MOST if rules.clip_distance is None else min(rules.clip_distance, MOST)


# --- Forward --------------------------------------------------------------------------------------


def _attend(rules: Rules, config: Config, operands: Operands, where: _Where):
    near, far, sinks = operands
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks, (near.query.shape[0], *sinks.shape))
    call = launch.folding_batches(functools.partial(_launch_forward, rules, config.tile("forward")))
    return call(near, far, sinks, where)


def _launch_forward(rules: Rules, tile: Tile, near: Branch, far: Branch | None, sinks, where):
    from lminf.kernels.lambda_attention import triton_kernels  # needs triton

    sizes = _sizes(near, far)
    return launch.run(
        launch.Launch(
            triton_kernels.forward,
            (math.ceil(sizes.queries / tile.block_q) * sizes.batch * sizes.heads,),
            [
                *near, *(far or near), where.places if sinks is None else sinks, *where.pointers(),
                sizes.queries, sizes.keys, sizes.far_rows, _window(rules), rules.num_global,
                _clip(rules),
            ],
            [
                jax.ShapeDtypeStruct(
                    (*near.query.shape[:3], near.value.shape[3]), near.query.dtype
                ),
                jax.ShapeDtypeStruct((sizes.batch, sizes.heads, sizes.queries), jnp.float32),
            ],
            _constants(rules, near, where, tile)
            | {"FAR": far is not None, "SINKS": sinks is not None},
            tile.warps,
            tile.stages,
            name="lambda_attention_forward",
        )
    )  # fmt: skip


# --- Backward -------------------------------------------------------------------------------------


def _forward(rules: Rules, config: Config, operands: Operands, where: _Where):
    out, lse = _attend(rules, config, operands, where)
    return (out, lse), (operands, where, out, lse)


def _backward(rules: Rules, config: Config, saved, cotangents):
    operands, where, out, lse = saved
    d_out, d_lse = cotangents
    near, far, sinks = operands
    # d(lse) joins delta: ds = p * (do v^T - delta), and d(lse)/ds = p.
    delta = jnp.einsum("btnh,btnh->bnt", d_out, out, preferred_element_type=jnp.float32) - d_lse
    # A row that saw nothing weighs nothing: 2^(s - 1e38) is 0.
    lse2 = jnp.where(jnp.isneginf(lse), -numerics.EMPTY_MAX, lse * numerics.LOG2_E)

    of_queries = launch.folding_batches(
        functools.partial(_launch_query_gradients, rules, config.tile("queries"))
    )
    of_keys = functools.partial(_launch_key_gradients, rules, config.tile("keys"))
    d_query, d_query_far = of_queries(near, far, d_out, lse2, delta, where)
    near_keys = launch.folding_batches(functools.partial(of_keys, False))
    d_near = Branch(d_query, *near_keys(near, d_out, lse2, delta, where))
    d_far = None
    if far is not None:
        far_keys = launch.folding_batches(functools.partial(of_keys, True))
        d_far = Branch(d_query_far, *far_keys(far, d_out, lse2, delta, where))
    d_sinks = None
    if sinks is not None:
        # The sink is one more logit, whose value is nothing: ds = p * (0 - delta).
        sinks2 = sinks.astype(jnp.float32) * numerics.LOG2_E
        share = jnp.exp2(sinks2[None, :, None] - lse2)
        d_sinks = -(share * delta).sum((0, 2)).astype(sinks.dtype)
    return Operands(d_near, d_far, d_sinks), None


def _launch_query_gradients(
    rules: Rules, tile: Tile, near: Branch, far: Branch | None, d_out, lse2, delta, where: _Where
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N H"]]:
    """Gradients of the near and the far queries; without a far branch the second means nothing."""
    from lminf.kernels.lambda_attention import triton_kernels  # needs triton

    sizes = _sizes(near, far)
    like = jax.ShapeDtypeStruct(near.query.shape, near.query.dtype)
    unused = jax.ShapeDtypeStruct((sizes.batch, 1, 1, 1), near.query.dtype)
    d_query, d_query_far = launch.run(
        launch.Launch(
            triton_kernels.gradient_of_queries,
            (math.ceil(sizes.queries / tile.block_q) * sizes.batch * sizes.heads,),
            [
                *near, *(far or near), d_out, lse2, delta, *where.pointers(),
                sizes.queries, sizes.keys, sizes.far_rows, _window(rules), rules.num_global,
                _clip(rules),
            ],
            [like, unused if far is None else like],
            _constants(rules, near, where, tile) | {"FAR": far is not None, "SCALE": rules.scale},
            tile.warps,
            tile.stages,
            name="lambda_attention_query_gradients",
        )
    )  # fmt: skip
    return d_query, d_query_far


def _launch_key_gradients(
    rules: Rules, tile: Tile, is_far: bool, branch: Branch, d_out, lse2, delta, where: _Where
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """Gradients of one branch's keys and values."""
    from lminf.kernels.lambda_attention import triton_kernels  # needs triton

    sizes = _sizes(branch, None)
    blocks = math.ceil(sizes.keys / tile.block_k)
    programs = blocks * sizes.batch * sizes.key_heads
    chunks = _chunks(programs, sizes.queries) if is_far else 1

    def output(like):
        dtype = like.dtype if chunks == 1 else jnp.float32
        return jax.ShapeDtypeStruct((chunks, *like.shape), dtype)

    d_key, d_value = launch.run(
        launch.Launch(
            triton_kernels.gradient_of_keys,
            (programs * chunks,),
            [
                *branch, d_out, lse2, delta, *where.pointers(),
                sizes.batch, sizes.queries, sizes.keys, _window(rules), rules.num_global,
                _clip(rules), chunks,
            ],
            [output(branch.key), output(branch.value)],
            _constants(rules, branch, where, tile) | {"FAR": is_far, "SCALE": rules.scale},
            tile.warps,
            tile.stages,
            name="lambda_attention_key_gradients",
        )
    )  # fmt: skip
    return d_key.sum(0).astype(branch.key.dtype), d_value.sum(0).astype(branch.value.dtype)


def _chunks(programs: int, queries: int) -> int:
    """Into how many parts the queries of the globals are cut, each with a sum of its own.

    A hundred globals are one block, and every query sees them: uncut, one program a head would walk
    the whole text alone. 256 programs keep a GPU busy; fewer than 1024 queries are not worth a sum.
    """
    return max(1, min(math.ceil(256 / programs), queries // 1024))


_attention = jax.custom_vjp(_attend, nondiff_argnums=(0, 1))
_attention.defvjp(_forward, _backward)
