"""Mixtures of experts in training: sharded, accumulated, and on one device."""

import dataclasses

import jax
import numpy as np
import pytest

from lminf.models import decoder, routers
from lminf.models.routers import LossFree
from lminf.objectives import terms
from tests.attention import cases
from tests.models.test_moe import MIX
from tests.train import making


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "strategy", "changes"),
    [
        ({"expert": 4, "data": 2}, "expert", {}),
        ({"expert": 4, "data": 2}, "expert", {"capacity_factor": 1.0}),
        (
            {"expert": 2, "fsdp": 2, "tensor": 2},
            "expert+zero3+tensor",
            {"dense_layers": 1, "router": LossFree()},
        ),
    ],
)
def test_on_a_mesh_of_experts_it_trains_as_on_one_device(sizes, strategy, changes):
    shape = dataclasses.replace(making.SPEC, moe=dataclasses.replace(MIX, **changes))
    asked = {"shape": shape, "objective": terms.language_modeling(shape)}
    losses, states = [], []
    for made in (
        making.program(**asked),
        making.program(**asked, strategy=strategy, **sizes),
        making.program(**asked, grad_accum_steps=2),
    ):
        state = made.start(making.host(decoder.init(shape, key=jax.random.key(0))))
        for step in range(2):
            state, metrics = made.step(state, making.put(made, making.tokens(step)))
        losses.append(float(metrics.loss))
        states.append(state)
    where = states[1].params["layers"]["moe"]["up"].sharding.spec
    assert "expert" in where
    assert losses[1] == pytest.approx(losses[0], abs=making.ATOL)
    assert making.largest_difference(states[0].params, states[1].params) < 1e-4
    if "capacity_factor" not in changes:  # balance is of a piece, so accumulating is another loss
        assert losses[2] == pytest.approx(losses[0], abs=1e-2)


@pytest.mark.slow
def test_a_step_moves_the_correction_biases_by_the_load_of_its_batch():
    """Up where an expert read fewer than an even share, of all pieces of the batch together."""
    shape = dataclasses.replace(making.SPEC, moe=dataclasses.replace(MIX, router=LossFree(0.25)))
    objective = terms.language_modeling(shape)
    made = making.program(shape=shape, objective=objective, grad_accum_steps=2)
    state = made.start(making.host(decoder.init(shape, key=jax.random.key(0))))
    batch = making.put(made, making.tokens())
    load = cases.compiled(lambda params: made.model(params, batch).expert_load())(state.params)
    error = 1 / 4 - np.asarray(load)
    assert np.abs(error).max() > 0.01
    state, metrics = cases.compiled(made.update)(state, batch)
    bias = state.params["layers"]["moe"][routers.BIAS]
    np.testing.assert_allclose(bias, 0.25 * np.sign(error), atol=1e-7)
    assert terms.EXPERT_LOAD not in metrics.reported
