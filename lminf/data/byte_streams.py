"""The bytes of a file: expanded a bounded piece at a time where it is compressed, and decoded."""

import bz2
import codecs
import contextlib
import gzip
import importlib
import io
import itertools
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lminf.atomic import check_regular
from lminf.errors import InputError

BLOCK_BYTES = 1 << 20
# Four bytes of zstandard can stand for 128 KiB, and its reader gives all that it was fed at once.
FED_BYTES = 1 << 10
XZ_MEMORY_BYTES = 1 << 28  # `xz -9` needs 65 MiB; a file can ask for 4 GiB

# ending -> compression, and the bytes that each compression begins with
ENDINGS = {
    ".gz": "gzip", ".gzip": "gzip", ".zst": "zstandard", ".zstd": "zstandard",
    ".bz2": "bzip2", ".xz": "xz",
}  # fmt: skip
MAGIC = {
    "gzip": b"\x1f\x8b",
    "zstandard": b"\x28\xb5\x2f\xfd",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ\0",
}


class Stream:
    """The bytes of a file; whatever its libraries raise becomes one sentence."""

    def __init__(self, raw: BinaryIO, path: Path):
        self.path = path
        self.tell = raw.tell  # bytes of the file read so far, as it lies on the disk
        self._ahead = b""
        try:
            self.compression = compression_of(raw, path)
            self._expanded = self._expand(raw)
        except InputError:
            raise
        except Exception as error:
            raise self._broken(error) from error

    def read(self, size: int) -> bytes:
        """Some of the bytes that come next; none at the end."""
        if self._ahead:
            ahead, self._ahead = self._ahead, b""
            return ahead
        return self._call(self._expanded.read, size)

    def readline(self, size: int) -> bytes:
        return self._call(self._expanded.readline, size)

    def unread(self, data: bytes) -> None:
        """Gives `data` back: the next read returns it."""
        self._ahead = data

    def _expand(self, raw: BinaryIO) -> Any:
        if self.compression == "gzip":
            return gzip.GzipFile(fileobj=raw)
        if self.compression == "bzip2":
            return bz2.BZ2File(raw)
        if self.compression == "xz":
            return io.BufferedReader(_Frames(raw, _xz), BLOCK_BYTES)
        if self.compression == "zstandard":
            library = optional("zstandard", self.path)
            return io.BufferedReader(_Frames(raw, lambda: _Zstandard(library)), BLOCK_BYTES)
        return raw

    def _call(self, method: Callable[[int], bytes], size: int) -> bytes:
        try:
            return method(size)
        except InputError:
            raise
        except Exception as error:
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> InputError:
        return InputError(f"{self.path} cannot be read to its end ({error}); copy it again")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Stream]:
    """The expanded bytes of a regular file."""
    try:
        check_regular(path)
        raw = path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give a readable file") from error
    with raw:
        yield Stream(raw, path)


def compression_of(raw: BinaryIO, path: Path) -> str | None:
    """By the first bytes; an ending that says otherwise is an error."""
    head = raw.read(16)
    raw.seek(0)
    compression = next((name for name, magic in MAGIC.items() if head.startswith(magic)), None)
    if compression == "bzip2" and not (head[3:4].isdigit() and head[4:5] in b"1\x17"):
        compression = None  # a text that begins with BZh
    stated = ENDINGS.get(path.suffix.lower())
    if stated is not None and compression != stated:
        raise InputError(f"{path} is not {stated} data, although its name ends in {path.suffix}; "
                         f"copy it again, or rename it")  # fmt: skip
    return compression


class _Frames(io.RawIOBase):
    """The contents of compressed frames one after another; a file that was cut is an error."""

    def __init__(self, raw: BinaryIO, start: Callable[[], Any]):
        self._raw, self._start, self._frame = raw, start, None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            frame = self._frame
            if frame is None or frame.eof:
                # xz allows zero bytes between frames.
                packed = (frame.unused_data if frame else b"").lstrip(b"\0")
                packed = packed or self._raw.read(FED_BYTES)
                if not packed:
                    return 0
                frame = self._frame = self._start()
            else:
                packed = self._raw.read(FED_BYTES) if frame.needs_input else b""
                if frame.needs_input and not packed:
                    raise EOFError("it ends in the middle of its compressed data")
            self._ready = memoryview(frame.decompress(packed, BLOCK_BYTES))
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def _xz() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY_BYTES)


class _Zstandard:
    """A frame, with the attributes of the standard library's decompressors."""

    needs_input = True

    def __init__(self, library: Any):
        self._frame = library.ZstdDecompressor().decompressobj()

    def decompress(self, packed: bytes, size: int) -> bytes:
        del size  # bounded by how little it is fed
        return self._frame.decompress(packed)

    @property
    def eof(self) -> bool:
        return self._frame.eof

    @property
    def unused_data(self) -> bytes:
        return self._frame.unused_data


def optional(module: str, path: Path) -> Any:
    """A module of the extra `data`; pyarrow alone is 170 MB, so nobody needs it for the rest."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(
            f"{path} needs the package {module.split('.')[0]}; install it with: "
            f"pip install 'lminf[data]'"
        ) from None


# --- Characters -----------------------------------------------------------------------------------


def decoded(stream: Stream) -> Iterator[str]:
    """The text in blocks of characters, without its byte order mark."""
    path, decode = stream.path, codecs.getincrementaldecoder("utf-8")().decode
    bytes_read, lines, empty = 0, 0, True
    pending = b""  # bytes of a character that a block cut in two: the decoder holds them
    for number in itertools.count():
        block = stream.read(BLOCK_BYTES)
        if b"\0" in block:
            nul = block.index(b"\0")
            raise InputError(
                f"{path} line {lines + block.count(10, 0, nul) + 1} holds a zero byte (offset "
                f"{bytes_read + nul}): it is a binary file; leave it out"
            )
        try:
            text = decode(block, final=not block)
        except UnicodeDecodeError as error:
            nul = bytes_read - len(pending) + error.start
            line = lines + (pending + block)[: error.start].count(10) + 1
            raise InputError(
                f"{path} line {line} is not UTF-8 text: byte {(pending + block)[error.start]:#04x} "
                f"at offset {nul}; convert it to UTF-8 or leave it out"
            ) from None
        if not block:
            break
        bytes_read, lines = bytes_read + len(block), lines + block.count(10)
        pending = _unfinished(pending + block)
        empty = empty and not text.strip()
        yield text.removeprefix("\ufeff") if number == 0 else text
    if empty:
        raise InputError(f"{path} holds no text ({bytes_read} bytes); leave it out")


def _unfinished(data: bytes) -> bytes:
    """The first bytes of a character that the end of valid UTF-8 cuts in two."""
    for size in range(1, min(3, len(data)) + 1):
        lead = data[-size]
        if lead >= 0xC0:
            char_bytes = 2 + (lead >= 0xE0) + (lead >= 0xF0)
            return data[-size:] if size < char_bytes else b""
    return b""
