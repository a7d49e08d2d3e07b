"""Parameter maps: which stored tensor fills which place of the tree, and how its axes move.

One table per naming scheme, one row per stored tensor:

    (name in the file, places in the tree, axes as stored -> axes in the tree)

`{}` in a name is the layer. The axes read like einops: `(n h) d -> d n h` splits the rows into
heads and puts the model width first; a tensor that fills several places has them as its leading
axis after the arrow. Sizes come from the ModelSpec. A row whose place the spec's tree does not
have (a bias, a tied head) is not expected in the file either. Read backwards, the same row writes
the tensor, so import and export cannot disagree.

Letters as in lminf/types.py, in lower case; p = h / 2 channel pairs.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lminf.models.spec import ModelSpec


class Row(NamedTuple):
    name: str  # as stored; "{}" stands for the layer
    places: tuple[str, ...]  # paths in the parameter tree
    axes: str  # as stored -> in the tree
    offset: float = 0.0  # what the format added to the value


def _row(name: str, place: str, axes: str, offset: float = 0.0) -> Row:
    """A Row; several places in one folder are written `layers/attention/{wq,wk,wv}`."""
    folder, _, names = place.rstrip("}").partition("{")
    return Row(name, tuple(folder + n for n in names.split(",")), axes, offset)


def _norm(name: str, place: str, offset: float = 0.0) -> list[Row]:
    """Rows of a norm, whose scale is stored as `.weight` and whose bias, if any, as `.bias`."""
    return [
        _row(f"{name}.weight", f"{place}/scale", "d", offset),
        _row(f"{name}.bias", f"{place}/bias", "d"),
    ]


# --- Hugging Face ---------------------------------------------------------------------------------

_LLAMA = [
    _row("model.embed_tokens.weight", "embed", "v d"),
    *_norm("model.layers.{}.input_layernorm", "layers/attention_norm"),
    _row("model.layers.{}.self_attn.q_proj.weight", "layers/attention/wq", "(n h) d -> d n h"),
    _row("model.layers.{}.self_attn.k_proj.weight", "layers/attention/wk", "(k h) d -> d k h"),
    _row("model.layers.{}.self_attn.v_proj.weight", "layers/attention/wv", "(k h) d -> d k h"),
    _row("model.layers.{}.self_attn.q_proj.bias", "layers/attention/bq", "(n h) -> n h"),
    _row("model.layers.{}.self_attn.k_proj.bias", "layers/attention/bk", "(k h) -> k h"),
    _row("model.layers.{}.self_attn.v_proj.bias", "layers/attention/bv", "(k h) -> k h"),
    _row("model.layers.{}.self_attn.q_norm.weight", "layers/attention/q_norm/scale", "h"),
    _row("model.layers.{}.self_attn.k_norm.weight", "layers/attention/k_norm/scale", "h"),
    _row("model.layers.{}.self_attn.o_proj.weight", "layers/attention/wo", "d (n h) -> n h d"),
    _row("model.layers.{}.self_attn.o_proj.bias", "layers/attention/bo", "d"),
    _row("model.layers.{}.mlp.gate_proj.weight", "layers/mlp/w_gate", "f d -> d f"),
    _row("model.layers.{}.mlp.up_proj.weight", "layers/mlp/w_up", "f d -> d f"),
    _row("model.layers.{}.mlp.down_proj.weight", "layers/mlp/w_down", "d f -> f d"),
    _row("model.layers.{}.mlp.gate_proj.bias", "layers/mlp/b_gate", "f"),
    _row("model.layers.{}.mlp.up_proj.bias", "layers/mlp/b_up", "f"),
    _row("model.layers.{}.mlp.down_proj.bias", "layers/mlp/b_down", "d"),
    *_norm("model.norm", "final_norm"),
    _row("lm_head.weight", "head", "v d"),
]
_AFTER_ATTENTION = "model.layers.{}.post_attention_layernorm"
_TWO_NORMS = [*_LLAMA, *_norm(_AFTER_ATTENTION, "layers/mlp_norm")]

HF: dict[str, list[Row]] = {
    "llama": _TWO_NORMS,
    "mistral": _TWO_NORMS,
    "qwen2": _TWO_NORMS,
    "qwen3": _TWO_NORMS,
    "gemma2": [
        *_LLAMA,
        *_norm(_AFTER_ATTENTION, "layers/attention_post_norm"),
        *_norm("model.layers.{}.pre_feedforward_layernorm", "layers/mlp_norm"),
        *_norm("model.layers.{}.post_feedforward_layernorm", "layers/mlp_post_norm"),
    ],
    "gpt_neox": [
        _row("gpt_neox.embed_in.weight", "embed", "v d"),
        *_norm("gpt_neox.layers.{}.input_layernorm", "layers/attention_norm"),
        *_norm("gpt_neox.layers.{}.post_attention_layernorm", "layers/mlp_norm"),
        _row(
            "gpt_neox.layers.{}.attention.query_key_value.weight",
            "layers/attention/{wq,wk,wv}",
            "(n three h) d -> three d n h",
        ),
        _row(
            "gpt_neox.layers.{}.attention.query_key_value.bias",
            "layers/attention/{bq,bk,bv}",
            "(n three h) -> three n h",
        ),
        _row(
            "gpt_neox.layers.{}.attention.dense.weight", "layers/attention/wo", "d (n h) -> n h d"
        ),
        _row("gpt_neox.layers.{}.attention.dense.bias", "layers/attention/bo", "d"),
        _row("gpt_neox.layers.{}.mlp.dense_h_to_4h.weight", "layers/mlp/w_up", "f d -> d f"),
        _row("gpt_neox.layers.{}.mlp.dense_h_to_4h.bias", "layers/mlp/b_up", "f"),
        _row("gpt_neox.layers.{}.mlp.dense_4h_to_h.weight", "layers/mlp/w_down", "d f -> f d"),
        _row("gpt_neox.layers.{}.mlp.dense_4h_to_h.bias", "layers/mlp/b_down", "d"),
        *_norm("gpt_neox.final_layer_norm", "final_norm"),
        _row("embed_out.weight", "head", "v d"),
    ],
    "gptj": [
        _row("transformer.wte.weight", "embed", "v d"),
        *_norm("transformer.h.{}.ln_1", "layers/attention_norm"),
        _row("transformer.h.{}.attn.q_proj.weight", "layers/attention/wq", "(n h) d -> d n h"),
        _row("transformer.h.{}.attn.k_proj.weight", "layers/attention/wk", "(k h) d -> d k h"),
        _row("transformer.h.{}.attn.v_proj.weight", "layers/attention/wv", "(k h) d -> d k h"),
        _row("transformer.h.{}.attn.out_proj.weight", "layers/attention/wo", "d (n h) -> n h d"),
        _row("transformer.h.{}.mlp.fc_in.weight", "layers/mlp/w_up", "f d -> d f"),
        _row("transformer.h.{}.mlp.fc_in.bias", "layers/mlp/b_up", "f"),
        _row("transformer.h.{}.mlp.fc_out.weight", "layers/mlp/w_down", "d f -> f d"),
        _row("transformer.h.{}.mlp.fc_out.bias", "layers/mlp/b_down", "d"),
        *_norm("transformer.ln_f", "final_norm"),
        _row("lm_head.weight", "head", "v d"),
        _row("lm_head.bias", "head_bias", "v"),
    ],
    "mpt": [
        _row("transformer.wte.weight", "embed", "v d"),
        *_norm("transformer.blocks.{}.norm_1", "layers/attention_norm"),
        *_norm("transformer.blocks.{}.norm_2", "layers/mlp_norm"),
        _row(
            "transformer.blocks.{}.attn.Wqkv.weight",
            "layers/attention/{wq,wk,wv}",
            "(three n h) d -> three d n h",
        ),
        _row(
            "transformer.blocks.{}.attn.out_proj.weight", "layers/attention/wo", "d (n h) -> n h d"
        ),
        _row("transformer.blocks.{}.ffn.up_proj.weight", "layers/mlp/w_up", "f d -> d f"),
        _row("transformer.blocks.{}.ffn.down_proj.weight", "layers/mlp/w_down", "d f -> f d"),
        *_norm("transformer.norm_f", "final_norm"),
        _row("lm_head.weight", "head", "v d"),
    ],
}

# Tensors that some checkpoints carry although the configuration fixes their values (causal masks,
# rotary frequencies); by the end of their names.
HF_DERIVED = (
    ".rotary_emb.inv_freq",
    ".attention.bias",
    ".attention.masked_bias",
    ".attn.bias",
    ".attn.masked_bias",
)

# --- GGUF, by its own architecture names ----------------------------------------------------------

_GGUF_ENDS = [
    _row("token_embd.weight", "embed", "v d"),
    _row("output.weight", "head", "v d"),
]
_GGUF_MLP = [
    _row("blk.{}.ffn_gate.weight", "layers/mlp/w_gate", "f d -> d f"),
    _row("blk.{}.ffn_up.weight", "layers/mlp/w_up", "f d -> d f"),
    _row("blk.{}.ffn_down.weight", "layers/mlp/w_down", "d f -> f d"),
    _row("blk.{}.ffn_gate.bias", "layers/mlp/b_gate", "f"),
    _row("blk.{}.ffn_up.bias", "layers/mlp/b_up", "f"),
    _row("blk.{}.ffn_down.bias", "layers/mlp/b_down", "d"),
]
_GGUF_NORMS = [
    *_norm("blk.{}.attn_norm", "layers/attention_norm"),
    *_norm("blk.{}.ffn_norm", "layers/mlp_norm"),
    *_norm("output_norm", "final_norm"),
]
_GGUF_VALUES = [
    _row("blk.{}.attn_v.weight", "layers/attention/wv", "(k h) d -> d k h"),
    _row("blk.{}.attn_v.bias", "layers/attention/bv", "(k h) -> k h"),
    _row("blk.{}.attn_output.weight", "layers/attention/wo", "d (n h) -> n h d"),
    _row("blk.{}.attn_output.bias", "layers/attention/bo", "d"),
]
_GGUF_QK = [
    _row("blk.{}.attn_q.weight", "layers/attention/wq", "(n h) d -> d n h"),
    _row("blk.{}.attn_k.weight", "layers/attention/wk", "(k h) d -> d k h"),
    _row("blk.{}.attn_q.bias", "layers/attention/bq", "(n h) -> n h"),
    _row("blk.{}.attn_k.bias", "layers/attention/bk", "(k h) -> k h"),
    _row("blk.{}.attn_q_norm.weight", "layers/attention/q_norm/scale", "h"),
    _row("blk.{}.attn_k_norm.weight", "layers/attention/k_norm/scale", "h"),
]
# For this one architecture llama.cpp stores the two channels of each rotated pair side by side
# (p two); our tree, like Hugging Face, has all first channels and then all second ones (two p).
_GGUF_QK_PAIRED = [
    _row("blk.{}.attn_q.weight", "layers/attention/wq", "(n p two) d -> d n (two p)"),
    _row("blk.{}.attn_k.weight", "layers/attention/wk", "(k p two) d -> d k (two p)"),
    _row("blk.{}.attn_q.bias", "layers/attention/bq", "(n p two) -> n (two p)"),
    _row("blk.{}.attn_k.bias", "layers/attention/bk", "(k p two) -> k (two p)"),
]
_GGUF_PLAIN = [*_GGUF_ENDS, *_GGUF_NORMS, *_GGUF_QK, *_GGUF_VALUES, *_GGUF_MLP]

GGUF: dict[str, list[Row]] = {
    "llama": [*_GGUF_ENDS, *_GGUF_NORMS, *_GGUF_QK_PAIRED, *_GGUF_VALUES, *_GGUF_MLP],
    "qwen2": _GGUF_PLAIN,
    "qwen3": _GGUF_PLAIN,
    "gemma2": [
        *_GGUF_ENDS,
        *_GGUF_QK,
        *_GGUF_VALUES,
        *_GGUF_MLP,
        # llama.cpp adds the 1 that Gemma's norms add when they run.
        *_norm("blk.{}.attn_norm", "layers/attention_norm", 1.0),
        *_norm("blk.{}.post_attention_norm", "layers/attention_post_norm", 1.0),
        *_norm("blk.{}.ffn_norm", "layers/mlp_norm", 1.0),
        *_norm("blk.{}.post_ffw_norm", "layers/mlp_post_norm", 1.0),
        *_norm("output_norm", "final_norm", 1.0),
    ],
    "gptneox": [
        *_GGUF_ENDS,
        *_GGUF_NORMS,
        *_GGUF_MLP,
        _row(
            "blk.{}.attn_qkv.weight", "layers/attention/{wq,wk,wv}", "(three n h) d -> three d n h"
        ),
        _row("blk.{}.attn_qkv.bias", "layers/attention/{bq,bk,bv}", "(three n h) -> three n h"),
        *_GGUF_VALUES[2:],
    ],
}


# --- The tree a spec asks for ---------------------------------------------------------------------


def sizes(spec: ModelSpec) -> dict[str, int]:
    """Length of each axis letter used in the tables."""
    return {
        "v": spec.vocab_size,
        "d": spec.width,
        "n": spec.num_heads,
        "k": spec.num_kv_heads,
        "h": spec.head_dim,
        "p": spec.head_dim // 2,
        "f": spec.mlp.hidden_dim,
        "two": 2,
        "three": 3,
    }


def tree_axes(spec: ModelSpec) -> dict[str, str]:
    """Axes of every parameter of the spec (lminf/models/spec.py) by path, layers without L."""

    def norm(place: str) -> dict[str, str]:
        return {f"{place}/scale": "d"} | ({f"{place}/bias": "d"} if spec.norm.bias else {})

    axes = {"embed": "v d"} | norm("layers/attention_norm") | norm("final_norm")
    attention = {"wq": "d n h", "wk": "d k h", "wv": "d k h", "wo": "n h d"}
    if spec.qkv_bias:
        attention |= {"bq": "n h", "bk": "k h", "bv": "k h"}
    if spec.out_bias:
        attention["bo"] = "d"
    if spec.qk_norm:
        attention |= {"q_norm/scale": "h", "k_norm/scale": "h"}
    mlp = {"w_up": "d f", "w_down": "f d"}
    if spec.mlp.bias:
        mlp |= {"b_up": "f", "b_down": "d"}
    if spec.mlp.gated:
        mlp |= {"w_gate": "d f"} | ({"b_gate": "f"} if spec.mlp.bias else {})
    axes |= {f"layers/attention/{name}": a for name, a in attention.items()}
    axes |= {f"layers/mlp/{name}": a for name, a in mlp.items()}
    if spec.residual != "parallel_shared":
        axes |= norm("layers/mlp_norm")
    if spec.post_norms:
        axes |= norm("layers/attention_post_norm") | norm("layers/mlp_post_norm")
    if not spec.tied:
        axes["head"] = "v d"
    if spec.head_bias:
        axes["head_bias"] = "v"
    return axes


def tree_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the spec by path, the layers on axis 0."""
    length = sizes(spec)
    return {
        path: ((spec.num_layers,) if path.startswith("layers/") else ()) + shape_of(axes, length)
        for path, axes in tree_axes(spec).items()
    }


