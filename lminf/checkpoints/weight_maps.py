"""Parameter maps: which stored tensor fills which place of the tree, and how its axes move.

One table per naming scheme, one row per stored tensor:

    (name in the file, places in the tree, axes as stored -> axes in the tree)

`{}` in a name is the layer, `{e}` (any letter of an axis) the index of the place's first axis. The
axes read like einops: `(n h) d -> d n h` splits the rows into heads and puts the model width first;
a tensor that fills several places has them as its leading axis after the arrow. Where they are not
alike it is several patterns with `+` between them, joined along the axis with the star:
`(n* h) d -> d n h + (k* h) d -> d k h`. Sizes come from the ModelSpec. A row whose place the spec's
tree does not have (a bias, a tied head) is not expected in the file either. Read backwards, the
same row writes the tensor, so import and export cannot disagree.

Letters as in lminf/types.py, in lower case; g = n / k query heads of a key head, p = h / 2 channel
pairs, e experts, m their hidden size, s that of the MLP beside them, r rows of learnt positions.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lminf.attention import rope
from lminf.models.spec import ModelSpec

# Tensors that some checkpoints carry although the configuration fixes their values (causal masks,
# rotary frequencies); by the end of their names.
DERIVED = (
    ".rotary_emb.inv_freq",
    ".attention.bias",
    ".attention.masked_bias",
    ".attn.bias",
    ".attn.masked_bias",
)


class Row(NamedTuple):
    name: str  # as stored; "{}" stands for the layer
    places: tuple[str, ...]  # paths in the parameter tree
    axes: str  # as stored -> in the tree
    offset: float = 0.0  # what the format added to the value

    @property
    def indexed(self) -> str | None:
        """The letter of the axis that the name gives an index of."""
        return next((letter for letter in "enk" if f"{{{letter}}}" in self.name), None)


def row(name: str, place: str, axes: str, offset: float = 0.0) -> Row:
    """A Row; several places in one folder are written `layers/attention/{wq,wk,wv}`."""
    folder, _, names = place.rstrip("}").partition("{")
    return Row(name, tuple(folder + n for n in names.split(",")), axes, offset)


def norm(name: str, place: str, offset: float = 0.0) -> list[Row]:
    """Rows of a norm, whose scale is stored as `.weight` and whose bias, if any, as `.bias`."""
    return [
        row(f"{name}.weight", f"{place}/scale", "d", offset),
        row(f"{name}.bias", f"{place}/bias", "d"),
    ]


def names_of(rows: Iterable[Row], place: str) -> set[str]:
    """What a format calls the tensor of one place."""
    return {item.name for item in rows if item.places == (place,)}


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
        "g": spec.num_heads // spec.num_kv_heads,
        "r": spec.encoding.offset + spec.encoding.length
        if isinstance(spec.encoding, rope.Learnt)
        else 0,
        "e": 0 if spec.moe is None else spec.moe.experts,
        "m": 0 if spec.moe is None else spec.moe.hidden_dim,
        "s": 0 if spec.moe is None else spec.moe.shared_dim,
        "one": 1,
        "two": 2,
        "three": 3,
    }


def tree_axes(spec: ModelSpec) -> dict[str, str]:
    """Axes of every parameter of the spec (lminf/models/spec.py) by path, layers without L."""
    assert spec.moe is None or not spec.moe.dense_layers  # no released family that is read has any

    def norm_axes(place: str) -> dict[str, str]:
        return {f"{place}/scale": "d"} | ({f"{place}/bias": "d"} if spec.norm.bias else {})

    def mlp_axes(hidden: str) -> dict[str, str]:
        names = {"w_up": f"d {hidden}", "w_down": f"{hidden} d"}
        if spec.mlp.gated:
            names["w_gate"] = f"d {hidden}"
        if spec.mlp.bias:
            names |= {"b_up": hidden, "b_down": "d"}
            names |= {"b_gate": hidden} if spec.mlp.gated else {}
        return names

    axes = {"embed": "v d"} | norm_axes("final_norm")
    if isinstance(spec.encoding, rope.Learnt):
        axes["positions"] = "r d"
    if spec.embed_norm:
        axes |= norm_axes("embed_norm")
    if spec.pre_norms:
        axes |= norm_axes("layers/attention_norm")
    if spec.pre_norms and spec.residual != "parallel_shared":
        axes |= norm_axes("layers/mlp_norm")
    if spec.post_norms:
        axes |= norm_axes("layers/attention_post_norm") | norm_axes("layers/mlp_post_norm")
    attention = {"wq": "d n h", "wk": "d k h", "wv": "d k h", "wo": "n h d"}
    if spec.qkv_bias:
        attention |= {"bq": "n h", "bk": "k h", "bv": "k h"}
    if spec.out_bias:
        attention["bo"] = "d"
    if spec.sinks:
        attention["sinks"] = "n"
    if spec.qk_norm == "head":
        attention |= {"q_norm/scale": "h", "k_norm/scale": "h"}
    elif spec.qk_norm is not None:
        attention |= {"q_head_norms/scale": "n h", "k_head_norms/scale": "k h"}
    axes |= {f"layers/attention/{name}": a for name, a in attention.items()}
    if spec.moe is None:
        axes |= {f"layers/mlp/{name}": a for name, a in mlp_axes("f").items()}
    else:
        experts = {"router": "d e", "up": "e d m", "down": "e m d"}
        if spec.moe.bias:
            experts |= {"b_router": "e", "b_up": "e m", "b_down": "e d"}
        if spec.mlp.gated:
            experts |= {"gate": "e d m"} | ({"b_gate": "e m"} if spec.moe.bias else {})
        axes |= {f"layers/moe/{name}": a for name, a in experts.items()}
        if spec.moe.shared_dim:
            axes |= {f"layers/shared/{name}": a for name, a in mlp_axes("s").items()}
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


# --- Tensors of several patterns ------------------------------------------------------------------


def _joined(axes: str) -> tuple[list[str], str, int]:
    """The patterns of `a + b` without stars, their groups on the left split up; and the axis that
    they are joined along."""
    patterns, splits, place = axes.split(" + "), [], 0
    first = _groups(patterns[0].partition("->")[0])
    for pattern in patterns:
        source_axes, _, target_axes = pattern.partition("->")
        letters = [a for group in _groups(source_axes) for a in group]
        place = next(i for i, letter in enumerate(letters) if letter.endswith("*"))
        splits.append(f"{' '.join(letters).replace('*', '')} -> {target_axes.strip()}")
    return splits, " ".join(a for group in first for a in group), place


def stored_shape(axes: str, length: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of the tensor that a row stores."""
    if " + " not in axes:
        return shape_of(axes.partition("->")[0], length)
    sides = [_groups(pattern.partition("->")[0]) for pattern in axes.split(" + ")]
    total = sum(length[a[:-1]] for side in sides for group in side for a in group if a[-1] == "*")
    return tuple(
        math.prod(total if a[-1] == "*" else length[a] for a in group) for group in sides[0]
    )


