"""InfLLM: a window, the first tokens, and blocks of the past that each group of tokens looks up.

Source: Xiao et al. 2024, arXiv:2402.04617. With L = window, the query at i sees
    i - j < L                                          at the true distance i - j
    j < sinks, chosen blocks, and what fills no block  at the distance L - 1
A block is `block` tokens in order, from `sinks` on; it is formed after the group that pushed the
last of it out of the window; where topk = 0 nothing waits for a block. Of every block, the
`repr_topk` tokens that attracted most attention while they were in the window stand for it: a
summary is the mean of their keys, by query head. A group's mean query, placed at L - 1, times the
summaries, summed over heads, ranks blocks.

The branches are disjoint. (The reference implementation counts keys that leave the window within a
group twice.) All blocks stay in one store on the device. With `resident` blocks are read from as
many slots of their own, into which those that are missing are fetched from the store: what is
fetched changes with it, and no result.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

import kernels
from lminf.attention import cache as caches
from lminf.attention import mass, policies, residency, select
from lminf.attention.policies import Held, HeldOrNone, Tokens
from lminf.attention.select import Branch
from lminf.errors import InputError


class Far(NamedTuple):
    """What a group sees beyond its window."""

    pos: Int[Array, "B F"]
    looked_up: Bool[Array, "B F"]  # whether it is of a chosen block
    chosen: Int[Array, "B k"]  # blocks
    existing: Int[Array, " B"]  # of these the first so many are blocks
    skipped: Int[Array, " B"]  # tokens of blocks that were not chosen


@policies.register("infllm")
@dataclass(frozen=True)
class InfLLM(select.Choosing):
    """Window, sinks and looked-up blocks. Source: Xiao et al. 2024, arXiv:2402.04617."""

    window: Tokens  # tokens, the query's own included
    sinks: HeldOrNone = 128  # tokens at the start that stay visible
    topk: HeldOrNone = 16  # blocks that a group of tokens looks up
    block: Held = 128  # tokens
    repr_topk: Held = 4  # tokens that stand for a block
    exec_block: Tokens = 512  # tokens that look up the same blocks, where they are read together
    resident: Held | None = None  # blocks at hand, least recently used first to go; None: all

    def __post_init__(self):
        super().__post_init__()
        if self.window % self.block:
            raise InputError(
                f"block={self.block} does not divide window={self.window}; "
                f"give a divisor of the window"
            )
        if self.repr_topk > self.block:
            raise InputError(
                f"repr_topk={self.repr_topk} of block={self.block} tokens; give 1 to {self.block}"
            )
        if self.resident is not None and self.resident < max(self.topk, 1):
            raise InputError(
                f"resident={self.resident} blocks cannot hold the topk={self.topk} that are looked "
                f"up together; give resident>={max(self.topk, 1)}"
            )

    @property
    def near_width(self) -> int:
        return self.window

    @property
    def far_count(self) -> int:
        return self.sinks

    @property
    def looked_up(self) -> int:
        return self.topk * self.block

    def layout(self, capacity: int) -> caches.Append:
        room = capacity // self.block
        if capacity > self.window and self.topk > room:
            raise InputError(
                f"topk={self.topk} blocks of {self.block} tokens, but a text of {capacity} tokens "
                f"holds {room}; give topk<={room} or smaller blocks"
            )
        return caches.Append(capacity)

    def _blocks(self, slots: int) -> int:
        """Blocks that a text of so many tokens can ever have."""
        return max(slots - self.window - self.sinks, 0) // self.block

    def _existing(self, first):
        """Blocks that exist for a group whose first query is there."""
        # With nothing to look up the past is gone as soon as it leaves the window: LMInfinite.
        left = first - self.window - self.sinks + int(self.topk == 0)
        return jnp.maximum(left, 0) // self.block

    def extra(self, sizes: caches.Sizes):
        blocks = self._blocks(sizes.slots)
        if not blocks:
            return ()
        summary = (sizes.batch, blocks, sizes.heads, sizes.head_dim)
        attention = (sizes.batch, sizes.slots, sizes.heads)
        held: dict[str, Any] = {
            "summary": jnp.zeros(summary, sizes.dtype),
            "attracted": jnp.zeros(attention),
        }
        if self.resident is not None and self.topk:
            held["resident"] = residency.empty(
                batch=sizes.batch, slots=min(self.resident, blocks), block=self.block,
                kv_heads=sizes.kv_heads, head_dim=sizes.head_dim, dtype=sizes.dtype,
            )  # fmt: skip
        return held

    def reader(self, scoring, layout, positions):
        groups = select.Groups(positions, self.exec_block)
        places = select.Places(scoring, positions)
        blocks = self._blocks(layout.slots)

        def read(q, held, layer):
            def one(group, q, extra):
                recent = jnp.arange(-self.window, q.shape[1], dtype=jnp.int32)
                pos = group.base[:, None] + recent[None]
                far = self._far(places, group, q, layer, extra)
                if layout.slots <= self.window:
                    far = far._replace(pos=far.pos[:, :0], looked_up=far.looked_up[:, :0])
                far_kv, extra = self._fetched(far, held, layer, extra)
                out, received = self._attend(
                    places, group, q, held, layer, pos, far_kv, far.skipped
                )
                if blocks:
                    extra = self._remember(group, held, layer, extra, pos, received)
                return out, extra

            return groups.run(one, q, held.extra)

        return read

    def _attend(self, places, group, q, held, layer, pos, far_kv, skipped):
        """Outputs, and what the window's keys received: [B, N, L + R]."""
        scoring, count = places.scoring, far_kv[0].shape[1]
        k, v = (select.rows_of(x, layer, pos).astype(q.dtype) for x in (held.k, held.v))
        far_k, far_v = (x.astype(q.dtype) for x in far_kv)
        near_q, near_k = places.at(q, group.rows_pos), places.at(k, pos)
        away = places.away(q, self.window - 1)
        start = pos[:, 0] - skipped  # the position of the first key, were what is skipped cut out

        def near(at, to):
            return (at >= to) & (at - to < self.window)

        if q.shape[1] == 1:
            row = jnp.arange(count, dtype=jnp.int32)[None, None]
            seen = near(group.pos[:, :, None], pos[:, None]) & (pos[:, None] >= 0)
            branches = [Branch(near_q, near_k, v, seen),
                        Branch(away, far_k, far_v, row <= start[:, None, None])]  # fmt: skip
            out, received = select.attend_branches(scoring, branches)
            return out, received[0]
        far = {"query_global": away, "key_global": far_k, "value_global": far_v} if count else {}
        out, lse = kernels.lambda_attention(
            near_q, near_k, v, **far, num_global=count, window_size=self.window, key_start=start,
            query_offset=self.window, scale=scoring.scale, logits_soft_cap=scoring.soft_cap,
            return_residuals=True,
        )  # fmt: skip
        received = mass.columns(
            near_q, near_k, lse, q_pos=group.pos, k_pos=pos, seen=near, scale=scoring.scale,
            soft_cap=scoring.soft_cap,
        )  # fmt: skip
        return out, received

    def _far(self, places, group, q, layer, extra):
        """What is seen beyond the window: sinks, the blocks that the group chooses, then what has
        left the window and fills no block.

        If that many were cut out of the text, row r would stand at position r: so the kernel,
        which shows its r-th global key to queries at r + window and after, shows each when its
        turn comes.
        """
        existing = self._existing(group.first)
        chosen = jnp.zeros((len(existing), 0), jnp.int32)
        if extra and self.topk:
            chosen = self._chosen(places, group, q, extra["summary"][layer], existing)
        count = jnp.minimum(existing, chosen.shape[1])
        skipped = (existing - count) * self.block
        size = self.sinks + (chosen.shape[1] + 1) * self.block + q.shape[1] - 1
        row = jnp.arange(max(size, 1), dtype=jnp.int32)[None]
        pos = jnp.where(row < self.sinks, row, row + skipped[:, None])
        looked_up = jnp.zeros(pos.shape, bool)
        if chosen.shape[1]:
            inside = row - self.sinks
            which = jnp.clip(inside // self.block, 0, chosen.shape[1] - 1)
            which = jnp.broadcast_to(which, pos.shape)
            block = jnp.take_along_axis(chosen, which, 1)
            looked_up = (inside >= 0) & (inside < count[:, None] * self.block)
            pos = jnp.where(looked_up, self.sinks + block * self.block + inside % self.block, pos)
        return Far(pos, looked_up, chosen, count, skipped)

    def _fetched(self, far, held, layer, extra):
        """Keys and values [B, F, K, H] of what is seen beyond the window."""
        if "resident" not in extra:
            return [select.rows_of(x, layer, far.pos) for x in (held.k, held.v)], extra
        size = (1, 1, self.block, *held.k.shape[3:])

        def load(row, block):
            start = (layer, row, self.sinks + block * self.block, 0, 0)
            k, v = (jax.lax.dynamic_slice(x, start, size)[0, 0] for x in (held.k, held.v))
            return k, v

        rank = jnp.arange(far.chosen.shape[1], dtype=jnp.int32)[None]
        *blocks, resident = residency.ask(
            extra["resident"], layer, far.chosen, rank < far.existing[:, None], load
        )
        inside = jnp.arange(far.pos.shape[1], dtype=jnp.int32) - self.sinks
        inside = jnp.clip(inside, 0, far.chosen.shape[1] * self.block - 1)
        others = jnp.where(far.looked_up, 0, far.pos)
        kv = [
            jnp.where(
                far.looked_up[..., None, None],
                some.reshape(len(some), -1, *some.shape[3:])[:, inside],
                select.rows_of(x, layer, others),
            )
            for some, x in zip(blocks, (held.k, held.v), strict=True)
        ]
        return kv, {**extra, "resident": resident}

    def _chosen(self, places, group, q, summary, existing):
        """Numbers [B, k] of the best blocks; where fewer exist, they stand first."""
        away = places.away(q, self.window - 1)
        counted = (group.pos >= 0)[..., None, None]
        mean = jnp.where(counted, away, 0).astype(jnp.float32).sum(1)  # up to a positive factor
        scores = jnp.einsum("bnh,bmnh->bm", mean, summary.astype(jnp.float32))
        numbers = jnp.arange(summary.shape[1], dtype=jnp.int32)[None]
        scores = jnp.where(numbers < existing[:, None], scores, -jnp.inf)
        return jax.lax.top_k(scores, min(self.topk, summary.shape[1]))[1]

    def _remember(self, group, held, layer, extra, near_pos, received):
        """What the window's tokens attracted, and the summaries of blocks that now exist."""
        batch, rows = group.pos.shape
        received = received.swapaxes(1, 2)
        every = jnp.arange(batch, dtype=jnp.int32)[:, None]
        slots = held.k.shape[2]
        at = jnp.where((near_pos >= 0) & (near_pos < group.end[:, None]), near_pos, slots)
        attracted = extra["attracted"].at[layer, every, at].add(received, mode="drop")
        # The blocks that this group's tokens push out of the window.
        most = -(-rows // self.block)
        number = self._existing(group.first)[:, None] + jnp.arange(most, dtype=jnp.int32)[None]
        pos = self.sinks + number[..., None] * self.block
        pos = (pos + jnp.arange(self.block, dtype=jnp.int32)[None, None]).reshape(batch, -1)
        heads = attracted.shape[3]
        wanted = attracted[layer, every, jnp.clip(pos, 0, slots - 1)]
        wanted = wanted.reshape(batch, most, self.block, heads).swapaxes(2, 3)
        _, best = jax.lax.top_k(wanted, self.repr_topk)  # [B, blocks, N, tokens]
        k = select.rows_of(held.k, layer, pos)
        k = k.reshape(batch, most, self.block, *k.shape[2:]).transpose(0, 1, 3, 2, 4)
        k = jnp.repeat(k, heads // k.shape[2], axis=2)  # [B, blocks, N, tokens, H]
        mean = jnp.take_along_axis(k, best[..., None], 3).astype(jnp.float32).mean(3)
        exists = number < self._existing(group.end)[:, None]
        row = jnp.where(exists, number, extra["summary"].shape[2])
        summary = (
            extra["summary"]
            .at[layer, every, row]
            .set(mean.astype(extra["summary"].dtype), mode="drop")
        )
        return {**extra, "summary": summary, "attracted": attracted}
