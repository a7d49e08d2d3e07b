"""The bounded cache of Λ-attention: the first g keys for ever, the last w keys in a ring.

Position p is kept in ring slot p % w; while p < g it is also kept among the globals. Slots are
head-major, so that one head's keys are one contiguous matrix for whoever reads them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf.kernels.common import arguments
from lminf.kernels.decode.operands import Places, Rules


class RollingCache(NamedTuple):
    """Keys and values of `length` tokens of each row, of which g + w are left. Caches of L layers,
    stacked, have an axis L in front of every array; `append` and `lambda_decode` then take a layer.

    Ring keys are rotated to their positions and never touched again. Global keys are what
    `query_global` is to meet: un-rotated where the distance is capped.
    """

    k_global: Float[Array, "*L B K R H"]
    v_global: Float[Array, "*L B K R Hv"]
    k_ring: Float[Array, "*L B K W H"]
    v_ring: Float[Array, "*L B K W Hv"]
    length: Int[Array, "*L B"]  # tokens read, the next one's position

    @property
    def num_global(self) -> int:
        return self.k_global.shape[-2]

    @property
    def window_size(self) -> int:
        return self.k_ring.shape[-2]

    def of(self, layer: Int[Array, ""] | None) -> "RollingCache":
        """One layer of stacked caches."""
        if layer is None:
            return self
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, False), self)


class Seen(NamedTuple):
    """What the token at position length - 1 sees: the last `near` tokens, which the ring holds,
    and the first `far` rows of the globals.
    """

    near: Int[Array, "B K"]
    far: Int[Array, "B K"]


def empty(
    batch: int, key_heads: int, width: int, *,
    num_global: int, window_size: int, value_width: int | None = None, dtype: Any = jnp.bfloat16,
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
    layer: int | Int[Array, ""] | None = None,
) -> RollingCache:
    """The cache after the next T tokens; of row b only the first count[b], where that is given.

    `key_global` are the same keys as the globals want them (un-rotated where the distance is
    capped); None: as the ring has them. With `layer`, the tokens are that layer's of stacked
    caches: in a loop that carries these, or where they are donated, only new rows are written.
    """
    batch, key_heads, window, width = cache.k_ring.shape[-4:]
    _, tokens, _, _ = arguments.shape("key", key, "B T K H", (batch, None, key_heads, width))
    values = cache.v_ring.shape[-1]
    arguments.shape("value", value, "B T K Hv", (batch, tokens, key_heads, values))
    if key_global is None:
        key_global = key
    arguments.shape("key_global", key_global, "B T K H", (batch, tokens, key_heads, width))
    if count is None:
        count = jnp.full(batch, tokens, jnp.int32)
    arguments.shape("count", count, "B", (batch,))

    index = jnp.arange(tokens, dtype=jnp.int32)[None]
    count = count.astype(jnp.int32)[:, None]
    length = cache.length if layer is None else cache.length[layer]
    position = length[:, None] + index
    # Tokens that this very call pushes out again are not written: two writes to a slot have no
    # order. A slot past the end drops the write.
    kept = (index < count) & (index >= count - window)
    ring = jnp.where(kept, position % window, window)
    first = jnp.where(index < count, position, cache.num_global)
    prefix = () if layer is None else (jnp.asarray(layer, jnp.int32),)
    prefix = (*prefix, jnp.arange(batch, dtype=jnp.int32)[:, None], slice(None))

    def write(stored: Array, slots: Int[Array, "B T"], fresh: Float[Array, "B T K X"]) -> Array:
        fresh = fresh.astype(stored.dtype)
        # XLA's CPU backend scatters bfloat16 in float32: it would convert all slots there and back
        # for every token, nearly half of a step after 4,096. A select writes them once, in place.
        alone = tokens == 1 and (layer is None or len(stored) == 1)
        if alone and stored.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
            chosen = jnp.arange(stored.shape[-2], dtype=jnp.int32)[None] == slots
            chosen, row = chosen[:, None, :, None], fresh.swapaxes(1, 2)
            if layer is not None:
                chosen, row = chosen[None], row[None]
            return jnp.where(chosen, row, stored)
        # One scatter of rows [K, X]: XLA carries it out in place. One of a single row would become
        # an update that its CPU backend repeats for every reader, each time with a copy of all
        # slots: the second row is dropped.
        if slots.size == 1:
            slots = jnp.pad(slots, ((0, 0), (0, 1)), constant_values=stored.shape[-2])
            fresh = jnp.pad(fresh, ((0, 0), (0, 1), (0, 0), (0, 0)))
        return stored.at[*prefix, slots].set(fresh, mode="drop")

    length += count[:, 0]
    return RollingCache(
        write(cache.k_global, first, key_global),
        write(cache.v_global, first, value),
        write(cache.k_ring, ring, key),
        write(cache.v_ring, ring, value),
        length if layer is None else cache.length.at[layer].set(length),
    )


def seen(cache: RollingCache, places: Places) -> Seen:
    """How much each key head sees of the ring and of the globals, of a cache of one layer.

    A global is seen only from distance w on: until then the ring holds it too.
    """
    key_heads = cache.k_ring.shape[1]
    window = places.head_window
    if window is None:
        window = jnp.full(key_heads, cache.window_size, jnp.int32)
    length = cache.length[:, None]
    far = jnp.minimum(length - window[None], cache.num_global)
    if places.global_count is not None:
        far = jnp.minimum(far, places.global_count)
    return Seen(jnp.minimum(length, window[None]), jnp.maximum(far, 0))


def ring_distances(cache: RollingCache) -> Int[Array, "B W"]:
    """How many tokens ago every slot of the ring was written, if it was."""
    window = max(cache.window_size, 1)
    last = (cache.length[:, None] - 1) % window
    return (last - jnp.arange(cache.window_size, dtype=jnp.int32)[None]) % window


def far_distances(rules: Rules, cache: RollingCache, places: Places) -> Float[Array, "B R"]:
    """How far away ALiBi takes the globals to be: row r is position r, but for what is given."""
    if places.far_distance is not None:
        query, key, scale = places.far_distance
        distance = (query - key).astype(jnp.float32) * jnp.asarray(scale, jnp.float32)
    else:
        rank = jnp.arange(cache.num_global, dtype=jnp.int32)[None]
        distance = cache.length[:, None] - 1 - rank
        if rules.clip_distance is not None:
            distance = jnp.minimum(distance, rules.clip_distance)
    shape = (cache.length.shape[0], cache.num_global)
    return jnp.broadcast_to(distance.astype(jnp.float32), shape)
