"""Training state on disk: onto another mesh, damaged, interrupted, the best."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lminf.checkpoints import native
from lminf.errors import InputError
from lminf.parallel import mesh

SLICED = P("fsdp", "tensor")


def state(value: float, sizes, spec=SLICED):
    """Two arrays and a count on a mesh of these sizes; and what a reader asks for."""
    laid_out = mesh.make(mesh.MeshShape(**{"data": 1, **sizes}))
    tree = {"w": np.arange(64, dtype=np.float32).reshape(8, 8) + value, "b": np.ones(3, np.float32)}
    placed = {"w": NamedSharding(laid_out, spec), "b": NamedSharding(laid_out, P())}
    return jax.tree.map(jax.device_put, tree, placed)


def abstract(tree):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


@pytest.fixture
def store(tmp_path):
    with native.Store(str(tmp_path / "checkpoints"), last=2, facts={"config": "{}"}) as made:
        yield made


def silent(text):
    raise AssertionError(text)


def test_it_comes_back_on_any_mesh_bit_for_bit(store):
    saved = state(0.5, {"data": 2, "fsdp": 2, "tensor": 2})
    store.save(7, saved)
    store.wait()
    for sizes, spec in (
        ({"fsdp": 4, "tensor": 2}, P("fsdp", "tensor")),
        ({"fsdp": 4, "tensor": 2}, P("tensor", "fsdp")),
        ({"data": 1}, P()),
    ):
        wanted = state(0.0, sizes, spec)
        step, found = store.restore(abstract(wanted), report=silent)
        assert step == 7
        assert found["w"].sharding == wanted["w"].sharding
        jax.tree.map(np.testing.assert_array_equal, found, saved)


def test_the_last_two_and_the_best_are_kept(store):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, None)):
        store.save(step, state(step, {"data": 1}), loss=loss)
    store.wait()
    assert [saved.step for saved in store.saved()] == [2, 4, 5]
    assert store.best().step == 2
    assert store.saved()[0].manifest["config"] == "{}"


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_read(store):
    for step in (1, 2):
        store.save(step, state(step, {"data": 1}))
    store.wait()
    largest = max(native._files(store.saved()[-1].path), key=lambda file: file.stat().length)
    damaged = bytearray(largest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    largest.write_bytes(bytes(damaged))
    said = []
    step, found = store.restore(abstract(state(0, {"data": 1})), report=said.append)
    assert step == 1
    assert found["w"][0, 0] == 1
    assert "00000002 is damaged (the bytes of" in said[0]
    (store.saved()[0].path / "_CHECKPOINT_METADATA").unlink()
    with pytest.raises(InputError, match=r"all 2 checkpoints in .* are damaged"):
        store.restore(abstract(state(0, {"data": 1})), report=said.append)


def test_an_interrupted_save_counts_as_nothing_and_is_written_over(store):
    store.save(1, state(1, {"data": 1}))
    store.save(2, state(2, {"data": 1}))
    store.wait()
    (store.saved()[-1].path / native.MANIFEST).unlink()
    assert store.restore(abstract(state(0, {"data": 1})), report=silent)[0] == 1
    store.save(2, state(3, {"data": 1}))
    store.wait()
    step, found = store.restore(abstract(state(0, {"data": 1})), report=silent)
    assert (step, float(found["w"][0, 0])) == (2, 3.0)


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    store = native.Store(str(tmp_path / "file" / "checkpoints"), last=1)
    with pytest.raises(InputError, match=r"cannot save .*00000001"):
        store.save(1, state(1, {"data": 1}))


def test_a_disk_that_fills_in_the_background_is_one_sentence(store, caplog):
    """A limit on the size of files stands for the full disk: TensorStore's threads meet it."""
    resource = pytest.importorskip("resource", reason="limits on files are POSIX")
    store.save(1, state(1, {"data": 1}))
    store.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"w": jax.random.normal(jax.random.key(0), (512, 512))}
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        store.save(2, large)
        with pytest.raises(InputError, match=r"cannot save .*00000002: .*free some space"):
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [saved.step for saved in store.saved()] == [1]
    assert not caplog.records  # no traceback beside it
