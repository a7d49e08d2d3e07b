"""Token stores: a corpus as one array of tokens, with the place where each document ends.

A store is a folder, in a file system or a bucket:

    tokens/     zarr3 array [tokens] of uint16, or uint32 for vocabularies beyond 65,536
    ends/       zarr3 array [documents] of int64: the token after each document's last
    store.json  Facts; written last, so a store without it is unfinished
    progress.json  while it is being written: what is complete, and where the reading goes on
"""

import contextlib
import dataclasses
import functools
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Int

from lminf.data.storage import Storage
from lminf.errors import InputError

FORMAT = "lminf-tokens-1"
FACTS, PROGRESS = "store.json", "progress.json"
# An object of 32 MiB (uint16) holds many separately compressed pieces: few objects in a bucket, and
# a row of 2,048 tokens is read by decoding 64 KiB.
OBJECT_TOKENS, PIECE_TOKENS = 1 << 24, 1 << 15


@dataclass(frozen=True)
class Facts:
    """What a store holds and where it comes from."""

    tokenizer: str  # the name it was given by
    tokenizer_digest: str  # Tokenizer.digest
    vocab_size: int
    dtype: str
    bos_id: int | None  # before each document
    end_id: int  # after each document
    tokens: int
    documents: int
    text_bytes: int  # UTF-8
    empty_documents: int  # that the sources held beside; they were left out
    field: str
    split: str
    sources: tuple[Mapping[str, Any], ...]  # name and bytes of each file
    text_digest: str  # of all texts in their order, whatever files they lie in
    special: str = "parse"  # as for Tokenizer.encode; stores without it are of that time
    format: str = FORMAT


class TokenStore:
    """Tokens and document ends, read-only."""

    def __init__(
        self,
        facts: Facts | None,
        tokens: ts.TensorStore,
        ends: ts.TensorStore,
        place: Storage | None = None,
    ):
        self.facts, self._place = facts, place
        self._tokens, self._ends = tokens, ends
        self.tokens = int(tokens.shape[0])

    @functools.cached_property
    def ends(self) -> Int[np.ndarray, " documents"]:
        """The token after each document's last one, int64: 8 bytes a document in memory."""
        with self._errors():
            ends = np.asarray(self._ends.read().result())
        if len(ends) and (ends[0] < 0 or (np.diff(ends) < 0).any() or ends[-1] != self.tokens):
            raise InputError(
                f"the ends of documents in {self._place.url if self._place else 'this store'} do "
                f"not rise to its {self.tokens:,} tokens: it is damaged; write it again"
            )
        return ends

    def before(self, token: int) -> "TokenStore":
        """The part of the corpus up to, and without, that token."""
        complete = int(np.searchsorted(self.ends, token, side="left"))
        ends = np.append(self.ends[:complete], token) if token else self.ends[:0]
        return TokenStore(self.facts, self._tokens[:token], ts.array(ends), self._place)

    def read(self, starts: Sequence[int], sizes: Sequence[int]) -> list[Int[np.ndarray, " _"]]:
        """`sizes[i]` tokens from `starts[i]` on, for all i at once."""
        waiting = [
            self._tokens[start : start + size].read()
            for start, size in zip(starts, sizes, strict=True)
        ]
        with self._errors():
            return [np.asarray(part.result()) for part in waiting]

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return self._place.errors("read") if self._place else contextlib.nullcontext()


def from_documents(documents: Sequence[Int[np.ndarray, " _"]]) -> TokenStore:
    """A store in memory of documents that already are tokens."""
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    tokens = np.concatenate(
        [np.asarray(d, np.uint32) for d in documents] or [np.empty(0, np.uint32)]
    )
    return TokenStore(None, ts.array(tokens), ts.array(ends))


