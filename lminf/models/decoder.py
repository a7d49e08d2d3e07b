"""A decoder-only transformer: tokens to hidden states. Heads are functions of hidden states.

Layers are one Block whose parameters are stacked on axis 0, scanned over. Which tokens a layer
sees is not the model's business: every layer is handed the function that attends. A pattern of
different policies (local and global layers in turn) makes the scan's step one period long.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf.attention import attend, cache
from lminf.attention.policy import FULL, LayerPolicy
from lminf.attention.scores import ScoreConfig
from lminf.models import heads, layer_scan, moe
from lminf.models.spec import MLPSpec, ModelSpec, NormSpec
from lminf.types import Hidden, Params, Positions, Tokens

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
# Parameter path -> logical axes; lminf.parallel turns them into shardings.
LAYERS = "(layers|first_layers)"
AXES = {
    "embed": ("vocab", "embed"),
    "head": ("vocab", "embed"),
    "head_bias": ("vocab",),
    "final_norm/(scale|bias)": ("embed",),
    f"{LAYERS}/(attention|attention_post|mlp|mlp_post)_norm/(scale|bias)": ("layers", "embed"),
    f"{LAYERS}/attention/wq": ("layers", "embed", "heads", "head_dim"),
    f"{LAYERS}/attention/w[kv]": ("layers", "embed", "kv_heads", "head_dim"),
    f"{LAYERS}/attention/bq": ("layers", "heads", "head_dim"),
    f"{LAYERS}/attention/b[kv]": ("layers", "kv_heads", "head_dim"),
    f"{LAYERS}/attention/wo": ("layers", "heads", "head_dim", "embed"),
    f"{LAYERS}/attention/bo": ("layers", "embed"),
    f"{LAYERS}/attention/[qk]_norm/(scale|bias)": ("layers", "head_dim"),
    f"{LAYERS}/(mlp|shared)/w_(gate|up)": ("layers", "embed", "mlp"),
    f"{LAYERS}/mlp/b_(gate|up)": ("layers", "mlp"),
    f"{LAYERS}/(mlp|shared)/w_down": ("layers", "mlp", "embed"),
    f"{LAYERS}/mlp/b_down": ("layers", "embed"),
    "layers/moe/router": ("layers", "embed", "routes"),
    "layers/moe/(gate|up)": ("layers", "expert", "embed", "mlp"),
    "layers/moe/down": ("layers", "expert", "mlp", "embed"),
}

# Of a layer's matrix, how many axes are contracted; they come first, after the axis of layers.
CONTRACTED_AXES = {"wq": 1, "wk": 1, "wv": 1, "wo": 2, "w_gate": 1, "w_up": 1, "w_down": 1}


def matmul(
    x: Float[Array, "B T *I"], w: Float[Array, "..."], *, contract: int = 1
) -> Float[Array, "B T *O"]:
    """x contracted with w over w's first `contract` axes: [B, T, *O].

    As one product of two matrices: with batch and time as separate axes, XLA's CPU backward of an
    MLP takes three times as long.
    """
    inner = math.prod(w.shape[:contract])
    out = x.reshape(-1, inner) @ w.reshape(inner, -1)
    return out.reshape(*x.shape[:2], *w.shape[contract:])


# The backward recomputes what lies between arguments and result. Whatever the scan over layers
# saves is zeroed, written and read: of a gated MLP two arrays of [B, T, F] instead of six.
recompute = partial(jax.checkpoint, prevent_cse=False)


def broadcast_like(vector: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`vector` with leading axes of length 1, to be added to or multiplied with x."""
    return jax.lax.expand_dims(vector, range(x.ndim - vector.ndim))


def add_bias(module: nn.Module, name: str, x: Float[Array, "B T *O"]) -> Float[Array, "B T *O"]:
    """x plus the module's parameter `name` [*O], which is initialised to zero."""
    bias = module.param(name, nn.initializers.zeros, x.shape[2:])
    return x + broadcast_like(bias.astype(x.dtype), x)


