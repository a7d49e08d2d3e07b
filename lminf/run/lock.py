"""One process per folder: a lock that names who holds it, and that no dead process keeps."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from lminf.atomic import disk_errors, without_remains
from lminf.errors import InputError
from lminf.run.folder import LOCK

LONGEST = 1000  # bytes of a lock


@contextlib.contextmanager
def held(folder: Path, *, option: str = "--out", wait: bool = False) -> Iterator[None]:
    """Holds the folder, made where there is none, while the block runs; `wait`: after whoever has
    it now. The system lets go of it however the process ends.

    `option` is the one that names another folder. A file of that name which is no lock is refused.
    A block that ends in a refusal leaves no lock and no empty folder that was not there before.
    """
    path = folder / LOCK
    with without_remains(folder):
        with disk_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
        with _taken(path, option, wait):
            yield


@contextlib.contextmanager
def _taken(path: Path, option: str, wait: bool) -> Iterator[None]:
    """The lock of this process. One that it made goes with a refusal, while it still has it."""
    handle, new = _opened(path)
    try:
        text = os.read(handle, LONGEST).decode(errors="replace")
        if text and not _is_lock(text):
            raise InputError(f"{path} is no lock of this program; move it away")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise InputError(
                f"{path.parent} is in use by {_holder(text)}; wait for it, or name another folder "
                f"with {option}"
            ) from None
        if _removed(path, handle):  # by one that was refused meanwhile
            with _taken(path, option, wait):
                yield
            return
        try:
            with disk_errors(path):
                os.ftruncate(handle, 0)
                holder = {"process": os.getpid(), "host": socket.gethostname()}
                os.pwrite(handle, json.dumps(holder).encode(), 0)
            yield
        except InputError:
            if new:
                path.unlink(missing_ok=True)
            raise
        finally:
            os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _opened(path: Path) -> tuple[int, bool]:
    """The lock's file and whether it was made now; refuses what is no file.

    Unbuffered: a full disk would refuse the same bytes again when the file is closed.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no lock of this program; move it away")
    with disk_errors(path):
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
        except FileExistsError:
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o644), False


def _removed(path: Path, handle: int) -> bool:
    return not path.exists() or not os.path.samestat(path.stat(), os.fstat(handle))


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
