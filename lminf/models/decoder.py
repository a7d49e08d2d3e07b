"""A transformer: tokens or embeddings to hidden states. Heads are functions of hidden states.

Layers are one Block whose parameters are stacked on axis 0 and scanned over (layer_scan.py). The
model does not decide which tokens a layer sees: every layer is given the function that attends. A
pattern of different policies (local and global layers in turn) makes one step of the scan a period.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lminf.attention import attend, cache, rope
from lminf.attention.bidirectional import prefill as bidirectional_prefill
from lminf.attention.policy import FULL, LayerPolicy
from lminf.attention.scores import ScoreConfig
from lminf.errors import InputError
from lminf.models import heads, layer_policies, layer_scan, layers, moe
from lminf.models.quantization import QuantizedWeights, dequantize
from lminf.models.spec import ModelSpec, MoESpec
from lminf.types import Hidden, Params, Positions, Tokens

# Parameter path -> logical axes; lminf.parallel turns them into shardings.
LAYERS = "(layers|first_layers)"
AXES = {
    "embed": ("vocab", "embed"),
    "positions": ("positions", "embed"),
    "head": ("vocab", "embed"),
    "head_bias": ("vocab",),
    "(embed|final)_norm/(scale|bias)": ("embed",),
    f"{LAYERS}/(attention|attention_post|mlp|mlp_post)_norm/(scale|bias)": ("layers", "embed"),
    f"{LAYERS}/attention/wq": ("layers", "embed", "heads", "head_dim"),
    f"{LAYERS}/attention/w[kv]": ("layers", "embed", "kv_heads", "head_dim"),
    f"{LAYERS}/attention/bq": ("layers", "heads", "head_dim"),
    f"{LAYERS}/attention/b[kv]": ("layers", "kv_heads", "head_dim"),
    f"{LAYERS}/attention/wo": ("layers", "heads", "head_dim", "embed"),
    f"{LAYERS}/attention/bo": ("layers", "embed"),
    f"{LAYERS}/attention/sinks": ("layers", "heads"),
    f"{LAYERS}/attention/[qk]_norm/scale": ("layers", "head_dim"),
    f"{LAYERS}/attention/q_head_norms/scale": ("layers", "heads", "head_dim"),
    f"{LAYERS}/attention/k_head_norms/scale": ("layers", "kv_heads", "head_dim"),
    f"{LAYERS}/(mlp|shared)/w_(gate|up)": ("layers", "embed", "mlp"),
    f"{LAYERS}/mlp/b_(gate|up)": ("layers", "mlp"),
    f"{LAYERS}/(mlp|shared)/w_down": ("layers", "mlp", "embed"),
    f"{LAYERS}/mlp/b_down": ("layers", "embed"),
    "layers/moe/router": ("layers", "embed", "routes"),
    "layers/moe/(gate|up)": ("layers", "expert", "embed", "mlp"),
    "layers/moe/down": ("layers", "expert", "mlp", "embed"),
    "layers/moe/(b_router|correction_bias)": ("layers", "routes"),
    "layers/moe/b_(gate|up)": ("layers", "expert", "mlp"),
    "layers/moe/b_down": ("layers", "expert", "embed"),
}

# Of a layer's matrix, how many axes are contracted; they come first, after the axis of layers.
CONTRACTED_AXES = {"wq": 1, "wk": 1, "wv": 1, "wo": 2, "w_gate": 1, "w_up": 1, "w_down": 1}


class Decoder(nn.Module):
    """Tokens or embeddings to final hidden states [B, T, D], after the last norm."""

    spec: ModelSpec
    policies: tuple[LayerPolicy, ...]  # [L]
    dtype: Any = jnp.float32  # of the computation; parameters are cast to it where they are used
    remat: Any = None  # a jax.checkpoint policy; None keeps every activation
    implementation: str | None = None  # of kernels.lambda_attention; None chooses
    # Inside shard_map: the mesh axis that tokens of a row are spread over, and slots of caches
    # where context_parallel.shares_slots says so.
    context_axis: str | None = None
    prefill: Callable[..., attend.Prefill] = attend.prefill  # how a text attends over itself
    # constrain(x, *logical axes): x with the sharding that those axes have on a mesh.
    constrain: Callable[..., Array] = layers.unconstrained

    @nn.compact
    def __call__(
        self,
        tokens: Tokens | None = None,
        *,
        embeds: Hidden | None = None,
        positions: Positions,
        segments: Int[Array, "B T"] | None = None,
        caches: tuple[cache.Cache, ...] | None = None,
        bidirectional: bool = False,
    ) -> tuple[Hidden, tuple[cache.Cache, ...] | None]:
        """Hidden states, and the caches (one for each layer of a period, or one for each layer)
        with these tokens in them.

        `embeds` replace the embeddings of tokens and are scaled as those are: `embed_tokens` of the
        same tokens gives the same hidden states. Positions rise by one along each row (or segment);
        tokens below 0 are padding. `bidirectional` lets every token see all tokens of its segment,
        as an encoder does (lminf.attention.bidirectional says what memory that takes). With
        mutable=["intermediates"], `layers` holds what every layer computed: attention/q, k, v
        [L, B, T, heads, H] before rotation, and hidden [L, B, T, D] after it, each in a 1-tuple.
        With mutable=["routing"], what the routers of a mixture did: moe.MEASURES [L] and
        moe/load [L, E].
        """
        s = self.spec
        self._check_inputs(tokens, embeds, caches, bidirectional)
        embed = self.param("embed", nn.initializers.normal(s.width**-0.5), (s.vocab_size, s.width))
        stacked = {name: self._stacked(name, part) for name, part in stages_of(s).items()}
        if embeds is None:
            assert tokens is not None
            # A table that is sharded by width is gathered first: looked up in shards, every row
            # would be sent twice.
            if not isinstance(embed, QuantizedWeights):
                embed = self.constrain(embed, "vocab", None)
            embeds = embed_tokens(s, {"embed": embed}, tokens, dtype=self.dtype)
        x = self._placed(embeds.astype(self.dtype), positions)
        x = self.constrain(x, "batch", "residual_length", None)
        if not s.tied:
            self.param("head", nn.initializers.normal(s.width**-0.5), (s.vocab_size, s.width))
        if s.head_bias:
            self.param("head_bias", nn.initializers.zeros, (s.vocab_size,))
        collections = [
            name
            for name in ("intermediates", moe.ROUTING)
            if self.is_mutable_collection(name) and not self.is_initializing()
        ]
        attentions, new_positions = self.attentions(
            x.shape[1], positions, segments, caches, bidirectional
        )
        x, kv, sown = self.run_layers(stacked, x, attentions, collections, tokens)
        for name, collected in sown.items():
            self.put_variable(name, "layers", collected)
        x = self.constrain(
            layers.Norm(s.norm, s.width, name="final_norm")(x), "batch", "length", None
        )
        if caches is None:
            return x, None
        updated = (
            layer.updated(layer_kv, layer_positions)
            for layer, layer_kv, layer_positions in zip(caches, kv, new_positions, strict=True)
        )
        return x, observed(
            s, self.variables["params"], self.policies, tuple(updated), tokens=tokens,
            positions=positions, hidden=x,
        )  # fmt: skip

    def _stacked(self, name: str, part: ModelSpec) -> Params:
        """The parameters of layers alike. Their shapes are checked where each layer uses them:
        quantised ones have not the leaves of those that are initialised.
        """
        if self.is_initializing():
            return self.param(name, lambda key: _init_layers(part, key))
        return self.variables["params"][name]

    def _placed(self, x: Hidden, positions: Positions) -> Hidden:
        """`place_embeds` with this module's parameters."""
        s, params = self.spec, {}
        if s.embed_norm:
            norm = layers.Norm(s.norm, s.width)
            params["embed_norm"] = self.param("embed_norm", lambda key: norm.init(key, x)["params"])
        if isinstance(s.encoding, rope.Learnt):
            rows, init = s.encoding.offset + s.encoding.length, nn.initializers.normal(0.02)
            params["positions"] = self.param("positions", init, (rows, s.width))
        return place_embeds(s, params, x, positions)

    def _check_inputs(self, tokens, embeds, caches, bidirectional):
        """Refuses inputs that have no meaning together."""
        if (tokens is None) == (embeds is None):
            raise InputError(
                f"{'neither tokens nor' if tokens is None else 'both tokens and'} embeds are "
                f"given; give one of the two"
            )
        observing = [policy.name for policy in self.policies if policy.needs_hidden]
        if tokens is None and caches is not None and observing:
            raise InputError(
                f"{observing[0]} scores token ids, but embeds have none; give tokens, or use "
                f"another policy"
            )
        if self.spec.moe is not None:
            check_router(self.spec.moe, tokens=tokens is not None, caches=caches is not None)
        for policy in self.policies:
            layer_policies.check_sinks(policy, self.spec.sinks)
        if self.spec.sinks and (bidirectional or self.prefill is not attend.prefill):
            raise InputError(
                "heads with learnt sinks attend to earlier tokens, and on one device or along a "
                "context axis; give another model, or read it without bidirectional= and a mesh"
            )
        if not bidirectional:
            return
        causal = [policy.name for policy in self.policies if policy != FULL]
        if caches is not None or causal or self.context_axis is not None:
            what = "caches" if caches is not None else causal[0] if causal else "context_axis"
            raise InputError(
                f"bidirectional=True does not work with {what}: every token needs all tokens of "
                f"its text at once; read texts under Full, without caches and context_axis"
            )

    def attentions(
        self,
        length: int,
        positions: Positions,
        segments: Int[Array, "B T"] | None = None,
        caches: tuple[cache.Cache, ...] | None = None,
        bidirectional: bool = False,
    ) -> tuple[list[layer_scan.LayerAttention], Sequence[Array]]:
        """How each layer of a period attends, and the positions that its cache then holds."""
        options = {"context_axis": self.context_axis, "implementation": self.implementation}
        period = len(caches) if caches else period_of(self.spec, self.policies)
        policies = self.policies[:period]
        layers_ = list(zip(policies, score_configs(self.spec)[:period], strict=True))
        indices = [layer_scan.index_of(policies, place) for place in range(period)]
        if bidirectional:
            runs = {
                config: bidirectional_prefill(config, positions, segments=segments)
                for _, config in layers_
            }
            return [layer_scan.without_cache(runs[config]) for _, config in layers_], ()
        if caches is None:
            # Layers alike share their rotations.
            prefills = {
                (policy, config): self.prefill(
                    policy, config, positions, segments=segments, **options
                )
                for policy, config in layers_
            }
            attentions = [
                layer_scan.without_cache(prefills[layer], options)
                for layer, options in zip(layers_, indices, strict=True)
            ]
            return attentions, ()
        extends = [
            attend.extend(policy, config, layer.layout, layer.pos, positions, **options)
            for (policy, config), layer in zip(layers_, caches, strict=True)
        ]
        devices = 1 if self.context_axis is None else jax.lax.axis_size(self.context_axis)
        attentions = [
            layer_scan.with_cache(extend, options, layer, length, devices)
            for (extend, _), options, layer in zip(extends, indices, caches, strict=True)
        ]
        return attentions, [new_positions for _, new_positions in extends]

    def run_layers(
        self,
        params: Mapping[str, Params],
        x: Hidden,
        attentions: Sequence[layer_scan.LayerAttention],
        collections: Sequence[str] = (),
        tokens: Tokens | None = None,
    ) -> tuple[Hidden, list[layer_scan.KV], dict[str, Any]]:
        """Hidden states after the layers, their keys and values, and what `collections` got."""

        def run_layer(block, x, layer_params, attend_, kv, row) -> tuple[Hidden, Any, Any]:
            def attend_layer(q, k, v, **sinks):
                return attend_(q, k, v, kv, row, **sinks)

            variables = {"params": layer_params}
            if collections:
                (x, kv), sown = block.apply(variables, x, attend_layer, tokens, mutable=collections)
                return x, kv, sown
            return *block.apply(variables, x, attend_layer, tokens), {}

        if self.remat is not None:
            run_layer = jax.checkpoint(run_layer, policy=self.remat, static_argnums=(0, 3))
        stages = [
            (layers.Block(stage, self.constrain, parent=None), params[name])
            for name, stage in stages_of(self.spec).items()
        ]
        return layer_scan.scan_layers(run_layer, x, stages, attentions)


