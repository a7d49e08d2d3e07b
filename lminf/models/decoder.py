"""A decoder-only transformer: tokens to hidden states. Heads are functions of hidden states.

Layers are one Block whose parameters are stacked on axis 0, scanned over. Which tokens a layer
sees is not the model's business: every layer is handed the function that attends. A pattern of
different policies (local and global layers in turn) makes the scan's step one period long.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf.attention import attend, cache
from lminf.attention.policy import FULL, LayerPolicy
from lminf.attention.scores import ScoreConfig
from lminf.models import moe
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

# Over how many axes a product with a layer's matrix sums; they stand first, after the layers'.
SUMMED = {"wq": 1, "wk": 1, "wv": 1, "wo": 2, "w_gate": 1, "w_up": 1, "w_down": 1}


def product(
    x: Float[Array, "B T *I"], w: Float[Array, "..."], *, contract: int = 1
) -> Float[Array, "B T *O"]:
    """x contracted with w over w's first `contract` axes: [B, T, *O].

    As one product of two matrices: with batch and time as separate axes, XLA's CPU backward of an
    MLP takes three times as long.
    """
    inner = math.prod(w.shape[:contract])
    out = x.reshape(-1, inner) @ w.reshape(inner, -1)
    return out.reshape(*x.shape[:2], *w.shape[contract:])


# Its backward computes again what lies between arguments and result. All that the scan over layers
# keeps is zeroed, written and read: of a gated MLP two arrays of [B, T, F] instead of six.
cheap = partial(jax.checkpoint, prevent_cse=False)


def along(vector: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`vector` with leading axes of length 1, to be added to or multiplied with x."""
    return jax.lax.expand_dims(vector, range(x.ndim - vector.ndim))


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
            return y * along(scale.astype(jnp.float32) + offset, y)

        y = cheap(scaled)(x, scale)
        if self.spec.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.width,))
            y = y + along(bias.astype(jnp.float32), y)
        return y.astype(x.dtype)


def unplaced(x: Float[Array, "..."], *axes: str | None) -> Float[Array, "..."]:
    """x as it is. On a mesh, lminf.parallel says instead where an array with these axes lies."""
    del axes
    return x


class Attention(nn.Module):
    spec: ModelSpec
    place: Any = unplaced

    @nn.compact
    def __call__(self, x: Hidden, attend) -> tuple[Hidden, Any]:
        """Output, and what else `attend(q, k, v)` returned beside its first result."""
        s = self.spec
        into = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        back = nn.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)
        wq = self.param("wq", into, (s.width, s.num_heads, s.head_dim))
        wk = self.param("wk", into, (s.width, s.num_kv_heads, s.head_dim))
        wv = self.param("wv", into, (s.width, s.num_kv_heads, s.head_dim))
        wo = self.param("wo", back, (s.num_heads, s.head_dim, s.width))
        q, k, v = (product(x, w.astype(x.dtype)) for w in (wq, wk, wv))
        if s.qkv_bias:
            zeros = nn.initializers.zeros
            q = q + along(self.param("bq", zeros, (s.num_heads, s.head_dim)).astype(x.dtype), q)
            k = k + along(self.param("bk", zeros, (s.num_kv_heads, s.head_dim)).astype(x.dtype), k)
            v = v + along(self.param("bv", zeros, (s.num_kv_heads, s.head_dim)).astype(x.dtype), v)
        if s.qkv_clip is not None:
            q, k, v = (jnp.clip(y, -s.qkv_clip, s.qkv_clip) for y in (q, k, v))
        if s.qk_norm:
            q = Norm(s.norm, s.head_dim, name="q_norm")(q)
            k = Norm(s.norm, s.head_dim, name="k_norm")(k)
        q = self.place(q, "batch", "length", "heads", None)
        k, v = (self.place(y, "batch", "length", "kv_heads", None) for y in (k, v))
        for name, value in (("q", q), ("k", k), ("v", v)):
            self.sow("intermediates", name, value)
        out, *rest = attend(q, k, v)
        out = product(out, wo.astype(x.dtype), contract=2)
        if s.out_bias:
            bias = self.param("bo", nn.initializers.zeros, (s.width,)).astype(x.dtype)
            out = out + along(bias, out)
        return out, tuple(rest)


class MLP(nn.Module):
    spec: MLPSpec
    width: int
    place: Any = unplaced

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        act, init = ACTIVATIONS[self.spec.activation], nn.initializers.lecun_normal()
        D, F = self.width, self.spec.hidden_dim

        def weight(name, shape):
            return self.param(name, init, shape).astype(x.dtype)

        def bias(name, size):
            if not self.spec.bias:
                return jnp.zeros((), x.dtype)
            return along(self.param(name, nn.initializers.zeros, (size,)).astype(x.dtype), x)

        up = product(x, weight("w_up", (D, F))) + bias("b_up", F)
        if self.spec.gated:
            gate = product(x, weight("w_gate", (D, F))) + bias("b_gate", F)
            up = cheap(lambda gate, up: act(gate) * up)(gate, up)
        else:
            up = act(up)
        up = self.place(up, "batch", "length", "mlp")
        return product(up, weight("w_down", (F, D))) + bias("b_down", D)


