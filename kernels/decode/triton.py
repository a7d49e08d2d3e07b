"""Λ-decoding in Triton, for NVIDIA and AMD GPUs: one pass over g + w slots, cut into parts.

One token and a few heads would keep a handful of multiprocessors busy, so the slots are cut until
there is a program for each; a second kernel merges what they found. The query heads of a key head
are the rows of one matrix product, padded to the 16 that tensor cores want, so slots are read once.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf.kernels.common import dispatch, launch, numerics
from lminf.kernels.decode import cache as caches
from lminf.kernels.decode import xla
from lminf.kernels.decode.cache import RollingCache
from lminf.kernels.decode.operands import DecodeResiduals, Places, Queries, Rules


@dataclass(frozen=True)
class Config:
    """Sizes of the tiles, and how many programs the slots are cut for."""

    block_k: int = 64  # slots
    programs: int = 264  # two for each multiprocessor of an H100
    warps: int = 4
    stages: int = 3


def decode(
    rules: Rules, queries: Queries, cache: RollingCache, places: Places, config: object
) -> DecodeResiduals:
    """Outputs and log-denominators; statistics in float32. Stacked caches: not under vmap."""
    launch.require()
    arrays = (queries.near, queries.far, *cache[:4])
    launch.refuse_operands(arrays, rules.scale, widest=256, float32=256)
    group = queries.near.shape[1] // cache.k_ring.shape[-3]
    if group > 64:
        raise NotImplementedError(f"{group} query heads a key head; it takes up to 64")
    default = Config()
    if queries.near.dtype == jnp.float32 or max(x.shape[-1] for x in arrays) > 128:
        default = dataclasses.replace(default, block_k=32, stages=2)
    config = dispatch.settled(Config, config, lambda: default)
    return DecodeResiduals(*_decode(rules, config, queries, cache, places))


class _Where(NamedTuple):
    """What is seen of the slots, and how far away, with the batch axis first."""

    length: Int[Array, " B"]
    seen: caches.Seen
    slopes: Float[Array, "B N"] | None  # in units of raw scores
    far_distance: Float[Array, "B R"] | None


def _compute(rules: Rules, config: Config, queries: Queries, cache: RollingCache, places: Places):
    heads = queries.near.shape[:2]
    if queries.sinks is not None:
        queries = queries._replace(sinks=jnp.broadcast_to(queries.sinks, heads))
    one, slopes, far_distance = cache.of(places.layer), places.alibi_slopes, None
    if slopes is not None:
        slopes = jnp.broadcast_to(slopes.astype(jnp.float32) / rules.scale, heads)
        far_distance = caches.far_distances(rules, one, places)
    where = _Where(one.length, caches.seen(one, places), slopes, far_distance)
    run = functools.partial(_launch, rules, config, places.layer)
    return (run if places.layer is not None else launch.folding_batches(run))(
        queries, cache._replace(length=None), where
    )


def _launch(rules: Rules, config: Config, layer, queries: Queries, cache, where: _Where):
    from lminf.kernels.decode import triton_kernels  # needs triton

    batch, heads, width = queries.near.shape
    key_heads, window, value_width = cache.v_ring.shape[-3:]
    ranks = cache.num_global
    tiles = math.ceil(ranks / config.block_k) + math.ceil(window / config.block_k)
    splits = min(tiles, math.ceil(config.programs / (batch * key_heads)))
    unit = (rules.scale if rules.soft_cap is None else rules.soft_cap) * numerics.LOG2_E
    mask = numerics.MASK_VALUE / max(unit, 1)
    ring = (cache.k_ring, cache.v_ring)
    statistics = jax.ShapeDtypeStruct((splits, batch, heads), jnp.float32)
    parts = launch.run(
        launch.Launch(
            triton_kernels.parts,
            (splits * batch * key_heads,),
            [
                queries.near, queries.far, *((cache.k_global, cache.v_global) if ranks else ring),
                *ring, where.length, *where.seen,
                where.length if layer is None else layer[None],
                *(where.length if x is None else x for x in (where.slopes, where.far_distance)),
                batch, ranks, window, splits,
            ],
            [
                jax.ShapeDtypeStruct((splits, batch, heads, value_width), jnp.float32),
                statistics, statistics,
            ],
            {
                "HEADS": heads,
                "KEY_HEADS": key_heads,
                "WIDTH": width,
                "VALUE_WIDTH": value_width,
                "BLOCK_M": launch.padded(heads // key_heads),
                "BLOCK_K": config.block_k,
                "BLOCK_H": launch.padded(width),
                "BLOCK_V": launch.padded(value_width),
                "UNIT": unit,
                "INNER": None if rules.soft_cap is None else rules.scale / rules.soft_cap,
                "MASK": mask,
                # float32 products on tensor cores: three of tf32 each, as exact as one of float32.
                "PRECISION": "tf32x3",
                "FAR": ranks > 0,
                "LAYERS": layer is not None,
                "ALIBI": where.slopes is not None,
            },
            config.warps,
            config.stages,
            name="lambda_decode_parts",
        )
    )  # fmt: skip
    sinks = queries.sinks
    return launch.run(
        launch.Launch(
            triton_kernels.combine,
            (batch * heads,),
            [*parts, parts[1] if sinks is None else sinks, batch, splits],
            [
                jax.ShapeDtypeStruct((batch, heads, value_width), queries.near.dtype),
                jax.ShapeDtypeStruct((batch, heads), jnp.float32),
            ],
            {
                "HEADS": heads,
                "VALUE_WIDTH": value_width,
                "BLOCK_S": 1 << (splits - 1).bit_length(),
                "BLOCK_V": launch.padded(value_width),
                "EMPTY": mask * unit / 2,
                "SINKS": sinks is not None,
            },
            4,
            1,
            name="lambda_decode_combine",
        )
    )


def _forward(rules: Rules, config: Config, *operands):
    return _compute(rules, config, *operands), operands


def _backward(rules: Rules, config: Config, saved, cotangents):
    return xla.gradients(rules, saved, DecodeResiduals(*cotangents))


_decode = jax.custom_vjp(_compute, nondiff_argnums=(0, 1))
_decode.defvjp(_forward, _backward)