def open_store(
    url: str, *, tokenizer_digest: str | None = None, memory: ts.Context | None = None
) -> TokenStore:
    """The finished store at a place; refused where another tokenizer wrote it."""
    place = Storage(url, memory=memory)
    facts = read_facts(place)
    if facts is None:
        progress, _ = read_progress(place)
        if progress is None:
            raise InputError(f"{url} holds no token store; make one with: lminf tokenize SOURCES "
                             f"--tokenizer MODEL --out {url}")  # fmt: skip
        raise InputError(
            f"the token store {url} is unfinished ({progress['documents']:,} documents are "
            f"complete); run the same `lminf tokenize` again, which goes on from there"
        )
    if tokenizer_digest not in (None, facts.tokenizer_digest):
        raise InputError(
            f"the token store {url} was written with the tokenizer {facts.tokenizer} (digest "
            f"{facts.tokenizer_digest[:12]}), not with the one of this model (digest "
            f"{tokenizer_digest[:12]}); tokenize the text again, or use that tokenizer"
        )
    tokens, ends = place.array("tokens"), place.array("ends")
    actual, stated = [
        [(tokens.dtype.name, tokens.shape), (ends.dtype.name, ends.shape)],
        [(facts.dtype, (facts.tokens,)), ("int64", (facts.documents,))],
    ]
    if actual != stated:
        raise InputError(
            f"the token store {url} is damaged: its arrays of tokens and of documents' ends are "
            f"{actual}, where {FACTS} says {stated}; write it again"
        )
    return TokenStore(facts, tokens, ends, place)


def read_facts(place: Storage) -> Facts | None:
    """The store's Facts; None where no finished store lies."""
    facts, _ = place.json(FACTS)
    if facts is None:
        return None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise InputError(
            f"{place.url}/{FACTS} is not of the format {FORMAT}; write the store again"
        )
    defaults = {"special": "parse"}
    facts = {**defaults, **facts}
    check_shape(place, FACTS, typing.get_type_hints(Facts), facts)
    if not 0 < facts["documents"] <= facts["tokens"]:
        raise InputError(f"{place.url}/{FACTS} is damaged: {facts['tokens']} tokens in "
                         f"{facts['documents']} documents; write the store again")  # fmt: skip
    return Facts(**{**facts, "sources": tuple(facts["sources"])})


def read_progress(place: Storage) -> tuple[dict[str, Any] | None, bytes]:
    """What an unfinished store says of itself, None where there is none; and its generation."""
    progress, generation = place.json(PROGRESS)
    if progress is not None:
        check_shape(place, PROGRESS, PROGRESS_SHAPE, progress)
    return progress, generation


PROGRESS_SHAPE = {"request": dict, "tokens": int, "documents": int, "state": dict | None}
# type of an entry -> whether a value of JSON is one
_FITS: dict[Any, Callable[[Any], bool]] = {
    int: lambda v: type(v) is int and 0 <= v < 1 << 62,
    int | None: lambda v: v is None or _FITS[int](v),
    str: lambda v: isinstance(v, str),
    bytes: lambda v: isinstance(v, str) and re.fullmatch("([0-9a-f]{2})*", v) is not None,
    dict: lambda v: isinstance(v, dict),
    dict | None: lambda v: v is None or isinstance(v, dict),
    tuple[Mapping[str, Any], ...]: lambda v: (
        isinstance(v, list)
        and all(isinstance(s, dict) and {"name", "bytes"} <= s.keys() for s in v)
    ),
}


def check_shape(place: Storage, name: str, shape: Mapping[str, Any], content: Any) -> None:
    """Refuses an object of a store that lacks an entry, or has one of another name or type."""
    if not isinstance(content, dict):
        raise InputError(f"{place.url}/{name} is damaged: it holds no object; name another place")
    for entry in {**shape, **content}:
        if entry not in content or entry not in shape or not _FITS[shape[entry]](content[entry]):
            value = json.dumps(content.get(entry))[:60]
            said = f"{entry} = {value}" if entry in content else f"no {entry}"
            raise InputError(f"{place.url}/{name} is damaged: it has {said}; write the store again "
                             f"into another place")  # fmt: skip


