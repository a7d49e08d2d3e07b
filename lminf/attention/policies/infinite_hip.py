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
        size, slots, kv_heads = self.chunk[stage], query.slots, query.kv_heads
        listed, kept = self._listed(stage, slots), self.kept(stage, slots)
        number = self._list(stage, listed, kv_heads, start, before)
        if kept == listed:
            return number
        tokens = jnp.where(number < 0, 0, start[:, None, None] - self.sinks - number * size)
        tokens = jnp.minimum(tokens, size)

        of_heads = (*number.shape[:2], query.q.shape[2] // kv_heads, listed)
        first, left = (jnp.broadcast_to(x[:, :, None], of_heads) for x in (number * size, tokens))

        def best_of_chunks(score):
            """Of each chunk the largest product of the token it comes down to, [B, K, X]."""

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

            start = (first, left, *score(first))
            *_, products = jax.lax.fori_loop(0, (size - 1).bit_length(), descend, start)
            return products.max(2)

        # Two programs: where chunks are not told apart no key has to be turned.
        largest = jax.lax.cond(
            query.layer < self.ordered_layers,
            lambda: best_of_chunks(self._ordered(query, listed)),
            lambda: best_of_chunks(self._alike(query)),
        )
        largest = jnp.where(tokens > 0, largest, -jnp.inf)
        _, best = jax.lax.top_k(largest, kept)
        return jnp.sort(jnp.take_along_axis(number, best, 2), axis=-1)

    def _ordered(self, query, listed):
        """The function of tokens [B, K, G, X] of the list's text to their largest products in each
        head, as first of a left half and of a right one: here the same.
        """
        token = jnp.full_like(query.group.pos, self.window + listed - 1)
        placed = query.placement.at(query.q, token)
        place = jnp.arange(listed, dtype=jnp.int32)  # of chunks, the last one's listed - 1

        def score(token):
            (largest,) = self._largest(query, [placed], token, jnp.broadcast_to(place, token.shape))
            return largest, largest

        return score

    def _alike(self, query):
        """As `_ordered`, for keys that all seem equally far away, one token more on the left."""
        sides = [query.placement.away(query.q, self.window + more) for more in (1, 0)]
        return lambda token: self._largest(query, sides, token, None)

    def _largest(self, query, placed, token, as_if_pos):
        """The largest product [B, K, G, X] of a token with queries placed in each of these ways."""
        flat = (*token.shape[:2], -1)
        k = query.by_head(query.kv.k, self.sinks + token.reshape(flat))
        if as_if_pos is not None:
            k = query.placed(k, as_if_pos.reshape(flat))
        k = k.reshape(*token.shape, k.shape[-1])
        rows = [scores.rows_of_key_heads(q, query.kv_heads) for q in placed]
        products = jnp.einsum(
            "bkgth,bkgxh->bkgtx", jnp.concatenate(rows, 3), k, preferred_element_type=jnp.float32
        )
        asks = (query.group.pos >= 0)[:, None, None, :, None]
        parts = jnp.split(products, len(placed), axis=3)
        return tuple(jnp.where(asks, part, -jnp.inf).max(3) for part in parts)

    def _list(self, stage, listed, kv_heads, start, before):
        """Numbers [B, K, X] of the chunks that a stage chooses from, in order; -1 for none."""
        tokens = (start - self.sinks)[:, None, None]
        if before is None:
            end = -(-tokens // self.chunk[0])
            number = jnp.arange(listed, dtype=jnp.int32)[None, None] - listed
            number = jnp.maximum(end + number, -1)
            return jnp.broadcast_to(number, (len(start), kv_heads, listed))
        parts = self.chunk[stage - 1] // self.chunk[stage]
        number = before[..., None] * parts + jnp.arange(parts, dtype=jnp.int32)[None, None, None]
        valid = (before[..., None] >= 0) & (number * self.chunk[stage] < tokens[..., None])
        return jnp.sort(jnp.where(valid, number, -1).reshape(*before.shape[:2], -1), axis=-1)
