"""Training state on disk: onto another mesh, damaged, interrupted, the best."""

import json
import os

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lminf.checkpoints import manifest, native
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
    assert store.saved()[0].facts["config"] == "{}"


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_read(store):
    for step in (1, 2):
        store.save(step, state(step, {"data": 1}))
    store.wait()
    largest = max(manifest.files_in(store.saved()[-1].path), key=lambda file: file.stat().length)
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
    store.save(2, state(3, {"data": 1}))
    store.wait()
    assert [saved.step for saved in store.saved()] == [1, 2]
    assert (store.folder / "00000002.damaged" / manifest.NAME).exists()  # nothing is thrown away


def killed_while_saving(store, monkeypatch, step, value):
    """Orbax had finished, the manifest was not there yet."""
    store.wait()
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", lambda *_, **__: (_ for _ in ()).throw(SystemExit))
        store.save(step, state(value, {"data": 1}))
        with pytest.raises(SystemExit):
            store.wait()


def test_an_interrupted_save_counts_as_nothing_and_is_written_over(store, monkeypatch):
    store.own({})
    store.save(1, state(1, {"data": 1}))
    killed_while_saving(store, monkeypatch, 2, 2)
    (store.folder / "00000003.orbax-checkpoint-tmp").mkdir()
    store.check_folder()
    assert store.restore(abstract(state(0, {"data": 1})), report=silent)[0] == 1
    store.save(2, state(3, {"data": 1}))
    store.wait()
    step, found = store.restore(abstract(state(0, {"data": 1})), report=silent)
    assert (step, float(found["w"][0, 0])) == (2, 3.0)
    names = sorted(path.name for path in store.folder.iterdir())
    assert names == ["00000001", "00000002", "00000003.damaged", "run.json"]


def test_a_checkpoint_that_lost_its_manifest_counts_as_nothing_and_is_set_aside(store):
    store.own({})
    for step in (1, 2):
        store.save(step, state(step, {"data": 1}))
    store.wait()
    (store.saved()[-1].path / manifest.NAME).unlink()
    store.check_folder()
    assert store.restore(abstract(state(0, {"data": 1})), report=silent)[0] == 1
    store.save(2, state(3, {"data": 1}))
    store.wait()
    assert [saved.step for saved in store.saved()] == [1, 2]


# --- Nothing of anybody else is deleted -----------------------------------------------------------


def place(folder, name):
    """One of a user's things, by that name."""
    if name.endswith("/"):
        (folder / name).mkdir()
        (folder / name / "mine.txt").write_text("keep me")
    elif name.endswith("@"):
        os.symlink(folder.parent, folder / name[:-1])
    else:
        (folder / name).write_text("keep me")


THEIRS = (
    "photos/", ".git/", "notes.txt", "00000100/", "00000100@", "00000100", "link@", "7/",
    "00000100.incomplete/", "00000200.damaged", "00000003.orbax-checkpoint-tmp/", "run.json",
    "run.json/", "lock/", "checkpoint-100/", "000000100/", "\u0661" * 8 + "/",
)  # fmt: skip


