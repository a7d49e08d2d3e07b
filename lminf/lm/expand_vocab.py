"""A language model with more tokens for a text that its tokenizer splits finely."""

import typing
from collections.abc import Sequence

from lminf.config import closest
from lminf.data import bpe, token_vectors
from lminf.data.tokenizers import Tokenizer
from lminf.errors import InputError
from lminf.lm.lm import LM
from lminf.surgery import vocab_map
from lminf.surgery.vocab_map import Row, Rows

MULTIPLE = 8  # of rows: what matrix units and sharded tables divide


def expand_vocab(lm: LM, texts: Sequence[str], *, tokens: int, rows: Rows, seed: int) -> LM:
    """The model with `tokens` new tokens or up to seven more, which fill its tables up to a
    multiple of 8. What it makes of texts without new tokens stays, but for their probability.

    InputError if the tokenizer is no BPE or the texts do not give so many.
    """
    if rows not in typing.get_args(Rows):
        raise InputError(f"rows={rows!r}; {closest(str(rows), typing.get_args(Rows))}")
    old = lm.tokenizer
    # Rows that the table has beyond its tokens are taken first.
    beyond = old.vocab_size + tokens - lm.spec.vocab_size
    count = tokens + (-(old.vocab_size + tokens) % MULTIPLE if beyond > 0 else 0)
    new = bpe.extend(old, texts, count, multiple=MULTIPLE if beyond > 0 else 1)
    mapping = vocab_map.vocab_map(
        new_rows(old, new, texts, rows),
        old_tokens=old.vocab_size, old_rows=lm.spec.vocab_size,
    )  # fmt: skip
    spec, params = vocab_map.expand(lm.spec, lm.params, mapping, seed=seed)
    return LM(spec, params, new, lm.policy, lm.dtype)


def new_rows(old: Tokenizer, new: Tokenizer, texts: Sequence[str], rows: Rows) -> list[Row]:
    """What the row of each token that `new` adds is made of."""
    count = new.vocab_size - old.vocab_size
    if rows == "random":
        return [{}] * count
    if rows == "mean":
        return [vocab_map.uniform(ids) for ids in bpe.pieces_of_added(old, new)]
    if rows == "focus":
        ids = [new.encode(text) for text in texts]
        vectors = token_vectors.token_vectors(ids, new.vocab_size)
        return vocab_map.focus_rows(vectors, old_tokens=old.vocab_size)
    merged = vocab_map.merge_rows(bpe.merges_of(new), old_tokens=old.vocab_size, count=count)
    if rows == "merge":
        return merged
    return vocab_map.align_rows(bpe.aligned(old, new, texts), merged, old_tokens=old.vocab_size)
