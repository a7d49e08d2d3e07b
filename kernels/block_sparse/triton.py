"""Block-sparse attention in Triton, for NVIDIA and AMD GPUs: grids, tiles, the gradient's formula.

The kernels are in `triton_kernels`; this file decides what they are launched on. A tile lies within
one listed block: blocks larger than a tile are walked in parts, and tiles larger than a block are
cut down to it. The backward recomputes the weights p = 2^(s - lse2) and forms, with
delta = sum(do * out) - d_lse,
    ds = p (do v^T - delta);  dq = ds k;  dk = ds^T q;  dv = p^T do
in one kernel that walks the lists and one that walks them transposed, so that each program owns
what it writes and two runs agree bit for bit.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lminf.kernels.block_sparse import lists as lists_
from lminf.kernels.block_sparse.operands import Lists, Operands, Rules
from lminf.kernels.common import dispatch, launch, numerics
from lminf.kernels.lambda_attention.operands import Residuals
from lminf.kernels.lambda_attention.triton import Config, Tile, config_of


def attention(rules: Rules, operands: Operands, lists: Lists, config: object) -> Residuals:
    """Outputs and log-denominators; differentiable in `operands`, through the LSE too."""
    launch.require()
    _refuse(rules, operands)
    config = dispatch.settled(Config, config, lambda: default_config(rules, operands))
    return Residuals(*_attention(rules, config, operands, lists))


def _refuse(rules: Rules, operands: Operands) -> None:
    """NotImplementedError for what the kernels do not compute."""
    dtypes = {x.dtype for x in operands}
    if len(dtypes) > 1:
        raise NotImplementedError(f"operands of different dtypes: {sorted(map(str, dtypes))}")
    if operands.query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"operands in {operands.query.dtype}")
    width = max(operands.query.shape[3], operands.value.shape[3])
    # In float32 the products of wider heads do not fit the registers.
    widest = 128 if operands.query.dtype == jnp.float32 else 256
    if width > widest:
        raise NotImplementedError(
            f"{operands.query.dtype} heads {width} wide; it takes up to {widest}"
        )
    if rules.scale <= 0:
        raise NotImplementedError(f"scale={rules.scale}: the running maximum needs a positive one")


def default_config(rules: Rules, operands: Operands) -> Config:
    """Tiles that compile without spilling a register for sm_80, sm_90 and sm_100.

    Not tuned: no GPU has run them yet.
    """
    widest = max(operands.query.shape[3], operands.value.shape[3])
    config = _TILES[operands.query.dtype == jnp.float32, _padded(max(widest, 64))]
    if rules.soft_cap is not None:  # tanh takes registers
        rows = min(64, config.forward_block_q)
        config = dataclasses.replace(
            config, forward_block_q=rows, forward_stages=2, keys_block_q=16
        )
    return config


_TILES = {
    # (float32, padded width)
    (False, 64): config_of(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    (False, 128): config_of(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    (False, 256): config_of(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (True, 64): config_of(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (True, 128): config_of(Tile(16, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 4, 1)),
}


def _padded(size: int) -> int:
    """The side of a tile: Triton takes powers of two, and a matrix product at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def _fitted(rules: Rules, config: Config, kernel: str) -> Tile:
    """The configured tile, no larger than the listed blocks."""
    tile = config.tile(kernel)
    return dataclasses.replace(
        tile,
        block_q=min(tile.block_q, _padded(rules.block_q)),
        block_k=min(tile.block_k, _padded(rules.block_kv)),
    )


# --- Which blocks need no mask --------------------------------------------------------------------


def _used(lists: Lists) -> Bool[Array, "B K Q M"]:
    place = jnp.arange(lists.indices.shape[3], dtype=jnp.int32)
    return place[None, None, None] < lists.counts[..., None]


