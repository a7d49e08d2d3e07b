"""Contexts made shorter by a model that was trained to write texts of a given length.

    text   what asks for a length   shorter text   end

A pair of a text and a shorter one, of one of several lengths, is a row of training, of which the
shorter text and its end count. The published pairs are written by a large model that is told the
length (self-instruction); here they are given.
Source: Liu et al. 2023, TCRA-LLM, arXiv:2310.15556.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from lminf.errors import InputError
from lminf.lm.budget import Budget
from lminf.lm.protocol import TextGenerator
from lminf.programs.reduce import TextReducer, longest_fitting, room_for_context


class Form(NamedTuple):
    """What stands between a text and the shorter one, and after it."""

    ask: Callable[[int], str]  # of the length that is asked for
    end: str


class Pair(NamedTuple):
    """A text, and a shorter one of at most so many units."""

    text: str
    length: int
    shorter: str


def training_rows(
    pairs: Sequence[Pair], form: Form, encode: Callable[[str], Int[np.ndarray, " _"]], *, width: int
) -> dict[str, np.ndarray]:
    """The batch [pairs, width] of tokens and targets, of which those of the shorter text and of its
    end have weight 1.
    """
    tokens = np.zeros((len(pairs), width + 1), np.int32)
    weights = np.zeros((len(pairs), width + 1), np.float32)
    for row, (text, length, shorter) in enumerate(pairs):
        prompt = encode(text + form.ask(length))
        ids = np.concatenate([prompt, encode(shorter + form.end)])
        if len(ids) > width + 1:
            raise InputError(
                f"a text and its summary of {length} take {len(ids)} tokens, and rows have "
                f"{width + 1}; give longer rows, or shorter texts"
            )
        tokens[row, : len(ids)] = ids
        weights[row, len(prompt) : len(ids)] = 1
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights[:, 1:]}


@dataclass(frozen=True)
class TrainedSummary(TextReducer):
    """What a model writes that was trained on such pairs and is asked for the longest of their
    lengths that the budget has room for, cut where it is longer. It does not see the question.
    """

    model: TextGenerator
    form: Form
    lengths: Sequence[int]  # rising, in units of the budget

    name = "trained summary"

    def shorten(self, context: str, question: str, budget: Budget) -> str:
        room = room_for_context(context, question, budget)
        length = max((each for each in self.lengths if each <= room), default=self.lengths[0])
        prompt = context + self.form.ask(length)
        (text,) = self.model.generate([prompt], max_new_tokens=room, stop=(self.form.end,))
        return longest_fitting(lambda count: text[:count], len(text), question, budget)
