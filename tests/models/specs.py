"""Tiny models that between them use everything a ModelSpec can say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lminf.attention import rope
from lminf.models import decoder
from lminf.models.spec import MLPSpec, ModelSpec, MoESpec, NormSpec

LLAMA = ModelSpec(
    family="llama",
    vocab_size=40,
    width=16,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,  # not width / num_heads
    mlp=MLPSpec(hidden_dim=24, activation="silu", gated=True, bias=False),
    norm=NormSpec(kind="rms", epsilon=1e-6, bias=False, scale_offset=0.0),
    encoding=rope.Rotary(100.0, 8, "half"),
    trained_length=32,
    windows=(None,) * 4,
    residual="sequential",
    qkv_bias=False,
    out_bias=False,
    qk_norm=None,
    post_norms=False,
    query_scale=8**-0.5,
    qkv_clip=None,
    attention_soft_cap=None,
    final_soft_cap=None,
    embed_scale=1.0,
    tied=False,
    head_bias=False,
)


def change(spec: ModelSpec, *, norm=None, mlp=None, **fields) -> ModelSpec:
    return dataclasses.replace(
        spec,
        norm=dataclasses.replace(spec.norm, **(norm or {})),
        mlp=dataclasses.replace(spec.mlp, **(mlp or {})),
        **fields,
    )


def shallow(spec: ModelSpec, layers: int) -> ModelSpec:
    own = spec.layer_encodings[:layers]
    return dataclasses.replace(
        spec, num_layers=layers, windows=spec.windows[:layers], layer_encodings=own
    )


GEMMA = change(
    LLAMA, family="gemma2", norm={"scale_offset": 1.0}, mlp={"activation": "gelu_tanh"},
    windows=(6, None) * 2, post_norms=True, attention_soft_cap=5.0, final_soft_cap=3.0,
    embed_scale=4.0, query_scale=0.5, tied=True,
)  # fmt: skip
QWEN = change(LLAMA, family="qwen", qk_norm="head", qkv_bias=True, tied=True)
NEOX = change(
    LLAMA, family="gpt_neox", norm={"kind": "layer", "bias": True}, num_kv_heads=4,
    mlp={"activation": "gelu", "gated": False, "bias": True}, residual="parallel",
    encoding=rope.Rotary(100.0, 4, "half"), qkv_bias=True, out_bias=True,
)  # fmt: skip
GPTJ = change(
    NEOX, family="gptj", residual="parallel_shared", qkv_bias=False, out_bias=False,
    encoding=rope.Rotary(100.0, 4, "interleaved"), head_bias=True,
)  # fmt: skip
MPT = change(
    LLAMA, family="mpt", norm={"kind": "layer"}, mlp={"activation": "gelu", "gated": False},
    encoding=rope.Alibi(8.0), num_kv_heads=4, qkv_clip=1.5, tied=True,
)  # fmt: skip
OLMO = change(
    LLAMA, family="olmo", qk_norm="all", pre_norms=False, post_norms=True, residual_scale=0.7,
    logit_scale=0.5, layer_encodings=(rope.NoEncoding(), None) * 2,
)  # fmt: skip
GPT2 = change(
    NEOX, family="gpt2", residual="sequential", encoding=rope.Learnt(32, 2), embed_norm=True,
    tied=True,
)  # fmt: skip
OSS = change(
    LLAMA, family="gpt_oss", qkv_bias=True, out_bias=True, sinks=True, windows=(6, None) * 2,
    encoding=rope.Rotary(100.0, 8, "half", rope.YaRN(2.0, 16, truncate=False)),
)  # fmt: skip
# Combinations that no family uses, and that must still hold together.
ODD = change(
    NEOX, family="odd", qk_norm="each_head", post_norms=True, encoding=rope.NoEncoding(),
    num_kv_heads=1, mlp={"activation": "relu", "gated": True},
)  # fmt: skip
MIXED = change(  # the rest of its kind: tests/models/test_moe.py
    LLAMA, family="mixed", mlp={"activation": "quick_gelu", "clip": 1.5, "up_offset": 1.0},
    moe=MoESpec(
        experts=4, top_k=2, hidden_dim=12, shared_dim=6, dense_layers=1, normalised=True,
        capacity_factor=None, bias=True,
    ),
)  # fmt: skip
SPECS = {s.family: s for s in (LLAMA, GEMMA, QWEN, NEOX, GPTJ, MPT, OLMO, GPT2, OSS, ODD)}


@functools.cache
def _tree(spec: ModelSpec):
    return jax.eval_shape(lambda: decoder.init(spec, key=jax.random.key(0)))


def shapes(spec: ModelSpec):
    """Path -> shape of every parameter."""
    leaves = jax.tree_util.tree_flatten_with_path(_tree(spec))[0]
    return {"/".join(str(p.key) for p in path): leaf.shape for path, leaf in leaves}


def parameters(spec: ModelSpec, *, seed: int = 0):
    """Random parameters, biases and scales included, so that every one of them counts."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "scale":
            return 1 - spec.norm.scale_offset + 0.2 * rng.normal(size=leaf.shape)
        fan_in = leaf.shape[-1] if name in ("embed", "head") else np.prod(leaf.shape[1:-1])
        biases = name.startswith("b") or name in ("head_bias", "sinks")
        size = 0.3 if biases else fan_in**-0.5
        return size * rng.normal(size=leaf.shape)

    drawn = jax.tree_util.tree_map_with_path(draw, _tree(spec))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), drawn)
