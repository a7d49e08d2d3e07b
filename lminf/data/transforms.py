"""Transforms: pure functions from an example and a key to examples.

An example is a mapping of arrays over the T tokens of one document:

    tokens     integers [T]
    weights    float32 [T], how much each token counts as a target; without it all count 1
    segments   integers [T], the document of each token; without it there is one

The key follows from the seed and the example's index, so any worker makes the same examples in any
order, and reading resumes at any index without state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol, TypeAlias, overload

import numpy as np
from jaxtyping import Int

from lminf import ranges
from lminf.data import permutation
from lminf.errors import InputError
from lminf.ranges import Range

Example: TypeAlias = Mapping[str, np.ndarray]
Key: TypeAlias = tuple[int, ...]  # seed, index, number of the transform, number of its example
TokenId: TypeAlias = Annotated[int, Range(min=0, max=2**31 - 1)]
Share: TypeAlias = Annotated[float, Range(min=0, max=1)]


class Transform(Protocol):
    def __call__(self, example: Example, key: Key) -> Sequence[Example]:
        """The examples that replace this one: none, one or more. The same key gives the same."""
        ...


class RowTransform(Transform, Protocol):
    """A transform of packed rows, which leaves each as long as it is."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens that it may write; the vocabulary must have them."""
        ...


def apply(
    transforms: Sequence[Transform], examples: Sequence[Example], *, seed: int
) -> Sequence[tuple[Example, ...]]:
    """What each example becomes under the transforms, one after another; made when it is read.

    `apply(…)[i]` is the outcome of `examples[i]` alone, and a slice is as lazy as the whole.
    """
    if problem := Range(min=0, max=2**31 - 1).problem(seed, whole=True):
        raise InputError(f"seed is {seed!r}; give {problem}")
    return _Transformed(tuple(transforms), examples, seed, range(len(examples)))