def observed(
    spec: ModelSpec,
    params: Params,
    policies: Sequence[LayerPolicy],
    caches: Sequence[cache.Cache],
    *,
    tokens: Any,  # Tokens, where a policy observes
    positions: Positions,
    hidden: Hidden,
) -> tuple[cache.Cache, ...]:
    """The caches, updated by the policies that observe hidden states."""
    head, updated = partial(heads.lm, spec, params), list(caches)
    layers_of: dict[LayerPolicy, list[int]] = {}
    for layer, policy in enumerate(policies[: len(caches)]):  # caches may be of one period
        if policy.needs_hidden:
            layers_of.setdefault(policy, []).append(layer)
    for policy, indices in layers_of.items():
        observing = policy.observe_hidden(
            [caches[layer] for layer in indices],
            tokens=tokens, positions=positions, hidden=hidden, logits=head,
        )  # fmt: skip
        for layer, new in zip(indices, observing, strict=True):
            updated[layer] = new
    return tuple(updated)


def embed_tokens(
    spec: ModelSpec, params: Params, tokens: Tokens, *, dtype: Any = jnp.float32
) -> Hidden:
    """What the layers read of tokens: rows of the embedding, times the spec's embed_scale."""
    rows = jax.tree.map(lambda leaf: leaf[tokens], params["embed"])
    return dequantize(rows, dtype) * jnp.asarray(spec.embed_scale, dtype)


