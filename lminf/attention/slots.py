"""Attention over caches whose slots may hold any token: after eviction, after prompt compression.

Which token a slot holds may differ by key head, so slots carry a position for each head (or one for
all): where the token stands in the text or, under eviction, its number in the cache. A position of
-1 empties a slot; nothing moves. Every filled slot that is not later is seen.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf.attention import cache as caches
from lminf.attention import scores
from lminf.attention.scores import Placement, ScoreConfig
from lminf.errors import InputError


def attention(
    config: ScoreConfig,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    q_pos: Int[Array, "B T"],
    k_pos: Int[Array, "B S P"],
) -> scores.Part:
    """Of queries and keys that are rotated already, over slots that are filled and not later."""
    k_pos, q_pos = k_pos.swapaxes(1, 2)[:, :, None], q_pos[:, None, :, None]
    seen, slopes = (k_pos >= 0) & (k_pos <= q_pos), config.slopes(q.shape[2])
    return scores.attention(config, q, k, v, seen, slopes=slopes, distance=q_pos - k_pos)


# --- Eviction -------------------------------------------------------------------------------------


def extend(
    policy: Any, config: ScoreConfig, layout: caches.SlotCache, positions: Int[Array, "B T"]
) -> Callable[..., tuple[Array, caches.KVState]]:
    """The step of every layer under a policy that evicts. The tokens of a call lie between two
    evictions; before the first after one, `policy.evict` makes room.
    """
    tokens, every = positions.shape[1], policy.evict_every
    if tokens > every:
        raise InputError(
            f"{policy.name} evicts before every {every} tokens, but {tokens} are to be read "
            f"at once; read them in chunks through the cache, or give turn>={tokens}"
        )
    cache_pos = policy.position_in_cache(positions)  # [B, T]
    starts = ((cache_pos >= 0) & (positions % every == 0)).any(1)
    first = jnp.where(cache_pos >= 0, positions, jnp.iinfo(jnp.int32).max).min(1) - every
    since = policy.position_in_cache(jnp.maximum(first, 0))[:, None, None]
    placement = Placement(config, cache_pos, table=layout.slots)
    by_q = placement.rotation(cache_pos)

    def evicted(state):
        new = policy.evict(state, since)
        return {x: jnp.where(starts[:, None, None], new[x], state[x]) for x in new}

    def step(q, k, v, kv, layer):
        layer_state = {name: kv.state[name][layer] for name in ("pos", "score")}
        # Sorting, which most steps of decoding need not do.
        layer_state = jax.lax.cond(starts.any(), evicted, lambda state: state, layer_state)
        slots = _free(layer_state["pos"], tokens)  # [B, T, P]
        slots = jnp.where((cache_pos >= 0)[:, :, None], slots, layout.slots)
        index = _rows(slots), slots, _heads(slots)
        pos = layer_state["pos"].at[index].set(cache_pos[:, :, None], mode="drop")
        score = layer_state["score"].at[index].set(0.0, mode="drop")
        stored_k = _write(kv.k, k, layer, slots)
        stored_v = _write(kv.v, v, layer, slots)
        all_k, all_v = stored_k[layer].astype(k.dtype), stored_v[layer].astype(v.dtype)
        placed = placement.at(all_k, jnp.broadcast_to(pos, all_k.shape[:3]))
        part = attention(config, placement.rotate(q, by_q), placed, all_v, cache_pos, pos)
        new = {"pos": pos, "score": policy.observe_slots(score, part.weights, cache_pos)}
        state = kv.state | {name: kv.state[name].at[layer].set(new[name]) for name in new}
        return part.out, caches.KVState(stored_k, stored_v, state)

    return step


def _free(pos: Int[Array, "B S P"], count: int) -> Int[Array, "B T P"]:
    """Slots that hold nothing, as many as asked for."""
    if count == 1:
        return pos.argmin(1, keepdims=True)
    return jnp.argsort(pos, axis=1)[:, :count]


def _write(stored: Float[Array, "L B S K H"], new: Float[Array, "B T K H"], layer, slots):
    if slots.shape[2] == 1:
        return caches.write(stored, new, layer, slots[:, :, 0])
    index = layer, _rows(slots), slots, _heads(slots)
    return stored.at[index].set(new.astype(stored.dtype), mode="drop")


def _rows(slots: Int[Array, "B T P"]):
    return jnp.arange(len(slots))[:, None, None]


def _heads(slots: Int[Array, "B T P"]):
    return jnp.arange(slots.shape[2])[None, None]


# --- Compressed prompts ---------------------------------------------------------------------------


def last_queries(
    state: dict[str, Array], q: Float[Array, "B T N H"], layer: Any
) -> dict[str, Array]:
    """The state of a prompt that will be compressed, with its last queries, un-rotated."""
    before = state["q"]
    last = jnp.concatenate([before[layer], q.astype(before.dtype)], 1)[:, -before.shape[2] :]
    return {"q": before.at[layer].set(last)}


def extend_compressed(
    config: ScoreConfig,
    layout: caches.CompressedPrompt,
    stored_pos: Int[Array, "B S"],
    positions: Int[Array, "B T"],
) -> tuple[Callable[..., tuple[Array, caches.KVState]], Int[Array, "B S"]]:
    """`attend.extend` over what is left of a prompt, whose keys are rotated and may be narrower,
    and the tokens after it, under one softmax.
    """
    tokens = positions.shape[1]
    every = jnp.arange(1, layout.slots + 1, dtype=jnp.int32)[None]
    filled = jnp.where(stored_pos >= 0, every, 0).max(1, keepdims=True)
    slots = filled + jnp.arange(tokens, dtype=jnp.int32)[None]
    slots = jnp.where(positions >= 0, slots, layout.slots)
    new_pos = caches.write_pos(stored_pos, positions, slots)
    placement = Placement(config, positions)
    by_q, by_k = placement.rotation(positions), placement.rotation(new_pos)

    def step(q, k, v, kv, layer):
        kv = kv._replace(
            k=caches.write(kv.k, k, layer, slots), v=caches.write(kv.v, v, layer, slots)
        )
        old = {name: x[layer] for name, x in kv.state.items()}
        new_k, new_v = kv.k[layer].astype(q.dtype), kv.v[layer].astype(v.dtype)
        q, new_k = placement.rotate(q, by_q), placement.rotate(new_k, by_k)
        narrow = narrowed(q, old["channels"]) if "channels" in old else q
        old_k, old_v = old["k"].astype(q.dtype), old["v"].astype(v.dtype)
        parts = (
            attention(config, narrow, old_k, old_v, positions, old["pos"]),
            attention(config, q, new_k, new_v, positions, new_pos[..., None]),
        )
        return scores.merge(*(part[:2] for part in parts))[0].astype(q.dtype), kv

    return step, new_pos


def narrowed(q: Float[Array, "B T N H"], channels: Int[Array, "B K D"]) -> Float[Array, "B T N D"]:
    """Queries with the channels that their key head kept."""
    grouped = q.reshape(*q.shape[:2], channels.shape[1], -1, q.shape[3])
    taken = jnp.take_along_axis(grouped, channels[:, None, :, None, :], axis=4)
    return taken.reshape(*q.shape[:3], channels.shape[2])
