"""Prompts that are read in full and then kept in less memory, by what their last tokens looked for:
SnapKV keeps the tokens they attended to, ThinK the channels of keys that their scores come from.

A text without an end of its prompt is full attention. The last `recent` tokens of the prompt and
all that is written after them stay. What is older lies in arrays of its own, with fewer rows or
narrower: keys there are rotated to their positions once, so that channels may go one by one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf.attention import cache as caches
from lminf.attention import scores, sparse
from lminf.attention.policy import Count, Policy, register
from lminf.attention.scores import Placement, ScoreConfig
from lminf.ranges import Range

Neighbors: TypeAlias = Annotated[int, Range(min=1, max=1023)]


class PromptCompression(Policy):
    """What both share: full attention until the prompt ends."""

    num_sinks = None
    needs_prompt = True
    context_parallel = False

    # int | None: tokens of the prompt that stay, the last ones included; None: all.
    capacity: Any
    pooling: Any  # int: neighbours over which attention is averaged before tokens are chosen

    observation_field: str
    # int: tokens at the end of the prompt that say what is kept, and stay.
    observation_window = property(lambda self: getattr(self, self.observation_field))

    def problems(self) -> Iterator[str]:
        if self.pooling % 2 == 0:
            yield f"pooling={self.pooling}: give an odd number of tokens"
        observed = self.observation_window
        if self.capacity is not None and self.capacity <= observed:
            yield (
                f"capacity={self.capacity} with {self.observation_field}={observed}: "
                f"give capacity>={observed + 1}"
            )

    def channels_kept(self, head_dim: int) -> int:
        """Channels of older keys that stay."""
        return head_dim

    def init_state(self, shape: caches.CacheShape) -> dict[str, Any]:
        queries = (shape.batch, self.observation_window, shape.heads, shape.head_dim)
        return {"q": jnp.zeros(queries, shape.dtype)}  # of the last tokens, un-rotated

    def observe_queries(
        self, state: dict[str, Array], q: Float[Array, "B T N H"], layer: Any
    ) -> dict[str, Array]:
        """The state with the last queries of those that were read."""
        stored = state["q"]
        last = jnp.concatenate([stored[layer], q.astype(stored.dtype)], 1)[:, -stored.shape[2] :]
        return {"q": stored.at[layer].set(last)}

    def compress_prompt(
        self, config: ScoreConfig, cache: caches.Cache, *, length: int, room: int
    ) -> caches.Cache:
        """The cache with the prompt compressed and `room` for more tokens. No row is longer than
        `length`.
        """
        slots_read = min(length, cache.k.shape[2])
        pos = cache.pos[:, :slots_read]  # a token's slot is its position
        read = pos.max(1, keepdims=True) + 1  # [B, 1]
        observed = self.observation_window
        recent = read - observed + jnp.arange(observed, dtype=jnp.int32)[None]
        placement = Placement(config, read - 1)
        older = max(min(self.capacity or slots_read, slots_read) - observed, 1)
        row, recent_pos = jnp.arange(len(pos))[:, None], jnp.maximum(recent, 0)

        def one(layer: caches.KVState) -> tuple[Array, Array, dict[str, Any]]:
            k, v = layer.k[:, :slots_read], layer.v[:, :slots_read]
            q, placed = placement.at(layer.state["q"], recent), placement.at(k, pos)
            chosen = self._chosen(config, q, placed, recent, pos, older)  # [B, O, K]
            index = row[..., None], jnp.maximum(chosen, 0), jnp.arange(k.shape[2])[None, None]
            valid = (chosen >= 0)[..., None]
            old_k = jnp.where(valid, placed[index], 0)
            state = {"v": jnp.where(valid, v[index], 0), "pos": chosen}
            wide = self.channels_kept(k.shape[3])
            if wide < k.shape[3]:
                lasting = jnp.where((recent >= 0)[..., None, None], placed[row, recent_pos], 0)
                state["channels"] = _channels(q, old_k, lasting, recent, wide)  # [B, K, D']
                old_k = jnp.take_along_axis(old_k, state["channels"][:, None], axis=3)
            last_k, last_v = (
                jnp.pad(x[row, recent_pos], ((0, 0), (0, room), (0, 0), (0, 0))) for x in (k, v)
            )
            return last_k, last_v, state | {"k": old_k}

        k, v, state = jax.lax.map(one, cache.kv)
        new_pos = jnp.where(recent >= 0, recent, caches.EMPTY)
        new_pos = jnp.pad(new_pos, ((0, 0), (0, room)), constant_values=caches.EMPTY)
        return caches.Cache(k, v, new_pos, caches.SlotCache(observed + room), state)

    def extend(
        self,
        config: ScoreConfig,
        layout: caches.SlotCache,
        stored_pos: Int[Array, "B S"],
        positions: Int[Array, "B T"],
    ) -> tuple[Callable[..., tuple[Array, caches.KVState]], Int[Array, "B S"]]:
        """As `attend.extend`, over what is left of a prompt and the tokens after it."""
        slot_numbers = jnp.arange(1, layout.slots + 1, dtype=jnp.int32)[None]
        filled = jnp.where(stored_pos >= 0, slot_numbers, 0).max(1, keepdims=True)
        slots = filled + jnp.arange(positions.shape[1], dtype=jnp.int32)[None]
        slots = jnp.where(positions >= 0, slots, layout.slots)
        new_pos = caches.write_pos(stored_pos, positions, slots)
        placement = Placement(config, positions)
        by_q, by_k = placement.rotation(positions), placement.rotation(new_pos)

        def step(q, k, v, kv, layer):
            k, v = caches.write(kv.k, k, layer, slots), caches.write(kv.v, v, layer, slots)
            new_k, new_v = k[layer].astype(q.dtype), v[layer].astype(q.dtype)
            old = {name: x[layer] for name, x in kv.state.items()}
            old_k, old_v = old["k"].astype(q.dtype), old["v"].astype(q.dtype)
            q, new_k = placement.rotate(q, by_q), placement.rotate(new_k, by_k)
            narrow = _narrowed(q, old["channels"]) if "channels" in old else q
            older = scores.over_slots(config, narrow, old_k, old_v, positions, old["pos"])
            newer = scores.over_slots(config, q, new_k, new_v, positions, new_pos[..., None])
            out, _ = scores.merge(older[:2], newer[:2])
            return out.astype(q.dtype), kv._replace(k=k, v=v)

        return step, new_pos

    def _chosen(self, config, q, k, recent, pos, count) -> Int[Array, "B O K"]:
        """Positions of the older tokens to keep, in order, by key/value head; first -1 for none."""
        old = ((pos >= 0) & (pos < recent[:, :1]))[:, None]  # [B, 1, S]
        votes = jnp.zeros((len(q), k.shape[2], k.shape[1]))
        if self.capacity is not None:
            part = scores.over_slots(config, q, k, k, recent, pos[..., None])
            votes = jnp.where(old, part.received(k.shape[2]), 0.0)
            # Means over neighbours, missing ones counting as 0, up to a factor.
            votes = jax.lax.reduce_window(
                votes, 0.0, jax.lax.add, (1, 1, self.pooling), (1, 1, 1), "SAME"
            )
        votes = jnp.where(old, votes, -jnp.inf)
        return sparse.best_of(votes, count).swapaxes(1, 2)  # of equals the earlier


def _narrowed(q: Float[Array, "B T N H"], channels: Int[Array, "B K D"]) -> Array:
    """Queries [B, T, N, D] with the channels that their key head kept."""
    grouped = q.reshape(*q.shape[:2], channels.shape[1], -1, q.shape[3])
    taken = jnp.take_along_axis(grouped, channels[:, None, :, None, :], axis=4)
    return taken.reshape(*q.shape[:3], channels.shape[2])


def _channels(q, old_k, last_k, recent, wide: int) -> Int[Array, "B K D"]:
    """The channels that scores of these queries with kept keys come from, in order.

    Score of a channel: sum of q^2 over the queries that share a key head, times sum of k^2.
    """
    recent_q = jnp.where((recent >= 0)[..., None, None], q, 0).astype(jnp.float32)
    by_q = jnp.square(recent_q.reshape(*recent_q.shape[:2], old_k.shape[2], -1, recent_q.shape[3]))
    by_k = sum(jnp.square(k.astype(jnp.float32)).sum(1) for k in (old_k, last_k))
    _, best = jax.lax.top_k(by_q.sum((1, 3)) * by_k, wide)
    return jnp.sort(best, axis=2).astype(jnp.int32)


@register("snapkv")
@dataclass(frozen=True)
class SnapKV(PromptCompression):
    """Of the prompt, what its last tokens attended to. Source: Li et al. 2024, arXiv:2404.14469.

    Attention is summed over the last `window` queries, and over the query heads of a key head, and
    averaged over `pooling` neighbours before the window.
    """

    capacity: Count  # tokens of the prompt that stay, the last `window` included
    window: Count = 32  # tokens
    pooling: Neighbors = 5  # tokens, odd

    observation_field = "window"


@register("think")
@dataclass(frozen=True)
class ThinK(PromptCompression):
    """Older keys without the channels that matter least. Source: Xu et al. 2024, arXiv:2407.21018.

    With `capacity`, SnapKV chooses tokens first. Keys and values of what is older take ratio / 2
    less memory.
    """

    # Of the channels of older keys, which go.
    ratio: Annotated[float, Range(min=0, below=1)] = 0.4
    recent: Count = 32  # tokens that stay, and whose queries say what is kept
    capacity: Count | None = None  # tokens of the prompt that stay; None: all
    pooling: Neighbors = 5

    window = None
    observation_field = "recent"

    def channels_kept(self, head_dim: int) -> int:
        return head_dim - int(self.ratio * head_dim)
