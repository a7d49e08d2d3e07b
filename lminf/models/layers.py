"""The layers of a decoder: normalisation, attention's projections, the MLP, and a block of them.

Which tokens a layer sees is not decided here: a block is given the function that attends.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8, Shaped

from lminf.models import moe
from lminf.models.quantization import QuantizedWeights, Weights
from lminf.models.spec import MLPSpec, ModelSpec, NormSpec
from lminf.types import Hidden, Tokens

# (q, k, v) -> out, kv; sinks= where the spec has them
Attend: TypeAlias = Callable[..., tuple[Array, Any]]
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def matmul(x: Float[Array, "B T *I"], w: Weights, *, contract: int = 1) -> Float[Array, "B T *O"]:
    """x contracted with w over w's first `contract` axes: [B, T, *O].

    As one product of two matrices: with batch and time as separate axes, XLA's CPU backward of an
    MLP takes three times as long.
    """
    outputs = w.shape[contract:]
    w = jax.tree.map(lambda leaf: leaf.reshape(-1, *outputs), w)
    out = product(x.reshape(-1, w.shape[0]), w, dtype=x.dtype)
    return out.reshape(*x.shape[:2], *outputs)


def product(
    x: Float[Array, "R I"], w: Weights, *, dtype: Any, transposed: bool = False
) -> Float[Array, "R O"]:
    """x w as `dtype`, of w [I, *O], or [O, I] where it is transposed; *O becomes one axis."""
    if isinstance(w, QuantizedWeights):
        out = _product(x, w.qvalue, jnp.float32, transposed)
        return (out * w.scale.reshape(1, -1)).astype(dtype)
    return _product(x, w.astype(x.dtype), dtype, transposed)


def _product(x: Float[Array, "R I"], w: Array, dtype: Any, transposed: bool) -> Float[Array, "R O"]:
    """The product with the numbers of w, floating-point or int8.

    XLA's CPU backend multiplies bfloat16 fast where the result is float32 and has two rows: 512
    rows of 576 by [576, 1536] take 4.8 ms, 24 with a bfloat16 result; one row by [576, 49152] takes
    210 ms, two 12 (AMD EPYC, two cores).
    """
    rows, cpu = len(x), jax.default_backend() == "cpu"
    if cpu and rows == 1 and not transposed and w.dtype.itemsize < 4:
        return _row_product(x[0], w).reshape(1, -1).astype(dtype)
    w, axes = w.reshape(len(w), -1), "ri,oi->ro" if transposed else "ri,io->ro"
    if cpu and rows <= FEW_ROWS and w.dtype == jnp.int8:
        return _integer_product(axes, x, w).astype(dtype)
    w = w.astype(x.dtype)
    if not cpu or x.dtype != jnp.bfloat16:
        return jnp.einsum(axes, x, w, preferred_element_type=dtype)
    x = jnp.concatenate([x, x]) if rows == 1 else x
    return jnp.einsum(axes, x, w, preferred_element_type=jnp.float32)[:rows].astype(dtype)


FEW_ROWS = 8  # of hidden states: as of texts that are written together


def _row_product(x: Float[Array, " I"], w: Shaped[Array, " I *O"]) -> Float32[Array, "*O"]:
    """One row times bfloat16 or int8 weights, on a CPU.

    Converted, multiplied and added in one loop: a dot would first write all of w to memory in
    float32. By [576, 1536] in bfloat16 this takes 0.16 ms, in int8 0.11; the dot takes 0.6 and 0.5,
    and 0.28 of float32 weights (Intel Xeon with AMX, two cores). Eight rows of w at a time, so that
    partial sums are seldom written. The sum is spelled a - (-b) because XLA hands plain ones to a
    library that does convert w first: 0.6 ms.
    """
    parts = math.gcd(len(w), 8)
    x = x.astype(jnp.float32).reshape(parts, -1, *[1] * (w.ndim - 1))
    w = w.reshape(parts, -1, *w.shape[1:])
    terms = [x[part] * w[part].astype(jnp.float32) for part in range(parts)]
    return jax.lax.reduce(sum(terms[1:], terms[0]), jnp.float32(0), lambda a, b: a - (-b), (0,))


def _integer_product(
    axes: str, x: Float[Array, "R I"], w: Int8[Array, "..."]
) -> Float32[Array, "R O"]:
    """Few rows times int8 weights, on a CPU, by its product of int8 matrices.

    A row is split into three int8 digits of base 128, which say it to 2^-22 of its largest entry;
    sums of products are exact in int32 up to 133,000 terms. By the head [49152, 576] one row takes
    5 ms, where it takes 10 in float32, and 66 if the head is converted first (the same Xeon).
    """
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(1, keepdims=True)
    unit = jnp.where(largest == 0, 1.0, largest) / 127
    rest, digits = x / unit, []
    for _ in range(3):
        digits.append(jnp.round(rest))
        rest = (rest - digits[-1]) * 128
    stacked = jnp.concatenate(digits).astype(jnp.int8)
    sums = jnp.einsum(axes, stacked, w, preferred_element_type=jnp.int32)
    high, middle, low = sums.astype(jnp.float32).reshape(3, len(x), -1)
    return (high + (middle + low / 128) / 128) * unit


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
    """RMS or layer normalisation over the last axis, or the last `axes`, statistics in float32."""

    spec: NormSpec
    shape: int | tuple[int, ...]  # of the scale: the last axes of what is normalised
    axes: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        offset, over = self.spec.scale_offset, tuple(range(-self.axes, 0))
        shape = self.shape if isinstance(self.shape, tuple) else (self.shape,)
        scale = self.param("scale", nn.initializers.constant(1.0 - offset), shape)

        def scaled(x, scale):
            y = x.astype(jnp.float32)
            if self.spec.kind == "layer":
                y = y - y.mean(over, keepdims=True)
            y = y * jax.lax.rsqrt(jnp.square(y).mean(over, keepdims=True) + self.spec.epsilon)
            return y * broadcast_like(scale.astype(jnp.float32) + offset, y)

        y = recompute(scaled)(x, scale)
        if self.spec.bias:
            bias = self.param("bias", nn.initializers.zeros, shape)
            y = y + broadcast_like(bias.astype(jnp.float32), y)
        return y.astype(x.dtype)


def unconstrained(x: Float[Array, "..."], *axes: str | None) -> Float[Array, "..."]:
    """x. On a mesh, lminf.parallel.partition.Constrain replaces this and shards x by its axes."""
    del axes
    return x


class Attention(nn.Module):
    """Projections into queries, keys and values, and of the attention output back to the width."""

    spec: ModelSpec
    constrain: Callable[..., Array] = unconstrained

    @nn.compact
    def __call__(self, x: Hidden, attend: Attend) -> tuple[Hidden, Any]:
        """The output, and the keys and values that `attend(q, k, v)` returns beside its own."""
        s = self.spec
        into = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        back = nn.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)
        wq = self.param("wq", into, (s.width, s.num_heads, s.head_dim))
        wk = self.param("wk", into, (s.width, s.num_kv_heads, s.head_dim))
        wv = self.param("wv", into, (s.width, s.num_kv_heads, s.head_dim))
        wo = self.param("wo", back, (s.num_heads, s.head_dim, s.width))
        q, k, v = (matmul(x, w) for w in (wq, wk, wv))
        if s.qkv_bias:
            q, k, v = add_bias(self, "bq", q), add_bias(self, "bk", k), add_bias(self, "bv", v)
        if s.qkv_clip is not None:
            q, k, v = (jnp.clip(y, -s.qkv_clip, s.qkv_clip) for y in (q, k, v))
        if s.qk_norm is not None:
            q, k = self.normalised("q", q), self.normalised("k", k)
        q = self.constrain(q, "batch", "length", "heads", None)
        k, v = (self.constrain(y, "batch", "length", "kv_heads", None) for y in (k, v))
        for name, value in (("q", q), ("k", k), ("v", v)):
            self.sow("intermediates", name, value)
        sinks = {}
        if s.sinks:
            sinks["sinks"] = self.param("sinks", nn.initializers.zeros, (s.num_heads,))
        out, kv = attend(q, k, v, **sinks)
        out = matmul(out, wo, contract=2)
        if s.out_bias:
            out = add_bias(self, "bo", out)
        return out, kv

    def normalised(self, name: str, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """Queries or keys, normalised; none of the released models gives these norms a bias."""
        spec = dataclasses.replace(self.spec.norm, bias=False)
        if self.spec.qk_norm == "head":
            return Norm(spec, x.shape[3], name=f"{name}_norm")(x)
        axes = 2 if self.spec.qk_norm == "all" else 1
        return Norm(spec, x.shape[2:], axes, name=f"{name}_head_norms")(x)


def activated(
    spec: MLPSpec, gate: Float[Array, "*B F"] | None, up: Float[Array, "*B F"]
) -> Float[Array, "*B F"]:
    """What an MLP multiplies by w_down; `gate` is None in one that is not gated."""
    act = ACTIVATIONS[spec.activation]
    if gate is None:
        return act(up)

    def product(gate, up):
        if spec.clip is not None:
            gate, up = jnp.minimum(gate, spec.clip), jnp.clip(up, -spec.clip, spec.clip)
        return act(gate) * (up + spec.up_offset if spec.up_offset else up)

    return recompute(product)(gate, up)


class MLP(nn.Module):
    """act(x w_up) w_down, or (act(x w_gate) * x w_up) w_down when gated."""

    spec: MLPSpec
    width: int
    constrain: Callable[..., Array] = unconstrained

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        init = nn.initializers.lecun_normal()
        D, F = self.width, self.spec.hidden_dim

        def project(x, name, size):
            y = matmul(x, self.param(f"w_{name}", init, (x.shape[-1], size)))
            return add_bias(self, f"b_{name}", y) if self.spec.bias else y

        up = project(x, "up", F)
        gate = project(x, "gate", F) if self.spec.gated else None
        up = activated(self.spec, gate, up)
        up = self.constrain(up, "batch", "length", "mlp")
        return project(up, "down", D)


class Block(nn.Module):
    """One layer. `attend(q, k, v)` returns the attention output, and keys and values or None."""

    spec: ModelSpec
    constrain: Callable[..., Array] = unconstrained

    @nn.compact
    def __call__(
        self, x: Hidden, attend: Attend, tokens: Tokens | None = None
    ) -> tuple[Hidden, Any]:
        s = self.spec
        attention = Attention(s, self.constrain, name="attention")
        mlp = self.mlp(tokens)

        def norm(name):
            if not s.pre_norms:
                return lambda y: y
            module = Norm(s.norm, s.width, name=name)
            return lambda y: self.constrain(module(y), "batch", "length", None)

        def post(name, y):
            if s.post_norms:
                y = Norm(s.norm, s.width, name=name)(residual(y))
            return y if s.residual_scale == 1.0 else y * s.residual_scale

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

    def mlp(self, tokens: Tokens | None) -> Callable[[Hidden], Hidden]:
        """The MLP, or the experts that replace it, whose router may read the ids of tokens."""
        s = self.spec
        if s.moe is None:
            return MLP(s.mlp, s.width, self.constrain, name="mlp")
        product = partial(activated, s.mlp)
        experts = moe.Experts(s.moe, s.width, product, s.mlp.gated, self.constrain, name="moe")
        if not s.moe.shared_dim:
            return lambda x: experts(x, tokens)
        wide = dataclasses.replace(s.mlp, hidden_dim=s.moe.shared_dim)
        shared = MLP(wide, s.width, self.constrain, name="shared")
        return lambda x: experts(x, tokens) + shared(x)
