"""Token stores, finished and unfinished: manifests, arrays and their metadata."""

import json
from pathlib import Path

from lminf.data import store, tokenizing
from lminf.data.storage import Storage
from lminf.data.tokenizers import ByteTokenizer


def seeds(folder: Path) -> None:
    """A store, and one whose writer was stopped; the text lies in each."""
    for name in ("finished", "unfinished"):
        path = folder / name
        path.mkdir()
        text = path / "text.jsonl"
        text.write_text("".join(json.dumps({"text": "some words " * n}) + "\n" for n in range(9)))
        tokenizing.tokenize([str(text)], ByteTokenizer(), str(path / "s"), name="bytes")
    # An unfinished store is one whose facts are not written yet.
    place = Storage(str(folder / "unfinished" / "s"))
    facts, _ = place.json(store.FACTS)
    progress = {"request": {}, "tokens": facts["tokens"], "documents": facts["documents"],
                "state": {**tokenizing.START, "pieces": 9}}  # fmt: skip
    (folder / "unfinished" / "s" / store.PROGRESS).write_text(json.dumps(progress))
    place.remove(store.FACTS)


def read(path: Path) -> None:
    """Reads the whole store; of an unfinished one, what its writer goes on with."""
    url = str(path / "s")
    if path.name == "unfinished":
        progress, _ = store.read_progress(Storage(url))
        if progress is not None:
            store.Writer(Storage(url), request=progress["request"], dtype="uint16")
        return
    found = store.open_store(url)
    found.read([0, *found.ends[:-1]], [1] * len(found.ends))
    found.read([0], [min(found.tokens, 1000)])
