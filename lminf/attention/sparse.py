"""Attention over tokens that a policy selects by what they hold: what such policies share.

All of them keep every key and value, in order, and see sinks, a window and what they select, under
one softmax. A policy says which tokens those are for a group of queries, and where they seem to be;
it computes no attention.

Queries select in groups: those at positions [n group, (n + 1) group) which one call reads, however
the row is padded. So a text read at once equals the text read in chunks whose sizes are multiples
of the group's, and with groups of one token it equals any partition into chunks. A token that is
read alone selects alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lminf import kernels
from lminf.attention import attention_received, rope
from lminf.attention import cache as caches
from lminf.attention import scores as scores_
from lminf.attention.policy import FULL, Policy
from lminf.attention.scores import Placement, ScoreConfig, by_head
from lminf.errors import InputError

WHOLE_CALL = 2**31 - 1  # a group of all tokens of a call: each selects by itself


class SparsePolicy(Policy):
    """Selects among all earlier tokens. Subclasses say which, and what they remember."""

    context_parallel = False

    group: Any  # int: queries that select together, where they are read together
    # int | "true" | "packed". Where what is selected seems to be: so far away from every query,
    # where it is, or where it stands in the list of all that is seen.
    selected_distance: Any
    last_only = False  # whether only the last query of a call selects, and others see a window
    dense_layers = 0  # layers at the start, of those with this policy, that see everything
    ranks_by_products = False  # so that ALiBi's bias would be missing

    @property
    def bounded(self) -> bool:
        return False  # what may be selected is anything

    def cache_layout(self, capacity: int) -> caches.LinearCache:
        return caches.LinearCache(capacity)

    def table_size(self, slots: int, rows: int) -> int:
        """One past the largest position that a key of a list is placed at; 0: none is by a list."""
        del rows
        return 0 if isinstance(self.selected_distance, int) else slots

    @property
    def sink_distance(self) -> int:
        """How far away sinks seem beyond the window, where what is selected is at one distance."""
        assert isinstance(self.selected_distance, int)
        return self.selected_distance

    def select(self, state: Any, query: "Query") -> tuple[Any, Any]:
        """What these queries see, and the state."""
        raise NotImplementedError

    def attend(
        self, query: "Query", selected: Any
    ) -> tuple[Float[Array, "B R N H"], Callable[[], Array] | None]:
        """Outputs over what is selected, and the function of what the window's keys received."""
        by_kernel = query.q.shape[1] > 1 and isinstance(self.selected_distance, int)
        return (_by_kernel if by_kernel else _gathered)(self, query, selected)

    def observe(self, state: Any, query: "Query", selected: Any, received: Any) -> Any:
        """The state once they attended; `received()` [B, N, W] is what the window's keys got."""
        del query, selected, received
        return state


class Selected(NamedTuple):
    """What a group of queries sees, beside the policy's sinks.

    Where all is at one distance, a query sees of `positions` what is beyond its own window; else
    the window of all queries is the one given.
    """

    positions: Int[Array, "B P X"]  # rising, -1 for none; lists of P heads: 1, K or N
    window_start: Int[Array, " B"]
    window_len: int

    @property
    def window_positions(self) -> Int[Array, "B W"]:
        return self.window_start[:, None] + jnp.arange(self.window_len, dtype=jnp.int32)[None]


def block_positions(
    block_ids: Int[Array, "B P M"], size: int, *, first: int = 0
) -> Int[Array, "B P X"]:
    """Positions of the tokens of blocks that begin at `first`; -1 for those of block -1."""
    block_ids = block_ids[..., None]
    positions = first + block_ids * size + jnp.arange(size, dtype=jnp.int32)[None, None, None]
    return jnp.where(block_ids >= 0, positions, -1).reshape(*block_ids.shape[:2], -1)


# --- Groups of queries ----------------------------------------------------------------------------


class Group(NamedTuple):
    """The tokens of one call that select together, in R rows, some of them empty."""

    columns: Int[Array, "B R"]  # where in the chunk they stand
    rows_pos: Int[Array, "B R"]  # rising by one along the rows, empty ones too
    pos: Int[Array, "B R"]  # -1 where the row is empty
    first: Int[Array, " B"]  # the smallest position that is not
    end: Int[Array, " B"]  # one past the largest; `first` in an empty group

    @property
    def base(self) -> Int[Array, " B"]:
        """The position of the first row."""
        return self.rows_pos[:, 0]

    def cut(self, x: Float[Array, "B T N H"]) -> Float[Array, "B R N H"]:
        return x[_each_row(self.columns), jnp.clip(self.columns, 0, x.shape[1] - 1)]

    def put(self, out: Float[Array, "B T N H"], part: Array) -> Float[Array, "B T N H"]:
        columns = jnp.where(self.pos >= 0, self.columns, out.shape[1])
        return out.at[_each_row(columns), columns].set(part.astype(out.dtype), mode="drop")


