"""Parameter maps: which stored tensor fills which place of the parameter tree, and how its axes move.

One table per naming scheme, one row per stored tensor:

    (name in the file, places in the tree, axes as stored -> axes in the tree)

`{}` in a name is the layer. The axes read like einops: `(n h) d -> d n h` splits the rows into
heads and puts the model width first; a tensor that fills several places has them as its leading
axis after the arrow. Sizes come from the ModelSpec. A row whose place the spec's tree does not
have (a bias, a tied head) is not expected in the file either. Read backwards, the same row writes
the tensor: import and export cannot disagree.

Letters as in lminf/types.py, in lower case; p = h / 2 channel pairs.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lminf.errors import InputError
from lminf.models.spec import ModelSpec


class Row(NamedTuple):
    name: str  # as stored; "{}" stands for the layer
    places: tuple[str, ...]  # paths in the parameter tree
    axes: str  # as stored -> in the tree
    offset: float = 0.0  # what the format added to the value


def row(name: str, place: str, axes: str, offset: float = 0.0) -> Row:
    """A Row; several places that share a folder are written `layers/attention/{wq,wk,wv}`."""
    folder, _, names = place.rstrip("}").partition("{")
    return Row(name, tuple(folder + n for n in names.split(",")), axes, offset)


# --- The tables -----------------------------------------------------------------------------------


def _both(name: str, place: str, out: str) -> list[Row]:
    """Rows of a norm, which stores its scale as `.weight` and, where it has one, `.bias`."""
    return [
        row(f"{name}.weight", f"{place}/scale", out),
        row(f"{name}.bias", f"{place}/bias", out),
    ]


_HF_LLAMA = [
    row("model.embed_tokens.weight", "embed", "v d"),
    *_both("model.layers.{}.input_layernorm", "layers/attention_norm", "d"),
    row("model.layers.{}.self_attn.q_proj.weight", "layers/attention/wq", "(n h) d -> d n h"),
    row("model.layers.{}.self_attn.k_proj.weight", "layers/attention/wk", "(k h) d -> d k h"),
    row("model.layers.{}.self_attn.v_proj.weight", "layers/attention/wv", "(k h) d -> d k h"),
    row("model.layers.{}.self_attn.q_proj.bias", "layers/attention/bq", "(n h) -> n h"),
    row("model.layers.{}.self_attn.k_proj.bias", "layers/attention/bk", "(k h) -> k h"),
    row("model.layers.{}.self_attn.v_proj.bias", "layers/attention/bv", "(k h) -> k h"),
    row("model.layers.{}.self_attn.o_proj.weight", "layers/attention/wo", "d (n h) -> n h d"),
    row("model.layers.{}.self_attn.o_proj.bias", "layers/attention/bo", "d"),
    row("model.layers.{}.self_attn.q_norm.weight", "layers/attention/q_norm", "h"),
    row("model.layers.{}.self_attn.k_norm.weight", "layers/attention/k_norm", "h"),
    row("model.layers.{}.mlp.gate_proj.weight", "layers/mlp/w_gate", "f d -> d f"),
    row("model.layers.{}.mlp.up_proj.weight", "layers/mlp/w_up", "f d -> d f"),
    row("model.layers.{}.mlp.down_proj.weight", "layers/mlp/w_down", "d f -> f d"),
    row("model.layers.{}.mlp.gate_proj.bias", "layers/mlp/b_gate", "f"),
    row("model.layers.{}.mlp.up_proj.bias", "layers/mlp/b_up", "f"),
    row("model.layers.{}.mlp.down_proj.bias", "layers/mlp/b_down", "d"),
    *_both("model.norm", "final_norm", "d"),
    row("lm_head.weight", "head", "v d"),
]

HF: dict[str, list[Row]] = {
    "llama": [
        *_HF_LLAMA,
        *_both("model.layers.{}.post_attention_layernorm", "layers/mlp_norm", "d"),
    ],
}
HF["mistral"] = HF["qwen2"] = HF["qwen3"] = HF["llama"]

_GGUF_COMMON = [
    row("token_embd.weight", "embed", "v d"),
    *_both("blk.{}.attn_norm", "layers/attention_norm", "d"),
    row("blk.{}.attn_v.weight", "layers/attention/wv", "(k h) d -> d k h"),
    row("blk.{}.attn_v.bias", "layers/attention/bv", "(k h) -> k h"),
    row("blk.{}.attn_output.weight", "layers/attention/wo", "d (n h) -> n h d"),
    row("blk.{}.attn_output.bias", "layers/attention/bo", "d"),
    *_both("blk.{}.ffn_norm", "layers/mlp_norm", "d"),
    row("blk.{}.ffn_gate.weight", "layers/mlp/w_gate", "f d -> d f"),
    row("blk.{}.ffn_up.weight", "layers/mlp/w_up", "f d -> d f"),
    row("blk.{}.ffn_down.weight", "layers/mlp/w_down", "d f -> f d"),
    row("blk.{}.ffn_gate.bias", "layers/mlp/b_gate", "f"),
    row("blk.{}.ffn_up.bias", "layers/mlp/b_up", "f"),
    row("blk.{}.ffn_down.bias", "layers/mlp/b_down", "d"),
    *_both("output_norm", "final_norm", "d"),
    row("output.weight", "head", "v d"),
]

# llama.cpp stores the two halves of each rotated pair side by side (p two); our tree, as Hugging
# Face does, has all first halves and then all second halves (two p).
GGUF: dict[str, list[Row]] = {
    "llama": [
        *_GGUF_COMMON,
        row("blk.{}.attn_q.weight", "layers/attention/wq", "(n p two) d -> d n (two p)"),
        row("blk.{}.attn_k.weight", "layers/attention/wk", "(k p two) d -> d k (two p)"),
        row("blk.{}.attn_q.bias", "layers/attention/bq", "(n p two) -> n (two p)"),
        row("blk.{}.attn_k.bias", "layers/attention/bk", "(k p two) -> k (two p)"),
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
    """Axes of every parameter of the spec (lminf/models/spec.py), by path; layers without their L."""

    def norm(place: str) -> dict[str, str]:
        return {f"{place}/scale": "d"} | ({f"{place}/bias": "d"} if spec.norm.bias else {})

    axes = {"embed": "v d"} | norm("layers/attention_norm")
    axes |= {
        f"layers/attention/{n}": a
        for n, a in zip(("wq", "wk", "wv"), ("d n h", "d k h", "d k h"), strict=True)
    }
    axes["layers/attention/wo"] = "n h d"
    if spec.qkv_bias:
        axes |= {
            "layers/attention/bq": "n h",
            "layers/attention/bk": "k h",
            "layers/attention/bv": "k h",
        }
    if spec.out_bias:
        axes["layers/attention/bo"] = "d"
    if spec.qk_norm:
        axes |= {"layers/attention/q_norm": "h", "layers/attention/k_norm": "h"}
    if spec.post_norms:
        axes |= norm("layers/attention_post_norm") | norm("layers/mlp_post_norm")
    if spec.residual != "parallel_shared":
        axes |= norm("layers/mlp_norm")
    axes |= {"layers/mlp/w_up": "d f", "layers/mlp/w_down": "f d"}
    if spec.mlp.gated:
        axes["layers/mlp/w_gate"] = "d f"
    if spec.mlp.bias:
        axes |= {"layers/mlp/b_up": "f", "layers/mlp/b_down": "d"}
        if spec.mlp.gated:
            axes["layers/mlp/b_gate"] = "f"
    axes |= norm("final_norm")
    if not spec.tied:
        axes["head"] = "v d"
    if spec.head_bias:
        axes["head_bias"] = "v"
    return axes


def tree_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the spec, by path, with the layers on axis 0."""
    length = sizes(spec)
    return {
        path: ((spec.num_layers,) if path.startswith("layers/") else ())
        + tuple(length[a] for a in axes.split())
        for path, axes in tree_axes(spec).items()
    }