def place_embeds(spec: ModelSpec, params: Params, x: Hidden, positions: Positions) -> Hidden:
    """Embeddings as the first layer reads them: normalised, and with their learnt positions."""
    if spec.embed_norm:
        norm: Any = layers.Norm(spec.norm, spec.width).apply
        x = norm({"params": params["embed_norm"]}, x)
    if isinstance(spec.encoding, rope.Learnt):
        offset, length = spec.encoding.offset, spec.encoding.length
        if x.shape[1] > length:
            raise InputError(
                f"{x.shape[1]} tokens, but the model has learnt {length} positions; "
                f"read at most {length}"
            )
        x = x + params["positions"][jnp.maximum(positions, 0) + offset].astype(x.dtype)
    return x


def stages_of(spec: ModelSpec) -> dict[str, ModelSpec]:
    """Name of the stacked parameters -> spec of those layers, for each run of layers alike."""
    if spec.moe is None or not spec.moe.dense_layers:
        return {"layers": spec}
    first = spec.moe.dense_layers
    dense = dataclasses.replace(
        spec, moe=None, num_layers=first, windows=spec.windows[:first],
        layer_encodings=spec.layer_encodings[:first],
    )  # fmt: skip
    mixed = dataclasses.replace(
        spec, moe=dataclasses.replace(spec.moe, dense_layers=0),
        num_layers=spec.num_layers - first, windows=spec.windows[first:],
        layer_encodings=spec.layer_encodings[first:],
    )  # fmt: skip
    return {"first_layers": dense, "layers": mixed}


