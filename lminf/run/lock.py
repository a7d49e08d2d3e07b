"""One process per folder: a lock that names who holds it, and that no dead process keeps."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from lminf.errors import InputError
from lminf.run.folder import LOCK, writing

LONGEST = 1000  # characters of a lock


@contextlib.contextmanager
def held(folder: Path, *, option: str = "--out") -> Iterator[None]:
    """Holds the folder while the block runs. The system lets go of it however the process ends.

    `option` is the one that names another folder. A file of that name which is no lock is refused.
    """
    path = folder / LOCK
    with _opened(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder} is in use by {_holder(file.read())}; wait for it, or name another "
                f"folder with {option}"
            ) from None
        with writing(path):
            file.truncate(0)
            json.dump({"process": os.getpid(), "host": socket.gethostname()}, file)
            file.flush()
        try:
            yield
        finally:
            file.truncate(0)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """The lock's file, made where there is none; refuses what is somebody's own file."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no lock of this program; move it away")
    with writing(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with os.fdopen(handle, "r+", encoding="utf-8", errors="replace") as file:
        text = file.read(LONGEST)
        if text and not _is_lock(text):
            raise InputError(f"{path} is no lock of this program; move it away")
        file.seek(0)
        yield file


def _is_lock(text: str) -> bool:
    try:
        return set(json.loads(text)) == {"process", "host"}
    except (ValueError, TypeError, RecursionError):
        return False


def _holder(text: str) -> str:
    if not _is_lock(text):  # taken a moment ago and not yet written
        return "another process"
    found = json.loads(text)
    return f"process {found['process']} on {found['host']}"


@contextlib.contextmanager
def waited(folder: Path) -> Iterator[None]:
    """Holds the folder for the moment that a block takes, after whoever has it now."""
    with _opened(folder / LOCK) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
