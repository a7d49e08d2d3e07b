"""LongPO's rounds: a model learns long prompts from the answers that it gives to short ones.

    short prompt    a chunk of a document and an instruction    its greedy answer is the better one
    long prompt     the document and the same instruction       its greedy answer is the worse one

A round makes such pairs with the model that the round before it trained, leaves out those that
teach nothing, and trains on the rest; long prompts grow from round to round.
Source: Chen et al. 2025, arXiv:2502.13922; the sentences of the prompts are ours.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int

from lminf.data.pairs import Pair
from lminf.errors import InputError
from lminf.lm.protocol import TextGenerator
from lminf.programs.recorded import Recorded, Row

ModelT = TypeVar("ModelT", bound=TextGenerator)

ASK = (
    "{chunk}\n\nWrite four different questions that the text above answers, each on a line of its "
    "own that begins with its number.\n"
)
QUESTION = re.compile(r"^\s*[1-4][.):]\s*(\S.*?)\s*$", re.MULTILINE)
PROMPT = "{context}\n\n{instruction}\nAnswer:"
QUESTION_TOKENS = 256  # for the four of them


class Prompts(NamedTuple):
    """One instruction after a chunk of a document, and after all of it."""

    short: str
    long: str


class AnswerPair(NamedTuple):
    """What a model answers to the short prompt, which is preferred, and to the long one."""

    prompts: Prompts
    chosen: str
    rejected: str

    def tokens(self, encode: Callable[[str], Int[np.ndarray, " _"]]) -> Pair:
        """As an objective reads it; `encode` is of the model that is trained."""
        chosen, rejected, long, short = (
            encode(text)
            for text in (self.chosen, self.rejected, self.prompts.long, self.prompts.short)
        )
        return Pair(chosen, rejected, prompt=long, reference_prompt=short)


def instruct(
    model: TextGenerator,
    document: str,
    *,
    chunk_len: tuple[int, int],
    key: Sequence[int],
) -> Prompts | None:
    """The prompts of a question that the model asks about a random chunk of the document; None
    where it writes no question. `chunk_len` is the least and the most characters of a chunk; `key`
    seeds what is drawn: the chunk, and which of four questions is kept.
    """
    least, most = chunk_len
    if not 1 <= least <= most <= len(document):
        raise InputError(
            f"chunks of {least} to {most} characters of a document of {len(document)}; give at "
            f"least 1 and at most what the shortest document has"
        )
    random = np.random.default_rng(key)
    length = int(random.integers(least, most + 1))
    start = int(random.integers(0, len(document) - length + 1))
    chunk = document[start : start + length]
    (reply,) = model.generate([ASK.format(chunk=chunk)], max_new_tokens=QUESTION_TOKENS)
    questions = QUESTION.findall(reply)
    if not questions:
        return None
    instruction = questions[int(random.integers(len(questions)))]
    return Prompts(*(PROMPT.format(context=text, instruction=instruction)
                     for text in (chunk, document)))  # fmt: skip


def answer_pairs(
    model: TextGenerator, prompts: Sequence[Prompts], *, max_new_tokens: int, batch: int
) -> list[AnswerPair]:
    """The pairs that teach something: both answers are there, and they differ. The model is asked
    `batch` prompts at a time.
    """
    pairs = []
    for start in range(0, len(prompts), batch):
        group = prompts[start : start + batch]
        chosen, rejected = (
            model.generate(texts, max_new_tokens=max_new_tokens)
            for texts in ([each.short for each in group], [each.long for each in group])
        )
        pairs += [AnswerPair(*answers) for answers in zip(group, chosen, rejected, strict=True)]
    return [
        pair for pair in pairs if pair.chosen and pair.rejected and pair.chosen != pair.rejected
    ]


def rounds(
    model: ModelT,
    lengths: Sequence[int],
    *,
    prompts_of: Callable[[TextGenerator, int], Sequence[Prompts]],
    train: Callable[[ModelT, Sequence[AnswerPair], int], ModelT],
    max_new_tokens: int,
    batch: int,
    name: str,
    rows: Sequence[Row] = (),
    record: Callable[[Row], object] = lambda row: None,
) -> Iterator[ModelT]:
    """The model after each round; `lengths` are those of the long prompts and rise, as by doubling.

    `prompts_of(model, length)` makes a round's prompts, the same whenever it is asked, and
    `train(model, pairs, round)` the next model, from this one and referring to it. Answers that
    `rows` hold are not asked again (`record` is given new ones, see `Recorded`), so with a `train`
    that resumes the rounds go on where they were. A round without a pair leaves the model as it is.
    """
    if any(later <= earlier for earlier, later in itertools.pairwise(lengths)):
        raise InputError(f"the rounds' lengths are {tuple(lengths)}; give lengths that rise")
    for index, length in enumerate(lengths):
        recorded = Recorded(model, f"{name}, round {index}", rows, record)
        pairs = answer_pairs(
            recorded, prompts_of(recorded, length), max_new_tokens=max_new_tokens, batch=batch
        )
        if pairs:
            model = train(model, pairs, index)
        yield model
