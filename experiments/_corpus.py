"""The text of a study, with tokenizers of its own and a fixed held-out part."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int

from lminf.checkpoints import fetch
from lminf.config import closest
from lminf.data import bpe, sources
from lminf.data.tokenizers import Tokenizer
from lminf.errors import InputError

TEXTS = {"library": sources.python_library, "prose": sources.python_prose}
DESCRIPTIONS = {
    "library": "the source files of the Python standard library (tests aside) and the topics of "
    "the language reference, as the interpreter installs them (PSF licence)",
    "prose": "the standard library's docstrings of 200 characters and more and the topics of the "
    "language reference, as the interpreter installs them (PSF licence)",
}
HELD_OUT = 50_000  # characters, the end of the text: the same span for every vocabulary
PIECE = 4000  # characters: files are cut, so that the held-out text is a sample of all of them


@dataclass(frozen=True)
class Corpus:
    """Pieces of documents in a mixed order. Tokenizers and models see no held-out text."""

    name: str

    @cached_property
    def _text(self) -> str:
        pieces = [
            text[start : start + PIECE]
            for text in TEXTS[self.name]()
            for start in range(0, len(text), PIECE)
        ]
        return "\n\n".join(sorted(pieces, key=sources.digest))

    @property
    def train(self) -> str:
        return self._text[:-HELD_OUT]

    @property
    def held_out(self) -> str:
        return self._text[-HELD_OUT:]

    @cached_property
    def digest(self) -> str:
        return sources.digest(self._text)

    @cached_property
    def folder(self) -> Path:
        """Where tokenizers and tokens are kept between cells."""
        return fetch.cache_folder() / "studies" / f"{self.name}-{self.digest}-{HELD_OUT}"

    def tokenizers(self, vocab_sizes: Sequence[int]) -> dict[int, Tokenizer]:
        pieces = [self.train[i : i + 10_000] for i in range(0, len(self.train), 10_000)]
        return bpe.sizes(pieces, vocab_sizes, cache=self.folder, key="train")

    def tokens(self, tokenizer: Tokenizer) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " H"]]:
        """Ids of the training text and of the held-out text."""
        path = self.folder / f"tokens-{tokenizer.digest}.npz"
        if not path.is_file():
            train, held_out = tokenizer.encode(self.train), tokenizer.encode(self.held_out)
            partial = path.with_suffix(".partial.npz")
            np.savez(partial, train=train.astype(np.uint16), held_out=held_out.astype(np.uint16))
            partial.replace(path)
        with np.load(path) as arrays:
            return arrays["train"].astype(np.int32), arrays["held_out"].astype(np.int32)


def corpus(name: str) -> Corpus:
    if name not in TEXTS:
        raise InputError(f"there is no corpus {name!r}; {closest(name, TEXTS)}")
    return Corpus(name)
