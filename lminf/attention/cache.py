"""Key-value caches: fixed numbers of slots that say which position each of them holds.

Keys are stored as the model projects them, before any rotation, because where a key seems to be
depends on the policy and on the query; decoding may rotate them once (lminf.attention.decode).
`pos = -1` marks an empty slot. Which slot a position goes to is a rule of the layout; masks come
from `pos`, never from slot numbers.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lminf.attention.policy import LayerPolicy, head_policies

EMPTY = -1


@dataclass(frozen=True)
class SinkRingCache:
    """The first `sinks` tokens stay, in order; the last `window` others take turns in a ring."""

    sinks: int  # tokens
    window: int = 0  # tokens; 0: every token stays, and there is room for `sinks`

    @property
    def slots(self) -> int:
        return self.sinks + self.window

    @property
    def keeps_all(self) -> bool:
        return not self.window

    def slot(self, pos: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """Where tokens at these positions are; past the end if there is no room."""
        if self.keeps_all:
            return pos
        return jnp.where(pos < self.sinks, pos, self.sinks + (pos - self.sinks) % self.window)

    def destinations(self, pos: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """Slot that each new token is written to; past the end for those that are not stored."""
        kept = pos >= 0
        if not self.keeps_all:
            # Tokens that this very chunk pushes out again are not written: two writes to one slot
            # have no order.
            kept &= (pos < self.sinks) | (pos > pos[:, -1:] - self.window)
        return jnp.where(kept, self.slot(pos), self.slots)


@dataclass(frozen=True)
class SlotCache:
    """A fixed number of slots, any of which may hold any token; a policy's own state says which, or
    what is kept besides.
    """

    slots: int
    keeps_all = False


@dataclass(frozen=True)
class PreRotated:
    """A ring of the last `window` keys, rotated, and the sinks where they seem, with their values.
    One of them is the cache's k and v, as [L, B, K, S, H] in memory, and the other its state.
    """

    window: int  # tokens
    sinks: int  # tokens
    ring: bool  # whether k and v are the ring
    spare: int = 0  # tokens of the ring that no window reaches
    keeps_all = False

    def ring_positions(self, last: Int[Array, "B 1"]) -> Int[Array, "B S"]:
        """Positions that the slots of the ring hold after the token at `last`; below 0: none."""
        return last - (last - jnp.arange(self.window, dtype=jnp.int32)[None]) % self.window

    def ordered(self, ring: Any, sinks: Any) -> tuple[Any, Any]:
        """What is k and v, and what is the state; and from these the ring and the sinks."""
        return (ring, sinks) if self.ring else (sinks, ring)


Layout: TypeAlias = SinkRingCache | SlotCache | PreRotated


class KVState(NamedTuple):
    """What layers hold, or one of them [1, ...]: a layer's step takes it and gives it back."""

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]
    state: Any = ()  # whatever else a policy remembers: a pytree of arrays [L, ...]


class CacheShape(NamedTuple):
    """What a policy must know to make room for what it remembers."""

    batch: int
    slots: int  # the most tokens that there will ever be
    heads: int  # of queries
    kv_heads: int
    head_dim: int
    dtype: Any
    width: int = 0  # of the model; 0 where there is none, only attention


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "pos", "state"],
    meta_fields=["layout"],
)
@dataclass(frozen=True)
class Cache:
    """What layers of one layout remember. Empty slots hold zeros and pos = -1."""

    k: Float[Array, "L B S K H"]  # un-rotated, unless the layout says otherwise
    v: Float[Array, "L B S K H"]
    pos: Int[Array, "B S"]
    layout: Layout
    state: Any = ()  # of the policies that remember more: a pytree of arrays [L, ...]

    @property
    def kv(self) -> KVState:
        return KVState(self.k, self.v, self.state)

    def updated(self, kv: KVState, pos: Int[Array, "B S"]) -> "Cache":
        """The cache with what the layers gave back."""
        return Cache(kv.k, kv.v, pos, self.layout, kv.state)

    def for_decoding(self, *, free: bool = False) -> "Cache":
        """Rotated keys and their values as the kernel reads them, [L, B, K, S, H]. With `free`
        arrays that were copied are given up at once: inside a program that decodes, the reshape
        would copy all layers with each token.
        """
        if not isinstance(self.layout, PreRotated):
            return self

        def by_head(x: Any) -> Any:
            turned = x.reshape(*x.shape[:2], x.shape[3], x.shape[2], x.shape[4])
            if free:
                turned.block_until_ready()
                x.delete()
            return turned

        return Cache(by_head(self.k), by_head(self.v), self.pos, self.layout, self.state)


def layout_for(policy: LayerPolicy, capacity: int) -> SinkRingCache | SlotCache:
    """The smallest layout that a policy can run on; `capacity` bounds the unbounded ones."""
    layout = policy.cache_layout(capacity)
    if layout is not None:
        return layout
    if not policy.bounded:
        return SinkRingCache(capacity)
    parts = head_policies(policy)
    return SinkRingCache(max(p.num_sinks for p in parts), max(p.window for p in parts))


