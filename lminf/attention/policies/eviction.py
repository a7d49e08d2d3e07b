"""Caches of a fixed size that keep the tokens with the best scores: SirLLM, H2O and TOVA.

    kept = first `sinks`  +  best by score  +  the most recent          capacity - turn tokens

Text is read in turns of `turn` tokens, [n turn, (n + 1) turn), and tokens are evicted before a
turn; with turn = 1 before each token, as papers define it. Positions are numbers in the cache, as
StreamingLLM's are, so no text is too long. What a row keeps may differ head by head (H2O) or layer
by layer: `pos` is the number of a slot's token.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf.attention import cache as caches
from lminf.attention import scores
from lminf.attention.policy import Count, CountOrNone, Policy, register
from lminf.attention.scores import Placement, ScoreConfig
from lminf.errors import InputError
from lminf.ranges import Range

LAST = jnp.iinfo(jnp.int32).max


@dataclass(frozen=True)
class EvictionPolicy(Policy):
    """What the policies that evict by a score share. Subclasses say what the score is."""

    capacity: Count  # tokens held, those of the turn that is being read included
    sinks: CountOrNone = 4  # tokens at the start that are never evicted
    # Tokens kept because they are the last, at least; None: half of the rest.
    recent: CountOrNone | None = 0
    turn: Count = 128  # tokens between evictions, and the most that are read at once

    num_sinks = 0
    window = property(attrgetter("capacity"))
    window_field = "capacity"
    evict_every = property(attrgetter("turn"))
    accumulates = True
    # Tokens that a turn finds there, once there are so many, and those because of their score.
    kept = property(lambda self: self.capacity - self.turn)
    best = property(lambda self: self.kept - self.sinks - (self.recent or 0))
    context_parallel = False
    by_head = False  # whether each key/value head keeps tokens of its own
    best_between = False  # whether sinks and recent tokens are kept apart from the best

    def __post_init__(self):
        super().__post_init__()
        if self.recent is None:
            object.__setattr__(self, "recent", self.best // 2)

    def problems(self) -> Iterator[str]:
        if self.best < 0:
            yield (
                f"capacity={self.capacity} is less than sinks={self.sinks}, "
                f"recent={self.recent or 0} and turn={self.turn} together; give capacity>="
                f"{self.capacity - self.best}"
            )

    def cache_layout(self, capacity: int) -> caches.SlotCache:
        return caches.SlotCache(self.capacity)

    def init_state(self, shape: caches.CacheShape) -> dict[str, Any]:
        slots = (shape.batch, self.capacity, shape.kv_heads if self.by_head else 1)
        return {"pos": jnp.full(slots, caches.EMPTY, jnp.int32), "score": jnp.zeros(slots)}

    def extend(
        self,
        config: ScoreConfig,
        layout: caches.SlotCache,
        stored_pos: Int[Array, "B S"],
        positions: Int[Array, "B T"],
    ) -> tuple[Callable[..., tuple[Array, caches.KVState]], Int[Array, "B S"]]:
        """As `attend.extend`, for tokens that lie between two evictions; `evict` makes room before
        the first after one. A token goes to any empty slot, and nothing moves.
        """
        tokens, turn = positions.shape[1], self.turn
        if tokens > turn:
            raise InputError(
                f"{self.name} evicts before every {turn} tokens, but {tokens} are to be read "
                f"at once; read them in chunks through the cache, or give turn>={tokens}"
            )
        cache_pos = self.position_in_cache(positions)
        starts = ((cache_pos >= 0) & (positions % turn == 0)).any(1)[:, None, None]
        first = jnp.where(cache_pos >= 0, positions, LAST).min(1) - turn
        since = self.position_in_cache(jnp.maximum(first, 0))[:, None, None]
        placement = Placement(config, cache_pos, table=layout.slots)
        by_q, row = placement.rotation(cache_pos), jnp.arange(len(positions))[:, None, None]

        def evicted(state):
            new = self.evict(state, since)
            return {name: jnp.where(starts, new[name], state[name]) for name in new}

        def step(q, k, v, kv, layer):
            state = {name: kv.state[name][layer] for name in ("pos", "score")}
            # Sorting, which most steps of decoding need not do.
            state = jax.lax.cond(starts.any(), evicted, lambda state: state, state)
            pos, score = state["pos"], state["score"]  # [B, S, P]
            empty = pos.argmin(1, keepdims=True) if tokens == 1 else jnp.argsort(pos, axis=1)
            slots = jnp.where(cache_pos[..., None] >= 0, empty[:, :tokens], layout.slots)
            index = row, slots, jnp.arange(pos.shape[2])[None, None]
            pos = pos.at[index].set(cache_pos[..., None], mode="drop")
            score = score.at[index].set(0.0, mode="drop")
            slots = slots if self.by_head else slots[..., 0]
            k, v = caches.write(kv.k, k, layer, slots), caches.write(kv.v, v, layer, slots)
            all_k, all_v = k[layer].astype(q.dtype), v[layer].astype(q.dtype)
            placed = placement.at(all_k, jnp.broadcast_to(pos, all_k.shape[:3]))
            part = scores.over_slots(
                config, placement.rotate(q, by_q), placed, all_v, cache_pos, pos
            )
            new = {"pos": pos, "score": self.observe_slots(score, part, cache_pos)}
            state = kv.state | {name: kv.state[name].at[layer].set(new[name]) for name in new}
            return part.out, caches.KVState(k, v, state)

        return step, stored_pos

    def position_in_cache(self, positions: Int[Array, "*B"]) -> Int[Array, "*B"]:
        """The number in the cache that a token at this position has in its own turn."""
        within = positions % self.turn
        number = jnp.minimum(positions - within, self.kept) + within
        return jnp.where(positions >= 0, number, caches.EMPTY)

    def observe_slots(
        self, score: Float[Array, "B S P"], part: scores.Part, cache_pos: Int[Array, "B T"]
    ) -> Float[Array, "B S P"]:
        """Scores of what is held, once tokens with these numbers attended to it."""
        return score

    def end_of_turn(
        self, score: Float[Array, "B S P"], pos: Int[Array, "B S P"], since: Any
    ) -> Float[Array, "B S P"]:
        """Scores at the end of a turn whose first token has the number `since` [B, 1, 1]."""
        return score

    def evict(self, state: dict[str, Any], since: Any) -> dict[str, Any]:
        """The state with `kept` tokens at most, numbered anew, after a turn that began `since`."""
        pos, score = state["pos"], self.end_of_turn(state["score"], state["pos"], since)
        filled = scored = pos >= 0
        if self.best_between:
            last = pos.max(1, keepdims=True) - (self.recent or 0)
            scored = filled & (pos >= self.sinks) & (pos <= last)

        def rank(*keys):
            """Where each one stands in order of the last key, then of those before it."""
            return jnp.argsort(jnp.lexsort(keys, axis=1), axis=1)

        by_score = rank(pos, -jnp.where(scored, score, -jnp.inf))
        chosen = filled & ((scored & (by_score < self.best)) | (pos < self.sinks))
        # Then by age: every chosen token is before every other one.
        by_age = rank(-pos, ~chosen)
        stays = filled & (by_age < self.kept)
        number = rank(jnp.where(stays, pos, LAST))
        return {
            "pos": jnp.where(stays, number, caches.EMPTY),
            "score": jnp.where(stays, score, 0.0),
        }


@register("h2o")
@dataclass(frozen=True)
class H2O(EvictionPolicy):
    """Keeps, in each key/value head, what received most attention so far, summed over its queries,
    and the last tokens.

    Source: Zhang et al. 2023, arXiv:2306.14048. As in the release there are no sinks, and half of
    what is kept is recent. Query heads that share a key head are summed.
    """

    sinks: CountOrNone = 0
    recent: CountOrNone | None = None

    by_head = True
    best_between = True

    def observe_slots(self, score: Array, part: scores.Part, cache_pos: Array) -> Array:
        return score + part.received(score.shape[2]).swapaxes(1, 2)


@register("tova")
@dataclass(frozen=True)
class TOVA(EvictionPolicy):
    """Keeps, in each layer, what the last query attended to most, averaged over heads.

    Source: Oren et al. 2024, arXiv:2401.06104, which has neither sinks nor recent tokens.
    """

    sinks: CountOrNone = 0

    def observe_slots(self, score: Array, part: scores.Part, cache_pos: Array) -> Array:
        last = cache_pos.argmax(1)[:, None, None, None]
        seen = jnp.take_along_axis(part.weights, last, axis=2)[:, :, 0].mean(1)  # [B, S]
        any_token = (cache_pos >= 0).any(1)[:, None, None]
        return jnp.where(any_token, seen[:, :, None], score)


@register("sirllm")
@dataclass(frozen=True)
class SirLLM(EvictionPolicy):
    """Keeps the tokens that surprised the model most. Source: Yao et al. 2024, arXiv:2405.12528.

    The surprise of x_t is -log P(x_t | x_<t); the first token of a turn is given the largest of its
    turn. Surprises are multiplied by `decay` after every turn, so `decay` counts turns, whether or
    not any of them evicted. score="reference" is what the published code computes instead: token
    t + 1 gets -log P(x_t | x_<=t), the surprise of seeing the token before it once more.
    """

    decay: Annotated[float, Range(above=0, max=1)] = 1.0
    score: Literal["surprise", "reference"] = "surprise"

    needs_hidden = True

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.score not in ("surprise", "reference"):
            yield f"score={self.score!r}; give 'surprise' or 'reference'"

    def init_state(self, shape: caches.CacheShape) -> dict[str, Any]:
        last_read = {
            "hidden": jnp.zeros((shape.batch, shape.width), shape.dtype),
            "token": jnp.zeros(shape.batch, jnp.int32),
        }
        return super().init_state(shape) | last_read  # of the token that was read last

    def end_of_turn(self, score: Any, pos: Any, since: Any) -> Array:
        of_turn = jnp.where(pos > since, score, 0.0).max(1, keepdims=True)
        if self.turn > 1:
            score = jnp.where(pos == since, of_turn, score)
        return score * self.decay

    def observe_hidden(
        self,
        layer_caches: Sequence[caches.Cache],
        *,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        hidden: Float[Array, "B T D"],
        logits: Callable[[Array], Array],
    ) -> list[caches.Cache]:
        """The caches with the surprise of the tokens that were just read, which is the same in all
        layers: logits of it for each would take 110 ms a token of SmolLM2 (Intel Xeon, two cores).
        """
        state = layer_caches[0].state
        before_hidden, before_token = (state[name][0] for name in ("hidden", "token"))
        earlier = jnp.concatenate([before_hidden[:, None].astype(hidden.dtype), hidden[:, :-1]], 1)
        previous = jnp.concatenate([before_token[:, None], tokens[:, :-1]], 1)
        expected = logits(earlier)
        of = tokens if self.score == "surprise" else previous
        chosen = jnp.take_along_axis(expected, of[:, :, None], axis=2)[:, :, 0]
        surprise = jax.nn.logsumexp(expected, axis=-1) - chosen
        surprise = jnp.where(positions > 0, surprise, 0.0)  # nothing stands before the first
        cache_pos = self.position_in_cache(positions)
        row, last = jnp.arange(len(tokens)), cache_pos.argmax(1)
        any_token = cache_pos[row, last] >= 0
        last_hidden = hidden[row, last].astype(before_hidden.dtype)
        last_hidden = jnp.where(any_token[:, None], last_hidden, before_hidden)
        last_token = jnp.where(any_token, tokens[row, last], before_token)
        valid = (cache_pos >= 0)[None, :, None, None]  # beside slots [L, B, S, 1] of each token

        def observed(cache: caches.Cache) -> caches.Cache:
            state = cache.state
            in_slot = (state["pos"][..., None] == cache_pos[None, :, None, None]) & valid
            new = jnp.where(in_slot, surprise[None, :, None, None], 0.0).sum(-1)
            state = state | {
                "score": jnp.where(in_slot.any(-1), new, state["score"]),
                "hidden": jnp.broadcast_to(last_hidden[None], state["hidden"].shape),
                "token": jnp.broadcast_to(last_token[None], state["token"].shape),
            }
            return dataclasses.replace(cache, state=state)

        return [observed(cache) for cache in layer_caches]
