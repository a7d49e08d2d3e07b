"""What a model costs, from its spec and the policies of its layers: nothing is run."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lminf.attention.policy import LayerPolicy, PerHead, Policy
from lminf.models import decoder
from lminf.models.spec import ModelSpec
from lminf.types import Params


def parameters(spec: ModelSpec) -> int:
    """The number of parameters; a tied head counts once."""
    shapes = jax.eval_shape(lambda: decoder.init(spec, key=jax.random.key(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def weight_bytes(params: Params) -> int:
    """Bytes of parameters, or of their shapes; int8 ones with their scales."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def active_parameters(spec: ModelSpec) -> int:
    """The number of parameters that one token uses: all but the experts it is not sent to."""
    if spec.moe is None:
        return parameters(spec)
    idle = spec.moe.experts - spec.moe.top_k
    each = (3 if spec.mlp.gated else 2) * spec.width * spec.moe.hidden_dim
    return parameters(spec) - (spec.num_layers - spec.moe.dense_layers) * idle * each


def block_parameters(spec: ModelSpec, *, active: bool = False) -> int:
    """N of the scaling laws: weights of attention and MLPs alone, without norms, biases, routers
    and the vocabulary's. `active`: of the experts, those that one token goes to.
    """
    attention = spec.width * spec.head_dim * 2 * (spec.num_heads + spec.num_kv_heads)
    hidden = spec.num_layers * spec.mlp.hidden_dim
    if spec.moe is not None:
        experts = spec.moe.top_k if active else spec.moe.experts
        mixed = experts * spec.moe.hidden_dim + spec.moe.shared_dim
        dense = spec.moe.dense_layers
        hidden = dense * spec.mlp.hidden_dim + (spec.num_layers - dense) * mixed
    return spec.num_layers * attention + spec.width * hidden * (3 if spec.mlp.gated else 2)


def matmul_flops_per_token(spec: ModelSpec) -> int:
    """Forward FLOPs of every product with a weight, the head included; of the experts that a token
    goes to.
    """
    routers = 0
    if spec.moe is not None:
        moe = spec.moe
        mixed = spec.num_layers - moe.dense_layers
        routers = mixed * spec.width * moe.experts * moe.router.learned
    return 2 * (block_parameters(spec, active=True) + routers + spec.width * spec.vocab_size)


def attention_flops(spec: ModelSpec, by_layer: Sequence[LayerPolicy], length: int) -> int:
    """Forward FLOPs of scores and weighted values over a whole text of `length` tokens."""
    return sum(
        4 * spec.head_dim * (spec.num_heads // len(parts)) * attended_pairs(part, length)
        for layer in by_layer
        for parts in [layer.policies if isinstance(layer, PerHead) else (layer,)]
        for part in parts
    )


def attended_pairs(policy: LayerPolicy, length: int) -> int:
    """(query, key) pairs that a text of `length` tokens attends over, each counted once."""
    most = attended_tokens(policy)
    most = length if most is None else min(most, length)
    return most * (most + 1) // 2 + (length - most) * most


def attended_tokens(policy: LayerPolicy) -> int | None:
    """The most tokens that a query of a head sees; None: all before it."""
    assert isinstance(policy, Policy)
    if policy.window is None or policy.num_sinks is None:
        return None
    return policy.window + policy.num_sinks + policy.max_selected


def cache_bytes(
    spec: ModelSpec, by_layer: Sequence[LayerPolicy], *, tokens: int, dtype: Any = jnp.float32
) -> int:
    """Bytes of keys, values and policy state of one sequence of `tokens`, over all layers."""
    caches = jax.eval_shape(
        lambda: decoder.init_caches(spec, by_layer, batch=1, capacity=tokens, dtype=dtype)
    )
    arrays = jax.tree.leaves([layer.kv for layer in caches])
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
