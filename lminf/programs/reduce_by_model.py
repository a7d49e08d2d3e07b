"""Contexts made to fit a budget by asking a model what to keep: see lminf.programs.reduce.

SemanticDeletion   deletes the words without which the text means nearly the same
Segments           keeps the segments that make the model sure of what follows the question
Summary            has the model write a shorter text
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Float

from lminf import ranges
from lminf.errors import InputError
from lminf.lm.budget import Budget
from lminf.lm.lm import LM
from lminf.lm.protocol import LanguageModel, TextGenerator
from lminf.programs import segment_reading
from lminf.programs.reduce import (
    WORD,
    Count,
    TextReducer,
    best_parts,
    longest_fitting,
    room_for_context,
)
from lminf.programs.segment_reading import SegmentReading
from lminf.ranges import Range

EMBEDDED = 32  # texts of one call of a model's `embed`
WORD_TOKENS = 2  # of a summary, by which a budget of tokens becomes one of words
SUMMARIZE = (
    "{context}\n\nSummarize the text above in at most {words} words. Keep every name and number "
    "that may be needed to answer this question: {question}\n\nThe summary:\n"
)


@dataclass(frozen=True)
class SemanticDeletion(TextReducer):
    """The context without the words that matter least to its embedding.

    A word's importance is 1 − cos(e(text), e(what is left without it)). The published form has one
    round, which finds it once for all words. The least important of them move the embedding alike,
    so that together they may move it farther than words drawn at random: each of several rounds
    deletes its share and looks at the words that are left again. `span` words are embedded at a
    time: a round over a whole text costs as many passes as it has words.
    Source: Liu et al. 2023, TCRA-LLM, arXiv:2310.15556.
    """

    model: LanguageModel
    span: Count | None = None  # words; None: the whole text
    rounds: Count = 8

    name = "semantic deletion"

    def __post_init__(self):
        ranges.check(self)
        check_embeds(self.model, self.name)

    def importance(
        self, words: Sequence[str], left: Sequence[int] | None = None
    ) -> Float[np.ndarray, " N"]:
        """Of each word of a text, or of those of its words that are left."""
        indices = range(len(words)) if left is None else left
        step, parts = self.span or max(len(words), 1), [np.zeros(0)]
        for start in range(0, len(words), step):
            inside = [words[index] for index in indices if start <= index < start + step]
            parts.append(self._in_span("".join(words[start : start + step]), inside))
        return np.concatenate(parts)

    def _in_span(self, text: str, left: Sequence[str]) -> Float[np.ndarray, " N"]:
        if len(left) < 2:  # without it there is no text
            return np.ones(len(left))
        without = ["".join([*left[:index], *left[index + 1 :]]) for index in range(len(left))]
        full, *shortened = unit_vectors(self.model, [text, *without])
        return 1 - np.stack(shortened) @ full

    def delete(self, text: str, rate: float) -> str:
        """The text without the share `rate` of its words, to the nearest number."""
        if not 0 <= rate <= 1:
            raise InputError(f"rate={rate} of words to delete; give a share from 0 to 1")
        words = WORD.findall(text)
        count = round(rate * len(words))
        gone = set(self._order(words, count)[:count])
        return "".join(word for index, word in enumerate(words) if index not in gone)

    def _order(self, words: Sequence[str], count: int) -> list[int]:
        """All words in the order in which they go, `count` of them in the rounds."""
        left, gone = np.arange(len(words)), []
        while len(gone) < count:
            batch = min(-(-count // self.rounds), count - len(gone))
            least = np.argsort(self.importance(words, left.tolist()), kind="stable")
            gone += left[least[:batch]].tolist()
            left = np.sort(left[least[batch:]])
        return gone + left.tolist()

    def shorten(self, context: str, question: str, budget: Budget) -> str:
        words = WORD.findall(context)
        last_first = self._order(words, len(words))[::-1]
        return best_parts(words, last_first, question, budget)


@dataclass(frozen=True)
class Segments(TextReducer):
    """The segments after which, and the question, the model is surest of the next token: XL3M's
    key context (lminf.programs.segment_reading) of the size of the budget.
    """

    lm: LM
    segment_len: Count  # tokens
    head_len: Annotated[int, Range(min=0, max=2**31 - 1)] = 0  # of the context's start, always kept

    name = "segments"

    def __post_init__(self):
        ranges.check(self)

    def shorten(self, context: str, question: str, budget: Budget) -> str:
        ids, context_ids = self.lm.encode(context + question)[0], self.lm.encode(context)[0]
        alike = ids[: len(context_ids)] == context_ids[: len(ids)]
        question_len = len(ids) - (len(alike) if alike.all() else int(alike.argmin()))
        bos = int(self.lm.tokenizer.add_bos)
        how = SegmentReading(self.segment_len, question_len, bos + self.head_len)
        needed = how.head_len + self.segment_len + question_len
        if needed > budget.size:
            raise InputError(
                f"head, segment and question take {needed} tokens and the budget is {budget.size}; "
                f"give shorter segments, or a larger budget"
            )
        kept = segment_reading.select_segments(self.lm, ids, how, room=budget.size)
        text = self.lm.tokenizer.decode(kept.tokens[bos : len(kept.tokens) - question_len])
        # Tokens of two segments that meet may be read as more than they were.
        return longest_fitting(lambda count: text[:count], len(text), question, budget)


@dataclass(frozen=True)
class Summary(TextReducer):
    """What the model writes when it is asked for a summary in as many words as the budget has
    room for, cut where it is longer. The sentences of the prompt are ours.
    """

    model: TextGenerator

    name = "summary"

    def shorten(self, context: str, question: str, budget: Budget) -> str:
        room = room_for_context(context, question, budget)
        prompt = SUMMARIZE.format(
            context=context, words=max(1, room // WORD_TOKENS), question=question.strip()
        )
        (reply,) = self.model.generate([prompt], max_new_tokens=room)
        if not (text := reply.strip()):
            raise InputError(
                f"the model wrote no summary of {context[:40]!r}…; ask another model, or reduce "
                f"by another method"
            )
        return longest_fitting(lambda count: text[:count], len(text), question, budget)


def check_embeds(model: object, method: str) -> None:
    """Refuses a model that gives no embeddings."""
    if not callable(getattr(model, "embed", None)):
        raise InputError(
            f"{method} compares embeddings, which {type(model).__name__} does not give; give a "
            f"model that has the verb embed"
        )


def unit_vectors(model: LanguageModel, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
    """The embedding of each text, of length 1."""
    groups = (texts[start : start + EMBEDDED] for start in range(0, len(texts), EMBEDDED))
    vectors = np.concatenate([model.embed(group) for group in groups]).astype(np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
