"""Texts -> token store, in parallel and in order; a killed run goes on where it was."""

import collections
import hashlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
from jaxtyping import Int

from lminf.data import documents, store
from lminf.data.documents import Piece, Source, Split
from lminf.data.storage import Storage
from lminf.data.store import Facts
from lminf.data.tokenizers import Special, Tokenizer
from lminf.errors import InputError

COMMIT_TOKENS = 1 << 24  # one object of a store: smaller commits would write it several times
BATCH_CHARS, BATCH_PIECES = 1 << 20, 4096  # what a worker takes at a time
BATCHES_AHEAD = 3  # for each worker: bounds the memory of the process that reads
ALONE_BYTES = 4 << 20  # less text than this is tokenized before a second process has started

Progress = Callable[[int, int], None]  # (done, of), in bytes of the sources


class Item(NamedTuple):
    source: int
    piece: Piece


class Encoded(NamedTuple):
    """A batch of pieces as tokens."""

    ids: Int[np.ndarray, " _"]  # all, one after another
    sizes: list[int]  # tokens of each piece
    text_bytes: int
    digests: list[bytes]


def tokenize(
    patterns: Sequence[str],
    tokenizer: Tokenizer,
    out: str,
    *,
    name: str,
    end: str | None = None,
    field: str = "text",
    split: Split = "file",
    special: Special = "plain",
    workers: int | None = None,
    progress: Progress | None = None,
    memory: ts.Context | None = None,
    commit_tokens: int = COMMIT_TOKENS,
) -> Facts:
    """Facts of the finished store at `out`; the same whatever the number of workers.

    `name` is what the tokenizer was asked for by. `end` is the token after each document where the
    tokenizer declares none; `special` is as for Tokenizer.encode. Nothing is done
    where the finished store lies there already.
    """
    sources = documents.find(patterns, out=None if "://" in out else Path(out).expanduser())
    place = Storage(out, memory=memory)
    end_id = _end_id(tokenizer, end, name)
    bos_id = tokenizer.bos_id if tokenizer.add_bos else None
    listing = [(str(s.path), s.bytes, s.modified) for s in sources]
    request = {
        "tokenizer": tokenizer.digest, "end of documents": end_id, "field": field, "split": split,
        "special tokens": special,
        "list of sources": hashlib.sha256(repr(listing).encode()).hexdigest(),
    }  # fmt: skip
    finished = store.read_facts(place)
    if finished is not None:
        _check_finished(out, finished, sources, request)
        return finished
    vocab_size = tokenizer.vocab_size
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    writer = store.Writer(place, request=request, dtype=dtype)
    state = dict(writer.state or START)
    store.check_shape(place, store.PROGRESS, dict.fromkeys(START, int) | {"digest": bytes}, state)

    total = sum(source.bytes for source in sources)
    if workers is None:
        workers = 0 if total < ALONE_BYTES else len(os.sched_getaffinity(0))
    bytes_before = np.cumsum([0, *(source.bytes for source in sources)]).tolist()
    items = _items(sources, state, field=field, split=split)
    encoder = Encoder(tokenizer, bos_id, end_id, dtype, special)
    for batch, encoded in _encoded(_batches(items), encoder, workers):
        start = 0
        for item, size, digest in zip(batch, encoded.sizes, encoded.digests, strict=True):
            new_source = item.source != state["source"]
            state["pieces"] = 1 if new_source else state["pieces"] + 1
            state["source"] = item.source
            state["digest"] = hashlib.sha256(bytes.fromhex(state["digest"]) + digest).hexdigest()
            if item.piece.first and item.piece.last and not size:
                state["empty"] += 1
            else:
                ids = encoded.ids[start : start + size]
                writer.append(ids, ends_document=item.piece.last)
            start += size
        state["bytes"] += encoded.text_bytes
        if writer.pending >= commit_tokens:
            writer.commit(dict(state))
        if progress:
            progress(min(bytes_before[batch[-1].source] + batch[-1].piece.bytes_read, total), total)
    writer.commit(dict(state))
    if not writer.tokens:
        raise InputError(f"{', '.join(patterns)} hold no text; name texts to read")
    facts = Facts(
        tokenizer=name, tokenizer_digest=tokenizer.digest, vocab_size=vocab_size, dtype=dtype,
        bos_id=bos_id, end_id=end_id, tokens=writer.tokens, documents=writer.documents,
        text_bytes=state["bytes"], empty_documents=state["empty"], field=field, split=split,
        special=special,
        sources=tuple({"name": str(s.path), "bytes": s.bytes} for s in sources),
        text_digest=state["digest"],
    )  # fmt: skip
    writer.finish(facts)
    return facts


# Where the reading goes on: after that many pieces of that source.
START: dict[str, Any] = {"source": 0, "pieces": 0, "bytes": 0, "empty": 0, "digest": ""}


