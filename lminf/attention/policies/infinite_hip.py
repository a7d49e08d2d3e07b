"""InfiniteHiP: the best keys of every block of queries, found by cutting down a list in stages.

Source: Lee et al. 2025, arXiv:2502.08910; docs/policies.md has the mathematics. The first stage
looks at all of the text, so it takes O(text / chunk) for a block of queries. What is seen is packed
as if nothing stood between it, so that no distance grows with the text. The source leaves open, and
here: each list starts with the first token after the sinks, and its last chunk may be short; a half
that ends up no better goes left; the token that stands for a chunk is scored once more as a right
half, so stages of single tokens rank all at one distance.
"""

from dataclasses import dataclass
from operator import attrgetter

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lminf.attention import scores, sparse
from lminf.attention.policies import hip
from lminf.attention.policy import Count, CountOrNone, Layers, Tokens, register
from lminf.errors import InputError


@register("infinite_hip")
@dataclass(frozen=True)
class InfiniteHiP(hip.HierarchicalSelect):
    """Keys found in stages, packed. Source: Lee et al. 2025, arXiv:2502.08910."""

    chunk: tuple[Count, ...] = (256, 32, 8)  # tokens of a chunk, by stage
    topk: tuple[Tokens, ...] = (32_768, 8192, 2048)  # tokens that a stage leaves
    refresh: tuple[Count, ...] = (16, 8, 4)  # tokens that are written before it searches again
    window: Tokens = 1024  # tokens, the query's own included
    sinks: CountOrNone = 256  # tokens at the start that stay visible
    query_block: Tokens = 64  # tokens that see the same, where they are read together
    ordered_layers: Layers = 3  # layers at the start whose search tells chunks apart by place
    dense_layers: Layers = 0  # layers at the start that see everything, where it is

    selected_distance = "packed"
    needs_rotary = True
    block = property(lambda self: self.chunk[-1])
    refreshes = property(attrgetter("refresh"))

    def __post_init__(self):
        super().__post_init__()
        counts = [len(getattr(self, field)) for field in ("chunk", "topk", "refresh")]
        if len(set(counts)) > 1 or not counts[0]:
            raise InputError(
                f"chunk, topk and refresh have {counts[0]}, {counts[1]} and {counts[2]} stages; "
                f"give each one number a stage"
            )
        for size, kept in zip(self.chunk, self.topk, strict=True):
            if kept % size:
                raise InputError(
                    f"topk={kept} tokens is no whole number of chunks of chunk={size}; "
                    f"give a multiple"
                )
        for before, after in zip(self.chunk, self.chunk[1:], strict=False):
            if before % after:
                raise InputError(
                    f"chunk={after} tokens does not divide chunk={before} of the stage before; "
                    f"give a divisor"
                )
        for before, after in zip(self.topk, self.topk[1:], strict=False):
            if after > before:
                raise InputError(
                    f"topk={after} tokens of the topk={before} that the stage before leaves; "
                    f"give no more than those"
                )

    @property
    def max_selected(self) -> int:
        return self.topk[-1]

    def _listed(self, stage: int, slots: int) -> int:
        """Chunks that a stage chooses from, at most."""
        if stage == 0:
            return -(-max(slots - self.window - self.sinks, 0) // self.chunk[0])
        return self.kept(stage - 1, slots) * (self.chunk[stage - 1] // self.chunk[stage])

    def kept(self, stage: int, slots: int) -> int:
        return min(self.topk[stage] // self.chunk[stage], self._listed(stage, slots))

    def window_start(self, first: Int[Array, " B"]) -> Int[Array, " B"]:
        return jnp.maximum(first - self.window + 1, self.sinks)

    def table_size(self, slots: int, rows: int) -> int:
        stages = range(len(self.chunk))
        listed = self.kept(stages[-1], slots) * self.chunk[-1]
        seen = self.sinks + listed + self.window + rows + self.refresh[0]
        return max(seen, 2, *(self._listed(stage, slots) for stage in stages))

    def search(
        self, stage: int, query: sparse.Query, start: Array, before: Array | None
    ) -> Int[Array, "B K kept"]:
        size, listed = self.chunk[stage], self._listed(stage, query.slots)
        kept, lists = self.kept(stage, query.slots), (len(query.q), query.kv_heads)
        total = (start - self.sinks)[:, None, None]
        if before is None:  # chunks of all that there is, the last one at the end of the list
            number = -(-total // size) - listed + jnp.arange(listed, dtype=jnp.int32)[None, None]
            number = jnp.broadcast_to(jnp.maximum(number, -1), (*lists, listed))
        else:  # those of the chunks before
            number = sparse.block_positions(before, self.chunk[stage - 1] // size)
            number = jnp.sort(jnp.where(number * size < total, number, -1), axis=2)
        if kept == listed:
            return number
        tokens = jnp.where(number < 0, 0, jnp.minimum(total - number * size, size))
        heads = query.q.shape[2]
        first, left = (scores.each_head(x, heads) for x in (number * size, tokens))

        def largest(sides, key_pos):
            """The largest product [B, K, X] of the token that each chunk comes down to."""

            def score(token):
                """As the first of a left half and as that of a right one."""
                both = sparse.largest_products(
                    query, jnp.concatenate(sides, 1), query.pos >= 0, self.sinks + token, key_pos
                )
                return both[:, :, 0], both[:, :, -1]

            def descend(_, ranges):
                token, left, as_left, as_right = ranges
                half = left // 2
                middle_as_left, middle_as_right = score(token + half)
                right = (middle_as_right > as_left) | (half == 0)
                return (
                    jnp.where(right, token + half, token),
                    jnp.where(right, left - half, half),
                    jnp.where(right, middle_as_left, as_left),
                    jnp.where(right, middle_as_right, as_right),
                )

            ranges = (first, left, *score(first))
            *_, products = jax.lax.fori_loop(0, (size - 1).bit_length(), descend, ranges)
            return products.reshape(*lists, -1, listed).max(2)

        def ordered():  # chunks by their place in the list, the last one's window + listed - 1 back
            place = jnp.broadcast_to(jnp.arange(listed, dtype=jnp.int32), first.shape)
            last = jnp.full_like(query.pos, self.window + listed - 1)
            return largest([query.placement.at(query.q, last)], place)

        def alike():  # all keys equally far away, one token more on the left: none is rotated
            return largest([query.placement.away(query.q, self.window + n) for n in (1, 0)], None)

        best = jax.lax.cond(query.layer < self.ordered_layers, ordered, alike)
        _, best = jax.lax.top_k(jnp.where(tokens > 0, best, -jnp.inf), kept)
        return jnp.sort(jnp.take_along_axis(number, best, 2), axis=2)
