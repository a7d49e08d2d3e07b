"""LM-Infinite whose next-token query also sees the keys between sinks and window that fit it best.

Source: Han et al. 2024, arXiv:2308.16137, section on top-k attention. Only the last query of a call
(of a prompt or chunk, and every token that is decoded) selects: of sinks <= j <= i - window, with
all of them placed `at` tokens away, each head takes the `topk` largest scores, and these join its
softmax. All keys must be kept, and decoding scans them.
"""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp

from lminf.attention import cache as caches
from lminf.attention import scores, sparse
from lminf.attention.policy import (
    CountOrNone,
    Distance,
    FarPositions,
    Layers,
    LMInfinite,
    Tokens,
    register,
)
from lminf.errors import InputError


@register("topk")
@dataclass(frozen=True)
class TopK(sparse.SparsePolicy):
    """LM-Infinite with top-k middle tokens. Source: Han et al. 2024, arXiv:2308.16137."""

    window: Tokens  # tokens, the query's own included
    sinks: CountOrNone = 10  # tokens at the start that stay visible
    topk: Tokens = 5  # tokens between them that a head takes
    at: Distance | None = None  # how far away those seem, tokens; None: half the window
    from_layer: Layers = 4  # the first layer, of those with this policy, that takes any
    distance: Distance | None = None  # tokens, of the sinks; None: the window

    group = 1
    last_only = True
    needs_rotary = True
    max_selected = property(attrgetter("topk"))

    @property
    def selected_distance(self) -> int:
        return self.window // 2 if self.at is None else self.at

    @property
    def sink_distance(self) -> int:
        return self.window if self.distance is None else self.distance

    def far_positions(self) -> FarPositions:
        return LMInfinite(self.window, self.sinks, self.distance).far_positions()

    def cache_layout(self, capacity: int) -> caches.LinearCache:
        if self.window < capacity < self.topk:
            raise InputError(
                f"topk={self.topk} tokens, but a text of {capacity} tokens has no more than that; "
                f"give topk<={capacity}"
            )
        return caches.LinearCache(capacity)

    def select(self, state: Any, query: sparse.Query) -> tuple[sparse.Selected, Any]:
        """The best keys between sinks and window, of each head."""
        i, every = query.group.pos, jnp.arange(query.slots, dtype=jnp.int32)[None]
        between = (every >= self.sinks) & (every <= i - self.window)
        between &= query.layer >= self.from_layer
        q = query.placement.away(query.q, self.selected_distance)
        products = scores.scaled(query.config, q, query.kv.k[query.layer].astype(q.dtype))
        products = jnp.where(between[:, None, None, None], products, -jnp.inf)
        best, indices = jax.lax.top_k(products, min(self.topk, query.slots))  # [B, K, G, 1, k]
        listed = jnp.where(jnp.isneginf(best), -1, indices.astype(jnp.int32))
        listed = jnp.sort(listed.reshape(len(i), -1, listed.shape[-1]), axis=-1)
        start, length = query.window(self.window - 1)
        return sparse.Selected(listed, start, length), state
