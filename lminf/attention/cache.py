"""Key-value caches: fixed numbers of slots that say which position each of them holds.

Keys are stored as the model projects them, before any rotation, because where a key seems to be
depends on the policy and on the query; writing may settle them (lminf.attention.settled).
`pos = -1` marks an empty slot. Which slot a position goes to is a rule of the layout; masks come
from `pos`, never from slot numbers.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf.attention import policies

EMPTY = -1


@dataclass(frozen=True)
class Append:
    """Every token stays. Slot = position."""

    capacity: int  # tokens

    @property
    def slots(self) -> int:
        return self.capacity

    def slot(self, pos: Int[Array, "B T"]) -> Int[Array, "B T"]:
        return pos

    def keeps(self, pos: Int[Array, "B T"], end: Int[Array, "B 1"]) -> Array:
        """Of the tokens at `pos`, with `end` the first position not read yet: which to write."""
        return pos >= 0


@dataclass(frozen=True)
class SinkRing:
    """The first `sinks` tokens stay; the last `window` others take turns in a ring."""

    sinks: int  # tokens
    window: int  # tokens

    @property
    def slots(self) -> int:
        return self.sinks + self.window

    def slot(self, pos: Int[Array, "B T"]) -> Int[Array, "B T"]:
        return jnp.where(pos < self.sinks, pos, self.sinks + (pos - self.sinks) % self.window)

    def keeps(self, pos: Int[Array, "B T"], end: Int[Array, "B 1"]) -> Array:
        # Tokens that this very chunk pushes out again are not written: two writes to one slot
        # have no order.
        return (pos >= 0) & ((pos < self.sinks) | (pos >= end - self.window))


@dataclass(frozen=True)
class Slots:
    """A fixed number of slots, any of which may hold any token: a policy's own state says which."""

    slots: int


ByPosition: TypeAlias = Append | SinkRing  # a token's position says where it goes


@dataclass(frozen=True)
class Settled:
    """The slots of `layout`, keys after the first rotated to slot numbers: what writing reads."""

    layout: ByPosition

    @property
    def slots(self) -> int:
        return self.layout.slots

    @property
    def first(self) -> int:
        """Slots of the first tokens, whose keys are un-rotated."""
        return self.layout.sinks if isinstance(self.layout, SinkRing) else 0


Layout: TypeAlias = ByPosition | Slots | Settled


class Held(NamedTuple):
    """What layers hold, or one of them [1, ...]: a layer's step takes it and gives it back."""

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]
    extra: Any = ()  # whatever else a policy remembers: a pytree of arrays [L, ...]


class Sizes(NamedTuple):
    """What a policy must know to make room for what it remembers."""

    batch: int
    slots: int
    heads: int  # of queries
    kv_heads: int
    head_dim: int
    dtype: Any
    width: int = 0  # of the model; 0 where there is none, only attention


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "pos", "extra"],
    meta_fields=["layout"],
)
@dataclass(frozen=True)
class Cache:
    """What layers of one layout remember. Empty slots hold zeros and pos = -1."""

    k: Float[Array, "L B S K H"]  # un-rotated, unless settled
    v: Float[Array, "L B S K H"]
    pos: Int[Array, "B S"]
    layout: Layout
    extra: Any = ()  # of the policies that remember more: a pytree of arrays [L, ...]

    @property
    def held(self) -> Held:
        return Held(self.k, self.v, self.extra)


def layout_for(policy: policies.LayerPolicy, capacity: int) -> Layout:
    """The smallest layout that a policy can run on; `capacity` bounds the unbounded ones."""
    if isinstance(policy, policies.ByContent):
        return policy.layout(capacity)
    parts = policy.policies if isinstance(policy, policies.PerHead) else (policy,)
    sinks, window = 0, 0
    for part in parts:
        if part.near_width is None or part.far_count is None:
            return Append(capacity)
        sinks, window = max(sinks, part.far_count), max(window, part.near_width)
    return SinkRing(sinks, window)


def empty(
    layout: Layout, *, layers: int, batch: int, kv_heads: int, head_dim: int, dtype, extra: Any = ()
) -> Cache:
    """`extra` is what one layer remembers besides, as `policies.ByContent.extra` gives it."""
    shape = (layers, batch, layout.slots, kv_heads, head_dim)
    return Cache(
        jnp.zeros(shape, dtype),
        jnp.zeros(shape, dtype),
        jnp.full((batch, layout.slots), EMPTY, jnp.int32),
        layout,
        jax.tree.map(lambda x: jnp.broadcast_to(x, (layers, *x.shape)), extra),
    )


def repeated(stored: Cache, rows: int) -> Cache:
    """A cache of one row as that of `rows` rows that have read the same."""

    def each(x):  # [L, 1, ...]
        return jnp.broadcast_to(x, (x.shape[0], rows, *x.shape[2:]))

    pos = jnp.broadcast_to(stored.pos, (rows, *stored.pos.shape[1:]))
    return Cache(
        each(stored.k), each(stored.v), pos, stored.layout, jax.tree.map(each, stored.extra)
    )


def destinations(layout: ByPosition, pos: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Slot that each new token is written to; past the end for those that are not stored."""
    end = pos[:, -1:] + 1
    return jnp.where(layout.keeps(pos, end), layout.slot(pos), layout.slots)


def write(
    stored: Float[Array, "L B S K H"], new: Float[Array, "B T K H"], layer, slots: Int[Array, "B T"]
) -> Float[Array, "L B S K H"]:
    """`stored` with layer `layer`'s new rows in place."""
    rows = jnp.arange(new.shape[0])[:, None]
    return stored.at[layer, rows, slots].set(new.astype(stored.dtype), mode="drop")


def write_pos(stored: Int[Array, "B S"], pos: Int[Array, "B T"], slots) -> Int[Array, "B S"]:
    rows = jnp.arange(pos.shape[0])[:, None]
    return stored.at[rows, slots].set(pos.astype(stored.dtype), mode="drop")
