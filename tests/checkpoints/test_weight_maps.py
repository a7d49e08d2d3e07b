import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lminf.checkpoints import gguf_weights, tensors, weight_maps
from lminf.checkpoints.families import FAMILIES
from lminf.errors import InputError
from tests.checkpoints import making

LENGTH = {"v": 7, "d": 6, "n": 4, "k": 2, "g": 2, "h": 8, "p": 4, "f": 5, "r": 9, "e": 3, "m": 10}
LENGTH |= {"one": 1, "two": 2, "three": 3}
TABLES = [
    *(family.rows for family in FAMILIES.values() if isinstance(family.rows, list)),
    *gguf_weights.TABLES.values(),
]
PATTERNS = sorted({row.axes for rows in TABLES for row in rows if " + " not in row.axes})
HF = {name: family.rows for name, family in FAMILIES.items()}


@given(axes=st.sampled_from(PATTERNS))
def test_every_pattern_is_undone_by_itself_read_backwards(axes):
    shape = weight_maps.shape_of(axes.partition("->")[0], LENGTH)
    x = np.arange(np.prod(shape)).reshape(shape)
    moved = weight_maps.rearrange(x, axes, LENGTH)
    assert moved.shape == weight_maps.shape_of(axes.rpartition("->")[2], LENGTH)
    np.testing.assert_array_equal(
        weight_maps.rearrange(moved, weight_maps.backwards(axes), LENGTH), x
    )


def test_heads_are_split_off_the_rows():
    w = np.arange(4 * 8 * 6).reshape(32, 6)
    moved = weight_maps.rearrange(w, "(n h) d -> d n h", LENGTH)
    assert moved[5, 3, 2] == w[3 * 8 + 2, 5]


def test_pairs_stored_side_by_side_become_two_halves():
    """llama.cpp stores rows `reshape(n, 2, h/2, d).swapaxes(1, 2)`; head 1, channel 5 is pair 1's
    second."""
    plain = np.arange(4 * 8 * 6).reshape(32, 6)
    as_stored = plain.reshape(4, 2, 4, 6).swapaxes(1, 2).reshape(32, 6)
    ours = weight_maps.rearrange(as_stored, "(n p two) d -> d n (two p)", LENGTH)
    np.testing.assert_array_equal(ours, plain.reshape(4, 8, 6).transpose(2, 0, 1))


def test_fused_heads_are_taken_apart():
    w = np.arange(4 * 3 * 8 * 6).reshape(96, 6)
    q, k, v = weight_maps.rearrange(w, "(n three h) d -> three d n h", LENGTH)
    assert (q[0, 1, 2], k[0, 1, 2], v[0, 1, 2]) == tuple(w[24 + i * 8 + 2, 0] for i in range(3))


def test_parts_of_different_sizes_are_joined_along_the_star():
    """Phi-3's rows: queries, then keys; Falcon's: key head by key head."""
    places = ("layers/attention/wq", "layers/attention/wk")
    one_after_the_other = weight_maps.Row("x", places, "(n* h) d -> d n h + (k* h) d -> d k h")
    w = np.arange((4 + 2) * 8 * 6).reshape(48, 6)
    q, k = weight_maps.to_tree(one_after_the_other, w, LENGTH)
    assert (q[5, 3, 2], k[5, 1, 2]) == (w[3 * 8 + 2, 5], w[(4 + 1) * 8 + 2, 5])
    np.testing.assert_array_equal(weight_maps.to_stored(one_after_the_other, (q, k), LENGTH), w)
    by_key_head = weight_maps.Row(
        "x", places, "(k g* h) d -> d (k g) h + (k one* h) d -> d (k one) h"
    )
    q, k = weight_maps.to_tree(by_key_head, w, LENGTH)
    assert (q[5, 3, 2], k[5, 1, 2]) == (w[(3 + 1) * 8 + 2, 5], w[(3 + 2) * 8 + 2, 5])
    np.testing.assert_array_equal(weight_maps.to_stored(by_key_head, (q, k), LENGTH), w)


@pytest.mark.parametrize(
    ("rows", "name", "spec"),
    [(HF[spec.family], spec.family, spec) for spec in making.SPECS.values()]
    + [(making.gguf_rows(name), name, spec) for name, spec in making.GGUF_SPECS.items()],
)
def test_import_of_export_is_the_same_tree(rows, name, spec):
    params = making.random_params(spec)
    if name.startswith("gemma"):  # adds 1 to norms, which rounds
        params = making.random_params(spec)
        for path, value in tensors.flattened(params).items():
            if path.endswith("scale"):
                value[...] = np.round(value * 64) / 64
    written = {item.name: make() for item, make in tensors.write(spec, rows, params)}
    again = tensors.read(
        spec,
        rows,
        shapes={name: value.shape for name, value in written.items()},
        tensor=written.__getitem__,
        dtype=np.float32,
        source="memory",
    )
    making.assert_same(params, again)


def test_progress_counts_tensors():
    spec, seen = making.BASE, []
    written = {
        item.name: make()
        for item, make in tensors.write(spec, HF["llama"], making.random_params(spec))
    }
    tensors.read(
        spec,
        HF["llama"],
        shapes={name: value.shape for name, value in written.items()},
        tensor=written.__getitem__,
        dtype=np.float32,
        source="memory",
        progress=lambda done, of: seen.append((done, of)),
    )
    assert seen == [(i + 1, len(written)) for i in range(len(written))]


def test_a_tree_that_is_not_the_specs_is_not_written():
    params = making.random_params(making.BASE)
    del params["head"]
    with pytest.raises(InputError, match="differ in head"):
        list(tensors.write(making.BASE, HF["llama"], params))
    params = making.random_params(making.BASE) | {"head": np.zeros((3, 3), np.float32)}
    with pytest.raises(InputError, match=r"head has shape \(3, 3\)"):
        list(tensors.write(making.BASE, HF["llama"], params))


def test_a_family_without_a_place_for_a_parameter_is_refused():
    spec = making.SPECS["gptj"]
    with pytest.raises(InputError, match="no tensor for head_bias"):
        list(tensors.stored(spec, HF["llama"]))
