"""One optimiser step: the loss of a batch, its gradient, and the update, in one program."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lminf.losses import xent
from lminf.models import decoder
from lminf.types import Params


class State(NamedTuple):
    """What training changes."""

    params: Params
    optimizer: Any
    step: Any  # int32


def start(params: Params, optimizer: optax.GradientTransformation) -> State:
    return State(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def loss(module: decoder.Decoder, params: Params, batch: Mapping[str, Array]) -> Float[Array, ""]:
    """Mean nats per token of `targets` after `tokens`, both [B, T]."""
    tokens = batch["tokens"]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, _ = module.apply({"params": params}, tokens, positions=positions)
    return xent.token_nll(module.spec, params, hidden, batch["targets"]).mean()


def make_step(
    module: decoder.Decoder, optimizer: optax.GradientTransformation
) -> Callable[[State, Mapping[str, Array]], tuple[State, Float[Array, ""]]]:
    """`step(state, batch) -> state, loss`; the state given is consumed."""

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, batch):
        value, gradients = jax.value_and_grad(partial(loss, module))(state.params, batch)
        updates, inner = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(cast(Params, params), inner, state.step + 1), value

    return step
