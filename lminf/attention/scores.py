"""Scores, and values mixed by them: what every form of attention shares.

`ScoreConfig` says how a model turns a query and a key into a score, `Placement` where both seem to
be. Key heads are named K, the G query heads of each N = K G; P key lists serve all N heads alike
(P is 1, K or N).
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

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

    def slopes(self, num_heads: int) -> Float[Array, " N"] | None:
        if isinstance(self.encoding, rope.Alibi):
            return jnp.asarray(self.encoding.slopes(num_heads))
        return None

    def capped(self, scores: Float[Array, "..."]) -> Float[Array, "..."]:
        """Scores under the model's soft cap, where it has one."""
        if self.soft_cap is None:
            return scores
        return self.soft_cap * jnp.tanh(scores / self.soft_cap)


# --- Where queries and keys seem to be ------------------------------------------------------------


class Placement:
    """Places queries and keys of one call at positions, by rotary rotation where the model has it.

    `positions` [B, T] are those that the call reads: dynamic rotary scaling follows their length.
    """

    def __init__(self, config: ScoreConfig, positions: Int[Array, "B T"], segments=None):
        self.encoding = config.encoding
        self.length = None  # [B, 1]
        if isinstance(self.encoding, rope.Rotary) and isinstance(
            self.encoding.scaling, rope.DynamicNTK
        ):
            if segments is not None:
                raise InputError(
                    "DynamicNTK follows the length of a row, but packed rows hold texts of several "
                    "lengths; give each text its own row or use NTKAware"
                )
            self.length = positions.max(-1, keepdims=True) + 1

    def rotation(self, positions: Int[Array, "B X"], scale: float = 1.0) -> rope.Rotation | None:
        """To be computed once for all layers."""
        if not isinstance(self.encoding, rope.Rotary):
            return None
        return rope.rotation(self.encoding, positions, scale=scale, length=self.length)

    def rotate(
        self, x: Float[Array, "*B X N H"], by: rope.Rotation | None
    ) -> Float[Array, "*B X N H"]:
        """x rotated; itself where the model does not rotate."""
        if not isinstance(self.encoding, rope.Rotary) or by is None:
            return x
        return rope.rotate(x, by, self.encoding.layout)

    def at(
        self, x: Float[Array, "B X N H"], positions: Int[Array, "B X"], scale: float = 1.0
    ) -> Float[Array, "B X N H"]:
        """x placed at these positions."""
        return self.rotate(x, self.rotation(positions, scale))

    def away(self, q: Float[Array, "B X N H"], distance: int) -> Float[Array, "B X N H"]:
        """q such that keys as they are stored seem to be so far away."""
        by = self.rotation(jnp.full(q.shape[:2], distance, jnp.int32))
        if by is None or not isinstance(self.encoding, rope.Rotary):
            return q
        # Keys rotated by nothing would still carry the schedule's temperature, in the channels
        # that rotate.
        warm = jnp.float32(self.encoding.scaling.temperature)
        return self.rotate(q, rope.Rotation(by.cos * warm, by.sin * warm))

    def table(self, positions: int, batch: int) -> rope.Rotation | None:
        """Rotations of positions 0.., for `look_up`: lists of a head's own would each compute
        their angles anew, which made decoding with HiP take 2.4 times as long.
        """
        every = jnp.arange(positions, dtype=jnp.int32)
        return self.rotation(jnp.broadcast_to(every, (batch, positions)))

    def look_up(
        self,
        x: Float[Array, "B *X H"],
        table: rope.Rotation | None,
        positions: Array,
    ) -> Float[Array, "B *X H"]:
        """x [B, ..., H] with each vector at a position of its own, [B, ...]."""
        if table is None:
            return x
        positions = jnp.clip(positions, 0, table.cos.shape[1] - 1)
        row = jnp.arange(len(positions), dtype=jnp.int32)
        row = jnp.expand_dims(row, range(1, positions.ndim))
        by = rope.Rotation(table.cos[row, positions], table.sin[row, positions])
        return self.rotate(x[..., None, :], by)[..., 0, :]


class Branches:
    """A policy's two placements of queries and keys, every rotation computed once."""

    def __init__(self, policy: Policy, placement: Placement, q_pos, k_pos, far_pos):
        """Queries at q_pos [B, T], keys at k_pos [B, S], of the far branch at far_pos [B, R]."""
        far = policy.far_positions()
        self.window, self.placement = policy.window, placement
        self.gain = policy.query_gain(q_pos)
        self.far_q_pos, self.far_k_pos = far.query(q_pos), far.key(far_pos)
        self.far_scale = far.scale
        self._near = placement.rotation(q_pos), placement.rotation(k_pos)
        self._far = tuple(
            placement.rotation(pos, far.scale) for pos in (self.far_q_pos, self.far_k_pos)
        )

    def near(self, q: Array, k: Array) -> tuple[Array, Array]:
        """Both placed at their positions."""
        return self._placed(q, k, self._near)

    def far(self, q: Array, k: Array) -> tuple[Array, Array]:
        """Both placed where far pairs seem to be."""
        return self._placed(q, k, self._far)

    def _placed(self, q, k, by):
        if self.gain is not None:
            q = q * self.gain[..., None, None].astype(q.dtype)
        return self.placement.rotate(q, by[0]), self.placement.rotate(k, by[1])