def _end_id(tokenizer: Tokenizer, end: str | None, name: str) -> int:
    if end is not None:
        token_id = tokenizer.backend.token_to_id(end)
        if token_id is None:
            raise InputError(f"the tokenizer {name} has no token {end!r} to end documents with; "
                             f"give one of its tokens with --end")  # fmt: skip
        return token_id
    if not tokenizer.eos_ids:
        raise InputError(f"the tokenizer {name} declares no token that ends a text; name one of "
                         f"its tokens with --end")  # fmt: skip
    return tokenizer.eos_ids[0]


def _check_finished(
    out: str, facts: Facts, sources: Sequence[Source], request: dict[str, Any]
) -> None:
    stored = {
        "tokenizer": facts.tokenizer_digest, "end of documents": facts.end_id,
        "field": facts.field, "split": facts.split, "special tokens": facts.special,
    }  # fmt: skip
    differing = [name for name, value in stored.items() if request[name] != value]
    if [(s["name"], s["bytes"]) for s in facts.sources] != [
        (str(s.path), s.bytes) for s in sources
    ]:
        differing.append("list of sources")
    if differing:
        raise InputError(f"{out} already holds a finished store of another {differing[0]}; name "
                         f"another place with --out")  # fmt: skip


def _items(
    sources: Sequence[Source], state: dict[str, Any], *, field: str, split: Split
) -> Iterator[Item]:
    """All pieces from where `state` says on."""
    skip = state["pieces"]
    for index in range(state["source"], len(sources)):
        for number, piece in enumerate(documents.read(sources[index], field=field, split=split)):
            if number >= skip:
                yield Item(index, piece)
        skip = 0


def _batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    batch, chars = [], 0
    for item in items:
        batch.append(item)
        chars += len(item.piece.text)
        if chars >= BATCH_CHARS or len(batch) >= BATCH_PIECES:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


# --- Encoding -------------------------------------------------------------------------------------


class Encoder(NamedTuple):
    """Pieces -> tokens, with what stands before and after documents."""

    tokenizer: Tokenizer
    bos_id: int | None
    end_id: int
    dtype: str  # the store's: half of what the tokenizer gives has to be sent and held
    special: Special

    def __call__(self, pieces: Sequence[Piece]) -> Encoded:
        parts, sizes, size_bytes, digests = [np.empty(0, np.int32)], [], 0, []
        prefix = np.array([] if self.bos_id is None else [self.bos_id], np.int32)
        suffix = np.array([self.end_id], np.int32)
        for piece in pieces:
            data = piece.text.encode()
            size_bytes += len(data)
            digests.append(hashlib.sha256(bytes([piece.first, piece.last]) + data).digest())
            if piece.first and piece.last and not data:
                sizes.append(0)  # a document without text
                continue
            ids = [self.tokenizer.encode(piece.text, special=self.special)]
            ids = [prefix, *ids] if piece.first else ids
            ids = [*ids, suffix] if piece.last else ids
            sizes.append(sum(map(len, ids)))
            parts += ids
        ids = np.concatenate(parts).astype(self.dtype)
        return Encoded(ids, sizes, size_bytes, digests)


def _encoded(
    batches: Iterator[list[Item]], encoder: Encoder, workers: int
) -> Iterator[tuple[list[Item], Encoded]]:
    """Each batch with its tokens, in order."""
    if not workers:
        for batch in batches:
            yield batch, encoder([item.piece for item in batch])
        return
    # Spawned: tensorstore's threads do not survive a fork.
    pool = futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(encoder,)
    )
    waiting: collections.deque[tuple[list[Item], futures.Future]] = collections.deque()
    try:
        for batch in batches:
            task = pool.submit(_encode, [item.piece for item in batch])
            # The text goes to the worker; only where it came from is needed here.
            waiting.append((_without_text(batch), task))
            if len(waiting) >= workers * BATCHES_AHEAD:
                done, task = waiting.popleft()
                yield done, task.result()
        while waiting:
            done, task = waiting.popleft()
            yield done, task.result()
    except BrokenProcessPool as error:
        raise InputError(
            f"one of {workers} tokenizing processes was killed, perhaps for lack of memory; run "
            f"the command again, which goes on from the last commit, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _without_text(batch: Sequence[Item]) -> list[Item]:
    return [Item(item.source, item.piece._replace(text="")) for item in batch]


def _start(encoder: Encoder) -> None:
    """In a new worker: one thread each, since there are as many workers as cores."""
    global _encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = encoder


def _end_with_parent() -> None:
    """Workers hold both ends of their queue: a killed parent would leave them waiting for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _encode(pieces: Sequence[Piece]) -> Encoded:
    return _encoder(pieces)


_encoder: Encoder  # of this worker process
