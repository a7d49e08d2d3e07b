"""LM-Infinite whose next-token query also sees the keys between sinks and window that fit it best.

Source: Han et al. 2024, arXiv:2308.16137, section on top-k attention; docs/policies.md has the
mathematics. Only the last query of a call selects (of a prompt or chunk, and every token that is
decoded). All keys must be kept, and decoding scans them.
"""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

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
    one_by_one = property(lambda self: _EachSelects(**vars(self)))
    layer_thresholds = property(lambda self: (self.from_layer,))
    max_selected = property(attrgetter("topk"))
    selected_distance = property(lambda self: self.window // 2 if self.at is None else self.at)
    sink_distance = property(lambda self: self.window if self.distance is None else self.distance)

    def far_positions(self) -> FarPositions:
        return LMInfinite(self.window, self.sinks, self.distance).far_positions()

    def cache_layout(self, capacity: int) -> None:
        if self.window < capacity < self.topk:
            raise InputError(
                f"topk={self.topk} tokens, but a text of {capacity} tokens has no more than that; "
                f"give topk<={capacity}"
            )

    def select(self, state: Any, query: sparse.Query) -> tuple[Int[Array, "B N X"], Any]:
        slot_pos = jnp.arange(query.slots, dtype=jnp.int32)[None]
        between = (slot_pos >= self.sinks) & (slot_pos <= query.pos - self.window)
        between &= query.layer_index >= self.from_layer
        q = query.placement.away(query.q, self.selected_distance)
        products = scores.dot(q, query.kv.k[query.layer].astype(q.dtype))[:, :, 0]
        products = jnp.where(between[:, None], products, -jnp.inf)
        return sparse.best_of(products, min(self.topk, query.slots)), state


@dataclass(frozen=True)
class _EachSelects(TopK):
    """The same where every query of a call selects, as it would alone."""

    last_only = False
