"""Scores, the softmax over them and values mixed by it: what every form of attention is made of.

`ScoreConfig` says how a model turns a query and a key into a score, `Placement` where both seem to
be, `attention` is one softmax, and `merge` makes one of several over different keys. N query heads
are served by K key heads, or by lists of keys for each of P heads, in order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Num

from lminf import kernels
from lminf.attention import rope
from lminf.attention.policy import LayerPolicy, PerHead, Policy
from lminf.errors import InputError

MASKED = -1e30  # finite: a row with nothing to see must not become NaN


@dataclass(frozen=True)
class ScoreConfig:
    """How a model turns a query and a key into a score, apart from which pairs it scores."""

    encoding: rope.Encoding
    scale: float
    soft_cap: float | None
    query_gain: rope.QueryGain | None = None

    def gained(
        self, attend: Callable[..., Any], positions: Int[Array, "B T"]
    ) -> Callable[..., Any]:
        """`attend` of queries at these positions times their gain."""
        if self.query_gain is None:
            return attend
        gain = self.query_gain.at(positions)[..., None, None]
        return lambda q, *args, **options: attend(q * gain.astype(q.dtype), *args, **options)

    def slopes(self, num_heads: int) -> Float[Array, " N"] | None:
        if isinstance(self.encoding, rope.Alibi):
            return jnp.asarray(self.encoding.slopes(num_heads))
        return None

    def for_kernel(self, heads: "HeadTerms | None" = None) -> dict[str, Any]:
        """As the arguments of attention kernels."""
        terms = {} if heads is None else {"alibi_slopes": heads.slopes, "sinks": heads.sinks}
        terms |= {"scale": self.scale, "logits_soft_cap": self.soft_cap}
        return {name: term for name, term in terms.items() if term is not None}


class HeadTerms(NamedTuple):
    """What differs by query head."""

    slopes: Float[Array, " N"] | None = None  # of ALiBi
    # Learnt logits: each joins the softmax of its head and has no value, so that a head can attend
    # to nothing. None of them is one of the first tokens, which are called sinks elsewhere here.
    sinks: Float[Array, " N"] | None = None

    def of(self, heads: np.ndarray) -> "HeadTerms":
        """Of some of the heads."""
        return HeadTerms(*(None if x is None else x[heads] for x in self))

    def past_sinks(
        self, out: Float[Array, "B T N H"], lse: Float32[Array, "B N T"]
    ) -> Float[Array, "B T N H"]:
        """Outputs of a softmax, whose log of the sum is `lse`, as they are with the sinks in it."""
        if self.sinks is None:
            return out
        share = jax.nn.sigmoid(lse - self.sinks.astype(jnp.float32)[None, :, None])
        return (out.astype(jnp.float32) * share.swapaxes(1, 2)[..., None]).astype(out.dtype)


# --- Where queries and keys seem to be ------------------------------------------------------------


class Placement:
    """Places queries and keys of one call at positions, by rotary rotation where the model has it.

    `positions` [B, T] are those that the call reads: dynamic rotary scaling follows their length.
    With `table`, rotations of tokens of a text of so many positions are looked up in a table that
    does not grow as the text does, but as its root.
    """

    def __init__(
        self, config: ScoreConfig, positions: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None = None, *, table: int = 0,
    ):  # fmt: skip
        self.rotary = config.encoding if isinstance(config.encoding, rope.Rotary) else None
        self.length = None  # [B, 1]
        if self.rotary is not None and self.rotary.scaling.follows_length:
            if segments is not None:
                raise InputError(
                    f"{type(self.rotary.scaling).__name__} follows the length of a row, but "
                    f"packed rows hold texts of several lengths; give each text its own row or use "
                    f"NTKAware"
                )
            self.length = positions.max(-1, keepdims=True) + 1
        self.table = self._table(table) if self.rotary is not None and table else None

    def _table(self, size: int) -> rope.RotationTable:
        """Of the positions below `size`. A loop computes it: XLA's CPU backend computes what comes
        out of none again for every vector that looks it up, which was five sixths of attention in a
        decoding step of LongHeads (1,024 of 16,384 tokens).
        """
        rotary, length = self.rotary, self.length
        assert rotary is not None
        count = 1 << -(-(size - 1).bit_length() // 2)  # about the root of the size, a power of 2

        def multiples(step: Array) -> rope.Rotation:
            positions = step * jnp.arange(count, dtype=jnp.int32)[None]
            rows = 1 if length is None else len(length)
            return rope.rotation(rotary, jnp.broadcast_to(positions, (rows, count)), length=length)

        cos, sin = jax.lax.map(multiples, jnp.array([count, 1], jnp.int32))
        warm = jnp.float32(rotary.scaling.temperature)
        fine = rope.Rotation(cos[1] / warm, sin[1] / warm)
        return rope.RotationTable(rope.Rotation(cos[0], sin[0]), fine)

    def rotation(self, positions: Int[Array, "B X"], scale: float = 1.0) -> rope.Rotation | None:
        """To be computed once for all layers; None where the model does not rotate."""
        if self.rotary is None:
            return None
        return rope.rotation(self.rotary, positions, scale=scale, length=self.length)

    def of_text(self, positions: Int[Array, "B X"]) -> rope.Rotation | None:
        """As `rotation`, of tokens of the text that the table is for; of others it may be any."""
        if self.table is None or positions.shape[1] <= self.table.fine.cos.shape[1]:
            return self.rotation(positions)
        return self.table.at(positions)

    def rotate(
        self, x: Float[Array, "*B X N H"], by: rope.Rotation | None
    ) -> Float[Array, "*B X N H"]:
        """x rotated; itself where the model does not rotate."""
        return x if self.rotary is None or by is None else rope.rotate(x, by, self.rotary.layout)

    def at(self, x: Float[Array, "B *X H"], positions: Int[Array, "*Y"]) -> Float[Array, "B *X H"]:
        """x [B, X, N, H] placed at positions [B, X], or with a position for each vector, [B, ...],
        that is in the table.
        """
        if positions.ndim == x.ndim - 2:
            return self.rotate(x, self.of_text(positions))
        if self.rotary is None:
            return x
        assert self.table is not None
        return self.rotate(x[..., None, :], self.table.at(positions))[..., 0, :]

    def away(self, q: Float[Array, "B X N H"], distance: int) -> Float[Array, "B X N H"]:
        """q such that keys as they are stored seem to be so far away."""
        by = self.rotation(jnp.full(q.shape[:2], distance, jnp.int32))
        if self.rotary is None or by is None:
            return q
        # Keys rotated by nothing would still carry the schedule's temperature, in the channels
        # that rotate.
        warm = jnp.float32(self.rotary.scaling.temperature)
        return self.rotate(q, rope.Rotation(by.cos * warm, by.sin * warm))


class Branches:
    """Functions `near` and `far` of q and k to both as the branches of a policy place them."""

    def __init__(self, policy: Policy, placement: Placement, q_pos, k_pos, far_pos):
        """Queries at q_pos [B, T], keys at k_pos [B, S], of the far branch at far_pos [B, R]."""
        far, gain = policy.far_positions(), policy.query_gain(q_pos)
        self.far_distance = kernels.GlobalDistance(far.query(q_pos), far.key(far_pos), far.scale)

        def placing(by_q, by_k):
            def placed(q: Array, k: Array) -> tuple[Array, Array]:
                q = q if gain is None else q * gain[..., None, None].astype(q.dtype)
                return placement.rotate(q, by_q), placement.rotate(k, by_k)

            return placed

        far_q_pos, far_k_pos, _ = self.far_distance
        self.near = placing(placement.rotation(q_pos), placement.of_text(k_pos))
        self.far = placing(*(placement.rotation(pos, far.scale) for pos in (far_q_pos, far_k_pos)))


# --- One softmax ----------------------------------------------------------------------------------


class Part(NamedTuple):
    """Attention over some of the keys, one part of what `merge` makes of several."""

    out: Float[Array, "B T N Hv"]  # zero where nothing is seen
    lse: Float32[Array, "B N T"]  # -inf where nothing is seen
    weights: Float32[Array, "B N T S"]

    def received(self, heads: int) -> Float32[Array, "B K S"]:
        """What each key got from all queries of its key head, of so many."""
        by_head = self.weights.sum(2).reshape(len(self.out), heads, -1, self.weights.shape[3])
        return by_head.sum(2)


def attention(
    config: ScoreConfig,
    q: Float[Array, "B T N H"],
    k: Float[Array, "..."],
    v: Float[Array, "..."],
    seen: Bool[Array, "#B #P #T #S"],
    **options: Any,
) -> Part:
    """One softmax of placed queries over placed keys: rows [B, S, K, H], or with `lists` the lists
    [B, P, S, H] of P heads. P is 1, K or N; what is seen may differ by it. `options` are those of
    `logits`.
    """
    weights, lse = softmax(logits(config, q, k, **options), seen)
    return Part(mix(weights.astype(v.dtype), v, options.get("lists", False)), lse, weights)


def over_slots(
    config: ScoreConfig,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    q_pos: Int[Array, "B T"],
    k_pos: Int[Array, "B S P"],
) -> Part:
    """`attention` over the rows of a cache that are filled, at a position of 0 or more, and not
    later. Which token a row holds may differ by key head; P is 1 or K.
    """
    k_pos, q_pos = k_pos.swapaxes(1, 2)[:, :, None], q_pos[:, None, :, None]
    seen, slopes = (k_pos >= 0) & (k_pos <= q_pos), config.slopes(q.shape[2])
    return attention(config, q, k, v, seen, slopes=slopes, distance=q_pos - k_pos)


def softmax(
    logits: Float32[Array, "B N T S"], seen: Bool[Array, "#B #P #T #S"]
) -> tuple[Float32[Array, "B N T S"], Float32[Array, "B N T"]]:
    """Weights, all zero for a query that sees nothing, and the log of their sum before."""
    return _softmax(jnp.where(each_head(seen, logits.shape[1]), logits, MASKED), -1)


def merge(*parts: tuple[Array, Array]) -> tuple[Float32[Array, "B T N H"], Float32[Array, "B N T"]]:
    """Outputs and LSE of one softmax over the keys of all parts (out, LSE), which share none."""
    shares, lse = _softmax(jnp.stack([lse for _, lse in parts]), 0)
    shares = shares.swapaxes(2, 3)[..., None]
    out = sum(
        out.astype(jnp.float32) * share for (out, _), share in zip(parts, shares, strict=True)
    )
    return jnp.asarray(out), lse


def _softmax(x, axis):
    """The softmax along an axis and its log-sum-exp; 0 and -inf where all x are masked."""
    top = jax.lax.stop_gradient(jnp.maximum(x.max(axis, keepdims=True), MASKED / 2))
    weights = jnp.exp(x - top)
    total = weights.sum(axis, keepdims=True)
    divisor = jnp.where(total == 0, 1.0, total)
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(divisor))
    return weights / divisor, lse.squeeze(axis)


def logits(
    config: ScoreConfig,
    q: Float[Array, "B T N H"],
    k: Float[Array, "..."],
    *,
    slopes: Float[Array, " N"] | None = None,
    distance: Num[Array, "#B #P T S"] | None = None,
    lists: bool = False,
) -> Float32[Array, "B N T S"]:
    """What the softmax of placed queries and keys is taken of; ALiBi's slopes take off their
    distance.
    """
    scores = dot(q, k, lists) * jnp.float32(config.scale)
    if slopes is not None and distance is not None:
        distance = each_head(jnp.abs(distance).astype(jnp.float32), len(slopes))
        scores -= slopes[None, :, None, None] * distance
    if config.soft_cap is None:
        return scores
    return config.soft_cap * jnp.tanh(scores / config.soft_cap)


def each_head(x: Array, heads: int) -> Array:
    """x [B, P, ...] for each of N heads, where P is neither 1 nor N."""
    return x if x.shape[1] in (1, heads) else jnp.repeat(x, heads // x.shape[1], axis=1)


# --- Products -------------------------------------------------------------------------------------


def dot(
    q: Float[Array, "B T N H"], k: Float[Array, "..."], lists: bool = False
) -> Float32[Array, "B N T S"]:
    """Products of queries and keys, rows [B, S, K, H] or lists [B, P, S, H]."""
    (batch, tokens, heads, width), count = q.shape, k.shape[1 if lists else 2]
    if tokens == 1 and not lists:
        return _dot_of_one(q, k)
    # Queries of one key head are rows of one product. Named apart, the scores come out of it in
    # another order and are copied, which takes longer than both products (512 queries, 2,048 keys).
    rows = q.swapaxes(1, 2).reshape(batch, count, -1, width)
    form = "bprh,bpsh->bprs" if lists else "bprh,bsph->bprs"
    scores = jnp.einsum(form, rows, k, preferred_element_type=jnp.float32)
    return scores.reshape(batch, heads, tokens, -1)


def mix(
    weights: Float[Array, "B N T S"], v: Float[Array, "..."], lists: bool = False
) -> Float[Array, "B T N H"]:
    """Values, rows [B, S, K, H] or lists [B, P, S, H], summed with these weights."""
    (batch, heads, tokens, slots), count = weights.shape, v.shape[1 if lists else 2]
    if tokens == 1 and not lists:
        return _mix_of_one(weights, v)
    rows = weights.reshape(batch, count, -1, slots)
    out = jnp.einsum("bprs,bpsh->bprh" if lists else "bprs,bsph->bprh", rows, v)
    return out.reshape(batch, heads, tokens, -1).swapaxes(1, 2)


# A product for each key head would first copy the cache, transposed, in every layer. Side by side
# the heads are one product over the rows as they lie, and its zeros cost less than that copy: 0.8
# of the time for 1 key head, 0.57 for 3, 0.35 for 8, 0.56 for 32 (4,106 slots, two cores).


def _dot_of_one(q: Float[Array, "B 1 N H"], k: Float[Array, "B S K H"]):
    """`dot` of one query per row: each head's query in its key head's columns of one wide row."""
    batch, slots, key_heads, _ = k.shape
    head_mask = np.repeat(np.eye(key_heads, dtype=bool), q.shape[2] // key_heads, axis=0)  # [N, K]
    wide = jnp.where(head_mask[None, :, :, None], q[:, 0, :, None], jnp.zeros((), q.dtype))
    scores = jnp.einsum(
        "bnc,bsc->bns", wide.reshape(batch, q.shape[2], -1), k.reshape(batch, slots, -1),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return scores[:, :, None]


def _mix_of_one(weights: Float[Array, "B N 1 S"], v: Float[Array, "B S K H"]):
    """`mix` of one query per row: every head mixes all columns, and keeps its key head's."""
    batch, slots, key_heads, width = v.shape
    out = jnp.einsum("bns,bsc->bnc", weights[:, :, 0], v.reshape(batch, slots, -1))
    out = out.reshape(batch, key_heads, -1, key_heads, width)
    kept = jnp.stack([out[:, head, :, head] for head in range(key_heads)], 1)
    return kept.reshape(batch, 1, -1, width)


