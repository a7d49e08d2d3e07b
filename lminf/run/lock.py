"""One process per folder: a lock that names who holds it, and that no dead process keeps."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from lminf.errors import InputError
from lminf.run.folder import LOCK, writing


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds the folder while the block runs. The system lets go of it however the process ends."""
    path = folder / LOCK
    with writing(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with os.fdopen(handle, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder} is in use by {_holder(file.read())}; wait for it, or name another "
                f"folder with --out"
            ) from None
        with writing(path):  # the disk may be full already
            os.truncate(handle, 0)
            os.write(handle, json.dumps(
                {"process": os.getpid(), "host": socket.gethostname()}
            ).encode())  # fmt: skip
        try:
            yield
        finally:
            file.truncate(0)


def _holder(text: str) -> str:
    try:
        found = json.loads(text)
        return f"process {found['process']} on {found['host']}"
    except (ValueError, KeyError, TypeError):  # taken a moment ago and not yet written
        return "another process"


@contextlib.contextmanager
def waited(folder: Path) -> Iterator[None]:
    """Holds the folder for the moment that a block takes, after whoever has it now."""
    with writing(folder / LOCK):
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    with os.fdopen(handle, "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
