"""Builds indexes of token stores and texts. An interrupted build resumes; an unfinished index does
not open.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from lminf.atomic import atomic_write, check_space
from lminf.data import documents, store
from lminf.data.store import TokenStore
from lminf.data.tokenizers import Tokenizer
from lminf.errors import InputError, refusing
from lminf.ngram import sorting
from lminf.ngram.encoding import Encoding
from lminf.ngram.index import FACTS, PROGRESS, Facts, Index, open_index, read_facts
from lminf.ngram.shard import (
    METADATA,
    METADATA_OFFSETS,
    OFFSETS,
    TABLE,
    TOKENS,
    mapped,
    pointer_bytes,
)

FILES = (TOKENS, TABLE, OFFSETS, METADATA, METADATA_OFFSETS)
MOST_SLOTS = 1 << 39  # of a shard, as published
READ_TOKENS = 1 << 22  # of a token store at a time


class Corpus(NamedTuple):
    """Documents in a fixed order, and the facts that identify them."""

    sources: dict[str, Any]
    tokenizer: str  # a name
    tokenizer_digest: str
    read: Any  # () -> an iterator of (token ids, metadata or None), a document each
    vocab_size: int | None = None  # of the tokenizer; None: not known


def of_store(url: str) -> Corpus:
    """The documents of a finished token store, without BOS and end-of-text tokens."""
    opened = store.open_store(url)
    facts = opened.facts
    assert facts is not None
    sources = {"store": facts.text_digest, "documents": facts.documents, "tokens": facts.tokens}
    return Corpus(sources, facts.tokenizer, facts.tokenizer_digest, lambda: _stored(opened),
                  facts.vocab_size)  # fmt: skip


def _stored(opened: TokenStore) -> Iterator[tuple[Int[np.ndarray, " T"], None]]:
    facts, ends = opened.facts, opened.ends
    assert facts is not None
    first = 0  # document
    while first < len(ends):
        start = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, start + READ_TOKENS, side="right")))
        tokens = opened.read([start], [int(ends[last - 1]) - start])[0]
        for document in np.split(tokens, ends[first : last - 1] - start):
            begins = int(facts.bos_id is not None and document[:1] == facts.bos_id)
            ended = int(document[-1] == facts.end_id)
            yield document[begins : len(document) - ended], None
        first = last


def of_texts(
    patterns: Sequence[str], tokenizer: Tokenizer, *, name: str, out: Path | None = None
) -> Corpus:
    """The documents of files, of which none is in `out`; the tokenizer was asked for by `name`."""
    files = documents.find(patterns, out=out)
    sources = {"files": [[str(file.path), file.bytes, file.modified] for file in files]}

    def read() -> Iterator[tuple[Int[np.ndarray, " T"], Any]]:
        for file in files:
            parts: list[Int[np.ndarray, " _"]] = []
            number = itertools.count()
            for piece in documents.read(file):
                parts.append(tokenizer.encode(piece.text))
                if piece.last:
                    line = next(number)
                    if len(document := np.concatenate(parts)):
                        yield document, {"path": str(file.path), "linenum": line}
                    parts = []

    return Corpus(sources, name, tokenizer.digest, read, tokenizer.vocab_size)


def of_documents(
    token_ids: Sequence[Int[np.ndarray, " T"]], *, tokenizer: str, tokenizer_digest: str
) -> Corpus:
    """Documents that are given as token ids."""
    digest = hashlib.sha256()
    for document in token_ids:
        digest.update(len(document).to_bytes(8, "little") + np.asarray(document, "<i8").tobytes())
    return Corpus({"tokens": digest.hexdigest()}, tokenizer, tokenizer_digest,
                  lambda: ((document, None) for document in token_ids))  # fmt: skip


def build(
    corpus: Corpus,
    out: Path,
    *,
    encoding: Encoding,
    memory_bytes: int,
    shard_slots: int = MOST_SLOTS,
    progress: sorting.Progress = lambda done, of: None,
) -> Index:
    """The index of a corpus at `out`. Sorting takes at most so much memory; more than one shard is
    made where documents are more than `shard_slots` tokens. A finished index of the same
    corpus is opened as it is.
    """
    request = {
        **dataclasses.asdict(encoding), "tokenizer": corpus.tokenizer,
        "tokenizer_digest": corpus.tokenizer_digest,
        "sources": {**corpus.sources, "shard_slots": shard_slots},
    }  # fmt: skip
    if _finished(out, request):
        return open_index(out)
    shards = _written(out, request)
    if shards is None:
        _write_json(out / PROGRESS, {"request": request, "shards": None})
        shards = _Writer(out, encoding, shard_slots).write(corpus)
        _write_json(out / PROGRESS, {"request": request, "shards": shards})
    _check_space(out, encoding, shards)
    for number in range(len(shards)):
        table = out / f"{TABLE}.{number}"
        if not table.exists():
            tokens = np.frombuffer(mapped(out / f"{TOKENS}.{number}"), encoding.tokens)
            sorting.write_table(
                tokens, encoding, table, memory_bytes=memory_bytes, progress=progress
            )
    facts = Facts(**request, shards=shards, vocab_size=corpus.vocab_size)
    _write_json(out / FACTS, dataclasses.asdict(facts))
    (out / PROGRESS).unlink()
    return open_index(out)


def _finished(out: Path, request: dict[str, Any]) -> bool:
    """Whether the index is there; refuses a place where another one lies, or somebody's files."""
    if (out / FACTS).exists():
        _check_same(out, dataclasses.asdict(read_facts(out)), request, what="another index")
        (out / PROGRESS).unlink(missing_ok=True)  # killed between the last two steps
        return True
    if not (out / PROGRESS).exists():
        for name in FILES:
            if existing := next(out.glob(f"{name}.*"), None):
                raise InputError(f"{existing} is there already and belongs to no index of ours; "
                                 f"name another folder")  # fmt: skip
    return False


