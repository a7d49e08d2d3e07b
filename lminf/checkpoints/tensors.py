"""Stored tensors -> parameter tree and back, through one table of lminf/checkpoints/weight_maps.py.

Every tensor is used exactly once, every place is filled exactly once, and one tensor at a time is
in memory beside the tree it fills.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from lminf.checkpoints import weight_maps
from lminf.errors import InputError
from lminf.models.spec import ModelSpec
from lminf.types import Params

Progress: TypeAlias = Callable[[int, int], None]  # (done, of)


class Stored(NamedTuple):
    """One tensor as a file holds it."""

    name: str
    layer: int | None
    place_index: int | None  # of the place's first axis after the layer, where the name gives one
    row: weight_maps.Row
    shape: tuple[int, ...]


def stored(spec: ModelSpec, rows: Iterable[weight_maps.Row]) -> Iterator[Stored]:
    """Every tensor that a file of this spec holds, embedding first, then layer by layer."""
    places, length = weight_maps.tree_axes(spec), weight_maps.sizes(spec)
    used = [row for row in rows if all(place in places for place in row.places)]
    if lost := set(places) - {place for row in used for place in row.places}:
        raise InputError(
            f"a {spec.family} checkpoint has no tensor for {_some(lost)}; the specification and "
            f"the family do not fit each other"
        )
    shape = {row.name: weight_maps.stored_shape(row.axes, length) for row in used}
    for row in used:
        if "{}" not in row.name:
            yield Stored(row.name, None, None, row, shape[row.name])
    for layer in range(spec.num_layers):
        for row in used:
            if "{}" not in row.name:
                continue
            if row.indexed is None:
                yield Stored(row.name.format(layer), layer, None, row, shape[row.name])
                continue
            for index in range(length[row.indexed]):
                name = row.name.format(layer, **{row.indexed: index})
                yield Stored(name, layer, index, row, shape[row.name])


def read(
    spec: ModelSpec,
    rows: Iterable[weight_maps.Row],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    tensor: Callable[[str], np.ndarray],
    dtype: Any,
    source: str,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The parameter tree in numpy arrays of `dtype`.

    `shapes` lists what the file holds, `tensor` gives one of them by name.
    """
    if spec.num_layers > len(shapes):  # before anything is made for each layer
        raise InputError(
            f"{source} holds {len(shapes)} tensors for {spec.num_layers} layers; the weights and "
            f"the configuration belong to different models"
        )
    entries = list(stored(spec, rows))
    shapes = _without_copies(spec, rows, shapes, tensor, source)
    check(spec, rows, entries, shapes, source)
    flat = {path: _aligned(shape, dtype) for path, shape in weight_maps.tree_shapes(spec).items()}
    length = weight_maps.sizes(spec)
    for done, item in enumerate(entries, 1):
        parts = weight_maps.to_tree(item.row, tensor(item.name), length)
        for place, part in zip(item.row.places, parts, strict=True):
            target = _place(flat[place], item)
            if item.row.offset:
                with np.errstate(all="ignore"):  # of weights that are no numbers, in damaged files
                    part = part.astype(np.float32) - np.float32(item.row.offset)
            target[...] = part
        if progress is not None:
            progress(done, len(entries))
    return nested(flat)


def _place(array: np.ndarray, item: Stored) -> np.ndarray:
    """The part of a place's array that one tensor fills."""
    return array[tuple(i for i in (item.layer, item.place_index) if i is not None)]


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array at a multiple of 64 bytes, which JAX can use on a CPU without copying it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _without_copies(
    spec: ModelSpec,
    rows: Iterable[weight_maps.Row],
    shapes: Mapping[str, tuple[int, ...]],
    tensor: Callable[[str], np.ndarray],
    source: str,
) -> dict[str, tuple[int, ...]]:
    """The shapes without a head that is the embedding it is tied to, stored again."""
    copies = weight_maps.names_of(rows, "head") & set(shapes) if spec.tied else set()
    (embedding,) = weight_maps.names_of(rows, "embed")
    for copy in copies:
        if embedding not in shapes or not _same(tensor(copy), tensor(embedding)):
            raise InputError(
                f"{source} holds {copy}, which differs from the embedding although its "
                f"configuration ties the two; set tie_word_embeddings to false, or remove the "
                f"tensor"
            )
    return {name: shape for name, shape in shapes.items() if name not in copies}


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two tensors are equal bit for bit, compared row by row."""
    return (a.shape, a.dtype) == (b.shape, b.dtype) and all(
        x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True)
    )


def check(
    spec: ModelSpec,
    rows: Iterable[weight_maps.Row],
    expected: list[Stored],
    shapes: Mapping[str, tuple[int, ...]],
    source: str,
) -> None:
    """Refuses a file that lacks a tensor, holds one too many, or one of another shape."""
    names = {item.name for item in expected}
    model = f"a {spec.family} model of {spec.num_layers} layers"
    missing, extra = names - set(shapes), set(shapes) - names
    if missing and missing <= weight_maps.names_of(rows, "head"):
        raise InputError(
            f"{source} lacks {_some(missing)} although its configuration says that the head is not "
            f"tied to the embedding; set tie_word_embeddings to true or fetch the missing tensor"
        )
    if missing:
        raise InputError(
            f"{source} lacks {_some(missing)}, which {model} needs; fetch the checkpoint again, "
            f"whole"
        )
    if extra:
        raise InputError(
            f"{source} holds {_some(extra)}, which {model} does not use; only checkpoints whose "
            f"every tensor is understood are read"
        )
    for item in expected:
        if tuple(shapes[item.name]) != item.shape:
            raise InputError(
                f"{item.name} in {source} has shape {tuple(shapes[item.name])} where its "
                f"configuration asks for {item.shape}; the two belong to different models"
            )


def write(
    spec: ModelSpec, rows: Iterable[weight_maps.Row], params: Params
) -> Iterator[tuple[Stored, Callable[[], np.ndarray]]]:
    """Every tensor of the checkpoint, each made only when its function is called."""
    flat = flattened(params)
    shapes = weight_maps.tree_shapes(spec)
    if set(flat) != set(shapes):
        odd = set(flat) ^ set(shapes)
        raise InputError(
            f"the parameters and their specification differ in {_some(odd)}; save a tree together "
            f"with the specification it was made for"
        )
    for path, shape in shapes.items():
        if tuple(flat[path].shape) != shape:
            raise InputError(
                f"parameter {path} has shape {tuple(flat[path].shape)} where the specification "
                f"asks for {shape}; save a tree together with the specification it was made for"
            )
    length = weight_maps.sizes(spec)

    def make(item: Stored) -> np.ndarray:
        parts = [_place(np.asarray(flat[place]), item) for place in item.row.places]
        moved = weight_maps.to_stored(item.row, parts, length)
        if item.row.offset:
            moved = moved + np.asarray(item.row.offset, moved.dtype)
        return np.ascontiguousarray(moved)

    for item in stored(spec, rows):
        yield item, lambda item=item: make(item)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} as {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        subtree = tree
        for folder in folders:
            subtree = subtree.setdefault(folder, {})
        subtree[name] = value
    return tree


def flattened(tree: Mapping[str, Any], folder: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} as {"a/b": x}."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{folder}{name}/")
        else:
            flat[folder + name] = value
    return flat


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    first = ", ".join(names[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"