@dataclass(frozen=True)
class _Transformed(Sequence[tuple[Example, ...]]):
    transforms: tuple[Transform, ...]
    examples: Sequence[Example]
    seed: int
    indices: range

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> tuple[Example, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> "_Transformed": ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            indices = self.indices[index]
            return _Transformed(self.transforms, self.examples, self.seed, indices)
        index = self.indices[index]
        return _made(self.transforms, self.examples[index], (self.seed, index))


def _made(transforms: Sequence[Transform], example: Example, key: Key) -> tuple[Example, ...]:
    made = [example]
    for stage, transform in enumerate(transforms):
        made = [
            result
            for number, each in enumerate(made)
            for result in transform(each, (*key, stage, number))
        ]
    return tuple(made)


def transform_row(transforms: Sequence[Transform], row: Example, key: tuple[int, int]) -> Example:
    """What a row becomes under the transforms; `key` is the seed and the row's number."""
    made = _made(transforms, row, key)
    if len(made) != 1 or len(made[0]["tokens"]) != len(row["tokens"]):
        lengths = " and ".join(str(len(each["tokens"])) for each in made) or "no"
        raise InputError(f"the transforms make {lengths} tokens of a row of {len(row['tokens'])}; "
                         f"give transforms that keep the length of rows")  # fmt: skip
    return made[0]


@dataclass(frozen=True)
class FillInTheMiddle:
    """Documents with a random middle part moved to the end, between sentinel tokens.

    A share `rate` of documents is cut at two uniformly random places into prefix, middle and
    suffix. Of these a share `spm_rate` is written suffix first (SPM), the rest prefix first (PSM):

        PSM    <prefix_id> prefix <suffix_id> suffix <middle_id> middle
        SPM    <prefix_id> <suffix_id> suffix <middle_id> prefix middle

    A leading `bos_id` and a closing `end_id` keep their places. Cuts fall between tokens; the paper
    cuts between characters and tokenizes the parts. Weights move with their tokens, and sentinels
    count 1. Source: Bavarian et al. 2022, arXiv:2207.14255.
    """

    prefix_id: TokenId
    suffix_id: TokenId
    middle_id: TokenId
    rate: Share = 0.5
    spm_rate: Share = 0.5
    bos_id: TokenId | None = None
    end_id: TokenId | None = None

    def __post_init__(self):
        ranges.check(self)
        sentinels = self.prefix_id, self.suffix_id, self.middle_id
        if len(set(sentinels)) < 3:
            raise InputError(f"the sentinels are the tokens {sentinels}; give three different ones")

    def __call__(self, example: Example, key: Key) -> Sequence[Example]:
        if "segments" in example:
            raise InputError(
                "fill-in-the-middle cuts one document, but this example has segments; transform "
                "documents before they are packed"
            )
        tokens = example["tokens"]
        start = int(len(tokens) > 0 and tokens[0] == self.bos_id)
        end = len(tokens) - int(len(tokens) > start and tokens[-1] == self.end_id)
        chosen, spm, *places = permutation.words(key, 4).tolist()
        if chosen >= self.rate * 2**64:
            return (example,)
        first, second = sorted(start + (place * (end - start + 1) >> 64) for place in places)
        index = np.arange(len(tokens) + 3)  # of the tokens, and of the sentinels behind them
        prefix, middle, suffix = index[start:first], index[first:second], index[second:end]
        to_prefix, to_suffix, to_middle = index[-3:-2], index[-2:-1], index[-1:]
        if spm < self.spm_rate * 2**64:
            body = to_prefix, to_suffix, suffix, to_middle, prefix, middle
        else:
            body = to_prefix, prefix, to_suffix, suffix, to_middle, middle
        order = np.concatenate([index[:start], *body, index[end : len(tokens)]])
        sentinels = {"tokens": [self.prefix_id, self.suffix_id, self.middle_id]}
        return (
            {
                name: np.append(values, sentinels.get(name, [1] * 3)).astype(values.dtype)[order]
                for name, values in example.items()
            },
        )


@dataclass(frozen=True)
class CompletionOnly:
    """Examples in which only the tokens after a response template count as targets.

    The template is the tokens that open the answer, such as those of `<|im_start|>assistant\\n`;
    all tokens up to its first occurrence, and its own, get weight 0.
    """

    template: tuple[TokenId, ...]

    def __post_init__(self):
        ranges.check(self)
        if not self.template:
            raise InputError("the response template has no tokens; give at least one")

    def __call__(self, example: Example, key: Key) -> Sequence[Example]:
        tokens = example["tokens"]
        end = _end_of(tokens, np.asarray(self.template))
        if end is None:
            raise InputError(
                f"example {key[1]} has no response template {self.template}; give the template's "
                f"tokens as they are encoded inside a text, or leave this example out"
            )
        weights = np.array(example.get("weights", np.ones(len(tokens))), np.float32)
        weights[:end] = 0
        return ({**example, "weights": weights},)


@dataclass(frozen=True)
class PerSequence:
    """Examples in which the targets of each document share a weight of 1.

    The loss is then the mean over documents of their mean loss; without it, every token counts the
    same, and a long document as much as its tokens. Of a packed row each segment is a document, and
    its first token, which nothing predicts, is no target. Source: Bai et al. 2024, "LongWriter",
    arXiv:2408.07055, which finds that it shortens long answers.
    """

    token_ids = ()  # it writes no tokens

    def __call__(self, example: Example, key: Key) -> Sequence[Example]:
        count = len(example["tokens"])
        segments = example.get("segments", np.zeros(count, np.int32))
        first = np.diff(segments, prepend=segments[:1] - 1) != 0
        weights = np.where(first, 0, example.get("weights", np.ones(count)))
        document = np.cumsum(first) - 1
        totals = np.bincount(document, weights)[document] if count else weights
        shares = np.divide(weights, totals, out=np.zeros(count), where=totals > 0)
        return ({**example, "weights": shares.astype(np.float32)},)


def _end_of(tokens: Int[np.ndarray, " T"], template: Int[np.ndarray, " R"]) -> int | None:
    """The index after the first occurrence of the template; None where there is none."""
    if len(tokens) < len(template):
        return None
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(template))
    matches = np.flatnonzero((windows == template).all(1))
    return int(matches[0]) + len(template) if len(matches) else None
