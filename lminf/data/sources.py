"""Texts to read: a file, or what every Python carries: its documentation and library sources."""

import ast
import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from lminf.data import documents
from lminf.errors import InputError

TEXT_CHARS = 1 << 28  # some 60 million tokens; more comes from a file that expands without end


def python_topics() -> str:
    """The interpreter's own reference: its topics sorted by name, joined by blank lines."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


# Folders of the library that are tests, tables, tools, or the packages of others.
_ASIDE = {
    "pydoc_data",
    "encodings",
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "ensurepip",
    "idlelib",
    "turtledemo",
}


def python_library() -> list[str]:
    """The library's source files (tests aside) and each topic of the reference: some 10 MB of text.

    In one mixed order, the same on every machine with this version of Python. Licence: PSF-2.0.
    """
    files = [(name, path.read_text(encoding="utf-8")) for name, path in _library_files()]
    return _mixed([*files, *_topics()])


def python_prose() -> list[str]:
    """The library's docstrings of 200 characters and more, and the topics: some 1.9 MB of prose."""
    topics = list(_topics())
    for name, path in _library_files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = [
            ast.get_docstring(node) or ""
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        topics += [(f"{name}:{i}", text) for i, text in enumerate(docs) if len(text) >= 200]
    return _mixed(topics)


def _library_files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not _ASIDE & set(parts) and not any(part.startswith("config-") for part in parts):
            yield "/".join(parts), path


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data import topics

    return iter(topics.topics.items())


def _mixed(named: list[tuple[str, str]]) -> list[str]:
    """The texts in the order of a digest of their names, so that any part of them is a sample."""
    named = [item for item in named if item[1].strip()]
    return [text for _, text in sorted(named, key=lambda item: digest(item[0]))]


def read_text(path: str | Path, *, field: str = "text") -> str:
    """A file's text; the documents of JSON and parquet, joined by blank lines."""
    texts, size = [], 0
    for piece in documents.read(documents.source_of(Path(path)), field=field):
        if not piece.text:
            continue
        if piece.first and texts:
            texts.append("\n\n")
        texts.append(piece.text)
        size += len(piece.text)
        if size > TEXT_CHARS:
            raise InputError(
                f"{path} holds more than {TEXT_CHARS >> 20} million characters, and a text is read "
                f"whole; give a part of it"
            )
    if not texts:
        raise InputError(f"{path} holds no text; give a file with text")
    return "".join(texts)


def text_of(path: str | None, *, field: str = "text") -> str:
    """The file's text, or the interpreter's documentation where no file is named."""
    return read_text(path, field=field) if path else python_topics()


def piped(read: Callable[[], str]) -> str:
    """What `read` takes from standard input, without a byte order mark."""
    try:
        return read().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(
            f"standard input is not UTF-8 text: byte {error.object[error.start]:#04x} at offset "
            f"{error.start}; convert it to UTF-8"
        ) from None


def digest(text: str) -> str:
    """First 16 hex digits of the SHA-256 of its UTF-8 bytes: tells whether two texts are one."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
