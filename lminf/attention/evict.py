"""Caches of a fixed size that keep the tokens with the best scores: SirLLM, H2O and TOVA.

    kept = first `sinks`  +  best by score  +  the most recent          capacity tokens with a turn

Text is read in turns of `turn` tokens, [n turn, (n + 1) turn), and nothing is forgotten within one.
Before a turn, capacity - turn tokens are chosen from those held: the first `sinks`, the
capacity - sinks - recent - turn best of all by score (of equals the oldest), and then the most
recent of the others; under H2O the best are of those between the sinks and the last `recent`. With
turn = 1 a token is evicted for each that is read, as papers define it.

Positions are places in the cache, as StreamingLLM's are: tokens held are numbered 0, 1, … in the
order of the text. A turn being read ends at capacity - 1, so no text is too long.

A slot is emptied by forgetting the place of its token; nothing moves. So what a row holds is a set,
which head by head (H2O) or layer by layer may differ: `place` is the number of a slot's token, -1
if it has none.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lminf.attention import cache as caches
from lminf.attention import dense, policies, rope
from lminf.attention.policies import Held, HeldOrNone
from lminf.errors import InputError
from lminf.ranges import Range

LAST = jnp.iinfo(jnp.int32).max


@dataclass(frozen=True)
class Scored(policies.ByContent):
    """What the policies that evict by a score share. Subclasses say what the score is."""

    capacity: Held  # tokens held, those of the turn that is being read included
    sinks: HeldOrNone = 4  # tokens at the start that are never evicted
    # Tokens kept because they are the last, at least; None: half of the rest.
    recent: HeldOrNone | None = 0
    turn: Held = 128  # tokens between evictions, and the most that are read at once

    span = "capacity"
    by_head = False  # whether each key/value head keeps tokens of its own
    best_between = False  # whether sinks and recent tokens are kept apart from the best

    def __post_init__(self):
        super().__post_init__()
        if self.recent is None:
            rest = max(self.capacity - self.sinks - self.turn, 0)
            object.__setattr__(self, "recent", rest // 2)
        if self.best < 0:
            raise InputError(
                f"capacity={self.capacity} is less than sinks={self.sinks}, recent={self.recent} "
                f"and turn={self.turn} together; give capacity>="
                f"{self.capacity - self.best}"
            )

    @property
    def best(self) -> int:
        """Tokens that a turn finds there because of their score."""
        return self.capacity - self.sinks - (self.recent or 0) - self.turn

    @property
    def kept(self) -> int:
        """Tokens that a turn finds there, once there are so many."""
        return self.capacity - self.turn

    @property
    def turn_len(self) -> int:
        return self.turn

    @property
    def near_width(self) -> int:
        return self.capacity

    @property
    def bounded(self) -> bool:
        return True

    def layout(self, capacity: int) -> caches.Slots:
        return caches.Slots(self.capacity)

    def extra(self, sizes: caches.Sizes) -> dict[str, Any]:
        shape = (sizes.batch, self.capacity, sizes.kv_heads if self.by_head else 1)
        return {"place": jnp.full(shape, caches.EMPTY, jnp.int32), "score": jnp.zeros(shape)}

    def place(self, positions: Int[Array, "*B"]) -> Int[Array, "*B"]:
        """The number in the cache that a token at this position has in its own turn."""
        within = positions % self.turn
        found = jnp.minimum(positions - within, self.kept) + within
        return jnp.where(positions >= 0, found, caches.EMPTY)

    def scored(
        self,
        score: Float[Array, "B S P"],
        weights: Float[Array, "B K G T S"],
        at: Int[Array, "B T"],
    ) -> Float[Array, "B S P"]:
        """Scores of what is held, once tokens at these places attended with these weights."""
        del weights, at
        return score

    def settled(self, score: Float[Array, "B S P"], place: Int[Array, "B S P"], since):
        """Scores at the end of a turn whose first token has the place `since` [B, 1, 1]."""
        del place, since
        return score

    def through(self, scoring, layout, stored_pos, positions):
        tokens = positions.shape[1]
        if tokens > self.turn:
            raise InputError(
                f"{self.name} evicts before every {self.turn} tokens, but {tokens} are to be read "
                f"at once; read them in chunks through the cache, or give turn>={tokens}"
            )
        at = self.place(positions)  # [B, T]
        starts = ((at >= 0) & (positions % self.turn == 0)).any(1)
        before = jnp.where(at >= 0, positions, LAST).min(1) - self.turn  # the last turn's first
        since = self.place(jnp.maximum(before, 0))[:, None, None]
        turned = _Turned(scoring, at, self.capacity)

        def refreshed(extra):
            place, score = extra["place"], extra["score"]
            now = self._evicted(place, self.settled(score, place, since))
            return {
                name: jnp.where(starts[:, None, None], new, old)
                for name, new, old in zip(("place", "score"), now, (place, score), strict=True)
            }

        def step(q, k, v, held, layer):
            own = {name: held.extra[name][layer] for name in ("place", "score")}
            # Sorting, which most steps of decoding need not do.
            own = jax.lax.cond(starts.any(), refreshed, lambda extra: extra, own)
            slots = _free(own["place"], tokens)  # [B, T, P]
            slots = jnp.where((at >= 0)[:, :, None], slots, layout.slots)
            rows, heads = _indices(slots)
            place = own["place"].at[rows, slots, heads].set(at[:, :, None], mode="drop")
            score = own["score"].at[rows, slots, heads].set(0.0, mode="drop")
            stored_k = _write(held.k, k, layer, slots)
            stored_v = _write(held.v, v, layer, slots)
            all_k, all_v = stored_k[layer].astype(k.dtype), stored_v[layer].astype(v.dtype)
            weights = turned.weights(q, all_k, at, place)
            mix = dense.mix_of_one if tokens == 1 else dense.mix
            out = mix(weights.astype(v.dtype), all_v)
            new = {"place": place, "score": self.scored(score, weights, at)}
            extra = held.extra | {name: held.extra[name].at[layer].set(new[name]) for name in new}
            return out, caches.Held(stored_k, stored_v, extra)

        return step, stored_pos  # which of the layers and heads differ in: `place` says it

    def _evicted(self, place, score):
        """(place, score) with `kept` tokens at most, numbered anew."""
        held = scored = place >= 0
        if self.best_between:
            since = place.max(1, keepdims=True) - (self.recent or 0)
            scored = held & (place >= self.sinks) & (place <= since)
        value = jnp.where(scored, score, -jnp.inf)
        by_score = _rank(jnp.lexsort((place, -value), axis=1))
        chosen = held & ((scored & (by_score < self.best)) | (place < self.sinks))
        # Then by age: every chosen token is before every other one.
        by_age = _rank(jnp.lexsort((-place, 1 - chosen.astype(jnp.int32)), axis=1))
        stays = held & (by_age < self.kept)
        number = _rank(jnp.argsort(jnp.where(stays, place, LAST), axis=1))
        return jnp.where(stays, number, caches.EMPTY), jnp.where(stays, score, 0.0)


class _Turned:
    """Rotations of one forward pass: queries by their places, keys by any place in the cache."""

    def __init__(self, scoring, at: Int[Array, "B T"], capacity: int):
        self.scoring, self.at = scoring, at
        self.rotary = scoring.encoding if isinstance(scoring.encoding, rope.Rotary) else None
        if self.rotary is not None:
            length = dense.length_read(scoring, at)
            places = jnp.broadcast_to(jnp.arange(capacity, dtype=at.dtype), (len(at), capacity))
            self.by_q = rope.rotation(self.rotary, at, length=length)
            # Looked up by every layer and head, each of which holds other tokens.
            self.by_place = rope.rotation(self.rotary, places, length=length)

    def weights(self, q, k, at, place: Int[Array, "B S P"]) -> Float[Array, "B K G T S"]:
        if self.rotary is not None:
            rows = jnp.arange(len(place))[:, None, None]
            some = jnp.maximum(place, 0)
            by_k = rope.Rotation(*(x[rows, some] for x in self.by_place))
            q = rope.rotate(q, self.by_q, self.rotary.layout)
            k = rope.rotate(k[..., None, :], by_k, self.rotary.layout)[..., 0, :]
        product = dense.dot_of_one if at.shape[1] == 1 else dense.dot
        scores = product(q, k) * jnp.float32(self.scoring.scale)
        to, held = at[:, None, None, :, None], place.swapaxes(1, 2)[:, :, None, None, :]
        slopes = self.scoring.slopes(q.shape[2])
        if slopes is not None:
            steep = slopes.reshape(k.shape[2], -1)[None, :, :, None, None]
            scores = scores - steep * (to - held).astype(jnp.float32)
        return dense.softmax(self.scoring, scores, (held >= 0) & (held <= to))


def _free(place: Int[Array, "B S P"], count: int) -> Int[Array, "B T P"]:
    """Slots that hold nothing, as many as asked for."""
    if count == 1:
        return place.argmin(1, keepdims=True)
    return jnp.argsort(place, axis=1)[:, :count]


def _write(stored: Float[Array, "L B S K H"], new: Float[Array, "B T K H"], layer, slots):
    if slots.shape[2] == 1:
        return caches.write(stored, new, layer, slots[:, :, 0])
    rows, heads = _indices(slots)
    return stored.at[layer, rows, slots, heads].set(new.astype(stored.dtype), mode="drop")


def _indices(slots: Int[Array, "B T P"]):
    return jnp.arange(len(slots))[:, None, None], jnp.arange(slots.shape[2])[None, None]


def _rank(order: Int[Array, "B S P"]) -> Int[Array, "B S P"]:
    """Where each one stands in this order."""
    return jnp.argsort(order, axis=1)


@policies.register("h2o")
@dataclass(frozen=True)
class H2O(Scored):
    """Keeps, in each key/value head, what attracted most attention so far, summed over its queries,
    and the last tokens.

    Source: Zhang et al. 2023, arXiv:2306.14048. As in the release there are no sinks, and half of
    what is kept is recent. Query heads that share a key head are summed.
    """

    sinks: HeldOrNone = 0
    recent: HeldOrNone | None = None

    by_head = True
    best_between = True

    def scored(self, score, weights, at):
        del at
        return score + weights.sum((2, 3)).swapaxes(1, 2)


@policies.register("tova")
@dataclass(frozen=True)
class TOVA(Scored):
    """Keeps, in each layer, what the last query attended to most, averaged over heads.

    Source: Oren et al. 2024, arXiv:2401.06104, which has neither sinks nor recent tokens.
    """

    sinks: HeldOrNone = 0

    def scored(self, score, weights, at):
        last = at.argmax(1)[:, None, None, None, None]
        seen = jnp.take_along_axis(weights, last, axis=3)[:, :, :, 0].mean((1, 2))  # [B, S]
        some = (at >= 0).any(1)[:, None, None]
        return jnp.where(some, seen[:, :, None], score)


@policies.register("sirllm")
@dataclass(frozen=True)
class SirLLM(Scored):
    """Keeps the tokens that surprised the model most. Source: Yao et al. 2024, arXiv:2405.12528.

    The surprise of x_t is -log P(x_t | x_<t); the first token of a turn is given the largest of its
    turn. Surprises are multiplied by `decay` after every turn, so `decay` counts turns, whether or
    not any of them evicted. score="reference" is what the published code computes instead: token
    t + 1 gets -log P(x_t | x_<=t), the surprise of seeing the token before it once more.
    """

    decay: Annotated[float, Range(above=0, max=1)] = 1.0
    score: Literal["surprise", "reference"] = "surprise"

    listens = True

    def __post_init__(self):
        super().__post_init__()
        if self.score not in ("surprise", "reference"):
            raise InputError(f"score={self.score!r}; give 'surprise' or 'reference'")

    def extra(self, sizes):
        before = {
            "hidden": jnp.zeros((sizes.batch, sizes.width), sizes.dtype),
            "token": jnp.zeros(sizes.batch, jnp.int32),
        }
        return super().extra(sizes) | before  # of the token that was read last

    def settled(self, score, place, since):
        of_turn = jnp.where(place > since, score, 0.0).max(1, keepdims=True)
        if self.turn > 1:
            score = jnp.where(place == since, of_turn, score)
        return score * self.decay

    def told(self, stored, *, tokens, positions, hidden, logits):
        """The cache with the surprise of the tokens that were just read."""
        before_hidden, before_token = stored.extra["hidden"][0], stored.extra["token"][0]
        earlier = jnp.concatenate([before_hidden[:, None].astype(hidden.dtype), hidden[:, :-1]], 1)
        previous = jnp.concatenate([before_token[:, None], tokens[:, :-1]], 1)
        scores = logits(earlier)
        of = tokens if self.score == "surprise" else previous
        chosen = jnp.take_along_axis(scores, of[:, :, None], axis=2)[:, :, 0]
        surprise = jax.nn.logsumexp(scores, axis=-1) - chosen
        surprise = jnp.where(positions > 0, surprise, 0.0)  # nothing stands before the first
        at, place = self.place(positions), stored.extra["place"]
        # [L, B, S, 1, T]
        here = (place[..., None] == at[None, :, None, None, :]) & (at >= 0)[None, :, None, None, :]
        new = jnp.where(here, surprise[None, :, None, None, :], 0.0).sum(-1)
        some, last = (at >= 0).any(1), at.argmax(1)
        rows = jnp.arange(len(tokens))
        extra = {
            "place": place,
            "score": jnp.where(here.any(-1), new, stored.extra["score"]),
            "hidden": _kept_where(some, hidden[rows, last], stored.extra["hidden"]),
            "token": _kept_where(some, tokens[rows, last], stored.extra["token"]),
        }
        return dataclasses.replace(stored, extra=extra)


def _kept_where(some: Bool[Array, " B"], new: Array, old: Array) -> Array:
    """`old` [L, B, …] with the rows where there is something new."""
    choose = some.reshape(1, -1, *(1,) * (old.ndim - 2))
    return jnp.where(choose, new[None].astype(old.dtype), old)