@pytest.mark.parametrize("used", [False, True], ids=["new folder", "folder of a run"])
@pytest.mark.parametrize("name", THEIRS)
def test_a_folder_that_holds_something_else_is_refused_and_left_as_it_is(name, used, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    store = native.Store(str(folder), last=1)
    if used and not name.startswith("run.json"):
        store.own({"seed": 0})
    place(folder, name)
    before = sorted(str(path) for path in folder.rglob("*"))
    with pytest.raises(InputError, match="which is no checkpoint that this program wrote") as told:
        store.check_folder()
    assert name.rstrip("/@") in str(told.value)
    assert sorted(str(path) for path in folder.rglob("*")) == before


@pytest.mark.parametrize("name", ["photos/", ".git/", "notes.txt", "00000100/", "link@"])
def test_a_save_deletes_nothing_that_this_program_did_not_make(name, store):
    store.folder.mkdir()
    place(store.folder, name)
    for step in (1, 2, 3, 4):
        store.save(step, state(step, {"data": 1}))
    store.wait()
    assert [saved.step for saved in store.saved()] == [3, 4]
    kept = store.folder / name.rstrip("/@")
    assert kept.exists()
    assert not name.endswith("/") or (kept / "mine.txt").read_text() == "keep me"


@pytest.mark.parametrize("name", ["00000002/", "00000002@", "00000002"])
def test_a_save_does_not_write_over_what_has_its_name(name, store):
    store.save(1, state(1, {"data": 1}))
    store.wait()
    place(store.folder, name)
    with pytest.raises(InputError, match=r"00000002 is in the place of a new checkpoint"):
        store.save(2, state(2, {"data": 1}))


def test_a_file_put_into_a_checkpoint_keeps_it(store):
    store.save(1, state(1, {"data": 1}))
    store.wait()
    (store.folder / "00000001" / "notes.txt").write_text("the good one")
    for step in (2, 3, 4):
        store.save(step, state(step, {"data": 1}))
    store.wait()
    assert [saved.step for saved in store.saved()] == [1, 3, 4]


# --- Manifests ------------------------------------------------------------------------------------


def change(**fields):
    """A manifest with some fields set, or without those that are set to ..., and its checksum
    made right again: what is refused is its content."""

    def of(content):
        content = {k: v for k, v in (content | fields).items() if v is not ...}
        return {**content, "checksum": manifest._checksum_of(content)}

    return of


def file(name, value):
    return lambda content: change(files={**content["files"], name: value})(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda _: [], "holds no object"),
        (lambda _: None, "holds no object"),
        (lambda _: "text", "holds no object"),
        (lambda _: 3, "holds no object"),
        (lambda c: {**c, "loss": 1.0}, "has changed since it was written"),
        (lambda c: {**c, "checksum": None}, "has changed since it was written"),
        (change(step=None), "is of step 'None'"),
        (change(step="2"), "is of step '2'"),
        (change(step=1), "is of step '1'"),
        (change(step=True), "is of step 'True'"),
        (change(step=2.0), "is of step '2.0'"),
        (change(step=...), "lacks step"),
        (change(loss=...), "lacks loss"),
        (change(files=...), "lacks files"),
        (change(loss="low"), "has the loss 'low'"),
        (change(loss=False), "has the loss 'False'"),
        (change(files={}), "names no files"),
        (change(files=[]), "names no files"),
        (change(config=7), "has config = '7', which is no text"),
        (file("/etc/hostname", [1, 2]), "names '/etc/hostname', which is not in its folder"),
        (file("../run.json", [1, 2]), "names '../run.json', which is not in its folder"),
        (file("state/../../x", [1, 2]), "is not in its folder"),
        (file("", [1, 2]), "is not in its folder"),
        (file("a\0b", [1, 2]), "is not in its folder"),
        (file("gone", [1, 2]), "gone is missing"),
        (file("state", [1, 2]), "state is not a file"),
        (file("x", [-1, 2]), "not bytes and a checksum"),
        (file("x", [1]), "not bytes and a checksum"),
        (file("x", [1, 2, 3]), "not bytes and a checksum"),
        (file("x", ["1", 2]), "not bytes and a checksum"),
        (file("x", [True, 2]), "not bytes and a checksum"),
        (file("x", None), "not bytes and a checksum"),
        (file("\ud800", [1, 2]), ""),
        (file("n" * 5000, [1, 2]), ""),
    ],
)  # fmt: skip
def test_a_manifest_that_is_not_what_it_should_be_is_named_and_skipped(damage, reason, two):
    written = two.folder / "00000002" / manifest.NAME
    before = written.read_text()
    written.write_text(json.dumps(damage(json.loads(before))))
    expect_the_one_before(two, reason)
    written.write_text(before)


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"step": NaN}', "\xff", '{"step": ' + "9" * 5000 + "}"]
)
def test_a_manifest_that_is_not_json_is_named_and_skipped(text, two):
    written = two.folder / "00000002" / manifest.NAME
    before = written.read_text()
    written.write_bytes(text.encode("latin-1"))
    expect_the_one_before(two, "is not JSON")
    written.write_text(before)


def test_a_manifest_that_is_no_file_is_named_and_skipped(two):
    written = two.folder / "00000002" / manifest.NAME
    before = written.read_text()
    written.unlink()
    os.mkfifo(written)  # reading it would wait for ever
    expect_the_one_before(two, "is not a file")
    written.unlink()
    written.write_text(before)


def test_a_manifest_without_a_checksum_of_its_own_is_read_as_before(two):
    written = two.folder / "00000002" / manifest.NAME
    before = written.read_text()
    content = json.loads(before)
    del content["checksum"]
    written.write_text(json.dumps(content))
    assert two.saved()[-1].damage() is None
    written.write_text(before)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two checkpoints, at steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    with native.Store(str(folder), last=2, facts={"config": "{}", "source": None}) as store:
        for step in (1, 2):
            store.save(step, state(step, {"data": 1}))
    return store


def expect_the_one_before(store, reason):
    last = store.saved()[-1]
    assert last.step == 2
    assert reason in last.damage()
    assert store.saved()[0].damage() is None
    assert store.best() is None
    store.check_folder()


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