# --- Heads that differ ----------------------------------------------------------------------------


def by_head(
    policy: LayerPolicy, config: ScoreConfig, make: Callable[[Policy], Callable]
) -> Callable[..., Any]:
    """`run(q, *arrays, sinks=None)` calling `make(part)(q, *arrays, HeadTerms)` for the heads of
    each part.

    `arrays` have their key/value heads on axis 2, as q has its query heads; what comes out, an
    array or several, has either there.
    """
    if not isinstance(policy, PerHead):
        assert isinstance(policy, Policy)
        alone = make(policy)
        return lambda q, *arrays, sinks=None: alone(
            q, *arrays, HeadTerms(config.slopes(q.shape[2]), sinks)
        )
    parts = {part: make(part) for part in dict.fromkeys(policy.policies)}
    key_heads = {part: [i for i, p in enumerate(policy.policies) if p == part] for part in parts}

    def run(q, *arrays, sinks=None):
        terms, outs = HeadTerms(config.slopes(q.shape[2]), sinks), []
        heads_of = np.arange(q.shape[2]).reshape(len(policy.policies), -1)
        for part, attend in parts.items():
            heads = np.array(key_heads[part])
            queries = heads_of[heads].reshape(-1)
            of_heads = (x[:, :, heads] for x in arrays)
            outs.append(attend(q[:, :, queries], *of_heads, terms.of(queries)))
        order = np.argsort([head for heads in key_heads.values() for head in heads])

        def joined(*parts):
            x = jnp.concatenate(parts, 2)
            return x[:, :, np.arange(x.shape[2]).reshape(len(order), -1)[order].reshape(-1)]

        return jax.tree.map(joined, *outs)

    return run