class Groups:
    """A chunk's tokens in groups that are aligned to positions, not to columns of the chunk."""

    def __init__(self, positions: Int[Array, "B T"], size: int):
        self.positions, self.size = positions, size
        self.tokens = positions.shape[1]
        self.rows = min(size, self.tokens)
        self.first = jnp.maximum(positions[:, 0], 0) // size
        self.count = jnp.max(positions[:, -1] // size - self.first) + 1

    def at(self, index: Any) -> Group:
        number = (self.first + index)[:, None]
        if self.tokens <= self.size:
            columns = jnp.arange(self.tokens, dtype=jnp.int32)
            columns = jnp.broadcast_to(columns, self.positions.shape)
            rows_pos = self.positions
            inside = rows_pos // self.size == number
        else:
            rows_pos = number * self.size + jnp.arange(self.size, dtype=jnp.int32)[None]
            columns = rows_pos - self.positions[:, :1]
            inside = (columns >= 0) & (columns < self.tokens)
        pos = jnp.where(inside & (rows_pos >= 0), rows_pos, -1)
        end = pos.max(1) + 1
        first = jnp.where(pos >= 0, pos, end[:, None]).min(1)
        return Group(columns, rows_pos, pos, first, end)

    def run(self, one: Callable, q: Float[Array, "B T N H"], state: Any) -> tuple[Array, Any]:
        """(out, state) after `one(group, its q, state)` gave those of every group in turn."""

        def body(index, carry):
            out, state = carry
            group = self.at(index)
            part, state = one(group, group.cut(q), state)
            return group.put(out, part), state

        carry = jnp.zeros_like(q), state
        if self.tokens == 1 or self.size == WHOLE_CALL:
            return body(jnp.int32(0), carry)
        return jax.lax.fori_loop(jnp.int32(0), self.count.astype(jnp.int32), body, carry)


def _each_row(positions: Int[Array, "B R"]) -> Int[Array, "B 1"]:
    return jnp.arange(positions.shape[0], dtype=jnp.int32)[:, None]


@dataclass(frozen=True)
class Query:
    """A group of queries, and the cache that they may ask."""

    group: Group
    q: Float[Array, "B R N H"]  # un-rotated
    kv: caches.KVState  # of all layers, with the call's keys and values in it
    layer: Array
    alone: bool  # whether it is all that the call reads, one token
    config: ScoreConfig
    placement: Placement
    table: rope.Rotation | None  # of positions 0..

    @property
    def slots(self) -> int:
        """The most tokens that there will ever be."""
        return self.kv.k.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.kv.k.shape[3]

    def window(self, before: int) -> tuple[Int[Array, " B"], int]:
        """Where it begins and how long it is, from so many tokens before the first query on."""
        return self.group.base - before, before + self.q.shape[1]

    def rows(self, stored: Float[Array, "L B S K H"], positions: Int[Array, "B X"]) -> Array:
        """[B, X, K, H] of this layer; positions that there are none of give any row."""
        positions = jnp.clip(positions, 0, stored.shape[2] - 1)
        return stored[self.layer, _each_row(positions), positions].astype(self.q.dtype)

    def by_head(self, stored: Float[Array, "L B S K H"], positions: Int[Array, "B P X"]) -> Array:
        """[B, P, X, H], with a list of positions for each of P heads: K or N."""
        row = jnp.arange(positions.shape[0], dtype=jnp.int32)[:, None, None]
        head = jnp.arange(positions.shape[1], dtype=jnp.int32)[None, :, None]
        head = head // (positions.shape[1] // stored.shape[3])
        positions = jnp.clip(positions, 0, stored.shape[2] - 1)
        return stored[self.layer, row, positions, head].astype(self.q.dtype)

    def placed(self, x: Float[Array, "B P X H"], positions: Int[Array, "B P X"]) -> Array:
        """x at these positions."""
        return self.placement.look_up(x, self.table, positions)


# --- One layer ------------------------------------------------------------------------------------


def reader(
    policy: SparsePolicy,
    config: ScoreConfig,
    layout: caches.Layout,
    positions: Int[Array, "B T"],
    over_positions: Callable[[Policy], Callable],
) -> Callable[..., tuple[Array, Any]]:
    """(q, k, v, kv before, kv after the chunk is written, layer) -> out, state. `over_positions`
    makes the function that attends under a policy of positions.
    """
    if policy.ranks_by_products and isinstance(config.encoding, rope.Alibi):
        raise InputError(
            f"{policy.name} ranks keys by products alone, but this model's positions are Alibi; "
            f"use a policy of positions"
        )
    batch, tokens = positions.shape
    placement = Placement(config, positions)
    groups = Groups(positions[:, -1:] if policy.last_only else positions, policy.group)
    table = None
    if size := policy.table_size(layout.slots, groups.rows):
        table = placement.table(size, batch)
    window_read = dense_read = None
    if policy.last_only and tokens > 1:
        window_read = by_head(policy, config, over_positions)
    if policy.dense_layers:
        dense_read = by_head(FULL, config, over_positions)

    def read(q, k, v, before, kv, layer):
        del before

        def over(attend):
            after = kv.k[layer], kv.v[layer]  # of a cache that keeps all: none is overwritten
            return attend(q, k, v, *after, *after)

        def one(group, q, state):
            alone = groups.tokens == 1
            query = Query(group, q, kv, layer, alone, config, placement, table)
            selected, state = policy.select(state, query)
            out, received = policy.attend(query, selected)
            return out, policy.observe(state, query, selected, received)

        def sparse():
            if window_read is None:
                return groups.run(one, q, kv.state)
            out, state = groups.run(one, q[:, -1:], kv.state)
            return jnp.concatenate([over(window_read)[:, :-1], out], 1), state

        if dense_read is None:
            return sparse()
        return jax.lax.cond(
            layer < policy.dense_layers,
            lambda: (over(dense_read).astype(q.dtype), kv.state),
            sparse,
        )

    return read


def _by_kernel(policy, query, selected):
    """A group with one list for all heads, at one distance: sinks and list are the globals."""
    group, placement, config = query.group, query.placement, query.config
    near_pos, sinks = selected.window_positions, _sinks(policy, len(query.q))
    k, v = query.rows(query.kv.k, near_pos), query.rows(query.kv.v, near_pos)
    near_q, near_k = placement.at(query.q, group.rows_pos), placement.at(k, near_pos)
    far, far_pos = {}, jnp.concatenate([sinks, selected.positions[:, 0]], 1)
    if far_pos.shape[1]:
        far = {
            "query_global": placement.away(query.q, policy.selected_distance),
            "key_global": query.rows(query.kv.k, far_pos),
            "value_global": query.rows(query.kv.v, far_pos),
            "global_positions": far_pos,
        }
    out, lse = kernels.lambda_attention(
        near_q, near_k, v, **far, num_global=far_pos.shape[1], window_size=policy.window,
        key_start=near_pos[:, 0], query_offset=selected.window_len - group.pos.shape[1],
        scale=config.scale, logits_soft_cap=config.soft_cap, return_residuals=True,
    )  # fmt: skip

    def received():
        return attention_received.by_key(
            config, near_q, near_k, lse, q_pos=group.pos, k_pos=near_pos, seen=policy.in_window
        )

    return out, received


def _gathered(policy, query, selected):
    """All that is seen, fetched and under one softmax; scores of all queries exist at once."""
    if not isinstance(policy.selected_distance, int):
        return _attend_list(policy, query, selected), None
    group, placement, config, q = query.group, query.placement, query.config, query.q
    query_pos = group.pos[:, None, :, None]  # [B, 1, R, 1] beside keys [B, P, 1, X]
    sinks, near, listed = _sinks(policy, len(q)), selected.window_positions, selected.positions

    def beyond(key_pos):
        return query_pos - key_pos[:, :, None] >= policy.window

    def shared(key_pos, seen, placed_q, rotation=None):
        """Scores and values of keys that all heads see or do not see."""
        k = placement.rotate(query.rows(query.kv.k, key_pos), rotation)
        scores = config.capped(scores_.scaled(config, placed_q, k))
        seen = (seen & (key_pos >= 0)[:, None, None])[:, :, None]
        return jnp.where(seen, scores, scores_.MASKED), query.rows(query.kv.v, key_pos)

    distance = query_pos - near[:, None, None]
    in_window = (distance >= 0) & (distance < policy.window)
    placed_q = placement.at(q, group.rows_pos)
    parts = [shared(near, in_window, placed_q, placement.rotation(near))]
    if sinks.shape[1]:
        parts.append(shared(sinks, beyond(sinks[:, None]), placement.away(q, policy.sink_distance)))
    away = placement.away(q, policy.selected_distance)
    if listed.shape[1] == 1:
        parts.append(shared(listed[:, 0], beyond(listed), away))
    scores, values = map(list, zip(*parts, strict=True))
    count = sum(v.shape[1] for v in values)
    if listed.shape[1] > 1:
        seen = beyond(listed) & (listed >= 0)[:, :, None]
        by_list = _list_scores(config, away, query.by_head(query.kv.k, listed), seen)
        scores.append(by_list.reshape(*scores[0].shape[:4], -1))
    weights = _softmax(jnp.concatenate(scores, -1)).astype(q.dtype)
    out = scores_.mix(weights[..., :count], jnp.concatenate(values, 1))
    if listed.shape[1] > 1:
        out = out + _mix_lists(weights[..., count:], query.by_head(query.kv.v, listed))

    def received():
        return weights[..., : near.shape[1]].astype(jnp.float32).sum(3).reshape(
            len(q), -1, near.shape[1]
        )  # fmt: skip

    return out, received


def _attend_list(policy, query, selected):
    """Of sinks, what is selected and the window, as one list for each of P heads."""
    lists, q = selected.positions.shape[:2], query.q.swapaxes(1, 2)
    sinks, near = (
        jnp.broadcast_to(x[:, None], (*lists, x.shape[1]))
        for x in (_sinks(policy, len(q)), selected.window_positions)
    )
    key_pos = jnp.concatenate([sinks, selected.positions, near], 2)
    query_pos = query.group.pos[:, None, :, None]
    seen = (key_pos >= 0)[:, :, None] & (key_pos[:, :, None] <= query_pos)  # [B, P, R, X]
    as_if_key, as_if_query = key_pos, query.group.rows_pos[:, None]
    if policy.selected_distance == "packed":
        as_if_key = jnp.cumsum(key_pos >= 0, -1, dtype=jnp.int32) - 1
        as_if_query = seen.sum(-1, dtype=jnp.int32) - 1
    as_if_query = jnp.maximum(as_if_query, 0).repeat(q.shape[1] // as_if_query.shape[1], 1)
    q = query.placed(q, as_if_query).swapaxes(1, 2)
    k = query.placed(query.by_head(query.kv.k, key_pos), jnp.maximum(as_if_key, 0))
    weights = _softmax(_list_scores(query.config, q, k, seen)).astype(q.dtype)
    return _mix_lists(weights, query.by_head(query.kv.v, key_pos))


def _sinks(policy, batch: int) -> Int[Array, "B G"]:
    sinks = jnp.arange(policy.num_sinks or 0, dtype=jnp.int32)
    return jnp.broadcast_to(sinks, (batch, len(sinks)))


def _list_scores(
    config: ScoreConfig,
    q: Float[Array, "B R N H"],
    k: Float[Array, "B P X H"],
    seen: Bool[Array, "B P R X"],
) -> Float[Array, "B P G R X"]:
    """Of queries with the list of their head, MASKED where it is not seen."""
    rows = scores_.rows_of_key_heads(q, k.shape[1])
    flat = rows.reshape(*rows.shape[:2], -1, rows.shape[4])
    scores = jnp.einsum("bprh,bpxh->bprx", flat, k, preferred_element_type=jnp.float32)
    scores = config.capped(scores.reshape(*rows.shape[:4], -1) * jnp.float32(config.scale))
    return jnp.where(seen[:, :, None], scores, scores_.MASKED)


def _mix_lists(weights: Float[Array, "B A G R X"], v: Float[Array, "B P X H"]):
    """[B, R, N, H] of weights by head, in any grouping."""
    batch, lists = v.shape[:2]
    rows = weights.reshape(batch, lists, -1, weights.shape[-1])
    out = jnp.einsum("bprx,bpxh->bprh", rows, v)
    return out.reshape(batch, -1, weights.shape[3], v.shape[3]).swapaxes(1, 2)


def _softmax(scores: Float[Array, "B A G R X"]) -> Float[Array, "B A G R X"]:
    """Weights, float32, of scores that are MASKED where nothing is seen; zero where nothing is."""
    top = jnp.maximum(scores.max(-1, keepdims=True), scores_.MASKED / 2)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total == 0, 1.0, total)
