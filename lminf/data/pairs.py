"""Pairs of answers as arrays: what preference objectives read.

prompt + chosen      chosen_tokens, chosen_targets, chosen_weights
prompt + rejected    rejected_…
reference_prompt + each of them, for a reference that reads another prompt: reference_chosen_…
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from lminf.errors import InputError


@dataclass(frozen=True)
class Pair:
    """A better and a worse answer, as token ids."""

    chosen: Int[np.ndarray, " A"]
    rejected: Int[np.ndarray, " R"]
    prompt: Int[np.ndarray, " P"]  # that the policy reads
    reference_prompt: Int[np.ndarray, " Q"]  # that the reference reads; DPO: the policy's

    def __post_init__(self):
        for name in ("chosen", "rejected", "prompt", "reference_prompt"):
            if not len(getattr(self, name)):
                raise InputError(f"the {name} of a pair is empty; give at least one token")


def batch(
    pairs: Sequence[Pair], *, length: int, reference_length: int | None = None
) -> dict[str, np.ndarray]:
    """Rows of `length` tokens, and of `reference_length` for the reference's prompts; None: without
    them. Only tokens of answers count as targets; the rest of a row is padding.
    """
    arrays = {}
    for answer in ("chosen", "rejected"):
        texts = [(pair.prompt, getattr(pair, answer)) for pair in pairs]
        arrays |= _rows(texts, length, f"{answer}_")
        if reference_length is not None:
            texts = [(pair.reference_prompt, getattr(pair, answer)) for pair in pairs]
            arrays |= _rows(texts, reference_length, f"reference_{answer}_")
    return arrays


def _rows(
    texts: Sequence[tuple[np.ndarray, np.ndarray]], length: int, prefix: str
) -> dict[str, np.ndarray]:
    tokens = np.zeros((len(texts), length + 1), np.int32)
    weights = np.zeros((len(texts), length), np.float32)
    for index, (prompt, answer) in enumerate(texts):
        end = len(prompt) + len(answer)
        if end - 1 > length:  # the last token is a target alone
            reader = "reference" if prefix.startswith("reference") else "policy"
            raise InputError(
                f"the {reader}'s prompt and answer of pair {index} take {end} tokens, more than "
                f"the {length + 1} that fit in a row of {length}; leave the pair out, or give "
                f"longer rows"
            )
        tokens[index, :end] = np.concatenate([prompt, answer])
        weights[index, len(prompt) - 1 : end - 1] = 1
    named = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
    return {prefix + name: array for name, array in named.items()}