def to_tree(item: Row, x: np.ndarray, length: Mapping[str, int]) -> Sequence[np.ndarray]:
    """What the stored tensor puts into each place of its row."""
    if " + " not in item.axes:
        moved = rearrange(x, item.axes, length)
        return list(moved) if len(item.places) > 1 else [moved]
    patterns, letters, place = _joined(item.axes)
    sides = [pattern.partition(" ->")[0].split() for pattern in patterns]
    ends = np.cumsum([length[side[place]] for side in sides])
    sizes_ = [ends[-1] if a[-1] == "*" else length[a] for a in letters.split()]
    parts = np.split(x.reshape(sizes_), ends[:-1], axis=place)
    return [rearrange(part, axes, length) for part, axes in zip(parts, patterns, strict=True)]


def to_stored(item: Row, parts: Sequence[np.ndarray], length: Mapping[str, int]) -> np.ndarray:
    """The stored tensor, from what is in the places of its row."""
    if " + " not in item.axes:
        tensor = np.stack(parts) if len(parts) > 1 else parts[0]
        return rearrange(tensor, backwards(item.axes), length)
    patterns, _, place = _joined(item.axes)
    split = [rearrange(x, backwards(axes), length) for x, axes in zip(parts, patterns, strict=True)]
    return np.concatenate(split, place).reshape(stored_shape(item.axes, length))
