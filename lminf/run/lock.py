"""One process per folder: a lock that names who holds it, and that no dead process keeps."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from lminf.atomic import disk_errors
from lminf.errors import InputError
from lminf.run.folder import LOCK

LONGEST = 1000  # bytes of a lock


@contextlib.contextmanager
def held(folder: Path, *, option: str = "--out") -> Iterator[None]:
    """Holds the folder while the block runs. The system lets go of it however the process ends.

    `option` is the one that names another folder. A file of that name which is no lock is refused.
    """
    path = folder / LOCK
    with _opened(path) as (handle, text):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder} is in use by {_holder(text)}; wait for it, or name another folder with "
                f"{option}"
            ) from None
        with disk_errors(path):
            os.ftruncate(handle, 0)
            holder = {"process": os.getpid(), "host": socket.gethostname()}
            os.pwrite(handle, json.dumps(holder).encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(handle, 0)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[int, str]]:
    """The lock's file, made where there is none, and its text; refuses somebody's own file.

    Unbuffered: a full disk would refuse the same bytes again when the file is closed.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no lock of this program; move it away")
    with disk_errors(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        text = os.read(handle, LONGEST).decode(errors="replace")
        if text and not _is_lock(text):
            raise InputError(f"{path} is no lock of this program; move it away")
        yield handle, text
    finally:
        os.close(handle)


def _is_lock(text: str) -> bool:
    try:
        return set(json.loads(text)) == {"process", "host"}
    except (ValueError, TypeError, RecursionError):
        return False


def _holder(text: str) -> str:
    if not _is_lock(text):  # taken a moment ago and not yet written
        return "another process"
    holder = json.loads(text)
    return f"process {holder['process']} on {holder['host']}"


@contextlib.contextmanager
def waited(folder: Path) -> Iterator[None]:
    """Holds the folder for the moment that a block takes, after whoever has it now."""
    with _opened(folder / LOCK) as (handle, _):
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
