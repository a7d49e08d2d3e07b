"""A tiny model and batches to train it on, laid out on any mesh."""

import functools

import jax
import numpy as np

from lminf.attention import policy as policies
from lminf.models import layer_policies, spec
from lminf.parallel import mesh, partition
from lminf.train import batches
from lminf.train.optim import AdamW
from lminf.train.step import TrainStep
from tests.models import specs

SPEC = spec.llama(
    vocab_size=64, width=16, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=32,
    trained_length=16,
)  # fmt: skip
ROWS, LENGTH = 8, 16
# What a sum over devices in another order changes.
ATOL = 2e-6


def program(*, strategy="data", shape=SPEC, policy=policies.FULL, **changes) -> TrainStep:
    """A program on a mesh of these sizes; on one device if none are given."""
    sizes = {axis: changes.pop(axis) for axis in mesh.AXES if axis in changes}
    laid_out = mesh.make(mesh.MeshShape(**{"data": 1, **sizes})) if sizes else mesh.single()
    chosen = partition.parse(strategy)
    if changes.get("pipeline") is not None:
        chosen = chosen * partition.PIPELINE
    partition.check(chosen, laid_out)
    by_layer = layer_policies.by_layer(
        policy, windows=shape.windows, num_kv_heads=shape.num_kv_heads
    )
    optimizer = changes.pop("optimizer", AdamW()).build()
    settings = {"learning_rate": lambda step: np.float32(1e-2), **changes}
    return TrainStep(shape, by_layer, laid_out, chosen, optimizer, **settings)


def tokens(step=0, rows=ROWS, length=LENGTH):
    """Batch number `step`: noise that repeats itself, so that there is something to learn."""
    half = np.random.default_rng(step).integers(0, SPEC.vocab_size, (rows, length // 2 + 1))
    text = np.tile(half, 2).astype(np.int32)[:, : length + 1]
    return {"tokens": text[:, :-1], "targets": text[:, 1:]}


def put(made: TrainStep, batch):
    return batches.put(batch, mesh=made.mesh, strategy=made.strategy)


@functools.cache
def params():
    return host(specs.parameters(SPEC))


def start(made: TrainStep):
    return made.start(params())


def train(made: TrainStep, steps=2, batch_of=tokens):
    """(state, losses) after some steps from the same start."""
    state, losses = start(made), []
    for index in range(steps):
        state, metrics = made.step(state, put(made, batch_of(index)))
        losses.append(float(metrics.loss))
    return state, losses


def host(tree):
    return jax.tree.map(np.asarray, jax.device_get(tree))


def largest_difference(one, other) -> float:
    pairs = zip(jax.tree.leaves(host(one)), jax.tree.leaves(host(other)), strict=True)
    return max(float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()) for a, b in pairs)
