import errno
import os

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
    for hold in (lock.held, lock.waited):
        with pytest.raises(InputError, match="is no lock of this program"), hold(tmp_path):
            pass
    assert (tmp_path / "lock").read_text() == text


def test_a_disk_that_is_full_is_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(InputError, match="No space left on device; free"), lock.held(tmp_path):
        pass
