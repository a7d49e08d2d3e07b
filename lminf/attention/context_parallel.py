"""Context parallelism: what each device gets of the tokens of a row on the others."""

from typing import Any

import jax
from jaxtyping import Array, Int

from lminf.attention import cache as caches


def shares_slots(layout: caches.Layout, devices: int) -> bool:
    """Whether each device holds its share of a cache's slots, in order, or all of them."""
    ordered = isinstance(layout, caches.SinkRingCache)
    return devices > 1 and ordered and layout.slots % devices == 0


class ContextShards:
    """How one text's tokens lie on a mesh axis: `tokens` on each device, in order."""

    def __init__(self, axis: str | None, tokens: int):
        self.axis, self.tokens = axis, tokens
        self.devices = 1 if axis is None else jax.lax.axis_size(axis)
        self.index = 0 if axis is None else jax.lax.axis_index(axis)
        self.total = tokens * self.devices  # tokens of the whole row
        self.first: Any = self.index * tokens  # where this device's begin among those of all

    def all(self, x: Array) -> Array:
        """[B, T, ...] of every device, in order, from each device's share of T."""
        return x if self.axis is None else jax.lax.all_gather(x, self.axis, axis=1, tiled=True)

    def own(self, x: Array) -> Array:
        """This device's share of [B, T, ...], of which `all` makes the whole again."""
        share = x.shape[1] // self.devices
        return jax.lax.dynamic_slice_in_dim(x, self.index * share, share, 1)

    def rows(self, x: Array, rows: Int[Array, "B R"]) -> Array:
        """[B, R, ...], from the devices that have them; row 0 is this device's first."""
        mine = ((rows >= 0) & (rows < self.tokens))[..., None, None]
        local = caches.rows(x, jax.numpy.clip(rows, 0, self.tokens - 1))
        return jax.lax.psum(jax.numpy.where(mine, local, jax.numpy.zeros((), x.dtype)), self.axis)

    def from_left(self, x: Array) -> Array:
        """The left neighbour's x; the first device gets the last one's."""
        return self._moved(x, [(i, (i + 1) % self.devices) for i in range(self.devices)])

    def with_halo(self, x: Array, count: int) -> Array:
        """x [B, T, ...] behind the `count` tokens that stand before it, zeros before the first."""
        parts, hops = [x], 0
        while count > 0:
            hops += 1
            last = x[:, self.tokens - min(count, self.tokens) :]
            parts.append(self._moved(last, [(i, i + hops) for i in range(self.devices - hops)]))
            count -= self.tokens
        return x if len(parts) == 1 else jax.numpy.concatenate(parts[::-1], 1)

    def _moved(self, x: Array, pairs: list[tuple[int, int]]) -> Array:
        return x if self.axis is None else jax.lax.ppermute(x, self.axis, pairs)
