"""Prompts that are read in full and then kept in less memory: SnapKV and ThinK.

Both act once, at the end of the prompt, by what its last tokens looked for:

    SnapKV   keeps the tokens they attended to, by key/value head
    ThinK    keeps the channels of keys that their scores come from, by key/value head

so a text without an end of its prompt is full attention. The last `recent` tokens of the prompt,
whose queries are the ones asked, and all that is written after them stay whole. What is older lies
in arrays of its own, with fewer rows or narrower: keys there are rotated to their positions, once
for all, so that channels may go one by one. Writing attends over both with one softmax.
"""

from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf.attention import attend, dense, policies, rope
from lminf.attention import cache as caches
from lminf.attention.policies import Held
from lminf.errors import InputError
from lminf.ranges import Range

Neighbours: TypeAlias = Annotated[int, Range(min=1, max=1023)]


@dataclass(frozen=True)
class _Condensing(policies.ByContent):
    """What both share."""

    needs_prompt = True

    def __post_init__(self):
        super().__post_init__()
        if self.pool % 2 == 0:
            raise InputError(f"pooling={self.pool}: give an odd number of tokens")
        capacity, asking = self.tokens_kept, self.asking
        if capacity is not None and capacity <= asking:
            field = "window" if isinstance(self, SnapKV) else "recent"
            raise InputError(
                f"capacity={capacity} with {field}={asking}: give capacity>={asking + 1}"
            )

    @property
    def asking(self) -> int:
        """Tokens at the end of the prompt that say what is kept, and stay whole."""
        raise NotImplementedError

    @property
    def tokens_kept(self) -> int | None:
        """Tokens of the prompt that stay, the last ones included; None: all."""
        raise NotImplementedError

    @property
    def pool(self) -> int:
        """Neighbours over which attention is averaged before tokens are chosen."""
        raise NotImplementedError

    def channels_kept(self, head_dim: int) -> int:
        """Channels of older keys that stay."""
        return head_dim

    def layout(self, capacity: int) -> caches.Append:
        return caches.Append(capacity)

    def extra(self, sizes: caches.Sizes) -> dict[str, Any]:
        shape = (sizes.batch, self.asking, sizes.heads, sizes.head_dim)
        return {"q": jnp.zeros(shape, sizes.dtype)}  # of the last tokens, un-rotated

    def through(self, scoring, layout, stored_pos, positions):
        if isinstance(layout, caches.Append):
            return self._reading(scoring, layout, stored_pos, positions)
        return self._writing(scoring, layout, stored_pos, positions)

    # --- The prompt -------------------------------------------------------------------------------

    def _reading(self, scoring, layout, stored_pos, positions):
        full, new_pos = attend.through(policies.FULL, scoring, layout, stored_pos, positions)

        def step(q, k, v, held, layer):
            out, held = full(q, k, v, held, layer)
            asked = held.extra["q"]
            last = jnp.concatenate([asked[layer], q.astype(asked.dtype)], 1)[:, -self.asking :]
            return out, held._replace(extra={"q": asked.at[layer].set(last)})

        return step, new_pos

    def after_prompt(
        self, scoring: dense.Scoring, stored: caches.Cache, *, length: int, room: int
    ) -> caches.Cache:
        """The cache with the prompt condensed and `room` for more tokens. No row is longer than
        `length`.
        """
        slots = min(length, stored.layout.slots)
        pos = stored.pos[:, :slots]  # a token's slot is its position
        read = pos.max(1, keepdims=True) + 1  # [B, 1]
        recent = read - self.asking + jnp.arange(self.asking, dtype=jnp.int32)[None]
        turn = _Turn(scoring, dense.length_read(scoring, read - 1))
        older = max(min(self.tokens_kept or slots, slots) - self.asking, 1)

        def one(layer: caches.Held) -> tuple[Array, Array, dict[str, Any]]:
            k, v = layer.k[:, :slots], layer.v[:, :slots]
            q = turn(layer.extra["q"], recent)
            placed = turn(k, pos)
            chosen = self._chosen(scoring, q, placed, recent, pos, older)  # [B, O, K]
            rows, heads = _rows_and_heads(chosen)
            some = jnp.maximum(chosen, 0)
            held = (chosen >= 0)[..., None]
            old_k = jnp.where(held, placed[rows, some, heads], 0)
            extra = {"v": jnp.where(held, v[rows, some, heads], 0), "pos": chosen}
            own = jnp.maximum(recent, 0)
            each = jnp.arange(len(own))[:, None]
            last_k, last_v = k[each, own], v[each, own]
            wide = self.channels_kept(k.shape[3])
            if wide < k.shape[3]:
                lasting = jnp.where((recent >= 0)[..., None, None], placed[each, own], 0)
                channels = _channels(q, old_k, lasting, recent, wide)
                extra["channels"] = channels  # [B, K, D']
                old_k = jnp.take_along_axis(old_k, channels[:, None], axis=3)
            return _padded(last_k, room), _padded(last_v, room), extra | {"k": old_k}

        k, v, extra = jax.lax.map(one, stored.held)
        new_pos = jnp.where(recent >= 0, recent, caches.EMPTY)
        new_pos = jnp.pad(new_pos, ((0, 0), (0, room)), constant_values=caches.EMPTY)
        return caches.Cache(k, v, new_pos, caches.Slots(self.asking + room), extra)

    def _chosen(self, scoring, q, k, recent, pos, count) -> Int[Array, "B O K"]:
        """Positions of the older tokens to keep, in order, by key/value head; -1 where there are
        no more.
        """
        kv_heads = k.shape[2]
        old = (pos >= 0) & (pos < recent[:, :1])  # [B, S]
        if self.tokens_kept is None:
            value = jnp.broadcast_to(old[..., None], (*old.shape, kv_heads)).astype(jnp.float32)
        else:
            weights = dense.softmax(scoring, _scores(scoring, q, k, recent, pos[..., None]),
                                     _seen(recent, pos[..., None]))  # fmt: skip
            votes = jnp.where(old[..., None], weights.sum((2, 3)).swapaxes(1, 2), 0.0)
            value = _pooled(votes, self.pool)
        value = jnp.where(old[..., None], value, -1.0)  # attention is never below 0
        best, slots = jax.lax.top_k(value.swapaxes(1, 2), count)  # the earlier of equals
        far = jnp.where(best >= 0, slots.astype(jnp.int32), jnp.iinfo(jnp.int32).max)
        far = jnp.sort(far, axis=2).swapaxes(1, 2)
        return jnp.where(far < k.shape[1], far, caches.EMPTY)

    # --- After the prompt -------------------------------------------------------------------------

    def _writing(self, scoring, layout, stored_pos, positions):
        tokens = positions.shape[1]
        at = jnp.arange(1, layout.slots + 1, dtype=jnp.int32)[None]
        filled = jnp.where(stored_pos >= 0, at, 0).max(1, keepdims=True)
        slots = filled + jnp.arange(tokens, dtype=jnp.int32)[None]
        slots = jnp.where(positions >= 0, slots, layout.slots)
        new_pos = caches.write_pos(stored_pos, positions, slots)
        turn = _Turn(scoring, dense.length_read(scoring, positions))
        product = dense.dot_of_one if tokens == 1 else dense.dot
        mix = dense.mix_of_one if tokens == 1 else dense.mix

        def step(q, k, v, held, layer):
            held = held._replace(
                k=caches.write(held.k, k, layer, slots), v=caches.write(held.v, v, layer, slots)
            )
            old = {name: x[layer] for name, x in held.extra.items()}
            new_k, new_v = held.k[layer].astype(q.dtype), held.v[layer].astype(v.dtype)
            q = turn(q, positions)
            narrow = _narrowed(q, old["channels"]) if "channels" in old else q
            scores = jnp.concatenate(
                [
                    _scores(scoring, narrow, old["k"].astype(q.dtype), positions, old["pos"],
                            product),
                    _scores(scoring, q, turn(new_k, new_pos), positions, new_pos[..., None],
                            product),
                ], -1,
            )  # fmt: skip
            mine = jnp.broadcast_to(new_pos[..., None], (*new_pos.shape, old["pos"].shape[2]))
            seen = _seen(positions, jnp.concatenate([old["pos"], mine], 1))
            weights = dense.softmax(scoring, scores, seen).astype(v.dtype)
            older = old["pos"].shape[1]
            out = mix(weights[..., :older], old["v"].astype(v.dtype))
            return out + mix(weights[..., older:], new_v), held

        return step, new_pos


