"""Files: those that are read are regular ones; those that are written, and folders, appear whole or
not at all.

What is written goes to a name beside the final one and is renamed when it is complete, so two
processes can write the same thing and a reader never meets half of it.
"""

import contextlib
import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lminf.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of a path, not of the disk: no rights, or something else stands in the path.
REFUSED = (
    errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EEXIST,
    errno.EISDIR, errno.ENAMETOOLONG, errno.ENOTEMPTY, errno.ELOOP, errno.EIO,
    errno.EBUSY,
)  # fmt: skip
PROBE = 1 << 16  # bytes: a full disk still makes empty files


def check_regular(path: Path) -> int:
    """The file's size in bytes. Pipes and devices are refused: they may never end."""
    facts = path.stat()
    if stat.S_ISDIR(facts.st_mode):
        raise InputError(f"{path} is a folder; name a file in it")
    if not stat.S_ISREG(facts.st_mode):
        raise InputError(f"{path} is a pipe or a device, not a regular file; write what it gives "
                         f"into a file first")  # fmt: skip
    return facts.st_size


def read_bytes(path: Path) -> bytes:
    """What a regular file holds; an OSError where it cannot be read."""
    check_regular(path)
    return path.read_bytes()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A name to write a file or folder under; becomes `path` if the block ends well."""
    temporary = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if temporary.is_file():
                with temporary.open("rb") as written:
                    os.fsync(written.fileno())  # after a power cut: the old file or the new one
            if temporary.is_dir() and path.is_dir():
                path.rmdir()  # an empty one; Windows does not rename over it
            os.replace(temporary, path)
        finally:
            if temporary.is_dir():
                shutil.rmtree(temporary)
            else:
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def without_remains(folder: Path) -> Iterator[None]:
    """If the block is refused, removes the folder and those above that it made and left empty."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except InputError:
        with contextlib.suppress(OSError):  # the first that is not empty
            for path in made:
                path.rmdir()
        raise


def check_space(path: Path, needed: int) -> None:
    """Refuses a place for `path` that cannot be written, or has not `needed` bytes free: a run
    learns of it before its work and not after."""
    with disk_errors(path):
        parent = _existing(path.absolute().parent)
        with tempfile.NamedTemporaryFile(dir=parent, prefix=f".{path.name}.") as probe:
            probe.write(b" " * PROBE)
            probe.flush()
            os.fsync(probe.fileno())
        free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(
            f"{path} needs {needed / 2**20:.0f} MiB and its disk has {free / 2**20:.0f} MiB free; "
            f"free some space, or name another folder"
        )


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a disk that is full, or a path that may not be written, into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*FULL, *REFUSED):
            raise
        full = error.errno in FULL
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; "
            f"{'free some space, or ' if full else ''}name another folder"
        ) from error


def _existing(path: Path) -> Path:
    if path.exists():
        return path
    if path.is_symlink():
        raise OSError(errno.ENOTDIR, f"{path} is a link to nothing")
    return _existing(path.parent)
