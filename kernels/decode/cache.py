"""The bounded cache of Λ-attention: the first g keys for ever, the last w keys in a ring.

Position p is kept in ring slot p % w; while p < g it is also kept among the globals. Slots are
head-major, so that one head's keys are one contiguous matrix for whoever reads them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.common import arguments


class RollingCache(NamedTuple):
    """Keys and values of `length` tokens of each row, of which g + w are left.

    Ring keys are rotated to their positions and never touched again. Global keys are what
    `query_global` is to meet: un-rotated where the distance is capped.
    """

    k_global: Float[Array, "B K R H"]
    v_global: Float[Array, "B K R Hv"]
    k_ring: Float[Array, "B K W H"]
    v_ring: Float[Array, "B K W Hv"]
    length: Int[Array, " B"]  # tokens read, the next one's position

    @property
    def num_global(self) -> int:
        return self.k_global.shape[2]

    @property
    def window_size(self) -> int:
        return self.k_ring.shape[2]


class Slots(NamedTuple):
    """Which slots the token at position length - 1 sees."""

    near: Bool[Array, "B W"]
    far: Bool[Array, "B R"]


def empty(
    batch: int, key_heads: int, width: int, *,
    num_global: int, window_size: int, value_width: int | None = None, dtype=jnp.bfloat16,
) -> RollingCache:  # fmt: skip
    """A cache that has read nothing."""
    arguments.count("num_global", num_global, least=0)
    arguments.count("window_size", window_size, least=1)

    def zeros(slots: int, width: int) -> Array:
        return jnp.zeros((batch, key_heads, slots, width), dtype)

    values = width if value_width is None else value_width
    return RollingCache(
        zeros(num_global, width), zeros(num_global, values),
        zeros(window_size, width), zeros(window_size, values),
        jnp.zeros(batch, jnp.int32),
    )  # fmt: skip


def append(
    cache: RollingCache,
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K Hv"],
    *,
    key_global: Float[Array, "B T K H"] | None = None,
    count: Int[Array, " B"] | None = None,
) -> RollingCache:
    """The cache after the next T tokens; of row b only the first count[b], where that is given.

    `key_global` are the same keys as the globals want them (un-rotated where the distance is
    capped); None: as the ring has them.
    """
    batch, key_heads, window, width = cache.k_ring.shape
    _, tokens, _, _ = arguments.shape("key", key, "B T K H", (batch, None, key_heads, width))
    values = cache.v_ring.shape[3]
    arguments.shape("value", value, "B T K Hv", (batch, tokens, key_heads, values))
    if key_global is None:
        key_global = key
    arguments.shape("key_global", key_global, "B T K H", (batch, tokens, key_heads, width))
    if count is None:
        count = jnp.full(batch, tokens, jnp.int32)
    arguments.shape("count", count, "B", (batch,))

    index = jnp.arange(tokens, dtype=jnp.int32)[None]
    count = count.astype(jnp.int32)[:, None]
    position = cache.length[:, None] + index
    # Tokens that this very call pushes out again are not written: two writes to a slot have no
    # order. A slot past the end drops the write.
    kept = (index < count) & (index >= count - window)
    ring = jnp.where(kept, position % window, window)
    first = jnp.where(index < count, position, cache.num_global)
    return RollingCache(
        _write(cache.k_global, first, key_global),
        _write(cache.v_global, first, value),
        _write(cache.k_ring, ring, key),
        _write(cache.v_ring, ring, value),
        cache.length + count[:, 0],
    )


def visible(cache: RollingCache) -> Slots:
    """The slots that the last token read sees, by the positions that they hold.

    A global is seen only from distance w on: until then the ring holds it too.
    """
    query = cache.length[:, None] - 1
    slot = jnp.arange(cache.window_size, dtype=jnp.int32)[None]
    rank = jnp.arange(cache.num_global, dtype=jnp.int32)[None]
    # The ring is full, or its first `length` slots are.
    return Slots(slot <= query, query - rank >= cache.window_size)


def _write(
    stored: Float[Array, "B K S X"], slots: Int[Array, "B T"], fresh: Float[Array, "B T K X"]
) -> Float[Array, "B K S X"]:
    def row(stored, slots, fresh):
        return stored.at[:, slots].set(fresh.swapaxes(0, 1), mode="drop")

    return jax.vmap(row)(stored, slots, fresh.astype(stored.dtype))
