"""Generation: tokens one at a time through the cache, and text out of tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lminf.errors import InputError
from lminf.models import decoder

STEP = 512  # tokens: unbounded caches and padded prompts grow by this, so few shapes are compiled


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature=0 is greedy."""

    temperature: float = 0.0
    top_k: int | None = None  # draw among the k most likely
    top_p: float | None = None  # draw among the fewest that hold this probability

    def __post_init__(self):
        if self.temperature < 0:
            raise InputError(f"temperature={self.temperature}: give 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k={self.top_k}: give at least 1 token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}: give a probability in (0, 1]")


GREEDY = Sampling()


def sample(logits: Float[Array, "B V"], sampling: Sampling, *, key) -> Int[Array, " B"]:
    """The next token of each row."""
    if sampling.temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        chances = jax.nn.softmax(ordered, axis=-1)
        # A token stays when those before it hold less than top_p: the first always does.
        inside = jnp.cumsum(chances, axis=-1) - chances < sampling.top_p
        least = jnp.where(inside, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def generate_tokens(
    lm: Any,
    prompts: Sequence[Int[np.ndarray, " T"]],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    key: jax.Array,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Yields the next token of every row, up to max_new_tokens times. `lm` is an lminf.LM.

    Prompts of unequal length are padded on the left with negative positions, which nothing sees.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    if not len(prompts) or not lengths.min():
        raise InputError("a prompt has no tokens; give at least one")
    longest = int(lengths.max())
    chunk = STEP if longest > STEP else max(16, 1 << (longest - 1).bit_length())
    chunk = 4 * STEP if longest > 16 * STEP else chunk
    width = -(-longest // chunk) * chunk
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, width - len(prompt) :] = prompt
    position = (lengths - width).astype(np.int32)  # of the first column
    capacity = -(-(longest + max_new_tokens) // STEP) * STEP
    caches = lm.init_caches(batch=len(prompts), capacity=capacity)
    module, keys = lm.decoder, jax.random.split(key, max_new_tokens)
    token = None
    for start in range(0, width, chunk):
        piece = jnp.asarray(padded[:, start : start + chunk])
        token, caches = _advance(
            module, sampling, lm.params, piece, jnp.asarray(position + start), caches, keys[0]
        )
    position = lengths.astype(np.int32)
    for count in range(max_new_tokens):
        yield np.asarray(token)
        if count + 1 < max_new_tokens:
            token, caches = _advance(
                module, sampling, lm.params, token[:, None], jnp.asarray(position + count), caches,
                keys[count + 1],
            )  # fmt: skip


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _advance(module: decoder.Decoder, sampling, params, tokens, first, caches, key):
    """The token after these [B, C], which stand at positions `first` [B] and on; and the caches."""
    positions = first[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden, caches = module.apply({"params": params}, tokens, positions=positions, caches=caches)
    scores = decoder.logits(module.spec, params, hidden[:, -1])
    return sample(scores, sampling, key=key), caches


class TextStream:
    """Turns one row's tokens into text that is safe to show: whole characters, no stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self._decoder = tokenizer.incremental()
        self._ends = frozenset(tokenizer.eos_ids)
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self.done = False

    def feed(self, token: int) -> str:
        """The text that may now be shown."""
        if self.done:
            return ""
        if token in self._ends:
            return self.finish()
        self._held += self._decoder.feed(token)
        found = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if found:
            self.done = True
            return self._held[: min(found)]
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        shown, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return shown

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        if self.done:
            return ""
        self.done = True
        return self._held + self._decoder.finish()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
