"""What a file of texts is: plain text, JSON or parquet, by its name and by what it holds."""

import json
import re
from pathlib import Path
from typing import Literal, NamedTuple

from lminf.data import byte_streams
from lminf.errors import InputError

HEAD_BYTES = 1 << 16

JSON = {".json", ".jsonl", ".ndjson", ".jsonlines", ".jl"}
# Anything may be kept under these names: records of JSON too.
UNSAID = {"", ".txt", ".text", ".log"}
PLAIN = UNSAID | {
    ".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".srt",
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".java", ".kt", ".scala",
    ".js", ".jsx", ".ts", ".tsx", ".go", ".rs", ".rb", ".php", ".pl", ".lua", ".r", ".m",
    ".swift", ".hs", ".ml", ".ex", ".exs", ".erl", ".clj", ".lisp", ".el", ".scm", ".dart", ".zig",
    ".f90", ".f", ".asm", ".s", ".sh", ".bash", ".zsh", ".ps1", ".sql", ".lean", ".v", ".vhdl",
    ".css", ".toml", ".yaml", ".yml", ".ini", ".cfg", ".cmake", ".proto",
}  # fmt: skip
PARQUET = {".parquet"}
# part-00000, text.00000-of-00100, v1.0: numbers of a part or a version are no ending
NUMBER = re.compile(r"\.[\d_-]*\d(?:-of-\d+)?$", re.IGNORECASE)

# First bytes of what is never text; those of a compression stand here for a second layer.
BINARY = {
    b"PK\x03\x04": "a zip archive",
    b"PK\x05\x06": "an empty zip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!\x1a": "a rar archive",
    b"\x04\x22\x4d\x18": "lz4 data",
    b"%PDF-": "a PDF document",
    b"{\\rtf": "an RTF document",
    b"\x89PNG": "a picture",
    b"GGUF": "a GGUF model",
    b"ARROW1": "an Arrow file",
    b"\x93NUMPY": "a NumPy array",
    b"SQLite format 3": "a database",
    **{magic: f"{name} data inside compressed data" for name, magic in byte_streams.MAGIC.items()},
}
# UTF-32 first: its mark begins with that of UTF-16.
OTHER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
TAR_MARK = slice(257, 262)
RECORD = re.compile(r'\s*(?:\[\s*)?\{\s*"(?:[^"\\]|\\.)*"\s*:')


class Format(NamedTuple):
    kind: Literal["text", "json", "parquet"]
    compression: str | None


def ending(path: Path) -> str:
    """The last part of the name that says what the file holds, in small letters."""
    name = path.name.lower()
    for packed in byte_streams.ENDINGS:
        name = name.removesuffix(packed)
    while match := NUMBER.search(name):
        name = name[: match.start()]
    return Path(name).suffix


def format_of(path: Path) -> Format:
    """Refuses by name what is no file of texts."""
    name = ending(path)
    if name not in PLAIN | JSON | PARQUET:
        raise InputError(
            f"{path} ends in {name}, which is no format of texts that is read; convert it to plain "
            f"text (.txt), JSON lines (.jsonl) or parquet, or leave it out"
        )
    with byte_streams.opened(path) as stream:
        head = b""
        while len(head) < HEAD_BYTES and (more := stream.read(HEAD_BYTES - len(head))):
            head += more
        compression = stream.compression
    what = next((what for magic, what in BINARY.items() if head.startswith(magic)), None)
    if head[TAR_MARK] == b"ustar":
        what = "a tar archive"
    if what == "bzip2 data inside compressed data" and head[4:5] not in (b"1", b"\x17"):
        what = None  # a text that begins with BZh
    if what is not None:
        raise InputError(f"{path} holds {what}, no text; unpack or convert it, or leave it out")
    for mark, encoding in OTHER_MARKS.items():
        if head.startswith(mark):
            raise InputError(f"{path} is {encoding} text by its byte order mark; convert it to "
                             f"UTF-8: iconv -f {encoding} -t UTF-8")  # fmt: skip
    if head.startswith(b"PAR1") or name in PARQUET:
        if compression is not None:
            raise InputError(f"{path} is parquet inside {compression} data, and parquet cannot be "
                             f"read from its beginning; unpack it first")  # fmt: skip
        return Format("parquet", None)
    if name in JSON or (name in UNSAID and _holds_records(head)):
        return Format("json", compression)
    return Format("text", compression)


def _holds_records(head: bytes) -> bool:
    """Whether a file without a telling name begins as JSON records do."""
    text = head.decode(errors="replace").removeprefix("\ufeff")
    if not RECORD.match(text):
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(text, len(text) - len(text.lstrip()))
    except (ValueError, RecursionError):
        return len(head) >= HEAD_BYTES  # the record may only be longer than the head
    return re.match(r"[ \t\r]*(?:\n|$)", text[end:]) is not None