class Norm(nn.Module):
    """RMS or layer normalisation over the last axis, statistics in float32."""

    spec: NormSpec
    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        offset = self.spec.scale_offset
        scale = self.param("scale", nn.initializers.constant(1.0 - offset), (self.width,))

        def scaled(x, scale):
            y = x.astype(jnp.float32)
            if self.spec.kind == "layer":
                y = y - y.mean(-1, keepdims=True)
            y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.spec.epsilon)
            return y * broadcast_like(scale.astype(jnp.float32) + offset, y)

        y = recompute(scaled)(x, scale)
        if self.spec.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.width,))
            y = y + broadcast_like(bias.astype(jnp.float32), y)
        return y.astype(x.dtype)


def unconstrained(x: Float[Array, "..."], *axes: str | None) -> Float[Array, "..."]:
    """x. On a mesh, lminf.parallel.partition.Constrain replaces this and shards x by its axes."""
    del axes
    return x


class Attention(nn.Module):
    spec: ModelSpec
    constrain: Any = unconstrained

    @nn.compact
    def __call__(self, x: Hidden, attend) -> tuple[Hidden, Any]:
        """The output, and the keys and values that `attend(q, k, v)` returns beside its own."""
        s = self.spec
        into = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        back = nn.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)
        wq = self.param("wq", into, (s.width, s.num_heads, s.head_dim))
        wk = self.param("wk", into, (s.width, s.num_kv_heads, s.head_dim))
        wv = self.param("wv", into, (s.width, s.num_kv_heads, s.head_dim))
        wo = self.param("wo", back, (s.num_heads, s.head_dim, s.width))
        q, k, v = (matmul(x, w.astype(x.dtype)) for w in (wq, wk, wv))
        if s.qkv_bias:
            q, k, v = add_bias(self, "bq", q), add_bias(self, "bk", k), add_bias(self, "bv", v)
        if s.qkv_clip is not None:
            q, k, v = (jnp.clip(y, -s.qkv_clip, s.qkv_clip) for y in (q, k, v))
        if s.qk_norm:
            q = Norm(s.norm, s.head_dim, name="q_norm")(q)
            k = Norm(s.norm, s.head_dim, name="k_norm")(k)
        q = self.constrain(q, "batch", "length", "heads", None)
        k, v = (self.constrain(y, "batch", "length", "kv_heads", None) for y in (k, v))
        for name, value in (("q", q), ("k", k), ("v", v)):
            self.sow("intermediates", name, value)
        out, kv = attend(q, k, v)
        out = matmul(out, wo.astype(x.dtype), contract=2)
        if s.out_bias:
            out = add_bias(self, "bo", out)
        return out, kv


class MLP(nn.Module):
    spec: MLPSpec
    width: int
    constrain: Any = unconstrained

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        act, init = ACTIVATIONS[self.spec.activation], nn.initializers.lecun_normal()
        D, F = self.width, self.spec.hidden_dim

        def project(x, name, size):
            w = self.param(f"w_{name}", init, (x.shape[-1], size)).astype(x.dtype)
            y = matmul(x, w)
            return add_bias(self, f"b_{name}", y) if self.spec.bias else y

        up = project(x, "up", F)
        if self.spec.gated:
            gate = project(x, "gate", F)
            up = recompute(lambda gate, up: act(gate) * up)(gate, up)
        else:
            up = act(up)
        up = self.constrain(up, "batch", "length", "mlp")
        return project(up, "down", D)


class Block(nn.Module):
    """One layer. `attend(q, k, v)` returns the attention output, and keys and values or None."""

    spec: ModelSpec
    constrain: Any = unconstrained

    @nn.compact
    def __call__(self, x: Hidden, attend) -> tuple[Hidden, Any]:
        s = self.spec
        attention = Attention(s, self.constrain, name="attention")
        mlp = self.mlp()

        def norm(name):
            module = Norm(s.norm, s.width, name=name)
            return lambda y: self.constrain(module(y), "batch", "length", None)

        def post(name, y):
            if not s.post_norms:
                return y
            return Norm(s.norm, s.width, name=name)(residual(y))

        def residual(y):
            return self.constrain(y, "batch", "residual_length", None)

        normed = norm("attention_norm")(x)
        attn_out, kv = attention(normed, attend)
        attn_out = post("attention_post_norm", attn_out)
        if s.residual == "sequential":
            x = residual(x + attn_out)
            x = residual(x + post("mlp_post_norm", mlp(norm("mlp_norm")(x))))
        else:
            shared = s.residual == "parallel_shared"
            mlp_out = mlp(normed if shared else norm("mlp_norm")(x))
            x = residual(x + attn_out + post("mlp_post_norm", mlp_out))
        self.sow("intermediates", "hidden", x)
        return x, kv

    def mlp(self):
        """The MLP, or the experts in its place."""
        s = self.spec
        if s.moe is None:
            return MLP(s.mlp, s.width, self.constrain, name="mlp")
        act = ACTIVATIONS[s.mlp.activation]
        experts = moe.Experts(s.moe, s.width, act, s.mlp.gated, self.constrain, name="moe")
        if not s.moe.shared_dim:
            return experts
        wide = dataclasses.replace(s.mlp, hidden_dim=s.moe.shared_dim)
        shared = MLP(wide, s.width, self.constrain, name="shared")
        return lambda x: experts(x) + shared(x)