class Writer:
    """Appends tokens and ends to a store; what `commit` has returned from is never lost."""

    def __init__(self, place: Storage, *, request: Mapping[str, Any], dtype: str):
        """Goes on with the unfinished store of the same request, if one lies there."""
        self._place, self._request = place, request
        progress, generation = read_progress(place)
        if progress is None:
            place.check_absent(("tokens", "ends"))
        else:
            _same_request(place.url, progress["request"], request)
        self.tokens: int = progress["tokens"] if progress else 0
        self.documents: int = progress["documents"] if progress else 0
        self.state: Any = (
            progress["state"] if progress else None
        )  # the caller's, as of the last commit
        # Claims the place, so that the next commit of any other process that writes here fails.
        self._generation = self._put_progress(generation)
        kinds = {"tokens": dtype, "ends": "int64"}
        self._arrays = {
            name: place.array(name, write=True)
            if self.tokens
            else place.array(name, metadata=_metadata(kind))
            for name, kind in kinds.items()
        }
        self._buffers: dict[str, list[np.ndarray]] = {"tokens": [], "ends": []}
        self.pending = 0  # tokens appended since the last commit

    def append(self, ids: Int[np.ndarray, " _"], *, ends_document: bool) -> None:
        self._buffers["tokens"].append(ids)
        self.pending += len(ids)
        if ends_document:
            end = np.array([self.tokens + self.pending], np.int64)
            self._buffers["ends"].append(end)

    def commit(self, state: Any) -> None:
        """Makes what was appended last, and `state` with it."""
        self.tokens = self._extend("tokens", self.tokens)
        self.documents = self._extend("ends", self.documents)
        self.pending, self.state = 0, state
        # Last: a process that is killed before leaves tokens beyond `tokens`, which the next one
        # overwrites with the same ones.
        self._generation = self._put_progress(self._generation)

    def finish(self, facts: Facts) -> None:
        """Turns what was committed into a finished store."""
        for name, size in (("tokens", self.tokens), ("ends", self.documents)):
            with self._place.errors("write"):
                self._arrays[name].resize(exclusive_max=[size]).result()
        _, absent = self._place.json(FACTS)
        self._place.put_json(FACTS, dataclasses.asdict(facts), replaces=absent)
        self._place.remove(PROGRESS)

    def _put_progress(self, replaces: bytes) -> bytes:
        progress = {"request": self._request, "tokens": self.tokens, "documents": self.documents,
                    "state": self.state}  # fmt: skip
        return self._place.put_json(PROGRESS, progress, replaces=replaces)

    def _extend(self, name: str, start: int) -> int:
        parts = self._buffers[name]
        if not parts:
            return start
        values = np.concatenate(parts)
        stop = start + len(values)
        with self._place.errors("write"):
            array = self._arrays[name]
            array = array.resize(exclusive_max=[stop], expand_only=True).result()
            array[start:stop].write(values.astype(array.dtype.numpy_dtype, copy=False)).result()
            self._arrays[name] = array
        self._buffers[name] = []
        return stop


def _metadata(dtype: str) -> dict[str, Any]:
    """Of a new array without elements."""
    inner = [{"name": "bytes", "configuration": {"endian": "little"}},
             {"name": "zstd", "configuration": {"level": 3}}]  # fmt: skip
    sharding = {"chunk_shape": [PIECE_TOKENS], "codecs": inner}
    grid = {"name": "regular", "configuration": {"chunk_shape": [OBJECT_TOKENS]}}
    return {"shape": [0], "data_type": dtype, "chunk_grid": grid,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}]}  # fmt: skip


def _same_request(url: str, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in now:
        if stored.get(name) != now[name]:
            raise InputError(
                f"{url} holds the beginning of another store: its {name} differs; name another "
                f"place with --out, or finish that one first"
            )