def _spans(rules: Rules, lists: Lists, keys: int) -> Int[Array, "B K Q 2"]:
    """(blocks listed, blocks of them that need no mask): lists ascend, so the clear ones lead."""
    limit = jnp.full(lists.indices.shape[2], keys // rules.block_kv, jnp.int32)
    if rules.causal:
        row = jnp.arange(lists.indices.shape[2], dtype=jnp.int32) * rules.block_q
        limit = jnp.minimum(limit, (row + 1) // rules.block_kv)
    clear = (_used(lists) & (lists.indices < limit[None, None, :, None])).sum(-1, dtype=jnp.int32)
    return jnp.stack([lists.counts, clear], -1)


def _transposed_spans(
    rules: Rules, lists: Lists, starts: Int[Array, "B K starts"], queries: int
) -> Int[Array, "B K kv_blocks 4"]:
    """(start, start of what needs no mask, its end, end) of every transposed list.

    Under causal attention the queries too early come first; the last block may not be whole.
    """
    block = jnp.arange(lists.indices.shape[2], dtype=jnp.int32)[None, None, :, None]
    late = jnp.broadcast_to(block >= queries // rules.block_q, lists.indices.shape)
    early = jnp.zeros_like(late)
    if rules.causal:
        last_key = (lists.indices + 1) * rules.block_kv - 1
        early = ~late & (block * rules.block_q < last_key)
    kv_blocks = starts.shape[2] - 1
    target = jnp.where(_used(lists), lists.indices, kv_blocks)

    def totals(target: Int[Array, "Q M"], counted: Bool[Array, "Q M"]):
        return jnp.zeros(kv_blocks + 1, jnp.int32).at[target].add(counted.astype(jnp.int32))

    early, late = (jax.vmap(jax.vmap(totals))(target, x)[..., :-1] for x in (early, late))
    begin, end = starts[..., :-1], starts[..., 1:]
    return jnp.stack([begin, begin + early, end - late, end], -1)


# --- Launches -------------------------------------------------------------------------------------


def _constants(rules: Rules, operands: Operands, tile: Tile) -> dict:
    unit = (rules.scale if rules.soft_cap is None else rules.soft_cap) * numerics.LOG2_E
    return {
        "HEADS": operands.query.shape[2],
        "KEY_HEADS": operands.key.shape[2],
        "WIDTH": operands.query.shape[3],
        "VALUE_WIDTH": operands.value.shape[3],
        "LIST_Q": rules.block_q,
        "LIST_KV": rules.block_kv,
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "BLOCK_H": _padded(operands.query.shape[3]),
        "BLOCK_V": _padded(operands.value.shape[3]),
        "UNIT": unit,  # from a raw score to the exponent of 2
        "INNER": None if rules.soft_cap is None else rules.scale / rules.soft_cap,
        # An exponent of MASK_VALUE, or somewhat above: MASK * UNIT must not overflow.
        "MASK": numerics.MASK_VALUE / max(unit, 1),
        # float32 products on tensor cores: three of tf32 each, as exact as one of float32.
        "PRECISION": "tf32x3",
        "CAUSAL": rules.causal,
    }


def _programs(length: int, listed_block: int, tile: int, heads: int, batch: int) -> tuple[int]:
    return (math.ceil(length / listed_block) * math.ceil(listed_block / tile) * heads * batch,)


def _attend(rules: Rules, config: Config, operands: Operands, lists: Lists):
    call = functools.partial(_launch_forward, rules, _fitted(rules, config, "forward"))
    return launch.folding_batches(call)(operands, lists)


def _launch_forward(rules: Rules, tile: Tile, operands: Operands, lists: Lists):
    from lminf.kernels.block_sparse import triton_kernels  # needs triton

    batch, queries, heads, _ = operands.query.shape
    spans = _spans(rules, lists, operands.key.shape[1])
    return launch.run(
        launch.Launch(
            triton_kernels.forward,
            _programs(queries, rules.block_q, tile.block_q, heads, batch),
            [
                *operands, lists.indices, spans, queries, operands.key.shape[1],
                lists.indices.shape[3],
            ],
            [
                jax.ShapeDtypeStruct(
                    (batch, queries, heads, operands.value.shape[3]), operands.query.dtype
                ),
                jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
            ],
            _constants(rules, operands, tile)
            | {"CLEAR": rules.block_kv % tile.block_k == 0},
            tile.warps,
            tile.stages,
            name="block_sparse_forward",
        )
    )  # fmt: skip


def _forward(rules: Rules, config: Config, operands: Operands, lists: Lists):
    out, lse = _attend(rules, config, operands, lists)
    return (out, lse), (operands, lists, out, lse)


def _backward(rules: Rules, config: Config, saved, cotangents):
    operands, lists, out, lse = saved
    d_out, d_lse = cotangents
    # d(lse) joins delta: ds = p * (do v^T - delta), and d(lse)/ds = p.
    delta = jnp.einsum("btnh,btnh->bnt", d_out, out, preferred_element_type=jnp.float32) - d_lse
    # A row that saw nothing weighs nothing: 2^(s - 1e38) is 0.
    lse2 = jnp.where(jnp.isneginf(lse), -numerics.EMPTY_MAX, lse * numerics.LOG2_E)
    gradients = [
        launch.folding_batches(functools.partial(call, rules, _fitted(rules, config, kernel)))(
            operands, d_out, lse2, delta, lists
        )
        for call, kernel in ((_launch_query_gradients, "queries"), (_launch_key_gradients, "keys"))
    ]
    return Operands(*gradients[0], *gradients[1]), None


def _launch_query_gradients(
    rules: Rules, tile: Tile, operands: Operands, d_out, lse2, delta, lists: Lists
) -> tuple[Float[Array, "B T N H"]]:
    from lminf.kernels.block_sparse import triton_kernels  # needs triton

    batch, queries, heads, _ = operands.query.shape
    spans = _spans(rules, lists, operands.key.shape[1])
    (d_query,) = launch.run(
        launch.Launch(
            triton_kernels.gradient_of_queries,
            _programs(queries, rules.block_q, tile.block_q, heads, batch),
            [
                *operands, d_out, lse2, delta, lists.indices, spans, queries, operands.key.shape[1],
                lists.indices.shape[3],
            ],
            [jax.ShapeDtypeStruct(operands.query.shape, operands.query.dtype)],
            _constants(rules, operands, tile)
            | {
                "CLEAR": rules.block_kv % tile.block_k == 0,
                "SCALE": rules.scale,
            },
            tile.warps,
            tile.stages,
            name="block_sparse_query_gradients",
        )
    )  # fmt: skip
    return (d_query,)


def _launch_key_gradients(
    rules: Rules, tile: Tile, operands: Operands, d_out, lse2, delta, lists: Lists
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    from lminf.kernels.block_sparse import triton_kernels  # needs triton

    batch, queries = operands.query.shape[:2]
    keys, key_heads = operands.key.shape[1:3]
    names, starts = lists_.transpose(lists, math.ceil(keys / rules.block_kv))
    d_key, d_value = launch.run(
        launch.Launch(
            triton_kernels.gradient_of_keys,
            _programs(keys, rules.block_kv, tile.block_k, key_heads, batch),
            [
                *operands, d_out, lse2, delta, names,
                _transposed_spans(rules, lists, starts, queries), queries, keys, names.shape[2],
            ],
            [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[1:]],
            _constants(rules, operands, tile)
            | {
                "CLEAR": rules.block_q % tile.block_q == 0,
                "SCALE": rules.scale,
            },
            tile.warps,
            tile.stages,
            name="block_sparse_key_gradients",
        )
    )  # fmt: skip
    return d_key, d_value


_attention = jax.custom_vjp(_attend, nondiff_argnums=(0, 1))
_attention.defvjp(_forward, _backward)
