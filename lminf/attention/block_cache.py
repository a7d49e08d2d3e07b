"""Blocks of a store that are at hand: a few slots, of which the least recently used is given away.

A policy that looks blocks up asks for the same ones again and again. What it asks for is fetched
from the store once and stays in a slot until the slot is needed, so what the store is read for is
the blocks that were missing. Slots hold copies of the store, so how many there are changes what is
fetched and nothing else.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

EMPTY = -1


class Resident(NamedTuple):
    """The slots of all layers; `fetched` counts what the store was read for."""

    k: Float[Array, "L B R W K H"]
    v: Float[Array, "L B R W K H"]
    block: Int[Array, "L B R"]  # EMPTY where there is none
    used: Int[Array, "L B R"]  # the number of the last call that asked for it
    fetched: Int[Array, "L B"]  # blocks


def empty(*, batch: int, slots: int, block: int, kv_heads: int, head_dim: int, dtype) -> Resident:
    """Slots of one layer, [B, …], with nothing in them."""
    rows = jnp.zeros((batch, slots, block, kv_heads, head_dim), dtype)
    nothing = jnp.full((batch, slots), EMPTY, jnp.int32)
    return Resident(rows, rows, nothing, nothing, jnp.zeros(batch, jnp.int32))


def ask(
    held: Resident,
    layer,
    wanted: Int[Array, "B M"],
    some: Bool[Array, "B M"],
    load: Callable[[Array, Array], tuple[Array, Array]],
) -> tuple[Float[Array, "B M W K H"], Float[Array, "B M W K H"], Resident]:
    """Keys and values of the different blocks `wanted` where `some`, anything elsewhere; and the
    slots after it. There are at least M slots; `load(row, block)` reads the store, k and v [W K H].
    """
    block, used = held.block[layer], held.used[layer]
    there = (block[:, None] == wanted[:, :, None]) & some[:, :, None]  # [B, M, R]
    is_there, its_slot = there.any(-1), there.argmax(-1).astype(jnp.int32)
    now = used.max(-1, keepdims=True) + 1
    used = jnp.where(there.any(1), now, used)
    # Of those not asked for now, the one that waited longest goes first; of equals the first slot.
    oldest = jnp.argsort(used, axis=-1, stable=True).astype(jnp.int32)
    missing = some & ~is_there
    turn = jnp.cumsum(missing, axis=-1, dtype=jnp.int32) - 1
    given = jnp.take_along_axis(oldest, jnp.maximum(turn, 0), -1)
    slot = jnp.where(is_there, its_slot, given)
    row = jnp.arange(len(wanted), dtype=jnp.int32)[:, None]
    at = jnp.where(missing, slot, block.shape[-1])
    block = block.at[row, at].set(wanted, mode="drop")
    used = used.at[row, at].set(jnp.broadcast_to(now, at.shape), mode="drop")

    # One missing block after another, and none that is there.
    order = jnp.argsort(~missing.reshape(-1), stable=True).astype(jnp.int32)

    def fetch(index, kv):
        r, m = jnp.divmod(order[index], wanted.shape[1])
        new = load(r, wanted[r, m])
        start = (layer, r, slot[r, m], 0, 0, 0)
        return tuple(
            jax.lax.dynamic_update_slice(x, part[None, None, None].astype(x.dtype), start)
            for x, part in zip(kv, new, strict=True)
        )

    count = missing.sum(dtype=jnp.int32)
    k, v = jax.lax.fori_loop(jnp.int32(0), count, fetch, (held.k, held.v))
    held = Resident(
        k,
        v,
        held.block.at[layer].set(block),
        held.used.at[layer].set(used),
        held.fetched.at[layer].add(missing.sum(-1, dtype=jnp.int32)),
    )
    return k[layer, row, slot], v[layer, row, slot], held