class _Turn:
    """Rotates to positions, where the model does."""

    def __init__(self, scoring: dense.Scoring, length):
        self.encoding, self.length = scoring.encoding, length

    def __call__(self, x: Float[Array, "B R N H"], pos: Int[Array, "B R"]):
        if not isinstance(self.encoding, rope.Rotary):
            return x
        return rope.rotate(
            x, rope.rotation(self.encoding, pos, length=self.length), self.encoding.layout
        )


def _seen(to: Int[Array, "B T"], at: Int[Array, "B S P"]):
    """[B, P, 1, T, S]"""
    at = at.swapaxes(1, 2)[:, :, None, None, :]
    return (at >= 0) & (at <= to[:, None, None, :, None])


def _scores(scoring, q, k, to: Int[Array, "B T"], at: Int[Array, "B S P"], product=dense.dot):
    """[B, K, G, T, S] of queries and keys that are rotated already."""
    scores = product(q, k) * jnp.float32(scoring.scale)
    slopes = scoring.slopes(q.shape[2])
    if slopes is None:
        return scores
    distance = to[:, None, None, :, None] - at.swapaxes(1, 2)[:, :, None, None, :]
    steep = slopes.reshape(k.shape[2], -1)[None, :, :, None, None]
    return scores - steep * distance.astype(jnp.float32)


