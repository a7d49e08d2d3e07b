"""Untie the Knots: documents of a packed row in chunks, shuffled, so that each must be found again.

Source: Tian et al. 2024, "Untie the Knots", arXiv:2409.04774.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lminf import ranges
from lminf.data import permutation
from lminf.data.transforms import Example, Key, Share, TokenId
from lminf.errors import InputError
from lminf.ranges import Range

ID_CHARACTERS = 6  # of a chunk's id
INSERTED = -1  # the source of a token that the given sequence does not hold


@dataclass(frozen=True)
class Backtracing:
    """Tokens that name the chunks of a document and, after its last one, tell their order.

    `<D> id </D>` stands before each chunk of a document with several, and `<S> id <s> id … </S>`,
    in the original order, after the one that comes last. An id is six random characters, each one
    token; the paper tokenizes the string.
    """

    open_id: TokenId  # <D>
    close_id: TokenId  # </D>
    open_list_id: TokenId  # <S>
    separator_id: TokenId  # <s>
    close_list_id: TokenId  # </S>
    characters: tuple[TokenId, ...]  # of letters and digits

    def __post_init__(self):
        ranges.check(self)
        if not self.characters:
            raise InputError("Backtracing.characters is (); give the tokens that ids are made of")

    @property
    def mark_ids(self) -> tuple[int, ...]:
        """The tokens that no text holds."""
        return (self.open_id, self.close_id, self.open_list_id, self.separator_id,
                self.close_list_id)  # fmt: skip

    @property
    def token_ids(self) -> tuple[int, ...]:
        return (*self.mark_ids, *self.characters)


class Tied(NamedTuple):
    """A sequence of K tokens that was tied, before it is cut to the length of a row."""

    tokens: Int[np.ndarray, " K"]
    sources: Int[np.ndarray, " K"]  # the place of each token in the given sequence, or INSERTED
    weights: Float[np.ndarray, " K"]  # how much each token counts as a target


class Chunk(NamedTuple):
    """The tokens from `start` up to, and without, `stop` of a sequence."""

    document: int
    number: int  # among the chunks of its document
    of: int  # chunks of its document
    start: int
    stop: int


class Part(NamedTuple):
    """Tokens of a tied sequence that are treated alike."""

    tokens: Int[np.ndarray, " K"] | Sequence[int]
    start: int = INSERTED  # in the given sequence
    predicted: bool = True  # whether they count as targets
    predicts: bool = True  # whether the target of one of them counts


@dataclass(frozen=True)
class UntieTheKnots:
    """Rows whose documents are cut into chunks, and the chunks shuffled.

    A law is drawn for each row by the `weights`, and the number of chunks of each of its documents
    by that law; rows of a law that cuts nothing stay as they are. The last chunk of the last
    document stays last, and the row is cut to its length. Chunk c of a document ends in the knot
    token 2c unless it is the last one, and begins with the knot token 2c - 1 unless it is the
    first. Knots and the headers of backtracing are not learned.
    """

    end_id: TokenId  # which ends a document
    knot_ids: tuple[TokenId, ...]  # 2 (n - 1) for at most n chunks, which no text holds
    weights: tuple[Share, ...] = (0.7, 0.3)  # of the laws
    # Of each law, the probabilities of 1, 2, … chunks.
    laws: tuple[tuple[Annotated[float, Range(min=0, max=1)], ...], ...] = ((1.0,), (0.0, 0.0, 1.0))
    cuts: Literal["random", "equal"] = "random"
    order: Literal["shuffled", "partial"] = "shuffled"  # partial: within a document as they were
    backtracing: Backtracing | None = None

    def __post_init__(self):
        ranges.check(self)
        if len(self.weights) != len(self.laws) or not sum(self.weights) > 0:
            raise InputError(
                f"weights={self.weights} of {len(self.laws)} laws; give one for each, not all 0"
            )
        if not all(sum(law) > 0 for law in self.laws):
            raise InputError(f"laws={self.laws}: give each a number of chunks above 0")
        most = max(map(len, self.laws))
        if len(self.knot_ids) != 2 * (most - 1):
            raise InputError(
                f"{len(self.knot_ids)} knot tokens for documents of up to {most} chunks; give "
                f"{2 * (most - 1)}"
            )
        reserved = [self.end_id, *self.knot_ids]
        reserved += self.backtracing.token_ids if self.backtracing else ()
        if len(set(reserved)) < len(reserved):
            raise InputError(f"knot_ids={self.knot_ids}: a token is given twice among the end of "
                             f"a document, the knots and backtracing; reserve others")  # fmt: skip

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens that it writes."""
        return (*self.knot_ids, *(self.backtracing.token_ids if self.backtracing else ()))

    def __call__(self, example: Example, key: Key) -> Sequence[Example]:
        if "segments" in example:
            raise InputError(
                "untie_the_knots shuffles documents that see each other, but this row keeps them "
                "apart; choose a plan that joins them, such as concat"
            )
        tokens = example["tokens"]
        tied = self.tie(tokens, key)
        given = np.append(example.get("weights", np.ones(len(tokens))), 1)  # 1: of what is inserted
        weights = (tied.weights * given[tied.sources]).astype(np.float32)
        return ({"tokens": tied.tokens[: len(tokens)], "weights": weights[: len(tokens)]},)

    def tie(self, tokens: Int[np.ndarray, " T"], key: Key) -> Tied:
        """The whole tied sequence, with what `untie` needs."""
        self._check_free(tokens)
        (word,) = permutation.words((*key, 0), 1).tolist()
        law = self.laws[_drawn(self.weights, word)]
        if not any(law[1:]):
            return Tied(tokens, np.arange(len(tokens)), np.ones(len(tokens)))
        chunks = self._chunks(tokens, law, key)
        parts = self._parts(tokens, self._shuffled(chunks, key), key)
        sizes = [len(part.tokens) for part in parts]
        sources = [
            np.arange(part.start, part.start + size) if part.start != INSERTED
            else np.full(size, INSERTED)
            for part, size in zip(parts, sizes, strict=True)
        ]  # fmt: skip
        predicted = np.repeat([float(part.predicted) for part in parts], sizes)
        predicts = np.repeat([float(part.predicts) for part in parts], sizes)
        predicted[1:] *= predicts[:-1]
        joined = np.concatenate([np.asarray(part.tokens, tokens.dtype) for part in parts])
        return Tied(joined, np.concatenate(sources), predicted)

    def _check_free(self, tokens: Int[np.ndarray, " T"]) -> None:
        """Refuses a text that holds a reserved token, which a model could not tell from a mark."""
        marks = (*self.knot_ids, *(self.backtracing.mark_ids if self.backtracing else ()))
        places = np.flatnonzero(np.isin(tokens, marks))
        if len(places):
            raise InputError(
                f"the text holds the token {tokens[places[0]]}, at place {places[0]:,} of a row, "
                f"but untie_the_knots reserves it as a mark; reserve tokens that no text holds"
            )

    def _chunks(self, tokens: np.ndarray, law: Sequence[float], key: Key) -> list[Chunk]:
        """The chunks of all documents in their order; a document shorter than its number of chunks
        stays whole."""
        ends = np.flatnonzero(tokens == self.end_id) + 1
        ends = ends.tolist() if len(ends) and ends[-1] == len(tokens) else [*ends, len(tokens)]
        words = permutation.words((*key, 1), len(ends) * len(law)).reshape(len(ends), -1)
        chunks, start = [], 0
        for document, (end, drawn) in enumerate(zip(ends, words.tolist(), strict=True)):
            size, count = end - start, 1 + _drawn(law, drawn[0])
            count = count if size >= count else 1
            cuts = (
                [size * i // count for i in range(1, count)]
                if self.cuts == "equal"
                else _distinct(drawn[1:count], size - 1)
            )
            edges = [start, *(start + cut for cut in cuts), end]
            chunks += [Chunk(document, i, count, *edges[i : i + 2]) for i in range(len(edges) - 1)]
            start = int(end)
        return chunks

    def _shuffled(self, chunks: list[Chunk], key: Key) -> list[Chunk]:
        """All in a uniformly random order, but for the last."""
        order = np.argsort(permutation.words((*key, 2), len(chunks) - 1), kind="stable").tolist()
        if self.order == "partial":
            # The places that a document's chunks were drawn to are taken by them in their order.
            of_document: dict[int, list[int]] = {}
            for index in sorted(order, reverse=True):
                of_document.setdefault(chunks[index].document, []).append(index)
            order = [of_document[chunks[index].document].pop() for index in order]
        return [*(chunks[index] for index in order), chunks[-1]]

    def _parts(self, tokens: np.ndarray, chunks: list[Chunk], key: Key) -> list[Part]:
        """What a row holds, from its first token to its last."""
        trace, knots = self.backtracing, self.knot_ids
        last = {chunk.document: place for place, chunk in enumerate(chunks)}
        ids = self._ids(chunks, key) if trace else {}
        parts = []
        for place, chunk in enumerate(chunks):
            if trace and chunk.of > 1:
                header = [trace.open_id, *ids[chunk.document, chunk.number], trace.close_id]
                parts.append(Part(header, predicted=False, predicts=False))
            if chunk.number > 0:
                knot = knots[2 * chunk.number - 1]
                parts.append(Part([knot], predicted=False, predicts=False))
            parts.append(Part(tokens[chunk.start : chunk.stop], chunk.start))
            if chunk.number < chunk.of - 1:
                parts.append(Part([knots[2 * chunk.number]], predicted=False, predicts=False))
            if trace and chunk.of > 1 and place == last[chunk.document]:
                parts.append(Part([trace.open_list_id], predicted=False))
                for number in range(chunk.of):
                    between = [trace.separator_id] if number else []
                    parts.append(Part([*between, *ids[chunk.document, number]]))
                parts.append(Part([trace.close_list_id], predicts=False))
        return parts

    def _ids(self, chunks: list[Chunk], key: Key) -> dict[tuple[int, int], list[int]]:
        """(document, number) -> the tokens of its id."""
        assert self.backtracing is not None
        characters = np.asarray(self.backtracing.characters)
        words = permutation.words((*key, 3), len(chunks) * ID_CHARACTERS) % len(characters)
        ids = characters[words.astype(np.int64)].reshape(-1, ID_CHARACTERS).tolist()
        named = sorted((chunk.document, chunk.number) for chunk in chunks)
        return dict(zip(named, ids, strict=True))


def untie(tied: Tied) -> Int[np.ndarray, " T"]:
    """The sequence that was tied: all its documents, as they were and in their order."""
    kept = np.flatnonzero(tied.sources != INSERTED)
    return tied.tokens[kept[np.argsort(tied.sources[kept], kind="stable")]]


def _drawn(weights: Sequence[float], word: int) -> int:
    """The index that a random 64-bit word chooses, with these odds."""
    until = np.cumsum(weights)
    return int(np.searchsorted(until[:-1], word / 2**64 * until[-1], side="right"))


def _distinct(words: Sequence[int], count: int) -> list[int]:
    """As many different numbers of 1 … count as there are words, ascending; every set alike.

    Source: Floyd's algorithm, Bentley and Floyd 1987, "A sample of brilliance".
    """
    chosen: set[int] = set()
    for limit, word in enumerate(words, count - len(words) + 1):
        number = 1 + (word * limit >> 64)
        chosen.add(limit if number in chosen else number)
    return sorted(chosen)
