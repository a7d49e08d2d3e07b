"""Documents of several kinds of text, read where they are installed and never copied."""

import html.parser
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from lminf.data import documents, sources
from lminf.errors import InputError
from lminf.lm.lm import LM
from lminf.ngram import build
from lminf.ngram.encoding import Encoding
from lminf.ngram.index import Index

REFERENCE, CODE = "reference", "code"
SORTING_BYTES = 4 << 30  # of memory
LEAST_CHARS = 40  # of a paragraph of a page; shorter ones are names of buttons and links


def texts(entry: str) -> list[str]:
    """The documents of an entry of a config, in a mixed order: `reference` is the language
    reference of this Python, one document; `code` are the source files of its library; anything
    else is a file, a folder or a pattern of files, a document each.
    """
    if entry in ("", REFERENCE):
        return [sources.python_topics()]
    if entry == CODE:
        from pydoc_data import topics

        prose = set(topics.topics.values())
        return [text for text in sources.python_library() if text not in prose]
    files = sorted(documents.find([entry]), key=lambda each: sources.digest(each.path.name))
    return ["".join(piece.text for piece in documents.read(each)) for each in files]


def tokenised(
    lm: LM, entry: str, *, length: int, count: int
) -> list[tuple[Int[np.ndarray, " _"], str]]:
    """(tokens without BOS, digest) of the first `count` documents of an entry that have `length`
    tokens; refuses fewer.
    """
    selected = []
    for text in texts(entry):
        if len(selected) == count:
            break
        tokens = lm.tokenizer.encode(text) if len(text) >= length else ()  # a token has a character
        if len(tokens) >= length:
            selected.append((np.asarray(tokens, np.int32), sources.digest(text)))
    if len(selected) < count:
        raise InputError(
            f"{entry or REFERENCE} has {len(selected)} documents of {length} tokens, but {count} "
            f"were asked for; name a folder with more or longer ones"
        )
    return selected


def kind(entry: str) -> str:
    """What rows call an entry: its name, or the package whose files a pattern names."""
    parts: Sequence[str] = [part for part in entry.split("/") if part and "*" not in part]
    if "doc" in parts[:-1]:
        return parts[parts.index("doc") + 1]
    return parts[-1] if parts else REFERENCE


def indexed(folder: Path, lm: LM, documents: Sequence[Int[np.ndarray, " T"]]) -> Index:
    """The index of documents in the model's tokens."""
    digest = lm.tokenizer.digest
    corpus = build.of_documents(documents, tokenizer="the model's", tokenizer_digest=digest)
    encoding = Encoding(2 if lm.tokenizer.vocab_size < 1 << 16 else 4, "id")
    return build.build(corpus, folder, encoding=encoding, memory_bytes=SORTING_BYTES)


# --- Pages ----------------------------------------------------------------------------------------


def pages(entry: str) -> list[str]:
    """The documents of an entry (`texts`), of HTML their paragraphs, each once."""
    known: set[str] = set()
    if not entry.endswith(".html"):
        return texts(entry)
    paragraphs = []
    files = sorted(documents.find([entry]), key=lambda each: sources.digest(each.path.name))
    for file in files:
        parser = Paragraphs()
        parser.feed(file.path.read_text(encoding="utf-8"))
        lines = [line for line in dict.fromkeys(parser.lines) if line not in known]
        known.update(lines)
        if lines:
            paragraphs.append("\n".join(lines))
    return paragraphs


def first_characters(pages: Sequence[str], characters: int) -> Iterator[str]:
    """The pages, and of the last one what is left of so many characters."""
    for page in pages:
        if characters > 0:
            yield page[:characters]
        characters -= len(page)


class Paragraphs(html.parser.HTMLParser):
    """The text between tags outside of scripts and styles."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []
        self._skipped = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self._skipped += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._skipped -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        line = " ".join(data.split())
        if not self._skipped and len(line) >= LEAST_CHARS:
            self.lines.append(line)
