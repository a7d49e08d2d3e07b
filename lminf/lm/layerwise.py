"""A decoder whose layers run one after another, each a program of its own: how CPUs read and write.

A scan over stacked arrays makes XLA's CPU backend copy the weights, the keys and the values of
every layer out of their stacks before it multiplies. Here the weights of a layer are views of the
stacked arrays and its cache is an array of its own. Layers that are alike share one program, so
there is also less to compile.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lminf.attention import attend, cache
from lminf.attention.policy import LayerPolicy
from lminf.attention.scores import ScoreConfig
from lminf.models import decoder, layer_scan, layers
from lminf.models.spec import ModelSpec
from lminf.types import Hidden, Params, Positions, Tokens

PLATFORMS = ("cpu",)  # where the layers run one by one


def replicated(params: Params, mesh: Mesh | None) -> Params:
    """The parameters on every device of the mesh; devices of one CPU share the memory."""
    if mesh is None:
        return params
    sharding = NamedSharding(mesh, P())
    if mesh.devices.flat[0].platform != "cpu":
        return jax.device_put(params, sharding)
    return jax.tree.map(lambda x: _share(np.asarray(x), sharding), params)


def layer_params(spec: ModelSpec, params: Params) -> list[Params]:
    """The parameters of each layer, as views of the stacked arrays of one CPU device."""

    def view(x: jax.Array | np.ndarray, row: int) -> jax.Array:
        device = x.sharding if isinstance(x, jax.Array) and x.committed else None
        return jax.device_put(np.asarray(x)[row], device)

    return [
        jax.tree.map(partial(view, row=row), params[name])
        for name, stage in decoder.stages_of(spec).items()
        for row in range(stage.num_layers)
    ]


def _share(x: np.ndarray, sharding: Any) -> jax.Array:
    """The same memory as an array of each device: `device_put` copies nothing that is aligned."""
    parts = [jax.device_put(x, device) for device in sharding.addressable_devices]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)


class LayerwiseDecoder:
    """Decoder.apply of one model on one device, with a cache for each layer."""

    def __init__(self, module: decoder.Decoder, params: Params, by_layer: Sequence[Params]):
        spec = module.spec
        self.by_layer = by_layer
        self.params = {name: x for name, x in params.items() if not name.endswith("layers")}
        stages = [
            stage for stage in decoder.stages_of(spec).values() for _ in range(stage.num_layers)
        ]
        self.programs = [
            layer_program(
                stage, policy, config, module.implementation, index=index_of(module.policies, layer)
            )
            for layer, (stage, policy, config) in enumerate(
                zip(stages, module.policies, decoder.score_configs(spec), strict=True)
            )
        ]
        self.embed, self.final_norm = embed_program(spec, module.dtype), norm_program(spec)
        self.observe = None
        if any(policy.needs_hidden for policy in module.policies):
            self.observe = observe_program(spec, module.policies)

    def __call__(
        self, tokens: Tokens, positions: Positions, caches: tuple[cache.Cache, ...]
    ) -> tuple[Hidden, tuple[cache.Cache, ...]]:
        """Hidden states, and the caches, which are used up, with these tokens in them."""
        x, updated = self.embed(self.params, tokens, positions), []
        for program, params, layer in zip(self.programs, self.by_layer, caches, strict=True):
            x, layer = program(params, x, positions, layer, tokens)
            updated.append(layer)
        hidden = self.final_norm(self.params, x)
        if self.observe is not None:
            updated = self.observe(self.params, updated, tokens, positions, hidden)
        return hidden, tuple(updated)


def index_of(policies: Sequence[LayerPolicy], layer: int) -> int:
    """The first of the layers with this one's policy that does as it does, counted among them."""
    count = policies[:layer].count(policies[layer])
    thresholds = [t for t in layer_scan.thresholds_of(policies[layer]) if t <= count]
    return max(thresholds, default=0)


def run_layer(
    spec: ModelSpec,
    policy: LayerPolicy,
    config: ScoreConfig,
    params: Params,
    x: Hidden,
    positions: Positions,
    layer_cache: cache.Cache,
    tokens: Tokens | None = None,
    *,
    index: int,
    **options: Any,
) -> tuple[Hidden, cache.Cache]:
    """Hidden states after one layer of a stage's spec, with its own parameters and its own cache,
    and the cache with these tokens in it. `index` is that of the layer among those with the policy;
    `tokens` are for routers that read ids; `options` are those of attend.extend.
    """
    extend, new_positions = attend.extend(
        policy, config, layer_cache.layout, layer_cache.pos, positions, **options
    )
    of_layer = layer_scan.index_of((policy,), 0)(index)

    def attend_layer(q, k, v, **sinks):
        return extend(q, k, v, layer_cache.kv, jnp.int32(0), **sinks, **of_layer)

    out: Any = layers.Block(spec).apply({"params": params}, x, attend_layer, tokens)
    x, kv = out
    return x, layer_cache.updated(kv, new_positions)


@lru_cache(maxsize=256)
def layer_program(
    spec: ModelSpec,
    policy: LayerPolicy,
    config: ScoreConfig,
    implementation: str | None,
    *,
    index: int = 0,
) -> Callable[..., Any]:
    """The compiled run_layer of layers like this, which uses up states and cache."""
    run = partial(run_layer, spec, policy, config, index=index, implementation=implementation)
    return jax.jit(run, donate_argnums=(1, 3))


@lru_cache(maxsize=64)
def embed_program(spec: ModelSpec, dtype: Any) -> Callable[..., Any]:
    """(params, tokens, positions) -> what the first layer reads."""

    def embed(params, tokens, positions):
        x = decoder.embed_tokens(spec, params, tokens, dtype=dtype)
        return decoder.place_embeds(spec, params, x, positions)

    return jax.jit(embed)


@lru_cache(maxsize=64)
def norm_program(spec: ModelSpec) -> Callable[..., Any]:
    """(params, hidden states after the last layer) -> those that heads read."""
    norm = layers.Norm(spec.norm, spec.width)

    def final_norm(params, x):
        return norm.apply({"params": params["final_norm"]}, x)

    return jax.jit(final_norm)


@lru_cache(maxsize=64)
def observe_program(spec: ModelSpec, policies: tuple[LayerPolicy, ...]) -> Callable[..., Any]:
    """(params, caches, tokens, positions, hidden states) -> the caches, as decoder.observed."""

    def observe(params, caches, tokens, positions, hidden):
        return decoder.observed(
            spec, params, policies, caches, tokens=tokens, positions=positions, hidden=hidden
        )

    return jax.jit(observe, donate_argnums=1)
