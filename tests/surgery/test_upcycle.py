"""A mixture that was upcycled from a dense model begins as that model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.errors import InputError
from lminf.models.routers import LossFree
from lminf.surgery import upcycle
from tests.models import specs
from tests.models.test_moe import MIX, SHAPE, hidden
from tests.train import making

COPIES = dataclasses.replace(
    MIX, hidden_dim=32, shared_dim=0, normalised=True, dense_layers=1, router=LossFree()
)


def test_each_expert_is_the_mlp_of_its_layer():
    params = specs.parameters(SHAPE)
    _, upcycled = upcycle.upcycle(SHAPE, params, COPIES, key=jax.random.key(0))
    assert set(upcycled["first_layers"]) == set(params["layers"])
    moe, mlp = upcycled["layers"]["moe"], params["layers"]["mlp"]
    for expert in range(COPIES.experts):
        for name in ("gate", "up", "down"):
            np.testing.assert_array_equal(moe[name][:, expert], mlp[f"w_{name}"][1:])
    assert not moe["correction_bias"].any()
    assert np.std(moe["router"]) == pytest.approx(0.02, rel=0.5)


@pytest.mark.slow
def test_it_computes_what_the_dense_model_does():
    params = specs.parameters(SHAPE)
    spec, upcycled = upcycle.upcycle(SHAPE, params, COPIES, key=jax.random.key(0))
    tokens = jnp.asarray(making.tokens()["tokens"][:2])
    dense = hidden(SHAPE, params, tokens)
    np.testing.assert_allclose(hidden(spec, upcycled, tokens), dense, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dim": 24}, "experts of 24 channels are no copies of an MLP of 32"),
        ({"shared_dim": 8}, "shared_dim=8: an MLP beside the experts would be added"),
        ({"bias": True}, "biases of MLPs are not copied"),
    ],
)
def test_mixtures_that_are_no_copies_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        upcycle.check(SHAPE, dataclasses.replace(COPIES, **changes))


def test_a_mixture_is_not_upcycled_again():
    with pytest.raises(InputError, match="a mixture of experts already"):
        upcycle.check(dataclasses.replace(SHAPE, moe=MIX), COPIES)