def _written(out: Path, request: dict[str, Any]) -> list[dict[str, int]] | None:
    """The shards whose tokens an unfinished build of the same request has written, if it has."""
    path = out / PROGRESS
    if not path.exists():
        return None
    with refusing(str(path), kind="progress of a build", advice="name another folder"):
        state = json.loads(path.read_bytes())
        earlier_request, shards = state["request"], state["shards"]
    if shards is not None:
        _check_same(out, earlier_request, request, what="the beginning of another index")
    for name in FILES:  # of a process that was killed
        for left in out.glob(f".{name}.*-*.part"):
            left.unlink()
        # Of tokens that were not all written, none are used, so another request may begin there.
        for left in out.glob(f"{name}.*") if shards is None else ():
            if left.name.removeprefix(f"{name}.").isdecimal():
                left.unlink()
    return shards


def _check_same(out: Path, earlier_request: Any, request: dict[str, Any], *, what: str) -> None:
    for name, value in json.loads(json.dumps(request)).items():
        if earlier_request.get(name) != value:
            raise InputError(f"{out} holds {what}, which differs in its {name}; name another "
                             f"folder, or give the command that it was begun with")  # fmt: skip


def _write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value) + "\n", encoding="utf-8")


def _check_space(out: Path, encoding: Encoding, shards: list[dict[str, int]]) -> None:
    missing = [shard["slots"] for number, shard in enumerate(shards)
               if not (out / f"{TABLE}.{number}").exists()]  # fmt: skip
    needed = sum(slots * pointer_bytes(slots * encoding.width) for slots in missing)
    check_space(out / TABLE, needed + 8 * max(missing, default=0))


class _Writer:
    """Writes all but the tables: tokens, offsets and metadata, a shard after another."""

    def __init__(self, out: Path, encoding: Encoding, shard_slots: int):
        self.out, self.encoding, self.shard_slots = out, encoding, shard_slots

    def write(self, corpus: Corpus) -> list[dict[str, int]]:
        """Slots and documents of each shard."""
        read, shards = corpus.read(), []
        pending = next(read, None)
        while pending is not None:
            shard, pending = self._write_shard(len(shards), pending, read)
            shards.append(shard)
        if not shards:
            raise InputError("the corpus holds no documents; give one that does")
        return shards

    def _write_shard(
        self, number: int, pending: Any, read: Iterator[Any]
    ) -> tuple[dict[str, int], Any]:
        """(slots and documents of a shard that begins with `pending`, the document after it)."""
        kind, starts, line_starts = self.encoding.tokens, [], []
        separator = np.array([self.encoding.separator]).astype(kind).tobytes()
        with contextlib.ExitStack() as stack:
            tokens, offsets, lines, line_offsets = (
                stack.enter_context(stack.enter_context(atomic_write(path)).open("wb"))
                for path in (self.out / f"{name}.{number}"
                             for name in (TOKENS, OFFSETS, METADATA, METADATA_OFFSETS))
            )  # fmt: skip
            while pending is not None:
                ids, metadata = pending
                slots = tokens.tell() // kind.itemsize
                if starts and slots + len(ids) + 2 > self.shard_slots:
                    break
                self._check(ids)
                starts.append(tokens.tell())
                line_starts.append(lines.tell())
                tokens.write(separator + ids.astype(kind).tobytes())
                lines.write(json.dumps(metadata).encode() + b"\n")
                pending = next(read, None)
            tokens.write(separator)
            offsets.write(np.array(starts, "<u8").tobytes())
            line_offsets.write(np.array(line_starts, "<u8").tobytes())
            slots = tokens.tell() // kind.itemsize
        return {"slots": slots, "documents": len(starts)}, pending

    def _check(self, ids: Int[np.ndarray, " T"]) -> None:
        if len(ids) and int(ids.max()) >= self.encoding.separator:
            raise InputError(
                f"token id {int(ids.max())} does not fit into {self.encoding.width} bytes, of "
                f"which the largest value separates documents; give a larger --width, 4 at most"
            )
