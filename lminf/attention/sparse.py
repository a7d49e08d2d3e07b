"""Attention over tokens that a policy selects by what they hold: what such policies share.

All of them keep every key and value, in order, and see sinks, a window and what they select, under
one softmax. A policy says which tokens those are for a group of queries, and where they seem to be;
it computes no attention.

Queries select in groups: those at positions [n group, (n + 1) group) which one call reads, however
the row is padded. So a text read at once equals the text read in chunks whose sizes are multiples
of the group's, and with groups of one token it equals any partition into chunks. A token that is
read alone selects alone.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from lminf import kernels
from lminf.attention import cache as caches
from lminf.attention import rope, scores
from lminf.attention.policy import FULL, Policy
from lminf.attention.scores import Placement, ScoreConfig, by_head
from lminf.errors import InputError
from lminf.kernels.common import numerics

RECEIVED_BLOCK = 256  # keys: the weights of 2,048 queries and 9 heads over them are 19 MB
WHOLE_CALL = 2**31 - 1  # a group of all tokens of a call: each selects by itself


class SparsePolicy(Policy, abc.ABC):
    """Selects among all earlier tokens. Subclasses say which, and what they remember."""

    context_parallel = False
    one_by_one = None  # queries select in groups

    @property
    def bounded(self) -> bool:
        return False  # what may be selected is anything

    group: Any  # int: queries that select together, where they are read together
    # int | "true" | "packed". Where what is selected seems to be: so far away from every query,
    # where it is, or where it stands in the list of all that is seen.
    selected_distance: Any
    last_only = False  # whether only the last query of a call selects, and others see a window
    dense_layers = 0  # layers at the start, of those with this policy, that see everything
    ranks_by_products = False  # so that ALiBi's bias would be missing
    # int: how far away sinks seem beyond the window, where what is selected is at one distance.
    sink_distance = property(attrgetter("selected_distance"))

    def table_size(self, slots: int, rows: int) -> int:
        """One past the largest position that a key is placed at."""
        return slots

    @abc.abstractmethod
    def select(self, state: Any, query: "Query") -> tuple[Any, Any]:
        """Positions [B, P, X] of what these queries see, in lists of P heads (1, K or N), rising,
        -1 for none; and the state. Where all is at one distance, sinks and windows are added to
        it, and a query sees of it what is beyond its own window.
        """

    def attend(
        self, query: "Query", selected: Any
    ) -> tuple[Float[Array, "B R N H"], Callable[[], Array] | None]:
        """Outputs over what is selected, and the function of what the window's keys received."""
        if not isinstance(self.selected_distance, int):
            return attend_list(self, query, selected), None
        by_kernel = query.q.shape[1] > 1
        return (_attend_by_kernel if by_kernel else _attend_parts)(self, query, selected)

    def observe(self, state: Any, query: "Query", received: Any) -> Any:
        """The state once they attended; `received()` [B, N, W] is what the keys of
        `query.window(self.window)` got.
        """
        return state


