"""Linear probes of a frozen model: what its hidden states say of a subject.

A probe is a linear classifier of hidden states behind a low-rank change of the embedding, which
adapts the frozen model to the probe's inputs. All attributes and places share one change here.
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
    places: Int[np.ndarray, "S N J"],
    labels: Int[np.ndarray, "S N A"],
    *,
    num_train: int,
    rank: int,
) -> Float[np.ndarray, "S J A"]:
    """Shares of right attributes from the hidden states at each place, for the rows from
    `num_train` on; the rows before train the probes. Row n of model s is its own subject.
    """
    settings = (c.steps, min(c.batch, num_train), c.rate, rank, num_train, int(labels.max()) + 1)
    keys = jax.random.split(jax.random.key(c.seed), len(tokens))
    return np.asarray(_fitted(program, settings, params, tokens, places, labels, keys))


@partial(jax.jit, static_argnums=(0, 1))
def _fitted(program: TrainStep, settings, params, tokens, places, labels, keys):
    steps, batch, rate, rank, num_train, classes = settings
    optimizer = optax.adamw(rate, weight_decay=0.1)

    def logits(probe, params, tokens, places):
        embeds = decoder.embed_tokens(program.spec, params, tokens)
        embeds += probe["up"][tokens] @ probe["down"]
        states = _worlds.hidden(program, params, tokens, embeds=embeds)
        states = jnp.take_along_axis(states, places[..., None], 1).astype(jnp.float32)
        return jnp.einsum("njd,jadc->njac", states, probe["w"])

    def one(params, tokens, places, labels, key):
        width, attributes = program.spec.width, labels.shape[1]
        first, *keys = jax.random.split(key, steps + 1)
        probe = {
            "up": jnp.zeros((program.spec.vocab_size, rank)),
            "down": jax.random.normal(first, (rank, width)) * width**-0.5,
            "w": jnp.zeros((places.shape[1], attributes, width, classes)),
        }

        def loss(probe, rows):
            scores = logits(probe, params, tokens[rows], places[rows])
            scores = jax.nn.log_softmax(scores)
            return -jnp.take_along_axis(scores, labels[rows][:, None, :, None], -1).mean()

        def step(carry, key):
            probe, state = carry
            rows = jax.random.choice(key, num_train, (batch,), replace=False)
            changes, state = optimizer.update(jax.grad(loss)(probe, rows), state, probe)
            return (optax.apply_updates(probe, changes), state), None

        (probe, _), _ = jax.lax.scan(step, (probe, optimizer.init(probe)), jnp.stack(keys))
        rest = slice(num_train, None)
        best = logits(probe, params, tokens[rest], places[rest]).argmax(-1)
        return (best == labels[rest][:, None]).mean(0)

    return jax.vmap(one)(params, tokens, places, labels, keys)
