"""Passkey retrieval: a five-digit key inside a long, dull text, and a question at the end.

Two generators from the literature, which no table should mix:

    lm_infinite   everything joined by spaces, filler in whole copies, the key between two copies.
                  Prompts end up to one copy short of the length asked for.
                  Source: Han et al. 2024, arXiv:2308.16137.
    landmark      five lines; filler cut by characters, before the key and (afresh) after it.
                  Prompts have exactly the length asked for, wherever the tokenizer allows it.
                  Source: Mohtashami & Jaggi 2023, arXiv:2305.16300.

We differ from both in three ways. Lengths are counted in tokens of the whole prompt, as the model
will read it. Keys have five digits, so that every answer is of one length. `lm_infinite` does not
end in a space, which most tokenizers would split from the key in a way no model was trained on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from lminf.config import closest
from lminf.errors import InputError
from lminf.evals.needle import Needle, NeedleTask
from lminf.evals.task import Budget

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them."
    " I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEY_LINE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"

Encode = Callable[[str], Sequence[int]]  # text -> tokens as the model reads them, BOS included
Generator = Literal["lm_infinite", "landmark"]


@dataclass(frozen=True)
class Passkey(NeedleTask):
    """Passkey retrieval as a task of lminf.evals.runner.

    Keys depend on the task's key alone, and not on the length.
    """

    generator: Generator = "landmark"
    depth: float | None = None  # share of the filler before the key; None: drawn for each instance

    name = "passkey"

    def __post_init__(self):
        generators = get_args(Generator)
        if self.generator not in generators:
            raise InputError(
                f"there is no generator {self.generator!r}; {closest(self.generator, generators)}"
            )
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise InputError(
                f"depth={self.depth} for a passkey; give 0 (before the filler) to 1 (after it)"
            )

    def instances(self, budget: Budget, *, count: int, key: Sequence[int]) -> list[Needle]:
        passkeys = np.random.default_rng(key).integers(10_000, 100_000, count)
        # A stream of their own: that of the keys is where `count` leaves it.
        drawn = np.random.default_rng((*key, 1)).random(count)
        depths = drawn if self.depth is None else np.full(count, self.depth)
        make = {"lm_infinite": lm_infinite, "landmark": landmark}[self.generator]
        return [
            make(budget.encode, length=budget.size, key=int(passkey), depth=float(depth))
            for passkey, depth in zip(passkeys, depths, strict=True)
        ]


def lm_infinite(encode: Encode, *, length: int, key: int, depth: float) -> Needle:
    """One prompt: task, copies of the filler with the key among them, question."""

    def parts(copies):
        num_before = int(depth * copies)
        return [TASK, *[FILLER] * num_before], [*[FILLER] * (copies - num_before), QUESTION]

    copy_tokens = len(encode(f"{FILLER} {FILLER}")) - len(encode(FILLER))
    return _fitted(encode, parts, " ", unit=copy_tokens, length=length, key=key, depth=depth)


def landmark(encode: Encode, *, length: int, key: int, depth: float) -> Needle:
    """One prompt: task, filler, key, filler, question, each on its own line."""
    cut = _FillerByTokens(encode)

    def parts(tokens):
        num_before = int(depth * tokens)
        return [TASK, cut(num_before)], [cut(tokens - num_before), QUESTION]

    return _fitted(encode, parts, "\n", unit=1, length=length, key=key, depth=depth)


def _fitted(
    encode: Encode,
    parts: Callable[[int], tuple[list[str], list[str]]],  # what is before the key and after it
    joint: str,
    *,
    unit: int,
    length: int,
    key: int,
    depth: float,
) -> Needle:
    """The longest prompt that has at most `length` tokens."""

    def prompt(n: int) -> str:
        head, tail = parts(n)
        return joint.join([*head, KEY_LINE.format(key=key), *tail])

    n, tokens = _fill(encode, prompt, length=length, unit=unit)
    start = len(encode(joint.join(parts(n)[0])))
    return Needle(prompt(n), key, int(depth * n) / max(n, 1), tokens, start)


class _FillerByTokens:
    """Calling it with n gives the longest beginning of the endless filler with about n tokens.

    One copy is tokenised once, cut after each of its characters; longer texts are arithmetic.
    A count can be off by one or two where pieces meet, which `_fill` sees and mends.
    """

    def __init__(self, encode: Encode):
        self.copy = f" {FILLER}"
        filler_tokens = len(encode(FILLER))
        counts = [
            len(encode(FILLER + self.copy[:end])) - filler_tokens
            for end in range(len(self.copy) + 1)
        ]
        self.copy_tokens = counts[-1]
        # The longest cut with at most n tokens: counts are no monotone function of characters,
        # because a whole word often has fewer tokens than its beginning.
        self.longest = [
            max(end for end, count in enumerate(counts) if count <= n)
            for n in range(self.copy_tokens)
        ]

    def __call__(self, tokens: int) -> str:
        copies, rest = divmod(tokens, self.copy_tokens)
        return (self.copy * copies + self.copy[: self.longest[rest]]).removeprefix(" ")


def _fill(
    encode: Encode, prompt: Callable[[int], str], *, length: int, unit: int
) -> tuple[int, int]:
    """(n, tokens): the most filler n for which prompt(n) was seen to have at most `length` tokens.

    Filler adds `unit` tokens per step, so the answer is computed; the tokenizer is asked for the
    empty prompt and to confirm, again only if pieces merged where they meet.
    """
    n, tokens = 0, len(encode(prompt(0)))
    if tokens > length:
        raise InputError(
            f"a passkey prompt of length={length} tokens has no room for its {tokens} tokens of "
            f"task, key and question; ask for length>={tokens + unit}"
        )
    best, tried = (n, tokens), {n}
    while True:
        n = max(n + (length - tokens) // unit, 0)
        if n in tried:
            return best
        tried.add(n)
        tokens = len(encode(prompt(n)))
        if tokens <= length and n > best[0]:
            best = (n, tokens)
