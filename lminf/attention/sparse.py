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

    def attend(self, query: "Query", selected: Any) -> tuple[Array, Callable[[], Array] | None]:
        """Outputs [B, R, N, H] over what is selected; and what the window's keys received."""
        if isinstance(selected, SelectedBlocks):
            return _visit_blocks(query, selected), None
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
    kv: tuple[Array, Array] | None = None  # [B, X, K, H] at `positions`, where at hand already

    @property
    def window_positions(self) -> Int[Array, "B W"]:
        return self.window_start[:, None] + jnp.arange(self.window_len, dtype=jnp.int32)[None]


class SelectedBlocks(NamedTuple):
    """Blocks of `size` tokens that each query of each head sees up to itself, packed."""

    chosen: Bool[Array, "B R N M"]  # of all M blocks of the text
    size: int
    visited: Int[Array, ""]  # of these the first so many are visited


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

    def put(self, out: Float[Array, "B T N H"], part) -> Float[Array, "B T N H"]:
        at = jnp.where(self.pos >= 0, self.columns, out.shape[1])
        return out.at[_each_row(at), at].set(part.astype(out.dtype), mode="drop")


class Groups:
    """A chunk's tokens in groups that are aligned to positions, not to columns of the chunk."""

    def __init__(self, positions: Int[Array, "B T"], size: int):
        self.positions, self.size = positions, size
        self.tokens = positions.shape[1]
        self.rows = min(size, self.tokens)
        self.first = jnp.maximum(positions[:, 0], 0) // size
        self.count = jnp.max(positions[:, -1] // size - self.first) + 1

    def at(self, index) -> Group:
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

    def run(self, one: Callable, q: Float[Array, "B T N H"], state) -> tuple[Array, Any]:
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


def _each_row(at: Int[Array, "B R"]) -> Int[Array, "B 1"]:
    return jnp.arange(at.shape[0], dtype=jnp.int32)[:, None]


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

    def rows(self, stored: Float[Array, "L B S K H"], at: Int[Array, "B X"]):
        """[B, X, K, H] of this layer; positions that there are none of give any row."""
        at = jnp.clip(at, 0, stored.shape[2] - 1)
        return stored[self.layer, _each_row(at), at].astype(self.q.dtype)

    def by_head(self, stored: Float[Array, "L B S K H"], at: Int[Array, "B P X"]):
        """[B, P, X, H], with a list of positions for each of P heads: K or N."""
        row = jnp.arange(at.shape[0], dtype=jnp.int32)[:, None, None]
        head = jnp.arange(at.shape[1], dtype=jnp.int32)[None, :, None]
        head = head // (at.shape[1] // stored.shape[3])
        at = jnp.clip(at, 0, stored.shape[2] - 1)
        return stored[self.layer, row, at, head].astype(self.q.dtype)

    def placed(self, x: Float[Array, "B P X H"], at: Int[Array, "B P X"]):
        return self.placement.look_up(x, self.table, at)


# --- One layer ------------------------------------------------------------------------------------


def reader(policy: SparsePolicy, config: ScoreConfig, layout, positions, over_positions: Callable):
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
    far, listed = {}, selected.positions[:, 0]
    at = jnp.concatenate([sinks, listed], 1)
    if at.shape[1]:
        far_k, far_v = selected.kv or (query.rows(query.kv.k, listed),
                                       query.rows(query.kv.v, listed))  # fmt: skip
        far = {
            "query_global": placement.away(query.q, policy.selected_distance),
            "key_global": jnp.concatenate([query.rows(query.kv.k, sinks), far_k], 1),
            "value_global": jnp.concatenate([query.rows(query.kv.v, sinks), far_v], 1),
            "global_positions": at,
        }
    out, lse = kernels.lambda_attention(
        near_q, near_k, v, **far, num_global=at.shape[1], window_size=policy.window,
        key_start=near_pos[:, 0], query_offset=selected.window_len - group.pos.shape[1],
        scale=config.scale, logits_soft_cap=config.soft_cap, return_residuals=True,
    )  # fmt: skip

    def received():
        return attention_received.by_key(
            near_q, near_k, lse, q_pos=group.pos, k_pos=near_pos, seen=policy.in_window,
            scale=config.scale, soft_cap=config.soft_cap,
        )  # fmt: skip

    return out, received


def _gathered(policy, query, selected):
    """All that is seen, fetched and under one softmax; scores of all queries exist at once."""
    group, placement, config, q = query.group, query.placement, query.config, query.q
    to = group.pos[:, None, :, None]  # [B, 1, R, 1] beside keys [B, P, 1, X]
    sinks = _sinks(policy, len(q))
    near = selected.window_positions
    if not isinstance(policy.selected_distance, int):
        return _attend_list(policy, query, sinks, selected.positions, near), None

    def shared(at, seen, placed_q, place=lambda k: k, kv=None):
        """Scores and values of keys that all heads see or do not see."""
        k, v = kv or (query.rows(query.kv.k, at), query.rows(query.kv.v, at))
        scores = scores_.scaled(config, placed_q, place(k))
        seen = (seen & (at >= 0)[:, None, None])[:, :, None]
        return jnp.where(seen, config.capped(scores), scores_.MASKED), v

    def beyond(at):
        return to - at[:, :, None] >= policy.window

    near_at = near[:, None, None]
    in_window = (near_at <= to) & (to - near_at < policy.window)
    by_near = placement.rotation(near)
    parts = [shared(near, in_window, placement.at(q, group.rows_pos),
                    lambda k: placement.rotate(k, by_near))]  # fmt: skip
    if sinks.shape[1]:
        parts.append(shared(sinks, beyond(sinks[:, None]), placement.away(q, policy.sink_distance)))
    scores, values = zip(*parts, strict=True)
    away = placement.away(q, policy.selected_distance)
    listed = selected.positions
    if listed.shape[1] == 1:
        more, v = shared(listed[:, 0], beyond(listed), away, kv=selected.kv)
        scores, values = (*scores, more), (*values, v)
    else:
        more = _dot_lists(away, query.by_head(query.kv.k, listed)) * jnp.float32(config.scale)
        seen = beyond(listed) & (listed >= 0)[:, :, None]
        more = jnp.where(seen[:, :, None], config.capped(more), scores_.MASKED)
        scores = (*scores, more.reshape(*scores[0].shape[:4], -1))
    weights = _softmax(jnp.concatenate(scores, -1)).astype(q.dtype)
    own, some = weights[..., : near.shape[1]], sum(v.shape[1] for v in values)
    out = scores_.mix(weights[..., :some], jnp.concatenate(values, 1))
    if listed.shape[1] > 1:
        out = out + _mix_lists(weights[..., some:], query.by_head(query.kv.v, listed))
    return out, lambda: own.astype(jnp.float32).sum(3).reshape(len(q), -1, own.shape[-1])


def _attend_list(policy, query, sinks, selected: Int[Array, "B P X"], near):
    """Of sinks, what is selected and the window, as one list for each of P heads."""
    lists = selected.shape[:2]
    sinks, near = (jnp.broadcast_to(x[:, None], (*lists, x.shape[1])) for x in (sinks, near))
    at, to = jnp.concatenate([sinks, selected, near], 2), query.group.pos[:, None, :, None]
    held, seen = at >= 0, (at >= 0)[:, :, None] & (at[:, :, None] <= to)  # [B, P, R, X]
    k_at, q_at = at, query.group.rows_pos[:, None]
    if policy.selected_distance == "packed":
        k_at = jnp.cumsum(held, -1, dtype=jnp.int32) - 1
        q_at = seen.sum(-1, dtype=jnp.int32) - 1
    k = query.placed(query.by_head(query.kv.k, at), jnp.maximum(k_at, 0))
    q = query.q.swapaxes(1, 2)
    q_at = jnp.maximum(q_at, 0).repeat(q.shape[1] // q_at.shape[1], 1)
    scores = _dot_lists(query.placed(q, q_at).swapaxes(1, 2), k) * jnp.float32(query.config.scale)
    scores = jnp.where(seen[:, :, None], query.config.capped(scores), scores_.MASKED)
    weights = _softmax(scores).astype(query.q.dtype)
    return _mix_lists(weights, query.by_head(query.kv.v, at))


def _sinks(policy, batch: int) -> Int[Array, "B G"]:
    sinks = jnp.arange(policy.num_sinks or 0, dtype=jnp.int32)
    return jnp.broadcast_to(sinks, (batch, len(sinks)))


def _dot_lists(q: Float[Array, "B R N H"], k: Float[Array, "B P X H"]):
    """[B, P, N / P, R, X] of queries with the list of their head."""
    rows = scores_.rows_of_key_heads(q, k.shape[1])
    flat = rows.reshape(*rows.shape[:2], -1, rows.shape[4])
    scores = jnp.einsum("bprh,bpxh->bprx", flat, k, preferred_element_type=jnp.float32)
    return scores.reshape(*rows.shape[:4], -1)


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


def _visit_blocks(query, blocks: SelectedBlocks):
    """Every query of every head has a list of its own: all blocks, one after another, masked where
    not chosen. Gathering would copy the listed blocks for each query and head.
    """
    group, q, size = query.group, query.q, blocks.size
    inside = jnp.arange(size, dtype=jnp.int32)
    after = blocks.chosen.astype(jnp.int32)
    after = jnp.cumsum(after[..., ::-1], -1)[..., ::-1] - after  # chosen ones after each
    offset = jnp.maximum(group.pos, 0) % size
    shape = (len(q), query.kv_heads, q.shape[2] // query.kv_heads, q.shape[1])  # [B, K, G, R]

    def visit(m, carry):
        top, total, out = carry
        pos = jnp.broadcast_to(m * size + inside[None], (len(q), size))
        k, v = query.rows(query.kv.k, pos), query.rows(query.kv.v, pos)
        k = query.placement.at(k, jnp.broadcast_to(inside, pos.shape))
        apart = after[..., m] * size + offset[..., None]  # [B, R, N] of the block's first token
        placed = query.placed(q, apart)
        mine = blocks.chosen[..., m].transpose(0, 2, 1).reshape(shape)[..., None]
        seen = mine & (pos[:, None] <= group.pos[:, :, None])[:, None, None]
        scores = query.config.capped(scores_.scaled(query.config, placed, k))
        scores = jnp.where(seen, scores, scores_.MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.exp(scores - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        rows = weights.astype(v.dtype).reshape(*shape[:2], -1, size)
        part = jnp.einsum("bkrs,bskh->bkrh", rows, v, preferred_element_type=jnp.float32)
        out = out * shrink[..., None] + part.reshape(out.shape)
        return new_top, total * shrink + weights.sum(-1), out

    start = (
        jnp.full(shape, scores_.MASKED / 2, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, q.shape[3]), jnp.float32),
    )
    _, total, out = jax.lax.fori_loop(jnp.int32(0), blocks.visited.astype(jnp.int32), visit, start)
    out = out / jnp.where(total == 0, 1.0, total)[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