class Decoder(nn.Module):
    """Tokens to final hidden states [B, T, D], after the last norm."""

    spec: ModelSpec
    policies: tuple[LayerPolicy, ...]  # [L]
    dtype: Any = jnp.float32  # of the computation; parameters are cast to it where they are used
    remat: Any = None  # a jax.checkpoint policy; None keeps every activation
    implementation: str | None = None  # of kernels.lambda_attention; None chooses
    # Inside shard_map: the mesh axis that tokens of a row are spread over. Caches are not: every
    # device holds all of them.
    context_axis: str | None = None
    prefill: Any = attend.prefill  # how a text attends over itself
    constrain: Any = unconstrained  # an array's sharding: constrain(x, *logical axes)

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        *,
        positions: Positions,
        segments: Int[Array, "B T"] | None = None,
        caches: tuple[cache.Cache, ...] | None = None,
    ) -> tuple[Hidden, tuple[cache.Cache, ...] | None]:
        """Hidden states, and the caches (one for each layer of a period) with these tokens in them.

        Positions rise by one along each row (or segment); a row below 0 is padding. With
        mutable=["intermediates"], `layers` holds what every layer computed: attention/q, k, v
        [L, B, T, heads, H] before rotation, and hidden [L, B, T, D] after it, each in a 1-tuple.
        With mutable=["routing"], what the routers of a mixture did: moe/balance, z, dropped [L].
        """
        s = self.spec
        embed = self.param("embed", nn.initializers.normal(s.width**-0.5), (s.vocab_size, s.width))
        layers = {
            name: self.param(name, lambda key, part=part: _init_layers(part, key))
            for name, part in stages_of(s).items()
        }
        # Sliced by width it is gathered first: looked up in slices, every row would cross twice.
        x = self.constrain(embed, "vocab", None)[tokens].astype(self.dtype) * jnp.asarray(
            s.embed_scale, self.dtype
        )
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
        x, caches, sown = self._run_layers(layers, x, positions, segments, caches, collections)
        for name, collected in sown.items():
            self.put_variable(name, "layers", collected)
        x = self.constrain(Norm(s.norm, s.width, name="final_norm")(x), "batch", "length", None)
        return x, None if caches is None else self._observed(caches, tokens, positions, x)

    def _observed(self, caches, tokens, positions, hidden):
        """The caches, where their policies go by what the model made of the tokens."""
        head = partial(heads.lm, self.spec, self.variables["params"])
        return tuple(
            policy.observe_hidden(
                layer, tokens=tokens, positions=positions, hidden=hidden, logits=head
            )
            if policy.needs_hidden
            else layer
            for policy, layer in zip(self.policies, caches, strict=False)  # caches: of one period
        )

    def _attentions(self, tokens, positions, segments, caches):
        """How each layer of a period attends, and the positions that its cache then holds."""
        config, options = score_config(self.spec), {
            "context_axis": self.context_axis, "implementation": self.implementation,
        }  # fmt: skip
        policies = self.policies[: period_of(self.policies)]
        if caches is None:
            prefills = [
                self.prefill(policy, config, positions, segments=segments, **options)
                for policy in policies
            ]
            return [layer_scan.without_cache(prefill) for prefill in prefills], ()
        extends = [
            attend.extend(policy, config, layer.layout, layer.pos, positions, **options)
            for policy, layer in zip(policies, caches, strict=True)
        ]
        attentions = [
            layer_scan.with_cache(extend, layer, tokens)
            for (extend, _), layer in zip(extends, caches, strict=True)
        ]
        return attentions, [new_positions for _, new_positions in extends]

    def _run_layers(self, params, x, positions, segments, caches, collections):
        """The hidden states after the layers, the caches and what was sown in `collections`."""
        attentions, new_positions = self._attentions(x.shape[1], positions, segments, caches)

        def run_layer(block, x, layer_params, attend_, kv, row) -> tuple[Hidden, Any, Any]:
            def attend_layer(q, k, v):
                return attend_(q, k, v, kv, row)

            variables = {"params": layer_params}
            if collections:
                (x, kv), sown = block.apply(variables, x, attend_layer, mutable=collections)
                return x, kv, sown
            return *block.apply(variables, x, attend_layer), {}

        if self.remat is not None:
            run_layer = jax.checkpoint(run_layer, policy=self.remat, static_argnums=(0, 3))
        stages = [
            (Block(stage, self.constrain), params[name])
            for name, stage in stages_of(self.spec).items()
        ]
        x, kv, sown = layer_scan.scan_layers(run_layer, x, stages, attentions)
        if caches is not None:
            caches = tuple(
                layer.updated(*new) for layer, *new in zip(caches, kv, new_positions, strict=True)
            )
        return x, caches, sown