@dataclass(frozen=True)
class Query:
    """The queries of one call that select together, in R rows, and the cache that they may ask."""

    q: Float[Array, "B R N H"]  # un-rotated
    rows_pos: Int[Array, "B R"]  # rising by one along the rows, empty ones too
    pos: Int[Array, "B R"]  # -1 where the row is empty; the first is only in an empty group
    kv: caches.KVState  # of all layers, with the call's keys and values in it
    layer: Array  # row of the cache's arrays
    layer_index: Array | int  # of the layers with this policy, from 0 on
    alone: bool  # whether it is all that the call reads, one token
    config: ScoreConfig
    placement: Placement

    @property
    def first(self) -> Int[Array, " B"]:
        """The smallest position."""
        return jnp.maximum(self.rows_pos[:, 0], 0)

    @property
    def end(self) -> Int[Array, " B"]:
        """One past the largest; 0 in an empty group."""
        return self.pos.max(1) + 1

    @property
    def slots(self) -> int:
        """The most tokens that there will ever be."""
        return self.kv.k.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.kv.k.shape[3]

    def window(self, before: int) -> Int[Array, "B W"]:
        """Positions from so many tokens before the first query to the last row."""
        return self.first[:, None] + jnp.arange(-before, self.q.shape[1], dtype=jnp.int32)[None]

    def rows(self, stored: Float[Array, "L B S K H"], positions: Int[Array, "B X"]) -> Array:
        """[B, X, K, H] of this layer; positions that there are none of give any row."""
        row = jnp.arange(len(positions), dtype=jnp.int32)[:, None]
        positions = jnp.clip(positions, 0, stored.shape[2] - 1)
        return stored[self.layer, row, positions].astype(self.q.dtype)

    def lists(self, stored: Float[Array, "L B S K H"], positions: Int[Array, "B P X"]) -> Array:
        """[B, P, X, H], with a list of positions for each of P heads; of all K where P is 1."""
        if positions.shape[1] == 1:
            return self.rows(stored, positions[:, 0]).swapaxes(1, 2)
        row = jnp.arange(positions.shape[0], dtype=jnp.int32)[:, None, None]
        head = jnp.arange(positions.shape[1], dtype=jnp.int32)[None, :, None]
        head = head // (positions.shape[1] // stored.shape[3])
        positions = jnp.clip(positions, 0, stored.shape[2] - 1)
        return stored[self.layer, row, positions, head].astype(self.q.dtype)


def block_positions(
    block_ids: Int[Array, "B P M"], size: int, *, first: int = 0
) -> Int[Array, "B P X"]:
    """Positions of the tokens of blocks that begin at `first`; -1 for those of block -1."""
    block_ids = block_ids[..., None]
    positions = first + block_ids * size + jnp.arange(size, dtype=jnp.int32)[None, None, None]
    return jnp.where(block_ids >= 0, positions, -1).reshape(*block_ids.shape[:2], -1)


def best_of(ranks: Float[Array, "*B X"], count: int) -> Int[Array, "*B {count}"]:
    """Where the largest are, rising; first -1 in place of those that are -inf."""
    best, indices = jax.lax.top_k(ranks, count)
    return jnp.sort(jnp.where(jnp.isneginf(best), -1, indices.astype(jnp.int32)), axis=-1)


def sinks(policy: Policy, like: Int[Array, "B P X"]) -> Int[Array, "B P G"]:
    """Positions of the policy's sinks, in lists as those of `like`."""
    sink_pos = jnp.arange(policy.num_sinks or 0, dtype=jnp.int32)
    return jnp.broadcast_to(sink_pos, (*like.shape[:2], len(sink_pos)))


# --- One layer ------------------------------------------------------------------------------------


def reader(
    policy: SparsePolicy,
    config: ScoreConfig,
    layout: caches.SinkRingCache,
    positions: Int[Array, "B T"],
    over_positions: Callable[[Policy], Callable],
) -> Callable[..., tuple[Array, Any]]:
    """(q, k, v, kv before, kv after the chunk is written, layer, layer_index) -> out, state.
    `over_positions` makes the function that attends under a policy of positions.
    """
    if policy.ranks_by_products and isinstance(config.encoding, rope.Alibi):
        raise InputError(
            f"{policy.name} ranks keys by products alone, but this model's positions are Alibi; "
            f"use a policy of positions"
        )
    windowed = policy.last_only and positions.shape[1] > 1
    selecting = positions[:, -1:] if windowed else positions
    rows = min(policy.group, selecting.shape[1])
    placement = Placement(config, positions, table=policy.table_size(layout.slots, rows))
    window_read = by_head(policy, config, over_positions) if windowed else None
    dense_read = by_head(FULL, config, over_positions) if policy.dense_layers else None

    def read(q, k, v, old_kv, kv, layer, *, layer_index=None):
        index = layer if layer_index is None else layer_index

        def over(attend):
            cached = kv.k[layer], kv.v[layer]  # of a cache that keeps all: none is overwritten
            return attend(q, k, v, *cached, *cached)

        def one(q, rows_pos, pos, state):
            alone = selecting.shape[1] == 1
            query = Query(q, rows_pos, pos, kv, layer, index, alone, config, placement)
            selected, state = policy.select(state, query)
            out, received = policy.attend(query, selected)
            return out, policy.observe(state, query, received)

        def sparse():
            if window_read is None:
                return _in_groups(one, q, kv.state, selecting, policy.group)
            out, state = _in_groups(one, q[:, -1:], kv.state, selecting, policy.group)
            return jnp.concatenate([over(window_read)[:, :-1], out], 1), state

        if dense_read is None:
            return sparse()
        return jax.lax.cond(
            index < policy.dense_layers,
            lambda: (over(dense_read).astype(q.dtype), kv.state),
            sparse,
        )

    return read


