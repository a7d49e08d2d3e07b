"""Between two sets of parameters: linear and spherical interpolation, and rows taken over.

With them a chat model adapted to a language on plain text gets its chat behaviour back, without
training (`restore_chat`). Source: Yamaguchi et al. 2024, arXiv:2412.11704 (ElChat).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lminf.errors import InputError
from lminf.types import Params

Method: TypeAlias = Literal["linear", "spherical"]
# A rate for the tensor of this path, or one for each of its layers, which are on axis 0. At 0 the
# outcome is the first tensor, at 1 the second.
RateOf: TypeAlias = Callable[[tuple[str, ...]], float | Sequence[float]]
PARALLEL = 0.9995  # cosine beyond which spherical interpolation is linear

# Of the first two and last two layers, the ones that are trained; others are those of the chat
# model, which they were frozen as.
CHAT_RATES = (0.3, 0.5, 0.5, 0.3)


def interpolate(first: Params, second: Params, rate_of: RateOf, *, method: Method) -> Params:
    """Each tensor between that of `first` and of `second`, which have the same shapes."""

    def between(path: Any, a: Array, b: Array) -> Array:
        if a.shape != b.shape:
            raise InputError(
                f"{jax.tree_util.keystr(path)} is {a.shape} in one model and {b.shape} in the "
                f"other; interpolate models of one shape"
            )
        rate = rate_of(tuple(str(entry.key) for entry in path))
        mix = _linear if method == "linear" else _spherical
        if isinstance(rate, Sequence):
            return jax.vmap(mix)(a, b, jnp.asarray(rate, jnp.float32)).astype(a.dtype)
        return mix(a, b, jnp.float32(rate)).astype(a.dtype)

    return jax.tree_util.tree_map_with_path(between, first, second)


def overwrite_rows(
    table: Float[Array, "V D"], source: Float[Array, "W D"], ids: Sequence[int]
) -> Float[Array, "V D"]:
    """The table with the rows `ids` of the source."""
    rows = jnp.asarray(ids, jnp.int32)
    return table.at[rows].set(source[rows].astype(table.dtype))


def restore_chat(
    adapted: Params,
    chat: Params,
    special_ids: Sequence[int],
    *,
    rates: Sequence[float] = CHAT_RATES,
    method: Method = "linear",
) -> Params:
    """The adapted model with the layers between its own and those of the chat model, and with the
    chat model's rows for the special tokens of its template.

    `rates` are the chat model's shares in the outermost layers, half of them the first and half
    the last. The adapted tables may have more rows than those of the chat model.
    """
    half = len(rates) // 2
    layers = jax.tree.leaves(chat["layers"])[0].shape[0]
    if len(rates) % 2 or layers < len(rates):
        raise InputError(
            f"{len(rates)} rates for a model of {layers} layers; give an even number, at most one "
            f"a layer"
        )
    of_layers = [*rates[:half], *[1.0] * (layers - len(rates)), *rates[half:]]
    mixed = interpolate(adapted["layers"], chat["layers"], lambda path: of_layers, method=method)
    tables = {
        name: overwrite_rows(adapted[name], chat[name], special_ids)
        for name in ("embed", "head") if name in adapted
    }  # fmt: skip
    return {**adapted, "layers": mixed, **tables}


def _linear(a: Array, b: Array, rate: Array) -> Array:
    """Exactly an end at the rates 0 and 1."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.where(rate == 1, b, a + rate * (b - a))


def _spherical(a: Array, b: Array, rate: Array) -> Array:
    """Along the arc between the directions of both tensors, as flat vectors."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    norms = jnp.linalg.norm(a.ravel()) * jnp.linalg.norm(b.ravel())
    cosine = jnp.clip(jnp.vdot(a, b) / jnp.where(norms == 0, 1, norms), -1, 1)
    angle = jnp.arccos(cosine)
    straight = (jnp.abs(cosine) > PARALLEL) | (norms == 0)
    sine = jnp.where(straight, 1, jnp.sin(angle))
    arc = jnp.sin((1 - rate) * angle) / sine * a + jnp.sin(rate * angle) / sine * b
    arc = jnp.where(rate == 0, a, jnp.where(rate == 1, b, arc))
    return jnp.where(straight, _linear(a, b, rate), arc)