def create(policy: LayerPolicy, shape: CacheShape, *, layers: int) -> Cache:
    """A cache that has read nothing; `shape.slots` is what bounds an unbounded policy."""
    layout = layout_for(policy, shape.slots)
    size = (layers, shape.batch, layout.slots, shape.kv_heads, shape.head_dim)
    k, v = (jnp.zeros(size, shape.dtype) for _ in "kv")
    pos = jnp.full((shape.batch, layout.slots), EMPTY, jnp.int32)
    state = policy.init_state(shape._replace(slots=layout.slots))
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (layers, *x.shape)), state)
    return Cache(k, v, pos, layout, state)


def rewindable(cache: Cache, spare: int) -> Cache:
    """A copy that may go back by `spare` tokens: its ring has as many slots more, so that what is
    read and taken back overwrites nothing that the window still needs.
    """
    layout = cache.layout
    if not isinstance(layout, SinkRingCache) or layout.keeps_all:
        return jax.tree.map(jnp.copy, cache)
    wide = SinkRingCache(layout.sinks, layout.window + spare)
    slots = jnp.where(cache.pos >= 0, wide.slot(cache.pos), wide.slots)
    row = jnp.arange(len(slots), dtype=jnp.int32)[:, None]

    def moved(x):  # [L, B, S, K, H]
        empty = jnp.zeros((*x.shape[:2], wide.slots, *x.shape[3:]), x.dtype)
        return empty.at[:, row, slots].set(x, mode="drop")

    pos = jnp.full((len(slots), wide.slots), EMPTY, jnp.int32)
    pos = write_pos(pos, cache.pos, slots)
    return Cache(moved(cache.k), moved(cache.v), pos, wide, jax.tree.map(jnp.copy, cache.state))


@jax.jit
def _rewound(pos: Int[Array, "B S"], lengths: Int[Array, " B"]) -> Int[Array, "B S"]:
    return jnp.where(pos < lengths[:, None], pos, EMPTY)


def rewound(cache: Cache, lengths: Int[Array | np.ndarray, " B"]) -> Cache:
    """The cache after the first `lengths` tokens of each row; keys and values of later ones stay in
    their slots until others are written there.
    """
    return dataclasses.replace(cache, pos=_rewound(cache.pos, lengths))


def rows(x: Float[Array, "B S K H"], index: Int[Array, "B R"]) -> Float[Array, "B R K H"]:
    """x at these rows. take_along_axis would look up every channel by itself."""
    return x[jnp.arange(len(index))[:, None], index]


def write(
    stored: Float[Array, "L B S K H"],
    new: Float[Array, "B T K H"],
    layer: Any,
    slots: Int[Array, "B T"] | Int[Array, "B T K"],
) -> Float[Array, "L B S K H"]:
    """`stored` with layer `layer`'s new rows in place, which may differ by key head."""
    row, layer = jnp.arange(len(new))[:, None], jnp.asarray(layer, jnp.int32)
    index = layer, row, slots
    if slots.ndim == 3:
        index = layer, row[..., None], slots, jnp.arange(slots.shape[2])[None, None]
    new = new.astype(stored.dtype)
    if new.shape[1] == 1 and jax.default_backend() == "cpu":
        # XLA's CPU backend merges the write of one row with what reads the cache next, into a copy
        # of all slots. Two rows, of which one is dropped, it writes first, and in place.
        new = jnp.concatenate([new, new], 1)
        dropped = jnp.full_like(slots, stored.shape[2])
        index = (*index[:2], jnp.concatenate([slots, dropped], 1), *index[3:])
    if stored.dtype.itemsize == 2 and jax.default_backend() == "cpu":
        return _written_as_bits(stored, new, index)
    return stored.at[index].set(new, mode="drop")


@jax.custom_jvp
def _written_as_bits(stored: Array, new: Array, index: tuple[Array, ...]) -> Array:
    """`stored.at[index].set(new)`. XLA's CPU backend scatters bfloat16 in float32: it would convert
    the caches of all layers there and back in every layer. Integers it writes in place. Reading
    8,192 tokens of SmolLM2-135M under Full took 48 s of processor time, 66 before (Intel Xeon).
    """
    bits, rows = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (stored, new))
    return jax.lax.bitcast_convert_type(bits.at[index].set(rows, mode="drop"), stored.dtype)


@_written_as_bits.defjvp
def _(primals, tangents):
    def written(stored, new):
        return stored.at[primals[2]].set(new, mode="drop")

    return _written_as_bits(*primals), jax.jvp(written, primals[:2], tangents[:2])[1]


def first_positions(batch: int, count: int) -> Int[Array, "B R"]:
    return jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))


def write_pos(
    stored: Int[Array, "B S"], pos: Int[Array, "B T"], slots: Int[Array, "B T"]
) -> Int[Array, "B S"]:
    """`stored` with the positions of new tokens in their slots."""
    row = jnp.arange(len(pos))[:, None]
    return stored.at[row, slots].set(pos.astype(stored.dtype), mode="drop")