def stages_of(spec: ModelSpec) -> dict[str, ModelSpec]:
    """The parameters of layers that are alike, and the spec of those layers alone, in order."""
    if spec.moe is None or not spec.moe.dense_layers:
        return {"layers": spec}
    first = spec.moe.dense_layers
    dense = dataclasses.replace(spec, moe=None, num_layers=first, windows=spec.windows[:first])
    mixed = dataclasses.replace(
        spec, moe=dataclasses.replace(spec.moe, dense_layers=0),
        num_layers=spec.num_layers - first, windows=spec.windows[first:],
    )  # fmt: skip
    return {"first_layers": dense, "layers": mixed}


def score_config(spec: ModelSpec) -> ScoreConfig:
    """How the model scores a query and a key."""
    return ScoreConfig(spec.encoding, spec.query_scale, spec.attention_soft_cap)


def period_of(pattern: Sequence[LayerPolicy]) -> int:
    """The shortest p that divides the layers and after which the policies repeat."""
    layers = len(pattern)
    return next(
        p
        for p in range(1, layers + 1)
        if layers % p == 0 and all(pattern[i] == pattern[i % p] for i in range(layers))
    )


def init_caches(
    spec: ModelSpec, by_layer: Sequence[LayerPolicy], *, batch: int, capacity: int, dtype
) -> tuple[cache.Cache, ...]:
    """Empty caches for `Decoder`; `capacity` (tokens) is what unbounded policies can hold."""
    period = period_of(by_layer)

    def empty(policy):
        layout = cache.layout_for(policy, capacity)
        shape = cache.CacheShape(
            batch, layout.slots, spec.num_heads, spec.num_kv_heads, spec.head_dim, dtype,
            spec.width,
        )  # fmt: skip
        return cache.empty(
            layout,
            layers=spec.num_layers // period,
            batch=batch,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=dtype,
            state=policy.init_state(shape),
        )

    return tuple(empty(policy) for policy in by_layer[:period])


def prepare_decoding(
    spec: ModelSpec,
    by_layer: Sequence[LayerPolicy],
    caches: tuple[cache.Cache, ...],
    *,
    length: int,
    room: int,
) -> tuple[cache.Cache, ...]:
    """Caches at the end of a prompt, by `attend.after_prompt`; what that rotates needs
    `Cache.for_decoding` next.
    """
    config = score_config(spec)
    return tuple(
        attend.after_prompt(policy, config, layer, length=length, room=room)
        for policy, layer in zip(by_layer, caches, strict=False)  # caches: of one period
    )


def init(spec: ModelSpec, *, key: jax.Array) -> Params:
    """Fresh float32 parameters."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    by_layer = (FULL,) * spec.num_layers
    return Decoder(spec, by_layer).init(key, tokens, positions=tokens)["params"]


def _init_layers(spec: ModelSpec, key: jax.Array) -> Params:
    x = jnp.zeros((1, 1, spec.width))
    keys = jax.random.split(key, spec.num_layers)
    return jax.vmap(lambda k: Block(spec).init(k, x, lambda q, k, v: (q, None))["params"])(keys)