# --- Axes -----------------------------------------------------------------------------------------


def _groups(side: str) -> list[list[str]]:
    """`(n h) d` as [[n, h], [d]]."""
    groups: list[list[str]] = []
    inside = False
    for word in side.replace("(", " ( ").replace(")", " ) ").split():
        if word in "()":
            inside = word == "("
            if inside:
                groups.append([])
        elif inside:
            groups[-1].append(word)
        else:
            groups.append([word])
    return groups


def shape_of(side: str, length: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of one side of an axes pattern: `(n h) d` with n=2, h=3, d=5 is (6, 5)."""
    return tuple(math.prod(length[a] for a in group) for group in _groups(side))


def rearrange(x: np.ndarray, axes: str, length: Mapping[str, int]) -> np.ndarray:
    """x with its axes moved as `axes` says; a view where that is possible."""
    source_axes, _, target_axes = axes.partition("->")
    if not target_axes:
        return x
    start = [a for group in _groups(source_axes) for a in group]
    end = [a for group in _groups(target_axes) for a in group]
    split = x.reshape([length[a] for a in start])
    return split.transpose([start.index(a) for a in end]).reshape(shape_of(target_axes, length))


def backwards(axes: str) -> str:
    """The pattern that undoes `axes`."""
    source_axes, _, target_axes = axes.partition("->")
    return f"{target_axes.strip()} -> {source_axes.strip()}" if target_axes else axes
