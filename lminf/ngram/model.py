"""Language models over an index: the ∞-gram, and its mixture with a neural model.

P∞ is that of the next token after the longest suffix of the text that occurs in the corpus; with a
neural model P = λ P∞ + (1 − λ) P_neural, where λ is one number where P∞ is sparse (all of it is on
one token) and another elsewhere. Source: Liu et al. 2024, arXiv:2401.17377. For scoring: its
authors saw mixtures go astray while they generate.
"""

import abc
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int

from lminf import ranges
from lminf.data.tokenizers import Tokenizer
from lminf.errors import InputError
from lminf.lm.generate import TextStream
from lminf.lm.lm import LM
from lminf.lm.protocol import Score, SequentialModel, check_apart
from lminf.ngram.index import Index
from lminf.ngram.next_tokens import infgram_ntd
from lminf.ranges import Range

BISECTIONS = 60  # of a weight: to the last bit of a float64


class TokenModel(SequentialModel):
    """A LanguageModel that is defined by its log-probabilities of next tokens."""

    tokenizer: Tokenizer

    @abc.abstractmethod
    def log_probs(
        self, prompts: Sequence[Int[np.ndarray, " _"]], *, last: int = 1
    ) -> Float32[np.ndarray, "B last V"]:
        """Log-probabilities of the token after each of the `last` tokens of every prompt, nats."""

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        """Token ids; an empty text is refused."""
        if not text:
            raise InputError("a text is empty; give at least one character")
        return self.tokenizer.encode(text)

    def next(self, prompts: Sequence[str]) -> Float32[np.ndarray, "B V"]:
        return self.log_probs([self.encode(prompt) for prompt in prompts])[:, 0]

    def score_one(self, prompt: str, continuation: str) -> Score:
        if not continuation:
            raise InputError("a continuation is empty; give at least one character")
        # Spaces at the end of a prompt belong to the continuation, as for LM.
        prompt_tokens, tokens = self.encode(prompt.rstrip()), self.encode(prompt + continuation)
        check_apart(prompt_tokens, tokens, prompt, continuation)
        log_probs = self.log_probs([tokens[:-1]], last=len(tokens) - len(prompt_tokens))[0]
        return Score.of(log_probs, tokens[len(prompt_tokens) :])

    def generate_one(self, prompt: str, *, max_new_tokens: int, stop: Sequence[str] = ()) -> str:
        tokens, stream = self.encode(prompt), TextStream(self.tokenizer, stop)
        text = ""
        for _ in range(max_new_tokens):
            token = int(self.log_probs([tokens])[0, 0].argmax())
            text += stream.feed(token)
            tokens = np.append(tokens, token)
            if stream.done:
                break
        return text + stream.finish()


@dataclass(frozen=True)
class InfiniGramLM(TokenModel):
    """The ∞-gram. Where a document of the corpus ends, the tokenizer's end of text follows."""

    index: Index
    tokenizer: Tokenizer

    def __post_init__(self):
        facts = self.index.facts
        if facts is not None and facts.tokenizer_digest != self.tokenizer.digest:
            raise InputError(f"the index was built with the tokenizer {facts.tokenizer}, and not "
                             f"with that of this model; build it again")  # fmt: skip

    @property
    def end_id(self) -> int:
        """The end-of-text token; an unused id where the tokenizer has none."""
        return self.tokenizer.eos_ids[0] if self.tokenizer.eos_ids else self.tokenizer.vocab_size

    @property
    def vocab_size(self) -> int:
        return max(self.tokenizer.vocab_size, self.end_id + 1)

    def probs(
        self, prompts: Sequence[Int[np.ndarray, " _"]], *, last: int = 1
    ) -> tuple[Float64[np.ndarray, "B last V"], Bool[np.ndarray, "B last"]]:
        """(probabilities after each of the `last` tokens of every prompt, whether they are sparse);
        they are of all occurrences, none left out.
        """
        contexts = [prompt[: len(prompt) - i] for prompt in prompts for i in reversed(range(last))]
        ntd = infgram_ntd(self.index, contexts, max_support=None)
        token = np.where(ntd.token == self.index.encoding.separator, self.end_id, ntd.token)
        if len(token) and int(token.max()) >= self.vocab_size:
            raise InputError(
                f"the index holds token {int(token.max())} and the tokenizer has "
                f"{self.vocab_size}: it is of another one; build it again"
            )
        probs = np.zeros((len(contexts), self.vocab_size))
        np.add.at(probs, (ntd.prompt, token), ntd.counts / ntd.prompt_count[ntd.prompt])
        sparse = np.bincount(ntd.prompt, minlength=len(contexts)) == 1
        shape = (len(prompts), last)
        return probs.reshape(*shape, -1), sparse.reshape(shape)

    def log_probs(
        self, prompts: Sequence[Int[np.ndarray, " _"]], *, last: int = 1
    ) -> Float32[np.ndarray, "B last V"]:
        with np.errstate(divide="ignore"):
            return np.log(self.probs(prompts, last=last)[0]).astype(np.float32)

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "B D"]:
        """Token counts of each text, normalised to length 1, in place of hidden states."""
        counts = np.stack([np.bincount(self.encode(text), minlength=self.vocab_size)
                           for text in texts])  # fmt: skip
        return (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)