def _in_groups(one, q, state, positions, size):
    """(out, state) after `one(its q, rows_pos, pos, state)` gave those of every group in turn."""
    batch, tokens = positions.shape
    if tokens == 1:
        return one(q, positions, jnp.maximum(positions, -1), state)
    row, rows = jnp.arange(batch, dtype=jnp.int32)[:, None], min(size, tokens)
    begin = positions[:, :1]
    first = jnp.maximum(begin, 0) // size

    def body(index, carry):
        out, state = carry
        number = first + index
        columns = jnp.maximum(number * size - begin, 0) + jnp.arange(rows, dtype=jnp.int32)[None]
        clipped = jnp.minimum(columns, tokens - 1)
        pos = positions[row, clipped]
        inside = (columns < tokens) & (pos >= 0) & (pos // size == number)
        part, state = one(q[row, clipped], begin + columns, jnp.where(inside, pos, -1), state)
        columns = jnp.where(inside, columns, tokens)
        return out.at[row, columns].set(part.astype(out.dtype), mode="drop"), state

    carry = jnp.zeros_like(q), state
    if size == WHOLE_CALL:
        return body(jnp.int32(0), carry)
    count = (positions.max(1, keepdims=True) // size - first).max() + 1
    return jax.lax.fori_loop(jnp.int32(0), count.astype(jnp.int32), body, carry)


def _attend_by_kernel(policy, query, selected):
    """A group with one list for all heads, at one distance: sinks and list are the globals."""
    placement, near_pos = query.placement, query.window(policy.window)
    k, v = query.rows(query.kv.k, near_pos), query.rows(query.kv.v, near_pos)
    near_q, near_k = placement.at(query.q, query.rows_pos), placement.at(k, near_pos)
    far_pos = jnp.concatenate([sinks(policy, selected), selected], 2)[:, 0]
    far_pos = jnp.sort(far_pos, axis=1)  # what is none comes first: the kernel wants them to rise
    out, lse = kernels.lambda_attention(
        near_q, near_k, v, query_global=placement.away(query.q, policy.selected_distance),
        key_global=query.rows(query.kv.k, far_pos), value_global=query.rows(query.kv.v, far_pos),
        global_positions=far_pos, num_global=far_pos.shape[1], window_size=policy.window,
        key_start=near_pos[:, 0], query_offset=policy.window, return_residuals=True,
        **query.config.for_kernel(),
    )  # fmt: skip

    def received():
        return received_by_key(
            query.config, near_q, near_k, lse, q_pos=query.pos, k_pos=near_pos,
            seen=policy.in_window,
        )  # fmt: skip

    return out, received


def received_by_key(
    config: ScoreConfig,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    lse: Float[Array, "B N T"],
    *,
    q_pos: Int[Array, "B T"],
    k_pos: Int[Array, "B S"],
    seen: Callable[[Array, Array], Bool[Array, "B T S"]],
    block: int = RECEIVED_BLOCK,
) -> Float32[Array, "B N S"]:
    """Attention each key received by query head: the sum of exp(logit - lse) over the queries that
    see it, `lse` being that of the whole softmax, of which the keys may be a part.

    Kernels do not return their weights; this computes them again, a block of keys at a time. q and
    k are placed already. A position below 0 is padding, which neither attends nor is attended to.
    """
    keys = k.shape[1]
    block = min(block, keys)
    padding = (0, 0), (0, -keys % block)
    k = jnp.pad(k, (*padding, (0, 0), (0, 0))).swapaxes(1, 2)
    k_pos = jnp.pad(k_pos, padding, constant_values=-1)
    log2_e = jnp.float32(numerics.LOG2_E)
    lse2, query_pos = lse.astype(jnp.float32)[..., None] * log2_e, q_pos[:, :, None]

    def of_block(start: Array) -> Array:
        some_k = jax.lax.dynamic_slice_in_dim(k, start, block, 2)
        key_pos = jax.lax.dynamic_slice_in_dim(k_pos, start, block, 1)[:, None]
        # What is not visible may be beyond what exp2 takes.
        weights = numerics.exp2(scores.logits(config, q, some_k, lists=True) * log2_e - lse2)
        visible = seen(query_pos, key_pos) & (query_pos >= 0) & (key_pos >= 0)
        return jnp.where(visible[:, None], weights, 0.0).sum(2)

    parts = jax.lax.map(of_block, jnp.arange(0, k.shape[2], block, dtype=jnp.int32))
    return jnp.moveaxis(parts, 0, 2).reshape(*lse.shape[:2], -1)[..., :keys]


def _attend_parts(policy, query, selected):
    """One query, whose window is at its true distance and all else at one: a part for each."""
    placement, query_pos = query.placement, query.pos[:, None, :, None]

    def part(q, positions, seen, place=lambda k: k):
        lists = positions.shape[1] > 1
        stored, positions = (query.kv.k, query.kv.v), positions if lists else positions[:, 0]
        k, v = ((query.lists if lists else query.rows)(x, positions) for x in stored)
        return scores.attention(query.config, q, place(k), v, seen, lists=lists)

    def far(positions, distance):
        seen = (query_pos - positions[:, :, None] >= policy.window) & (positions >= 0)[:, :, None]
        return part(placement.away(query.q, distance), positions, seen)

    near = query.window(policy.window)
    seen = policy.in_window(query_pos, near[:, None, None]) & (near >= 0)[:, None, None]
    placed = placement.at(query.q, query.rows_pos)
    near = part(placed, near[:, None], seen, lambda k, pos=near: placement.at(k, pos))
    sets = (
        (sinks(policy, selected[:, :1]), policy.sink_distance),
        (selected, policy.selected_distance),
    )
    parts = [far(*positions)[:2] for positions in sets if positions[0].size]
    out, lse = scores.merge(near[:2], *parts)
    share = jnp.exp(near.lse - jnp.where(jnp.isneginf(lse), 0, lse))[..., None]
    return out.astype(query.q.dtype), lambda: (near.weights * share).sum(2)


def attend_list(
    policy: SparsePolicy, query: Query, positions: Int[Array, "B P X"]
) -> Float[Array, "B R N H"]:
    """All that is seen, as one list for each of P heads, under one softmax."""
    key_pos, query_pos = positions, query.rows_pos[:, None]
    seen = (positions >= 0)[:, :, None] & (positions[:, :, None] <= query.pos[:, None, :, None])
    if policy.selected_distance == "packed":
        key_pos = jnp.cumsum(positions >= 0, -1, dtype=jnp.int32) - 1
        query_pos = seen.sum(-1, dtype=jnp.int32) - 1  # [B, P, R]
    query_pos = scores.each_head(query_pos, query.q.shape[2]).swapaxes(1, 2)
    q = query.placement.at(query.q, jnp.broadcast_to(query_pos, query.q.shape[:3]))
    k = query.placement.at(query.lists(query.kv.k, positions), key_pos)
    v = query.lists(query.kv.v, positions)
    return scores.attention(query.config, q, k, v, seen, lists=True).out


def largest_products(
    query: Query,
    q: Float[Array, "B D N H"],
    asks: Bool[Array, "B R"],
    positions: Int[Array, "B P X"],
    key_pos: Int[Array, "B P X"] | None = None,
) -> Float[Array, "B N E X"]:
    """The largest product of each key in its head's list with the queries that ask, of R; q has
    them placed in E ways. Keys are placed at `key_pos`, or left as they are stored.
    """
    k = query.lists(query.kv.k, positions)
    k = k if key_pos is None else query.placement.at(k, key_pos)
    products = scores.dot(q, k, True)
    products = products.reshape(*products.shape[:2], -1, asks.shape[1], k.shape[2])
    return jnp.where(asks[:, None, None, :, None], products, -jnp.inf).max(3)
