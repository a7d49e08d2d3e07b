"""A draft for speculative decoding: what the ∞-gram of a corpus gives most of the probability."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from lminf.errors import InputError
from lminf.lm.lm import LM
from lminf.lm.speculative import Proposal, Texts
from lminf.ngram.index import FACTS, PROGRESS, Index, open_index
from lminf.ngram.next_tokens import ntd


@dataclass(frozen=True)
class NGramDraft:
    """What followed more than half of the occurrences of the longest end of the text that occurs in
    a corpus, token by token. Nothing is proposed from where no token did, nor where not even the
    text's last token occurs: reading several tokens in vain is slower than plain decoding.
    """

    index: Index

    def start(self, lm: Any, prompts: Texts, **settings: Any) -> "NGramDraft":
        del lm, prompts, settings
        return self

    def propose(self, texts: Texts, k: int, *, key: jax.Array) -> Proposal:
        del key
        separator = self.index.encoding.separator
        ends = [_storable(text, separator) for text in texts]
        lengths = self.index.longest_suffix(ends)
        ends = [end[len(end) - n :] for end, n in zip(ends, lengths.tolist(), strict=True)]
        proposed, rows = np.full((len(texts), k), -1), np.flatnonzero(lengths)
        for step in range(k):
            if not len(rows):
                break
            counted = ntd(self.index, [ends[row] for row in rows])
            certain = 2 * counted.counts > counted.prompt_count[counted.prompt]
            certain &= counted.token != separator
            rows, tokens = rows[counted.prompt[certain]], counted.token[certain]
            proposed[rows, step] = tokens
            # With what followed it, the longest end is that of the longer text.
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
                ends[row] = np.append(ends[row], token)
        return Proposal(proposed)


def _storable(text: Int[np.ndarray, " _"], separator: int) -> Int[np.ndarray, " _"]:
    """The end of a text behind the last token that no document can hold."""
    beyond = np.flatnonzero(text >= separator)
    return text[beyond[-1] + 1 :] if len(beyond) else text


def ngram_draft(folder: str, *, model: str) -> Callable[[LM], NGramDraft]:
    """What makes the draft of the index in a folder for a model, which is called `model`."""
    path = Path(folder).expanduser()
    if not folder or not any((path / name).exists() for name in (FACTS, PROGRESS)):
        raise InputError(
            f"the draft ngram:{folder} names no index of `lminf ngram build`; write ngram:FOLDER, "
            f"of one that was built with --tokenizer {model}"
        )
    index = open_index(path)
    assert index.facts is not None
    built_with, digest = index.facts.tokenizer, index.facts.tokenizer_digest

    def of(lm: LM) -> NGramDraft:
        if digest != lm.tokenizer.digest:
            raise InputError(
                f"the index of the draft ngram:{folder} was built with the tokenizer {built_with}, "
                f"and {model} has another one, so its tokens mean something else; build an index "
                f"with --tokenizer {model}, or give prompt_lookup"
            )
        return NGramDraft(index)

    return of
