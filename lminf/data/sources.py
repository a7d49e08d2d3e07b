"""Texts to read: a file, or the reference documentation that every Python interpreter carries."""

import hashlib
from pathlib import Path

from lminf.errors import InputError


def python_topics() -> str:
    """The interpreter's own reference: its topics sorted by name, joined by blank lines."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def read_text(path: str | Path) -> str:
    """A UTF-8 file's text."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read the text file {path}: {error.strerror}; give a readable file"
        ) from error
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: byte {raw[error.start]:#04x} at offset {error.start}; "
            f"convert it to UTF-8"
        ) from error
    if not text.strip():
        raise InputError(f"{path} holds no text ({len(raw)} bytes); give a file with text")
    return text


def text_of(path: str | None) -> str:
    """The file's text, or the interpreter's documentation where no file is named."""
    return read_text(path) if path else python_topics()


def digest(text: str) -> str:
    """First 16 hex digits of the SHA-256 of its UTF-8 bytes: tells whether two texts are one."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
