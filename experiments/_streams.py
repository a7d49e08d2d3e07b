"""Decoding after a long text, timed without reading the text.

The work of a step depends on the number of slots of the cache and not on their content, so the
cache is filled with positions, and keys and values stay zero.
"""

import dataclasses
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lminf.attention import cache
from lminf.attention.policies.eviction import EvictionPolicy
from lminf.attention.policy import AnyPolicy
from lminf.lm import generate
from lminf.lm.generate import GREEDY
from lminf.lm.lm import LM
from lminf.run.progress import Progress


class Stream:
    """One policy after a prompt of `position` tokens, with room for some more."""

    def __init__(self, lm: LM, position: int, *, room: int) -> None:
        self.lm, self.position = lm, position
        # As generation does: caches that keep everything grow by this many tokens at a time.
        self.capacity = -(-(position + room) // generate.STEP) * generate.STEP
        read = self.as_if_read()
        self.caches = generate.prepare_decoding(lm.decoder, read, length=position, room=room)
        self.at, self.token = position, np.zeros(1, np.int32)

    def as_if_read(self) -> tuple[cache.Cache, ...]:
        empty = self.lm.on_one_device.init_caches(batch=1, capacity=self.capacity)
        return tuple(as_if_read(each, self.lm.policy, self.position) for each in empty)

    @property
    def bytes(self) -> int:
        """Of keys, values and what else the policy holds."""
        return sum(x.nbytes for x in jax.tree.leaves([(c.k, c.v, c.state) for c in self.caches]))

    def step(self) -> float:
        """Seconds until the next token is known here."""
        started = time.perf_counter()
        self.token = np.asarray(self.advance(self.token[:, None], self.at))
        self.at += 1
        return time.perf_counter() - started

    def read(self, chunk: int) -> float:
        """Seconds to read `chunk` tokens of a prompt from here; no step is to follow."""
        self.caches = self.as_if_read()
        started = time.perf_counter()
        np.asarray(self.advance(np.zeros((1, chunk), np.int32), self.position))
        return time.perf_counter() - started

    def advance(self, tokens: Int[np.ndarray, "1 C"], position: int) -> Int[jax.Array, " 1"]:
        """The token after these, greedily."""
        key = jax.random.key(0)  # greedy: not used
        positions = position + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        token, self.caches = generate.decode_step(
            self.lm, jnp.asarray(tokens), positions, self.caches, GREEDY, key
        )
        return token


def step_times(streams: Sequence[Stream], steps: int) -> Float[np.ndarray, "streams 3"]:
    """Quartiles of the milliseconds of a token of each. They take turns, one token of each, so
    that a busy moment of the machine falls on all alike; the first tokens compile and are left out.
    """
    with Progress(steps + 1, label="decoding", unit="tokens of each") as progress:
        rounds = []  # [steps + 1] of [streams] seconds
        for done in range(steps + 1):
            rounds.append([stream.step() for stream in streams])
            progress.update(done + 1)
    return 1e3 * np.percentile(rounds[1:], [25, 50, 75], axis=0).T


def as_if_read(empty: cache.Cache, policy: AnyPolicy, tokens: int) -> cache.Cache:
    """The cache with the positions that it has after `tokens` tokens; keys and values stay zero."""
    if isinstance(policy, EvictionPolicy):
        filled = int(policy.position_in_cache(jnp.int32(tokens - 1))) + 1
        slots = jnp.arange(empty.layout.slots, dtype=jnp.int32)
        pos = jnp.where(slots < filled, slots, cache.EMPTY)[None, None, :, None]
        pos = jnp.broadcast_to(pos, empty.state["pos"].shape)
        return dataclasses.replace(empty, state=empty.state | {"pos": pos})
    pos = jnp.arange(tokens, dtype=jnp.int32)[None]
    slots = empty.layout.destinations(pos)
    return dataclasses.replace(empty, pos=cache.write_pos(empty.pos, pos, slots))
