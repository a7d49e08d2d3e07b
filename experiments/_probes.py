"""Linear probes of a frozen model: what its hidden states say of a subject.

A probe is a linear classifier of hidden states behind a low-rank change of the embedding, which
adapts the frozen model to the probe's inputs; every attribute has its own.
Source: Allen-Zhu and Li 2023, arXiv:2309.14316, P-probing and Q-probing.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from lminf.experiments import _worlds
from lminf.models import decoder
from lminf.train.step import TrainStep
from lminf.types import Params


def accuracies(
    c: ConfigDict,
    program: TrainStep,
    params: Params,
    tokens: Int[np.ndarray, "S N T"],
    places: Int[np.ndarray, "S N"],
    labels: Int[np.ndarray, "S N A"],
    *,
    num_train: int,
    rank: int,
) -> Float[np.ndarray, "S A"]:
    """Shares of right attributes, by the hidden state at each row's place, of the rows from
    `num_train` on; the rows before train the probes. Row n of model s is a subject of its own.
    """
    settings = (c.steps, min(c.batch, num_train), c.rate, rank, num_train, int(labels.max()) + 1)
    keys = jax.random.split(jax.random.key(c.seed), labels.shape[::2])
    return np.asarray(_fitted(program, settings, params, tokens, places, labels, keys))


@partial(jax.jit, static_argnums=(0, 1))
def _fitted(program: TrainStep, settings, params, tokens, places, labels, keys):
    steps, batch, rate, rank, num_train, classes = settings
    optimizer, width = optax.adamw(rate, weight_decay=0.1), program.spec.width

    def logits(probe, params, tokens, places):
        embeds = decoder.embed_tokens(program.spec, params, tokens)
        embeds += probe["up"][tokens] @ probe["down"]
        states = _worlds.hidden(program, params, tokens, embeds=embeds)
        states = jnp.take_along_axis(states, places[:, None, None], 1)[:, 0]
        return states.astype(jnp.float32) @ probe["w"]

    def one(params, tokens, places, labels, key):
        first, *keys = jax.random.split(key, steps + 1)
        probe = {
            "up": jnp.zeros((program.spec.vocab_size, rank)),
            "down": jax.random.normal(first, (rank, width)) * width**-0.5,
            "w": jnp.zeros((width, classes)),
        }

        def loss(probe, rows):
            scores = jax.nn.log_softmax(logits(probe, params, tokens[rows], places[rows]))
            return -jnp.take_along_axis(scores, labels[rows][:, None], 1).mean()

        def step(carry, key):
            probe, state = carry
            rows = jax.random.choice(key, num_train, (batch,), replace=False)
            changes, state = optimizer.update(jax.grad(loss)(probe, rows), state, probe)
            return (optax.apply_updates(probe, changes), state), None

        (probe, _), _ = jax.lax.scan(step, (probe, optimizer.init(probe)), jnp.stack(keys))
        # In pieces, since the paper's test people are 50,000; the last one is filled up.
        count = len(labels) - num_train
        pieces = num_train + np.arange(-(-count // batch) * batch).reshape(-1, batch) % count
        best = jax.lax.map(
            lambda rows: logits(probe, params, tokens[rows], places[rows]).argmax(-1), pieces
        )
        return (best.reshape(-1)[:count] == labels[num_train:]).mean()

    of_attributes = jax.vmap(one, in_axes=(None, None, None, 1, 0))
    return jax.vmap(of_attributes)(params, tokens, places, labels, keys)