# --- Mixtures -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MixtureWeights:
    """The weights λ of the ∞-gram in a mixture."""

    sparse: Annotated[float, Range(min=0, max=1)]  # where its estimate is sparse
    non_sparse: Annotated[float, Range(min=0, max=1)]

    def __post_init__(self):
        ranges.check(self)

    def at(self, sparse: Bool[np.ndarray, " *B"]) -> Float64[np.ndarray, " *B"]:
        return np.where(sparse, self.sparse, self.non_sparse)

    def nll(
        self,
        infgram: Float[np.ndarray, " T"],
        sparse: Bool[np.ndarray, " T"],
        neural: Float[np.ndarray, " T"],
    ) -> Float64[np.ndarray, " T"]:
        """The mixture's NLL (nats) of tokens to which the models give these probabilities."""
        weight = self.at(sparse)
        return -np.log(weight * infgram + (1 - weight) * neural)


def fit_weights(
    infgram: Float[np.ndarray, " T"],
    sparse: Bool[np.ndarray, " T"],
    neural: Float[np.ndarray, " T"],
) -> MixtureWeights:
    """The maximum-likelihood weights for validation tokens with these probabilities.

    A group without tokens has the weight 0.
    """
    parts = (_likeliest(infgram[rows], neural[rows]) for rows in (sparse, ~sparse))
    return MixtureWeights(*parts)


def _likeliest(first: Float[np.ndarray, " T"], second: Float[np.ndarray, " T"]) -> float:
    """The λ in [0, 1) with the largest mean log(λ first + (1 − λ) second), which is concave in λ:
    where its slope changes sign.
    """
    low, high = 0.0, 1.0
    difference = np.asarray(first, np.float64) - second
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        rises = (difference / (second + middle * difference)).sum() > 0
        low, high = (middle, high) if rises else (low, middle)
    return low


@dataclass(frozen=True)
class Mixture(TokenModel):
    """λ P∞ + (1 − λ) P_neural, of models with one tokenizer."""

    neural: LM
    ngram: InfiniGramLM
    weights: MixtureWeights

    tokenizer: Tokenizer = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "tokenizer", self.neural.tokenizer)
        if self.tokenizer.digest != self.ngram.tokenizer.digest:
            raise InputError("the models of a mixture have different tokenizers; build the index "
                             "with that of the neural model")  # fmt: skip

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        return self.neural.encode(text)[0]

    def log_probs(
        self, prompts: Sequence[Int[np.ndarray, " _"]], *, last: int = 1
    ) -> Float32[np.ndarray, "B last V"]:
        logits = self.neural.logits(prompts, last=last).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        neural = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        begins = int(self.tokenizer.add_bos)  # the corpus has no BOS
        probs, sparse = self.ngram.probs([prompt[begins:] for prompt in prompts], last=last)
        if probs.shape[-1] > neural.shape[-1]:
            raise InputError("the tokenizer has more tokens than the neural model; use its own")
        weight = self.weights.at(sparse)[..., None]
        mixed = (1 - weight) * neural
        mixed[..., : probs.shape[-1]] += weight * probs
        return np.log(mixed).astype(np.float32)

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "B D"]:
        return self.neural.embed(texts)


class Perplexity(NamedTuple):
    """Perplexities of the neural model alone and of the mixture."""

    neural: float
    mixture: float

    @property
    def improvement(self) -> float:
        """1 − (PPL − 1) / (PPL_neural − 1): 1 is a certain prediction of every token."""
        return 1 - (self.mixture - 1) / (self.neural - 1)
