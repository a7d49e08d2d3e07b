"""What a run reads: token stores and texts by their paths, and what of them it is measured on."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorstore as ts
from jaxtyping import Int

from lminf.data import formats, sources, store, tokenizing
from lminf.data.store import TokenStore
from lminf.data.tokenizers import Tokenizer
from lminf.errors import InputError


def open_corpora(path: str | None, tokenizer: Tokenizer | None) -> list[TokenStore]:
    """Stores, in the order of their paths, which commas separate.

    A folder or an address is a token store. A file is tokenized now and held in memory: the
    documents of JSON and parquet, or one plain text. No path: the interpreter's documentation.
    Stores can be opened without their tokenizer.
    """
    if not path:
        tokenizer = _required(tokenizer, "the interpreter's documentation")
        return [store.from_documents([tokenizer.encode(sources.python_topics())])]
    parts = [part.strip() for part in path.split(",") if part.strip()]
    if not parts:
        raise InputError(f"no store or file is named in {path!r}; give paths between commas")
    return [_open(part, tokenizer) for part in parts]


def _open(path: str, tokenizer: Tokenizer | None) -> TokenStore:
    if "://" in path or Path(path).is_dir():
        return store.open_store(path, tokenizer_digest=tokenizer and tokenizer.digest)
    if not Path(path).exists():
        raise InputError(f"there is no file or folder {path}; check the path")
    tokenizer = _required(tokenizer, path)
    if formats.format_of(Path(path)) == formats.Format("text", None):
        return store.from_documents([tokenizer.encode(sources.read_text(path))])
    memory = ts.Context()
    tokenizing.tokenize([path], tokenizer, "memory://text", name="the model's", memory=memory)
    return store.open_store("memory://text", memory=memory)


def _required(tokenizer: Tokenizer | None, what: str) -> Tokenizer:
    if tokenizer is None:
        raise InputError(f"{what} is no token store; name a tokenizer for it with --tokenizer")
    return tokenizer


def hold_out(
    corpora: Sequence[TokenStore], share: float, *, at_most: int
) -> tuple[list[TokenStore], Int[np.ndarray, " _"]]:
    """(the corpora without that share of their ends, tokens of those ends).

    Of each end, its first tokens: as many of all corpora, and together `at_most`.
    """
    if not 0 <= share < 1:
        raise InputError(f"a share of {share} cannot be held out; give 0 or more and less than 1")
    kept = [store.tokens - int(store.tokens * share) for store in corpora]
    sizes = [
        min(store.tokens - first, -(-at_most // len(corpora)))
        for store, first in zip(corpora, kept, strict=True)
    ]
    ends = [
        store.read([first], [size])[0]
        for store, first, size in zip(corpora, kept, sizes, strict=True)
    ]
    left = [store.before(first) for store, first in zip(corpora, kept, strict=True)]
    return left, np.concatenate(ends).astype(np.int32)[:at_most]
