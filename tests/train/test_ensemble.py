"""Copies that differ in seed and rate, trained as one program, are the runs they stand for."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from lminf.attention.policy import FULL
from lminf.data.windows import RandomWindows
from lminf.models import spec
from lminf.parallel import mesh, partition
from lminf.train.ensemble import Replicas
from lminf.train.optim import AdamW
from lminf.train.schedules import Cosine
from lminf.train.step import TrainStep

PEAKS = (1e-3, 3e-2)
SEEDS = (0, 3)
STEPS = 4


@pytest.fixture(scope="module")
def program():
    shape = spec.llama(vocab_size=32, width=16, num_layers=1, num_heads=2, num_kv_heads=1,
                       hidden_dim=24, trained_length=8)  # fmt: skip
    one = mesh.make(mesh.MeshShape(), jax.devices()[:1])
    return TrainStep(
        shape,
        (FULL,),
        one,
        partition.parse("data"),
        AdamW().build(),
        learning_rate=lambda step: step,
    )


@pytest.fixture(scope="module")
def data():
    tokens = np.random.default_rng(0).integers(0, 32, 500)
    return [RandomWindows(tokens, length=8, rows=3, seed=seed) for seed in SEEDS]


@pytest.mark.slow
def test_copies_are_the_separate_runs(program, data, monkeypatch):
    monkeypatch.setattr("lminf.train.ensemble.AT_ONCE", 3)
    schedule = Cosine(1.0, 1e-5, 2)
    copies = Replicas(program, SEEDS, PEAKS)
    state, first = copies.train(copies.init(), data, until=1, schedule=schedule, steps=STEPS)
    state, rest = copies.train(state, data, until=STEPS, schedule=schedule, steps=STEPS)
    losses = np.concatenate([first, rest])
    assert losses.shape == (STEPS, len(SEEDS), len(PEAKS))
    nll = np.asarray(copies.nll(state.params, data[0].batch(0)))
    for (s, seed), (p, peak) in itertools.product(enumerate(SEEDS), enumerate(PEAKS)):
        own = dataclasses.replace(schedule, peak=peak)
        alone = dataclasses.replace(program, learning_rate=lambda step, own=own: own(step, STEPS))
        state = alone.init(key=jax.random.key(seed))
        for step in range(STEPS):
            state, metrics = alone.step(state, data[s].batch(step))
            np.testing.assert_allclose(losses[step, s, p], metrics.loss, rtol=1e-5)
        here = alone.nll(state, data[0].batch(0))
        np.testing.assert_allclose(nll[s, p], here, atol=1e-4)
    assert len({float(loss) for loss in losses[-1].ravel()}) == 4
