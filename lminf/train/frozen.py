"""Training beside a frozen model: of parameters that a loss reads together with the model's own."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from lminf.errors import InputError
from lminf.train.schedules import Schedule
from lminf.types import Params

Batch: TypeAlias = Mapping[str, Any]
# (trained, frozen, batch) -> what is minimised, a scalar. Hashable: a compiled step depends on it.
Loss: TypeAlias = Callable[[Params, Params, Batch], Array]


def fit(
    loss_at: Callable[[int], Loss],
    params: Params,
    frozen: Params,
    batch_at: Callable[[int], Batch],
    *,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    steps: int,
    progress: Callable[[int], object] = lambda done: None,
    watch: Callable[[int, Params], object] = lambda done, params: None,
) -> tuple[Params, Float[np.ndarray, " steps"]]:
    """The trained parameters after so many steps, and the loss of each step. `optimizer` is for a
    learning rate of 1; gradients are clipped to a norm of 1. What is frozen is read and not
    returned, so it cannot change. `watch` sees what is trained after every step, and must copy what
    it keeps: the next step uses it up.
    """
    params = jax.tree.map(jnp.array, params)  # copies, which the steps use up
    state, losses = optimizer.init(params), []
    for step in range(steps):
        rate = jnp.float32(schedule(jnp.asarray(step), steps))
        batch = {name: jnp.asarray(x) for name, x in batch_at(step).items()}
        params, state, loss = _step(loss_at(step), optimizer, params, state, frozen, batch, rate)
        losses.append(loss)
        watch(step + 1, params)
        if step:
            losses[-2].block_until_ready()
            progress(step)
    values = np.asarray(losses, np.float64)
    if not np.isfinite(values).all():
        first = int(np.argmin(np.isfinite(values)))
        raise InputError(
            f"the loss of step {first} is {values[first]}; lower the learning rate or look at its "
            f"batch"
        )
    return params, values


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _step(loss, optimizer, params, state, frozen, batch, rate):
    value, gradient = jax.value_and_grad(loss)(params, frozen, batch)
    norm = optax.tree.norm(gradient)
    gradient = jax.tree.map(lambda g: g / jnp.maximum(norm, 1.0), gradient)
    changes, state = optimizer.update(gradient, state, params)
    return jax.tree.map(lambda p, change: p + rate * change, params, changes), state, value
