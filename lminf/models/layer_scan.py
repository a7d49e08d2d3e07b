"""The scan over a decoder's layers. One step is a period of the pattern of policies.

With caches, the keys and values of all layers of one layout pass through the scan in one of two
forms:

    in place    the scan carries the arrays of all layers, and each layer writes its own row
    sliced      the scan takes each layer's arrays apart and stacks what the layers return
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lminf.attention import attend, cache
from lminf.attention.context_parallel import shares_slots
from lminf.attention.policy import LayerPolicy
from lminf.errors import InputError
from lminf.types import Hidden, Params

KV: TypeAlias = Any  # cache.KVState, of one layer or of all; None without a cache
Options: TypeAlias = Callable[[Any], dict[str, Any]]  # row of its arrays -> of `attend`
Attend: TypeAlias = Callable[..., tuple[Array, KV]]  # (q, k, v, kv, row)
# (block, x, its parameters, attend, kv, row) -> x, kv, what the layer sowed
RunLayer: TypeAlias = Callable[[Any, Hidden, Params, Attend, KV, Any], tuple[Hidden, KV, Any]]


class LayerAttention(NamedTuple):
    """How one layer of a period attends, and the keys and values of all layers like it."""

    attend: Attend
    kv: KV = None
    in_place: bool = True


def thresholds_of(policy: LayerPolicy) -> tuple[int, ...]:
    """The policy's layer_thresholds; a mix of heads has none."""
    return getattr(policy, "layer_thresholds", ())


def index_of(policies: Sequence[LayerPolicy], layer: int) -> Options:
    """What the attention of a place in a period is told of its layer: which of all layers with its
    policy it is, where that changes anything.
    """
    alike = [position for position, policy in enumerate(policies) if policy == policies[layer]]
    if not thresholds_of(policies[layer]):
        return lambda row: {}
    return lambda row: {"layer_index": row * len(alike) + alike.index(layer)}


def without_cache(prefill: attend.Prefill, options: Options = lambda row: {}) -> LayerAttention:
    """Attention of a text over itself."""
    return LayerAttention(
        lambda q, k, v, kv, row, **sinks: (prefill(q, k, v, **sinks, **options(row)), kv)
    )


def with_cache(
    extend: attend.Extend, options: Options, layer_cache: cache.Cache, tokens: int, devices: int
) -> LayerAttention:
    """Attention of `tokens` new tokens over a cache whose slots are on so many devices.

    One token is written into the arrays of all layers in place, and so is what was gathered from
    several devices. A longer chunk that overwrites slots which it also reads would make XLA copy
    all layers in every layer, so it is sliced.
    """

    def extend_row(q, k, v, kv, row, **sinks):
        return extend(q, k, v, kv, row, **sinks, **options(row))

    layout = layer_cache.layout
    if tokens == 1 or layout.keeps_all or shares_slots(layout, devices):
        return LayerAttention(extend_row, layer_cache.kv)

    def extend_slice(q, k, v, kv, row, **sinks):
        kv = jax.tree.map(lambda x: x[None], kv)
        out, kv = extend(q, k, v, kv, jnp.int32(0), **sinks, **options(row))
        return out, jax.tree.map(lambda x: x[0], kv)

    return LayerAttention(extend_slice, layer_cache.kv, in_place=False)


def scan_layers(
    run_layer: RunLayer,
    x: Hidden,
    stages: Sequence[tuple[Any, Params]],
    period: Sequence[LayerAttention],
) -> tuple[Hidden, list[KV], dict[str, Any]]:
    """Hidden states after all layers, keys and values of each layer of the period, and what the
    layers sowed, [L, ...] each.

    A stage is a block and the stacked parameters of its layers; a model whose first layers are
    dense has two.
    """
    in_place = [layer.kv if layer.in_place else None for layer in period]
    sliced = [None if layer.in_place else layer.kv for layer in period]
    first, sliced_by_stage, sown_by_stage = 0, [], []
    for block, params in stages:
        layers = jax.tree.leaves(params)[0].shape[0]
        if layers % len(period):
            raise InputError(
                f"a pattern of {len(period)} policies does not divide the {layers} layers of one "
                f"kind that it repeats over; give one whose length divides {layers}"
            )
        rows = slice(first, first := first + layers // len(period))
        step, scanned_params = _one_period(partial(run_layer, block), period, params, rows)
        (x, in_place), (stage_sliced, sown) = jax.lax.scan(
            step,
            (x, in_place),
            (
                scanned_params,
                jnp.arange(rows.start, rows.stop, dtype=jnp.int32),
                jax.tree.map(lambda leaf, rows=rows: leaf[rows], sliced),
            ),
        )
        sliced_by_stage.append(stage_sliced)
        sown_by_stage.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), sown))
    sliced_kv = _concatenated(sliced_by_stage)
    kv = [carried or stacked for carried, stacked in zip(in_place, sliced_kv, strict=True)]
    sown = {
        name: _concatenated([stage[name] for stage in sown_by_stage if name in stage])
        for name in sown_by_stage[-1]
    }
    return x, kv, sown


def _one_period(
    run_layer: Callable[..., tuple[Hidden, KV, Any]],
    period: Sequence[LayerAttention],
    stacked: Params,
    rows: slice,
) -> tuple[Callable[..., Any], Params | None]:
    """The scan's step, and the parameters that the scan slices for it, [periods, period, ...]."""
    length = len(period)
    # Gradients need parameters that the scan slices. With caches the reshape would copy all of them
    # on every call: 425 MB a token in SmolLM2-135M.
    scanned_params = None
    if all(layer.kv is None for layer in period):
        scanned_params = jax.tree.map(lambda w: w.reshape(-1, length, *w.shape[1:]), stacked)

    def params_of(params, row, layer):
        if params is not None:
            return jax.tree.map(lambda w: w[layer], params)
        return jax.tree.map(lambda w: w[(row - rows.start) * length + layer], stacked)

    def step(carry, scanned):
        x, in_place = carry
        params, row, sliced = scanned
        in_place, sliced, sown = list(in_place), list(sliced), []
        for layer, attention in enumerate(period):
            kv = in_place if attention.in_place else sliced
            x, kv[layer], layer_sown = run_layer(
                x, params_of(params, row, layer), attention.attend, kv[layer], row
            )
            sown.append(layer_sown)
        return (x, in_place), (sliced, jax.tree.map(lambda *leaves: jnp.stack(leaves), *sown))

    return step, scanned_params


def _concatenated(stages: Sequence[Any]) -> Any:
    """Trees of one structure, their arrays concatenated along axis 0."""
    if len(stages) == 1:
        return stages[0]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stages)
