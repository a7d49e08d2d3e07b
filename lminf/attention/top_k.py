"""LM-Infinite whose next-token query also sees the keys between sinks and window that fit it best.

Source: Han et al. 2024, arXiv:2308.16137, section on top-k attention. Only the last query of a call
(of a prompt or chunk, and every token that is decoded) chooses: of sinks <= j <= i - window, with
all of them placed `at` tokens away, each head takes the `topk` largest scores, and these join its
softmax. All keys must be kept, and decoding scans them.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lminf.attention import attend, dense, policies, select
from lminf.attention import cache as caches
from lminf.attention.policies import Distance, HeldOrNone, Layers, LMInfinite, Tokens
from lminf.errors import InputError


@policies.register("topk")
@dataclass(frozen=True)
class TopK(select.Choosing):
    """LM-Infinite with top-k middle tokens. Source: Han et al. 2024, arXiv:2308.16137."""

    window: Tokens  # tokens, the query's own included
    sinks: HeldOrNone = 10  # tokens at the start that stay visible
    topk: Tokens = 5  # tokens between them that a head takes
    at: Distance | None = None  # how far away those seem, tokens; None: half the window
    from_layer: Layers = 4  # the first layer, of those with this policy, that takes any
    distance: Distance | None = None  # tokens, of the sinks; None: the window

    @property
    def near_width(self) -> int:
        return self.window

    @property
    def far_count(self) -> int:
        return self.sinks

    @property
    def looked_up(self) -> int:
        return self.topk

    def layout(self, capacity: int) -> caches.Append:
        if self.window < capacity < self.topk:
            raise InputError(
                f"topk={self.topk} tokens, but a text of {capacity} tokens has no more than that; "
                f"give topk<={capacity}"
            )
        return caches.Append(capacity)

    def through(self, scoring, layout, stored_pos, positions):
        plain = LMInfinite(self.window, self.sinks, self.distance)
        read, new_pos = attend.through(plain, scoring, layout, stored_pos, positions)
        slots = caches.destinations(layout, positions)
        last_pos = positions[:, -1:]
        places = select.Places(scoring, positions)

        def step(q, k, v, held, layer):
            if q.shape[1] > 1:
                out, held = read(q, k, v, held, layer)
            else:
                held = held._replace(
                    k=caches.write(held.k, k, layer, slots), v=caches.write(held.v, v, layer, slots)
                )
                out = jnp.zeros_like(q)
            last = self._last(places, q[:, -1:], last_pos, held, layer)
            return out.at[:, -1:].set(last), held

        return step, new_pos

    def _last(self, places, q, q_pos, held, layer):
        """Output [B, 1, N, H] of one query, whose key and value are held already."""
        scoring, slots = places.scoring, held.k.shape[2]
        recent = q_pos + jnp.arange(1 - self.window, 1, dtype=jnp.int32)[None]
        first = jnp.arange(min(self.sinks, slots), dtype=jnp.int32)
        first = jnp.broadcast_to(first, (len(q), len(first)))
        far = self.window if self.distance is None else self.distance
        scores, values = [], []
        for pos, seen, placed in (
            (recent, recent >= 0, True),
            (first, q_pos - first >= self.window, False),
        ):
            k, v = (select.rows_of(x, layer, pos).astype(q.dtype) for x in (held.k, held.v))
            by_q = places.at(q, q_pos) if placed else places.away(q, far)
            by_k = places.at(k, pos) if placed else k
            scores.append(select.scores_of(scoring, by_q, by_k, seen[:, None, None, None]))
            values.append(v)
        values = jnp.concatenate(values, 1)

        at = self.window // 2 if self.at is None else self.at
        every = jnp.arange(slots, dtype=jnp.int32)[None]
        between = (
            (every >= self.sinks) & (every <= q_pos - self.window) & (layer >= self.from_layer)
        )
        middle = select.scores_of(
            scoring, places.away(q, at), held.k[layer].astype(q.dtype), between[:, None, None, None]
        )
        best, chosen = jax.lax.top_k(middle, min(self.topk, slots))  # [B, K, G, 1, k]
        weights = select.softmax(jnp.concatenate([*scores, best], -1)).astype(q.dtype)
        count = values.shape[1]
        out = dense.mix(weights[..., :count], values)
        rows, heads = (jnp.arange(n, dtype=jnp.int32) for n in (len(q), held.v.shape[3]))
        rows, heads = rows[:, None, None, None, None], heads[None, :, None, None, None]
        taken = held.v[layer, rows, chosen, heads].astype(q.dtype)  # [B, K, G, 1, k, H]
        found = jnp.einsum("bkgts,bkgtsh->btkgh", weights[..., count:], taken)
        return out + found.reshape(q.shape)
