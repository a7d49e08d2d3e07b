"""Weights in int8: symmetric, one scale for each output channel.

    w[i, o] ~ qvalue[i, o] scale[o],    scale[o] = max_i |w[i, o]| / 127

A product is taken with qvalue, and its result is multiplied by the scales: what is kept in memory,
and read for every token, is a quarter of float32.

The names are those of qwix, whose provider intercepts the calls of one Linen module. It does not
serve here: on a CPU each layer is a program of its own, heads are functions outside the module, and
the products that are fast there (lminf.models.layers) are none of a library's.
Source: vector-wise absmax quantisation, Dettmers et al. 2022, arXiv:2208.07339, section 2; only the
weights are quantised here.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

from lminf.errors import InputError

LARGEST = 127  # -128 has no counterpart


class QuantizedWeights(NamedTuple):
    """A matrix in int8, or a stack of them. It stands in a tree of parameters for the array."""

    qvalue: Int8[Array, "..."]
    scale: Float32[Array, "..."]  # of length 1 along the axes that a product contracts

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the original array."""
        return self.qvalue.shape

    @property
    def size(self) -> int:
        """How many values there are."""
        return self.qvalue.size


Weights: TypeAlias = Float[Array, "..."] | QuantizedWeights


def quantize(w: Float[Array, "..."], *, contracted: Sequence[int]) -> QuantizedWeights:
    """The nearest int8 values; `contracted` are the axes that a product sums over."""
    exact = w.astype(jnp.float32)
    largest = jnp.abs(exact).max(tuple(contracted), keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest) / LARGEST
    return QuantizedWeights(jnp.round(exact / scale).astype(jnp.int8), scale)


def dequantize(w: Weights, dtype: Any) -> Float[Array, "..."]:
    """The weights as an array of `dtype`, whether they are quantised or not."""
    if not isinstance(w, QuantizedWeights):
        return w.astype(dtype)
    return (w.qvalue.astype(jnp.float32) * w.scale).astype(dtype)


def is_quantized(params: Any) -> bool:
    """Whether any of a tree's weights are in int8."""
    return any(isinstance(leaf, QuantizedWeights) for leaf in _leaves(params))


def parameters(params: Any) -> int:
    """How many weights a tree has; scales are none."""
    return sum(leaf.size for leaf in _leaves(params))


def _leaves(params: Any) -> list[Any]:
    return jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QuantizedWeights))


def check_float(params: Any, *, purpose: str) -> None:
    """Refuses int8 weights where only floating-point ones will do."""
    if is_quantized(params):
        raise InputError(
            f"{purpose} needs floating-point weights, but this model's are int8; load it without "
            f'weights="int8"'
        )