# --- Products -------------------------------------------------------------------------------------

# Queries of one key head are rows of one product. Named apart, [B, K, G, T, S] comes out of it in
# another order and is copied, which takes longer than both products (512 queries, 2,048 keys).


def rows_of_key_heads(q: Float[Array, "B T N H"], key_heads: int) -> Float[Array, "B K G T H"]:
    return q.reshape(*q.shape[:2], key_heads, -1, q.shape[3]).transpose(0, 2, 3, 1, 4)


def dot(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> Float[Array, "B K G T S"]:
    if q.shape[1] == 1:
        return _dot_of_one(q, k)
    rows = rows_of_key_heads(q, k.shape[2])
    flat = rows.reshape(*rows.shape[:2], -1, rows.shape[4])
    scores = jnp.einsum("bkrh,bskh->bkrs", flat, k, preferred_element_type=jnp.float32)
    return scores.reshape(*rows.shape[:4], -1)


def mix(weights: Float[Array, "B K G T S"], v: Float[Array, "B S K H"]) -> Float[Array, "B T N H"]:
    if weights.shape[3] == 1:
        return _mix_of_one(weights, v)
    rows = weights.reshape(*weights.shape[:2], -1, weights.shape[4])
    out = jnp.einsum("bkrs,bskh->bkrh", rows, v)
    out = out.reshape(*weights.shape[:4], -1).transpose(0, 3, 1, 2, 4)
    return out.reshape(*out.shape[:2], -1, out.shape[4])


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
    return scores.reshape(batch, key_heads, -1, 1, slots)


def _mix_of_one(weights: Float[Array, "B K G 1 S"], v: Float[Array, "B S K H"]):
    """`mix` of one query per row: every head mixes all columns, and keeps its key head's."""
    batch, slots, key_heads, width = v.shape
    rows = weights.reshape(batch, -1, slots)
    out = jnp.einsum("bns,bsc->bnc", rows, v.reshape(batch, slots, -1))
    out = out.reshape(batch, key_heads, -1, key_heads, width)
    kept = jnp.stack([out[:, head, :, head] for head in range(key_heads)], 1)
    return kept.reshape(batch, 1, -1, width)


def scaled(
    config: ScoreConfig,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    slopes: Float[Array, " N"] | None = None,
    q_pos: Int[Array, "B T"] | None = None,
    k_pos: Int[Array, "B P S"] | None = None,
    scale: float = 1.0,
) -> Float[Array, "B K G T S"]:
    """Scores of placed queries and keys before the soft cap. ALiBi's slopes take off the distance
    between their positions times `scale`; P is 1 or K.
    """
    products = dot(q, k) * jnp.float32(config.scale)
    if slopes is None or q_pos is None or k_pos is None:
        return products
    distance = (q_pos[:, None, :, None] - k_pos[:, :, None]).astype(jnp.float32) * scale
    return products - slopes.reshape(1, k.shape[2], -1, 1, 1) * distance[:, :, None]


def softmax(
    config: ScoreConfig, scores: Float[Array, "B K G T S"], seen: Bool[Array, "#B #K #G #T #S"]
) -> Float[Array, "B K G T S"]:
    """Weights of the values, float32; all zero for a query that sees nothing."""
    scores = jnp.where(seen, config.capped(scores), MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    weights = jnp.where(seen, weights, 0.0)
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total == 0, 1.0, total)


# --- Heads that differ ----------------------------------------------------------------------------


def by_head(
    policy: LayerPolicy, config: ScoreConfig, make: Callable[[Policy], Callable]
) -> Callable[..., Array]:
    """`run(q, *arrays)` calling `make(part)(q, *arrays, slopes)` for the heads of each part.

    `arrays` have their key/value heads on axis 2, as q has its query heads.
    """
    if not isinstance(policy, PerHead):
        assert isinstance(policy, Policy)
        alone = make(policy)
        return lambda q, *arrays: alone(q, *arrays, config.slopes(q.shape[2]))
    parts = {part: make(part) for part in dict.fromkeys(policy.policies)}

    def run(q, *arrays):
        slopes = config.slopes(q.shape[2])
        group = q.shape[2] // len(policy.policies)
        out: list = [None] * q.shape[2]
        for part, attend in parts.items():
            heads = [i for i, chosen in enumerate(policy.policies) if chosen == part]
            queries = np.array([i * group + j for i in heads for j in range(group)])
            taken = [x[:, :, np.array(heads)] for x in arrays]
            some = attend(q[:, :, queries], *taken, None if slopes is None else slopes[queries])
            for index, head in enumerate(queries):
                out[head] = some[:, :, index]
        return jnp.stack(out, 2)

    return run
