"""What evaluations, programs and ensembles ask of a language model, whatever it is made of.

The protocols, and base classes of models that answer one prompt after another.
"""

import abc
from collections.abc import Callable, Sequence, Sized
from typing import NamedTuple, Protocol, Required, TypeAlias, TypedDict, runtime_checkable

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
    prompt_tokens: Int[np.ndarray, " P"],
    tokens: Int[np.ndarray, " T"],
    prompt: str,
    continuation: str,
) -> None:
    """Refuses a continuation without tokens of its own, where `tokens` are those of it and the
    prompt: the probability of one that is merged with the prompt's end is none of
    the continuation.
    """
    if np.array_equal(prompt_tokens, tokens):
        raise InputError("a continuation is empty; give at least one character")
    if not np.array_equal(prompt_tokens, tokens[: len(prompt_tokens)]):
        raise InputError(
            f"the tokenizer merges the beginning of {continuation[:40]!r} with the end of its "
            f"prompt ({prompt[-40:]!r}); begin it with a space, or end the prompt elsewhere"
        )


OnAnswer: TypeAlias = Callable[[int, str], None]  # (index of the prompt, its complete answer)


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `TextGenerator.generate`, for those that pass them on."""

    max_new_tokens: Required[int]
    stop: Sequence[str]
    on_answer: OnAnswer | None


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


# --- One prompt after another ---------------------------------------------------------------------


class SequentialGenerator(abc.ABC):
    """A TextGenerator that answers one prompt after another."""

    @abc.abstractmethod
    def generate_one(self, prompt: str, *, max_new_tokens: int, stop: Sequence[str] = ()) -> str:
        """The answer to one prompt, as `TextGenerator.generate` defines it."""

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        on_answer: OnAnswer | None = None,
    ) -> list[str]:
        answers = []
        for index, prompt in enumerate(prompts):
            answers.append(self.generate_one(prompt, max_new_tokens=max_new_tokens, stop=stop))
            if on_answer:
                on_answer(index, answers[-1])
        return answers


class SequentialModel(SequentialGenerator):
    """The verbs of a LanguageModel that are the same for every text by itself; `next` and `embed`
    are left to the subclass.
    """

    @abc.abstractmethod
    def encode(self, text: str) -> Sized:
        """The tokens of a text."""

    @abc.abstractmethod
    def score_one(self, prompt: str, continuation: str) -> Score:
        """The probability of a continuation after its prompt."""

    def count_tokens(self, text: str) -> int:
        return len(self.encode(text))

    def score(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[Score]:
        return [self.score_one(p, c) for p, c in zip(prompts, continuations, strict=True)]


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings that are in it."""
    return text[: min((text.find(end) for end in stop if end in text), default=None)]