def score_configs(spec: ModelSpec) -> tuple[ScoreConfig, ...]:
    """[L] how each layer scores a query and a key."""
    return tuple(
        ScoreConfig(encoding, spec.query_scale, spec.attention_soft_cap, spec.query_gain)
        for encoding in spec.encodings
    )


def period_of(spec: ModelSpec, by_layer: Sequence[LayerPolicy]) -> int:
    """The shortest p that divides the layers and after which policies and encodings repeat."""
    pattern, count = list(zip(by_layer, spec.encodings, strict=True)), spec.num_layers
    return next(
        p
        for p in range(1, count + 1)
        if count % p == 0 and all(pattern[i] == pattern[i % p] for i in range(count))
    )


def init_caches(
    spec: ModelSpec,
    by_layer: Sequence[LayerPolicy],
    *,
    batch: int,
    capacity: int,
    dtype: Any,
    period: int | None = None,
) -> tuple[cache.Cache, ...]:
    """Empty caches for `Decoder`, one for each layer of a period (None: the shortest); `capacity`
    (tokens) is what unbounded policies can hold.
    """
    period = period_of(spec, by_layer) if period is None else period
    if spec.moe is not None:
        check_router(spec.moe, tokens=True, caches=True)
    shape = cache.CacheShape(
        batch, capacity, spec.num_heads, spec.num_kv_heads, spec.head_dim, dtype, spec.width
    )
    layers = spec.num_layers // period
    return tuple(cache.create(policy, shape, layers=layers) for policy in by_layer[:period])


def check_router(mixture: MoESpec, *, tokens: bool, caches: bool) -> None:
    """Refuses what a router cannot do: decode while it looks at later tokens, or read ids of
    embeddings.
    """
    if caches and not mixture.router.causal:
        raise InputError(
            "where experts choose, they compare a token with later ones, so such a model cannot "
            "read in chunks or write; give its MoESpec another router, such as TokenChoice()"
        )
    if not tokens and mixture.router.reads_tokens:
        raise InputError(
            "hash routing goes by token ids, and embeddings have none; give tokens, or a model "
            "with another router"
        )


def prepare_decoding(
    spec: ModelSpec,
    by_layer: Sequence[LayerPolicy],
    caches: tuple[cache.Cache, ...],
    *,
    length: int,
    room: int,
) -> tuple[cache.Cache, ...]:
    """Caches at the end of a prompt, by `attend.prepare_decoding`; what that rotates needs
    `Cache.for_decoding` next.
    """
    return tuple(
        attend.prepare_decoding(policy, config, layer, length=length, room=room)
        for policy, config, layer in zip(
            by_layer, score_configs(spec), caches, strict=False  # caches: of one period
        )
    )  # fmt: skip


def init(spec: ModelSpec, *, key: jax.Array) -> Params:
    """Fresh float32 parameters."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    by_layer = (FULL,) * spec.num_layers
    return Decoder(spec, by_layer).init(key, tokens, positions=tokens)["params"]


def _no_attention(q: Array, k: Array, v: Array, **sinks: Array) -> tuple[Array, None]:
    del k, v, sinks
    return q, None


def _init_layers(spec: ModelSpec, key: jax.Array) -> Params:
    x, tokens = jnp.zeros((1, 1, spec.width)), jnp.zeros((1, 1), jnp.int32)
    keys = jax.random.split(key, spec.num_layers)
    return jax.vmap(lambda k: layers.Block(spec).init(k, x, _no_attention, tokens)["params"])(keys)
