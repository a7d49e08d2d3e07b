import errno
import fcntl
import os
import shutil

import pytest

from lminf.errors import InputError
from lminf.run import lock


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    told = pytest.raises(InputError, match=f"in use by process {os.getpid()} on ")
    with lock.held(tmp_path), told, lock.held(tmp_path):
        pass
    with lock.held(tmp_path):
        pass


def test_what_a_dead_process_left_holds_nobody_up(tmp_path):
    (tmp_path / "lock").write_text('{"process": 1, "host": "elsewhere"}')
    with lock.held(tmp_path):
        pass


@pytest.mark.parametrize("text", ["my own notes", '{"process": 1}', "[]", "[" * 2000])
def test_a_file_of_that_name_which_is_no_lock_is_left_as_it_is(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    for wait in (False, True):
        refused = pytest.raises(InputError, match="is no lock of this program")
        with refused, lock.held(tmp_path, wait=wait):
            pass
    assert (tmp_path / "lock").read_text() == text


def test_a_disk_that_is_full_is_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(InputError, match="No space left on device; free"), lock.held(tmp_path):
        pass


def test_a_refusal_takes_the_lock_and_new_folders_back(tmp_path):
    for wait in (False, True):
        with pytest.raises(InputError, match="no"), lock.held(tmp_path / "a" / "b", wait=wait):
            raise InputError("no")
        assert not list(tmp_path.iterdir())
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "notes").write_text("mine")
        with pytest.raises(InputError, match="no"), lock.held(tmp_path / "a", wait=wait):
            raise InputError("no")
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["notes"]
        shutil.rmtree(tmp_path / "a")


def test_a_lock_that_was_taken_back_while_another_waited_holds_nobody(tmp_path, monkeypatch):
    flock, removed = fcntl.flock, []

    def late(handle, operation):
        flock(handle, operation)
        if not removed:
            removed.append((tmp_path / "lock").unlink())

    monkeypatch.setattr(fcntl, "flock", late)
    with lock.held(tmp_path):
        assert (tmp_path / "lock").exists()
        with pytest.raises(InputError, match="in use"), lock.held(tmp_path):
            pass
