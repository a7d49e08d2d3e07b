"""Real text with a key-value sentence at each of several depths: read once, asked at every depth.

Copy gain and the margins of key-value questions are measured on the same document, so that one
reading serves every depth of both. Each document has its own text, keys and values. The sentences
are the multi-key needles of RULER (Hsieh et al. 2024, arXiv:2404.06654) with a word as the value:
one token, so that one distribution ranks all candidates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from lminf.errors import InputError

SENTENCE = "\nThe value of key {key} is {word}.\n"
QUESTION = "\n\nWhat is the value of key {key}? The value of key {key} is"
# Distinct first letters, so that a tokenizer of bytes tells them apart too.
WORDS = (
    "apple", "bridge", "candle", "dragon", "engine", "forest", "garden", "hammer", "island",
    "jacket", "kitchen", "ladder", "mountain", "needle", "ocean", "pencil", "queen", "river",
    "silver", "table", "umbrella", "violin", "window", "xylophone", "yellow", "zebra",
)  # fmt: skip

Encode = Callable[[str], Sequence[int]]  # text -> tokens, without BOS


@dataclass(frozen=True)
class Haystack:
    """A document of real text and the sentences in it."""

    tokens: Int[np.ndarray, " T"]
    starts: Int[np.ndarray, " D"]  # tokens before each sentence
    ends: Int[np.ndarray, " D"]  # one past its last token
    questions: Int[np.ndarray, "D C"]  # tokens that ask for each value, which follows
    values: Int[np.ndarray, " D"]  # the token of each sentence's value
    absent: Int[np.ndarray, " A"]  # tokens of values that no sentence of the document has


def haystack(
    text: Int[np.ndarray, " _"],
    encode: Encode,
    *,
    length: int,
    depths: Sequence[float],
    space: int,
    key: Sequence[int],
    bos: Sequence[int] = (),
) -> Haystack:
    """A document of exactly `length` tokens: the beginning of `text`, with a sentence after each
    share `depths` of the document. At least `space` tokens of text follow every sentence.
    """
    random = np.random.default_rng(key)
    lead, answers = value_tokens(encode)
    if len(answers) < len(depths) + 1:
        raise InputError(
            f"{len(depths)} depths, but this tokenizer tells {len(answers)} values apart; give at "
            f"most {len(answers) - 1}"
        )
    words = random.permutation(sorted(answers))
    keys = _keys(encode, random, len(depths))
    pieces, used, ends, total = [np.asarray(bos, np.int32)], 0, [], len(bos)
    starts = [int(depth * length) for depth in depths]
    for start, key_number, word in zip(starts, keys, words, strict=False):
        prose = start - total
        if prose < (space if ends else 0):
            raise InputError(
                f"depth {start / length:.3f} of {length} tokens leaves {max(prose, 0)} tokens of "
                f"text before its sentence, of {space} needed; give fewer depths or longer texts"
            )
        sentence = np.asarray(encode(SENTENCE.format(key=key_number, word=word)), np.int32)
        pieces += [text[used : used + prose], sentence]
        used, total = used + prose, start + len(sentence)
        ends.append(total)
    rest = length - total
    if rest < space or len(text) < used + rest:
        raise InputError(
            f"{length} tokens need {used + max(rest, space)} of text, and {space} after the last "
            f"depth; the text has {len(text)}"
        )
    return Haystack(
        np.concatenate([*pieces, text[used : used + rest]]).astype(np.int32),
        np.asarray(starts),
        np.asarray(ends),
        np.asarray([[*encode(QUESTION.format(key=each)), *lead] for each in keys], np.int32),
        np.asarray([answers[word] for word in words[: len(depths)]]),
        np.asarray([answers[word] for word in words[len(depths) :]]),
    )


def value_tokens(encode: Encode) -> tuple[list[int], dict[str, int]]:
    """The tokens that all values begin with, and of each the next one, which tells it apart."""
    tokens = {word: list(encode(f" {word}")) for word in WORDS}
    columns = zip(*tokens.values(), strict=False)
    common = next(index for index, column in enumerate(columns) if len(set(column)) > 1)
    # Of words that begin with the same token one is kept.
    by_token = {ids[common]: word for word, ids in tokens.items()}
    return tokens[WORDS[0]][:common], {word: token for token, word in by_token.items()}


def _keys(encode: Encode, random: np.random.Generator, count: int) -> list[int]:
    """Distinct numbers of five digits whose questions have one number of tokens, so that they are
    read side by side.
    """
    keys = [int(each) for each in random.permutation(np.arange(10_000, 100_000))[: 20 * count]]
    lengths = [len(encode(QUESTION.format(key=each))) for each in keys]
    usual = max(set(lengths), key=lengths.count)
    return [each for each, size in zip(keys, lengths, strict=True) if size == usual][:count]