# --- Axes -----------------------------------------------------------------------------------------


def _groups(side: str) -> list[list[str]]:
    groups, inside = [], False
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
    before, _, after = axes.partition("->")
    if not after:
        return x
    start = [a for group in _groups(before) for a in group]
    end = [a for group in _groups(after) for a in group]
    split = x.reshape([length[a] for a in start])
    return split.transpose([start.index(a) for a in end]).reshape(shape_of(after, length))


# --- Reading --------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """One tensor as a file holds it."""

    name: str
    layer: int | None
    row: Row
    shape: tuple[int, ...]


def stored(spec: ModelSpec, rows: Collection[Row]) -> Iterator[Stored]:
    """Every tensor that a file of this spec holds, in the table's order."""
    places, length = tree_axes(spec), sizes(spec)
    for r in rows:
        if not all(place in places for place in r.places):
            continue
        shape = shape_of(r.axes.partition("->")[0], length)
        if "{}" in r.name:
            for layer in range(spec.num_layers):
                yield Stored(r.name.format(layer), layer, r, shape)
        else:
            yield Stored(r.name, None, r, shape)


def read_tree(
    spec: ModelSpec,
    rows: Collection[Row],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    dtype: Any,
    source: str,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The parameter tree, each stored tensor used exactly once, one tensor in memory at a time.

    `shapes` lists what the file holds, `read` gives one tensor by name.
    """
    wanted = list(stored(spec, rows))
    names = {t.name for t in wanted}
    if missing := sorted(names - set(shapes)):
        raise InputError(
            f"{source} lacks {_some(missing)}, which a {spec.family} model of {spec.num_layers} "
            f"layers needs; fetch the checkpoint again, whole"
        )
    if extra := sorted(set(shapes) - names):
        raise InputError(
            f"{source} holds {_some(extra)}, which a {spec.family} model of {spec.num_layers} "
            f"layers does not use; only checkpoints whose every tensor is understood are read"
        )
    for t in wanted:
        if tuple(shapes[t.name]) != t.shape:
            raise InputError(
                f"{t.name} in {source} has shape {tuple(shapes[t.name])} but its configuration "
                f"asks for {t.shape}; the file and its configuration belong to different models"
            )
    flat = {path: np.empty(shape, dtype) for path, shape in tree_shapes(spec).items()}
    length = sizes(spec)
    for done, t in enumerate(wanted):
        moved = rearrange(read(t.name), t.row.axes, length)
        parts = moved if len(t.row.places) > 1 else moved[None]
        for place, part in zip(t.row.places, parts, strict=True):
            target = flat[place] if t.layer is None else flat[place][t.layer]
            target[...] = part - part.dtype.type(t.row.offset) if t.row.offset else part
        if progress is not None:
            progress(done + 1, len(wanted))
    return nested(flat)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} as {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        here = tree
        for folder in folders:
            here = here.setdefault(folder, {})
        here[name] = value
    return tree


def _some(names: Collection[str]) -> str:
    first = ", ".join(list(names)[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more tensors"
