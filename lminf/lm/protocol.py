"""What evaluations, programs and ensembles ask of a language model, whatever it is made of."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int

from lminf.errors import InputError


class Score(NamedTuple):
    """How well a continuation follows its prompt."""

    log_prob: float  # nats, of all its tokens together
    tokens: int
    greedy: bool  # whether every token is the most likely one

    @classmethod
    def of(cls, log_probs: Float32[np.ndarray, "T V"], tokens: Int[np.ndarray, " T"]) -> "Score":
        """Of the tokens of a continuation, from what a model expects (nats) at each of them."""
        chosen = np.asarray(log_probs[np.arange(len(tokens)), tokens], np.float64)
        greedy = bool((log_probs.argmax(-1) == tokens).all())
        return cls(float(chosen.sum()), len(tokens), greedy)


def check_apart(
    own: Int[np.ndarray, " P"], tokens: Int[np.ndarray, " T"], prompt: str, continuation: str
) -> None:
    """Refuses a continuation without tokens of its own, where `own` are those of the prompt and
    `tokens` those of both: the probability of one that is merged with the prompt's end is none of
    the continuation.
    """
    if np.array_equal(own, tokens):
        raise InputError("a continuation is empty; give at least one character")
    if not np.array_equal(own, tokens[: len(own)]):
        raise InputError(
            f"the tokenizer merges the beginning of {continuation[:40]!r} with the end of its "
            f"prompt ({prompt[-40:]!r}); begin it with a space, or end the prompt elsewhere"
        )


OnAnswer: TypeAlias = Callable[[int, str], None]  # (index of the prompt, its complete answer)


class TextGenerator(Protocol):
    """What writes answers, such as a language model or a program over one."""

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        on_answer: OnAnswer | None = None,
    ) -> list[str]:
        """The most likely text after each prompt, token by token, without the prompt.

        `on_answer` is called as answers are complete, in any order: a caller that stores them
        loses none if it is interrupted.
        """
        ...


@runtime_checkable
class LanguageModel(TextGenerator, Protocol):
    """Four verbs on lists of texts; each list is one batch, answered in its order.

    Raises InputError for what the model cannot take: an empty prompt, one that is too long.
    """

    def count_tokens(self, text: str) -> int:
        """The tokens that the model reads the text as, special ones included."""
        ...

    def score(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[Score]:
        """The probability of each continuation after its prompt."""
        ...

    def next(self, prompts: Sequence[str]) -> Float32[np.ndarray, "B V"]:
        """Log-probabilities of the next token, nats."""
        ...

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "B D"]:
        """One vector a text: the mean of the final hidden states of its tokens."""
        ...
