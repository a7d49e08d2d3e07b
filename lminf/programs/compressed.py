"""Contexts reduced inside a model, behind the contract of lminf.programs.reduce: to embeddings that
it reads (Extensible Tokenization), or to keys and values that a side network looks up (LongMem).

What is reduced is read with the question by `next`, the likelihood of the token after both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from lminf.errors import InputError
from lminf.lm.budget import Budget
from lminf.lm.lm import LM
from lminf.models import heads
from lminf.models.extensible import ExtensibleTokenizer
from lminf.models.longmem import Bank, LongMem
from lminf.programs.reduce import Embeddings, KeyValues, room_for_context
from lminf.types import Params


@dataclass(frozen=True)
class Extensible:
    """A context as embeddings, by the smallest of the ratios with which they fit."""

    lm: LM
    tokenizer: ExtensibleTokenizer
    params: Params  # of the tokenizer
    ratios: Sequence[int]  # rising

    name = "extensible tokenization"

    def reduce(self, context: str, question: str, budget: Budget) -> Embeddings:
        """As `Reducer.reduce`."""
        room, tokens = room_for_context(context, question, budget), self.lm.encode(context)[0]
        positions = {each: self.tokenizer.kept_positions(len(tokens), each) for each in self.ratios}
        sizes = {ratio: len(kept) for ratio, kept in positions.items()}
        ratio = next((ratio for ratio, size in sizes.items() if size <= room), None)
        if ratio is None:
            raise InputError(
                f"the context of {len(tokens)} tokens takes {min(sizes.values())} embeddings at "
                f"{max(sizes)} tokens each, and {room} are left beside the question; give larger "
                f"ratios, or a larger budget"
            )
        values = _encode(self.tokenizer, self.params, self.lm.params, tokens[None], ratio)
        return Embeddings(values[0])

    def next(self, reduced: Embeddings, question: str) -> Float32[np.ndarray, " V"]:
        """Log-probabilities of the token after the context and the question, nats."""
        tokens = self.lm.tokenizer.encode(question)[None]
        past = reduced.values[None]
        return np.asarray(_after_embeddings(self.tokenizer, self.lm.params, past, tokens)[0])


@dataclass(frozen=True)
class Memory:
    """A context as the bank of keys and values of its segments. All are kept, as far as the bank
    reaches; the budget is of those that each token attends to.
    """

    lm: LM
    longmem: LongMem
    side: Params
    segment: int  # tokens

    name = "longmem"

    def reduce(self, context: str, question: str, budget: Budget) -> KeyValues:
        """As `Reducer.reduce`, of the whole segments at the end of the context."""
        room, tokens = room_for_context(context, question, budget), self.lm.encode(context)[0]
        if room < self.longmem.retrieved:
            raise InputError(
                f"every token attends to {self.longmem.retrieved} of the bank, and {room} are left "
                f"beside the question; give a side network that retrieves fewer, or a larger budget"
            )
        used = len(tokens) // self.segment * self.segment
        if not used:
            raise InputError(
                f"the context of {len(tokens)} tokens has no segment of {self.segment}; give a "
                f"longer one, or shorter segments"
            )
        bank = self.longmem.empty(1)
        for start in range(len(tokens) - used, len(tokens), self.segment):
            segment = tokens[None, start : start + self.segment]
            _, bank = _read(self.longmem, self.side, self.lm.params, bank, segment)
        filled = int(bank.filled)
        return KeyValues(bank.k[0, -filled:], bank.v[0, -filled:])

    def next(self, reduced: KeyValues, question: str) -> Float32[np.ndarray, " V"]:
        """Log-probabilities of the token after the context and the question, nats."""
        tokens = self.lm.tokenizer.encode(question)
        # Filled up to whole chunks; nothing sees what comes later.
        padded = np.pad(tokens, (0, -len(tokens) % self.longmem.chunk))[None]
        bank = self.longmem.empty(1).append(*(x[None] for x in reduced))
        hidden, _ = _read(self.longmem, self.side, self.lm.params, bank, padded)
        last = hidden[:, len(tokens) - 1]
        return np.asarray(_log_probs(self.lm.spec, self.lm.params, last)[0])


@partial(jax.jit, static_argnums=(0, 4))
def _encode(tokenizer: ExtensibleTokenizer, params, frozen, tokens: Int[Array, "1 T"], ratio: int):
    return tokenizer.encode(params, frozen, tokens, ratio)


@partial(jax.jit, static_argnums=0)
def _after_embeddings(tokenizer: ExtensibleTokenizer, frozen, past, tokens):
    return _log_probs(tokenizer.spec, frozen, tokenizer.read(frozen, past, tokens)[:, -1])


@partial(jax.jit, static_argnums=0)
def _read(longmem: LongMem, side, frozen, bank: Bank, tokens: Int[Any, "1 T"]):
    return longmem.read(side, frozen, bank, tokens)


@partial(jax.jit, static_argnums=0)
def _log_probs(spec, params, hidden: Float[Array, "B D"]):
    return jax.nn.log_softmax(heads.lm(spec, params, hidden), axis=-1)
