"""From a dense model to a mixture of experts, each of which begins as a copy of its MLP.

Source: Komatsuzaki et al. 2023, arXiv:2212.05055 (sparse upcycling).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lminf.errors import InputError
from lminf.models import decoder
from lminf.models.routers import BIAS
from lminf.models.spec import ModelSpec, MoESpec
from lminf.types import Params

ROUTER_DEVIATION = 0.02  # of a new router's entries


def upcycle(
    spec: ModelSpec, params: Params, mixture: MoESpec, *, key: jax.Array
) -> tuple[ModelSpec, Params]:
    """The spec and the parameters of a model whose MLPs, but for the first `dense_layers`, are
    `mixture.experts` copies of themselves under a new router.

    Where the weights of a token's experts sum to 1 and none is dropped it computes what the dense
    model does.
    """
    check(spec, mixture)
    upcycled = dataclasses.replace(spec, moe=mixture)
    dense, layers = mixture.dense_layers, params["layers"]
    stages = {"first_layers": jax.tree.map(lambda x: x[:dense], layers)} if dense else {}
    rest: Any = jax.tree.map(lambda x: x[dense:], layers)
    mlp = rest.pop("mlp")
    experts = {
        name.removeprefix("w_"): jnp.repeat(w[:, None], mixture.experts, 1)
        for name, w in mlp.items()
    }
    layers_left = spec.num_layers - dense
    if mixture.router.learned:
        shape = (layers_left, spec.width, mixture.experts)
        experts["router"] = ROUTER_DEVIATION * jax.random.normal(key, shape, params["embed"].dtype)
    if mixture.router.bias_rate is not None:
        experts[BIAS] = jnp.zeros((layers_left, mixture.experts), params["embed"].dtype)
    stages["layers"] = rest | {"moe": experts}
    assert set(stages) == set(decoder.stages_of(upcycled))
    return upcycled, {**params, **stages}


def check(spec: ModelSpec, mixture: MoESpec) -> None:
    """Refuses models and mixtures between which no MLP can be copied."""
    if spec.moe is not None:
        raise InputError("the model is a mixture of experts already; give a dense one")
    if spec.mlp.bias or mixture.bias:
        raise InputError(
            "biases of MLPs are not copied into experts, which have them in other places; give a "
            "model and a mixture without"
        )
    if mixture.hidden_dim != spec.mlp.hidden_dim:
        raise InputError(
            f"experts of {mixture.hidden_dim} channels are no copies of an MLP of "
            f"{spec.mlp.hidden_dim}; give hidden_dim={spec.mlp.hidden_dim}"
        )
    if mixture.shared_dim:
        raise InputError(
            f"shared_dim={mixture.shared_dim}: an MLP beside the experts would be added to what "
            f"the dense model computes; give shared_dim=0"
        )
