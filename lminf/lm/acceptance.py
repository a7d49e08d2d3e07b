"""Rules of acceptance for speculative decoding, as functions of two distributions.

A token x is drawn from q, the draft's distribution, where the model's is p. It is accepted with the
rule's probability of it; else a token is drawn from the rule's residual. What tokens then follow is

    out = q acceptance + (1 - sum q acceptance) residual
"""

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf import ranges
from lminf.errors import InputError
from lminf.ranges import Range


@dataclass(frozen=True)
class Standard:
    """What follows is distributed as p. Sources: Leviathan et al. 2023, arXiv:2211.17192, and Chen
    et al. 2023, arXiv:2302.01318.
    """

    def acceptance(self, p: Float[Array, "*B V"], q: Float[Array, "*B V"]) -> Array:
        """The probability [*B, V] of accepting each token, if it was drawn."""
        return _ratio(p, q)

    def residual(self, p: Float[Array, "*B V"], q: Float[Array, "*B V"]) -> Array:
        """The distribution [*B, V] to sample from after a rejection."""
        return _normalized(p - q, instead=p)


@dataclass(frozen=True)
class RAPID:
    """The model's distribution is shifted towards the draft's, which knows something of its own:

        p' = softmax(log p - eta T(p - q)),    T keeps tokens with q >= tail max q

    With the residual p' - q the tokens follow p'. The published one has max(p - q, p - p'), and its
    tokens then follow neither. eta = 0 is Standard. Source: Chen et al. 2025, arXiv:2502.20330.
    """

    eta: Annotated[float, Range(min=0, max=1e4)]
    tail: Annotated[float, Range(min=0, max=1)] = 0.1
    residual_of: Literal["published", "shifted"] = "published"

    def __post_init__(self):
        ranges.check(self)
        if self.residual_of not in ("published", "shifted"):
            raise InputError(f"residual_of={self.residual_of!r}; give 'published' or 'shifted'")

    def shifted(self, p: Float[Array, "*B V"], q: Float[Array, "*B V"]) -> Array:
        """p' [*B, V]."""
        known = q >= self.tail * q.max(-1, keepdims=True)
        return jax.nn.softmax(jnp.log(p) - self.eta * jnp.where(known, p - q, 0), axis=-1)

    def acceptance(self, p: Float[Array, "*B V"], q: Float[Array, "*B V"]) -> Array:
        return _ratio(self.shifted(p, q), q)

    def residual(self, p: Float[Array, "*B V"], q: Float[Array, "*B V"]) -> Array:
        shifted = self.shifted(p, q)
        if self.residual_of == "shifted":
            return _normalized(shifted - q, instead=shifted)
        return _normalized(jnp.maximum(p - q, p - shifted), instead=p)


def _ratio(p, q):
    return jnp.where(q > 0, jnp.minimum(p, q) / jnp.where(q > 0, q, 1), 1)


def _normalized(weights, *, instead):
    """What is positive of them, as probabilities; `instead` where nothing is, which is only drawn
    from where nothing is rejected, but for rounding.
    """
    weights = jnp.maximum(weights, 0)
    total = weights.sum(-1, keepdims=True)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), instead)


STANDARD = Standard()
Rule: TypeAlias = Standard | RAPID
RULES = {"standard": Standard, "rapid": RAPID}


def verify(
    rule: Rule,
    p: Float[Array, "B k+1 V"],
    q: Float[Array, "B k V"],
    drafted: Int[Array, "B k"],
    counts: Int[Array, " B"],
    *,
    key: jax.Array,
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """How many of the first `counts` drafted tokens of each row are accepted, and the token after
    them.
    """
    accept_key, next_key = jax.random.split(key)
    row, index = jnp.arange(len(p), dtype=jnp.int32), jnp.arange(q.shape[1], dtype=jnp.int32)
    chances = jnp.take_along_axis(rule.acceptance(p[:, :-1], q), drafted[..., None], axis=2)[..., 0]
    passed = jax.random.uniform(accept_key, chances.shape) < chances
    passed &= index[None] < counts[:, None]
    accepted = jnp.cumprod(passed, axis=1, dtype=jnp.int32).sum(1, dtype=jnp.int32)
    expected = p[row, accepted]
    residual = rule.residual(expected, q[row, jnp.minimum(accepted, q.shape[1] - 1)])
    follows = jnp.where((accepted == counts)[:, None], expected, residual)
    return accepted, jax.random.categorical(next_key, jnp.log(follows)).astype(jnp.int32)
