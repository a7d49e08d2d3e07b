"""A text as rows of words, and words as units of one kind: what models of bytes, characters,
subwords and words are compared on, word by word.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer, models, trainers

from lminf.errors import InputError

WORD = re.compile(r"\w+|[^\w\s]+")  # punctuation is apart
STOP, UNKNOWN = 0, 1  # the unit that ends a word, and what training has none of
END = "\n"  # of a word among subwords, whose last one has the end in it


@dataclass(frozen=True, eq=False)
class Words:
    """Rows of words in a mixed order, those after the first `train` ones held out."""

    types: tuple[str, ...]  # the different words
    rows: Int[np.ndarray, "N W"]  # of types
    train: int

    @cached_property
    def trained(self) -> list[str]:
        """The words of the rows to train on."""
        return [self.types[index] for index in self.rows[: self.train].ravel()]


def rows_of(text: str, *, words: int, longest: int, held_out: float) -> Words:
    """The text in rows of so many words, each cut to its first `longest` characters."""
    all_words = [word[:longest] for word in WORD.findall(text)]
    count = len(all_words) // words
    train = count - max(1, round(count * held_out))
    if train < 1:
        raise InputError(
            f"the text has {len(all_words)} words, which are {count} rows of {words}; name a "
            f"longer text, or give fewer words a row"
        )
    types, ids = np.unique(all_words[: count * words], return_inverse=True)
    order = np.random.default_rng(0).permutation(count)  # the same for all models and seeds
    return Words(tuple(types.tolist()), ids.reshape(count, words)[order], train)


@dataclass(frozen=True, eq=False)
class Units:
    """How every word is spelled, with what ends it."""

    spelled: Int[np.ndarray, "types c"]  # then -1
    size: int  # of the vocabulary

    @property
    def within(self) -> Int[np.ndarray, "types c"]:
        """Without the unit that ends a word."""
        return np.where(self.spelled == STOP, -1, self.spelled)[:, :-1].astype(np.int32)

    @property
    def known(self) -> Bool[np.ndarray, " types"]:
        """Words that can be spelled."""
        return (self.spelled != UNKNOWN).all(-1)

    def lengths(self, rows: Int[np.ndarray, "B W"]) -> Int[np.ndarray, " B"]:
        """Units of each row."""
        return (self.spelled >= 0).sum(-1)[rows].sum(-1)


def in_units(kind: str, words: Words, *, vocab: int) -> Units:
    """The words in bytes, in the characters that training has, or in `vocab` subwords of it."""
    if kind == "byte":
        return _units(([byte + 2 for byte in word.encode()] for word in words.types), 258)
    if kind == "character":
        ids = {char: index for index, char in enumerate(sorted(set("".join(words.trained))), 2)}
        spelled = ([ids.get(char, UNKNOWN) for char in word] for word in words.types)
        return _units(spelled, len(ids) + 2)
    backend = Tokenizer(models.BPE(unk_token="unknown"))
    trainer = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=vocab, min_frequency=2, show_progress=False, special_tokens=["", "unknown"]
    )
    backend.train_from_iterator((word + END for word in words.trained), trainer)
    size = backend.get_vocab_size()
    if size < vocab:
        raise InputError(
            f"the text supports a vocabulary of {size} subwords, not {vocab}; give more text or a "
            f"smaller --config.vocab"
        )
    encodings = backend.encode_batch([word + END for word in words.types])
    return _units((encoding.ids for encoding in encodings), size, ends=False)


def _units(spelled: Iterable[Sequence[int]], size: int, *, ends: bool = True) -> Units:
    rows = [[*units, STOP] if ends else units for units in spelled]
    table = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for row, units in zip(table, rows, strict=True):
        row[: len(units)] = units
    return Units(table, size)