class Block(nn.Module):
    """One layer. `attend(q, k, v)` returns the attention output first."""

    spec: ModelSpec
    place: Any = unplaced

    @nn.compact
    def __call__(self, x: Hidden, attend) -> tuple[Hidden, Any]:
        s = self.spec
        attention = Attention(s, self.place, name="attention")
        mlp = self.mlp()

        def norm(name):
            read = Norm(s.norm, s.width, name=name)
            return lambda y: self.place(read(y), "batch", "length", None)

        def post(name, y):
            if not s.post_norms:
                return y
            return Norm(s.norm, s.width, name=name)(residual(y))

        def residual(y):
            return self.place(y, "batch", "residual_length", None)

        normed = norm("attention_norm")(x)
        seen, rest = attention(normed, attend)
        seen = post("attention_post_norm", seen)
        if s.residual == "sequential":
            x = residual(x + seen)
            x = residual(x + post("mlp_post_norm", mlp(norm("mlp_norm")(x))))
        else:
            shared = s.residual == "parallel_shared"
            thought = mlp(normed if shared else norm("mlp_norm")(x))
            x = residual(x + seen + post("mlp_post_norm", thought))
        self.sow("intermediates", "hidden", x)
        return x, rest

    def mlp(self):
        """The MLP, or the experts in its place."""
        s = self.spec
        if s.moe is None:
            return MLP(s.mlp, s.width, self.place, name="mlp")
        act = ACTIVATIONS[s.mlp.activation]
        experts = moe.Experts(s.moe, s.width, act, s.mlp.gated, self.place, name="moe")
        if not s.moe.shared_dim:
            return experts
        wide = dataclasses.replace(s.mlp, hidden_dim=s.moe.shared_dim)
        shared = MLP(wide, s.width, self.place, name="shared")
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
    place: Any = unplaced  # where an array lies: place(x, *logical axes)

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
        x = self.place(embed, "vocab", None)[tokens].astype(self.dtype) * jnp.asarray(
            s.embed_scale, self.dtype
        )
        x = self.place(x, "batch", "residual_length", None)
        if not s.tied:
            self.param("head", nn.initializers.normal(s.width**-0.5), (s.vocab_size, s.width))
        if s.head_bias:
            self.param("head_bias", nn.initializers.zeros, (s.vocab_size,))
        watched = [
            name
            for name in ("intermediates", moe.ROUTING)
            if self.is_mutable_collection(name) and not self.is_initializing()
        ]
        x, caches, sown = self._run_layers(layers, x, positions, segments, caches, watched)
        for name, collected in sown.items():
            self.put_variable(name, "layers", collected)
        x = self.place(Norm(s.norm, s.width, name="final_norm")(x), "batch", "length", None)
        return x, None if caches is None else self._observed(caches, tokens, positions, x)

    def _observed(self, caches, tokens, positions, hidden):
        """The caches, where their policies go by what the model made of the tokens."""
        expected = partial(logits, self.spec, self.variables["params"])
        return tuple(
            policy.observe_hidden(
                stored, tokens=tokens, positions=positions, hidden=hidden, logits=expected
            )
            if policy.needs_hidden
            else stored
            for policy, stored in zip(self.policies, caches, strict=False)  # caches: of one period
        )

    def _run_layers(self, layers, x, positions, segments, caches, watched):
        s, period = self.spec, period_of(self.policies)
        config = score_config(s)
        if caches is None:
            attends = [
                self.prefill(
                    policy, config, positions, segments=segments,
                    context_axis=self.context_axis, implementation=self.implementation,
                )
                for policy in self.policies[:period]
            ]  # fmt: skip
            pos = ()
        else:
            steps = [
                attend.extend(
                    policy, config, stored.layout, stored.pos, positions,
                    context_axis=self.context_axis, implementation=self.implementation,
                )
                for policy, stored in zip(self.policies[:period], caches, strict=True)
            ]  # fmt: skip
            attends, pos = [step for step, _ in steps], [pos for _, pos in steps]

        def one_layer(x, params, attend_, stored, index, block) -> tuple[Hidden, Any, Any]:
            def attended(q, k, v):
                return (attend_(q, k, v),) if stored is None else attend_(q, k, v, stored, index)

            if watched:
                (x, rest), sown = block.apply({"params": params}, x, attended, mutable=watched)
                return x, rest, sown
            x, rest = block.apply({"params": params}, x, attended)
            return x, rest, {}

        if self.remat is not None:
            one_layer = jax.checkpoint(one_layer, policy=self.remat, static_argnums=(2, 5))

        def weights_of(params, index, i, stacked):
            if params is not None:  # sliced by the scan, which gradients need
                return jax.tree.map(lambda leaf: leaf[i], params)
            # Reshaped weights would be copied whole on every call: 425 MB a token in SmolLM2-135M.
            return jax.tree.map(lambda w: w[index * period + i], stacked)

        # One token is written into all layers' cache in place. A chunk that overwrites what it also
        # reads would make XLA copy all layers in each of them: there the scan cuts each layer out.
        held = [None if c is None else c.kv for c in caches or [None] * period]
        cut = [x.shape[1] > 1 and not isinstance(c.layout, cache.LinearCache) for c in caches or ()]
        cut = cut or [False] * period
        whole = [None if now else kv for kv, now in zip(held, cut, strict=True)]
        layer_by_layer = [kv if now else None for kv, now in zip(held, cut, strict=True)]

        def one_period(block, stacked, begin, carry, scanned):
            x, kept = carry
            params, index, layer = scanned
            kept, layer, sown = list(kept), list(layer), []
            for i, attend_ in enumerate(attends):
                stored, at = kept[i], index
                if cut[i]:
                    stored, at = jax.tree.map(lambda c: c[None], layer[i]), jnp.int32(0)
                own = weights_of(params, index - begin, i, stacked)
                x, rest, seen = one_layer(x, own, attend_, stored, at, block)
                sown.append(seen)
                if cut[i]:
                    layer[i] = jax.tree.map(lambda c: c[0], rest[0])
                elif stored is not None:
                    kept[i] = rest[0]
            return (x, kept), (layer, jax.tree.map(lambda *leaves: jnp.stack(leaves), *sown))

        begin, cut_out, seen_in = 0, [], []
        for name, part in stages_of(s).items():  # two scans where the first layers are dense
            rounds, rest = divmod(part.num_layers, period)
            if rest:
                raise ValueError(f"{part.num_layers} {name} are no multiple of {period} policies")
            stacked = layers[name]
            by_period = None
            if caches is None:
                by_period = jax.tree.map(lambda w: w.reshape(-1, period, *w.shape[1:]), stacked)
            layer = jax.tree.map(itemgetter(slice(begin, begin + rounds)), layer_by_layer)
            (x, whole), (layer, sown) = jax.lax.scan(
                partial(one_period, Block(part, self.place), stacked, begin),
                (x, whole),
                (by_period, jnp.arange(begin, begin + rounds, dtype=jnp.int32), layer),
            )
            cut_out.append(layer)
            seen_in.append(jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), sown))
            begin += rounds
        layer_by_layer = joined(cut_out)
        sown = {
            name: joined([seen[name] for seen in seen_in if name in seen]) for name in seen_in[-1]
        }
        if caches is not None:
            stored = (one or other for one, other in zip(whole, layer_by_layer, strict=True))
            caches = tuple(
                old.updated(kv, p) for kv, p, old in zip(stored, pos, caches, strict=True)
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


def joined(parts: Sequence[Any]) -> Any:
    """Trees of one structure, their arrays one after another along axis 0."""
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


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
    """`attend.prepare_decoding` of every layer's cache; `for_decoding` follows where it rotated."""
    config = score_config(spec)
    return tuple(
        attend.prepare_decoding(policy, config, stored, length=length, room=room)
        for policy, stored in zip(by_layer, caches, strict=False)  # caches: of one period
    )


def head_of(params: Params) -> Float[Array, "V D"]:
    """The classifier: the embedding where the model ties them."""
    return params.get("head", params["embed"])


def logits(spec: ModelSpec, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Next-token logits, float32."""
    head = head_of(params).astype(hidden.dtype)
    out = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
    if spec.head_bias:
        out = out + along(params["head_bias"].astype(jnp.float32), out)
    if spec.final_soft_cap is not None:
        out = spec.final_soft_cap * jnp.tanh(out / spec.final_soft_cap)
    return out


def init(spec: ModelSpec, *, key: jax.Array) -> Params:
    """Fresh float32 parameters."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    by_layer = (FULL,) * spec.num_layers
    return Decoder(spec, by_layer).init(key, tokens, positions=tokens)["params"]


def _init_layers(spec: ModelSpec, key):
    x = jnp.zeros((1, 1, spec.width))
    each = jax.random.split(key, spec.num_layers)
    return jax.vmap(lambda k: Block(spec).init(k, x, lambda q, k, v: (q,))["params"])(each)