def _pooled(x: Float[Array, "B S K"], width: int) -> Float[Array, "B S K"]:
    """Means over `width` neighbours, missing ones counting as 0."""
    sums = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, width, 1), (1, 1, 1), "SAME")
    return sums / width


def _channels(q, old_k, last_k, recent, wide: int) -> Int[Array, "B K D"]:
    """The channels that scores of these queries with kept keys come from, in order.

    Score of a channel: sum of q^2 over the queries that share a key head, times sum of k^2.
    """
    asked = jnp.where((recent >= 0)[..., None, None], q, 0).astype(jnp.float32)
    by_q = jnp.square(asked.reshape(*asked.shape[:2], old_k.shape[2], -1, asked.shape[3]))
    by_k = jnp.square(old_k.astype(jnp.float32)).sum(1) + jnp.square(
        last_k.astype(jnp.float32)
    ).sum(1)
    _, best = jax.lax.top_k(by_q.sum((1, 3)) * by_k, wide)
    return jnp.sort(best, axis=2).astype(jnp.int32)


def _narrowed(q: Float[Array, "B T N H"], channels: Int[Array, "B K D"]) -> Float[Array, "B T N D"]:
    """Queries with the channels that their key head kept."""
    grouped = q.reshape(*q.shape[:2], channels.shape[1], -1, q.shape[3])
    taken = jnp.take_along_axis(grouped, channels[:, None, :, None, :], axis=4)
    return taken.reshape(*q.shape[:3], channels.shape[2])


def _padded(x: Float[Array, "B R K H"], room: int):
    return jnp.pad(x, ((0, 0), (0, room), (0, 0), (0, 0)))


def _rows_and_heads(chosen: Int[Array, "B O K"]):
    return jnp.arange(len(chosen))[:, None, None], jnp.arange(chosen.shape[2])[None, None]


@policies.register("snapkv")
@dataclass(frozen=True)
class SnapKV(_Condensing):
    """Of the prompt, what its last tokens attended to. Source: Li et al. 2024, arXiv:2404.14469.

    Attention is summed over the last `window` queries, and over the query heads of a key head, and
    averaged over `pooling` neighbours before the window.
    """

    capacity: Held  # tokens of the prompt that stay, the last `window` included
    window: Held = 32  # tokens
    pooling: Neighbours = 5  # tokens, odd

    @property
    def asking(self) -> int:
        return self.window

    @property
    def tokens_kept(self) -> int:
        return self.capacity

    @property
    def pool(self) -> int:
        return self.pooling


@policies.register("think")
@dataclass(frozen=True)
class ThinK(_Condensing):
    """Older keys without the channels that matter least. Source: Xu et al. 2024, arXiv:2407.21018.

    With `capacity`, SnapKV chooses tokens first. Keys and values of what is older take ratio / 2
    less memory.
    """

    # Of the channels of older keys, which go.
    ratio: Annotated[float, Range(min=0, below=1)] = 0.4
    recent: Held = 32  # tokens that stay whole, and whose queries are asked
    capacity: Held | None = None  # tokens of the prompt that stay; None: all
    pooling: Neighbours = 5

    @property
    def asking(self) -> int:
        return self.recent

    @property
    def tokens_kept(self) -> int | None:
        return self.capacity

    @property
    def pool(self) -> int:
        return self.pooling

    def channels_kept(self, head_dim: int) -> int:
        return head_dim - int(self.ratio * head_dim)
