"""What of a text is in a corpus: the ∞-gram probability of its tokens, spans that occur verbatim,
documents that hold most of it, and occurrences of several n-grams beside each other.

Source: Liu et al. 2024, arXiv:2401.17377.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, Shaped
from numpy.lib.stride_tricks import sliding_window_view

from lminf.errors import InputError
from lminf.ngram.encoding import Queries
from lminf.ngram.index import Index, Probability, Ranges, Tokens, counts
from lminf.ngram.shard import Shard

MAX_DIFF_TOKENS = 100
MAX_CLAUSE_FREQ = 50_000
ANCHORS = 1 << 12  # places whose surroundings are read at a time
CONTAMINATION_N, CONTAMINATION_SHARE = 13, 0.8


class TextProbability(NamedTuple):
    """The ∞-gram probability of every token of a text, given those before it."""

    probability: Probability
    sparse: Bool[np.ndarray, " T"]  # one token has all of the probability


def score_text(index: Index, text: Tokens, *, max_context: int | None = None) -> TextProbability:
    """Of every token by the longest context that occurs, of at most `max_context` tokens: with 4,
    the estimate of a 5-gram model that backs off.

    The matched parts of a text end ever later, so the longest context of a token begins at the
    first one whose match reaches it: one search a token, and no suffix is tried twice.
    """
    reach = np.arange(len(text)) + index.longest_prefixes(text)
    ends = np.arange(len(text), dtype=np.int64)
    starts = np.searchsorted(reach, ends, side="left").astype(np.int64)
    if max_context is not None:
        starts = np.maximum(starts, ends - max_context)
    lengths = ends - starts
    contexts = Queries(index.encoding.encode(text), starts, lengths)
    ranges = index.find_in(contexts, None)
    continued = index.find_in(contexts._replace(lengths=lengths + 1), ranges)
    probability = Probability(counts(ranges), counts(continued), lengths)
    return TextProbability(probability, _one_follower(index, ranges, lengths))


def _one_follower(
    index: Index, ranges: Ranges, lengths: Int64[np.ndarray, " T"]
) -> Bool[np.ndarray, " T"]:
    """Whether the same token follows all occurrences: next tokens of a range are in order."""
    least, most = np.full(len(lengths), 1 << 40), np.full(len(lengths), -1)
    for shard, shard_ranges in zip(index.shards, ranges, strict=True):
        rows = np.flatnonzero(shard_ranges[:, 1] > shard_ranges[:, 0])
        for ranks in (shard_ranges[rows, 0], shard_ranges[rows, 1] - 1):
            token = shard.tokens_at(shard.positions(ranks) + lengths[rows])
            least[rows] = np.minimum(least[rows], token)
            most[rows] = np.maximum(most[rows], token)
    return least == most


class Span(NamedTuple):
    """A part of a text that occurs in the corpus, and within no longer one that does."""

    start: int  # tokens
    length: int
    occurrences: int


def attribute(index: Index, text: Tokens, *, min_len: int) -> list[Span]:
    """The maximal spans of a text, of at least so many tokens, that occur verbatim."""
    longest = index.longest_prefixes(text)
    reach = np.arange(len(text)) + longest
    maximal = (longest >= min_len) & (reach > np.append(-1, reach[:-1]))
    starts = np.flatnonzero(maximal)
    queries = [list(text[start : reach[start]]) for start in starts.tolist()]
    if not queries:
        return []
    occurrences = index.count(queries).tolist()
    return [
        Span(*span) for span in zip(starts.tolist(), map(len, queries), occurrences, strict=True)
    ]


class Contaminated(NamedTuple):
    """A document of the corpus that holds much of an evaluation text."""

    shard: int
    document: int  # in its shard
    text: int  # among those evaluated
    share: float  # of the n-grams of that text


def contaminated(
    index: Index,
    texts: Sequence[Tokens],
    *,
    n: int = CONTAMINATION_N,
    share: float = CONTAMINATION_SHARE,
) -> list[Contaminated]:
    """The documents in which at least that share of a text's n-grams occur, each once a text.

    A text of fewer than `n` tokens has no n-gram, and none is found.
    """
    documents_of_texts = []
    for number, text in enumerate(texts):
        if len(text) < n:
            continue
        grams = np.unique(sliding_window_view(np.asarray(text), n), axis=0)
        ranges = index.find(grams)
        for shard in index.shards:
            gram, positions = _positions(index, shard.number, ranges)
            pairs = np.unique(shard.document_numbers(positions) * len(grams) + gram)
            documents, distinct = np.unique(pairs // len(grams), return_counts=True)
            most = distinct >= share * len(grams)
            documents_of_texts += [
                Contaminated(shard.number, document, number, many / len(grams))
                for document, many in zip(
                    documents[most].tolist(), distinct[most].tolist(), strict=True
                )
            ]
    return documents_of_texts


def _positions(
    index: Index, number: int, ranges: Ranges, stride: int = 1
) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " N"]]:
    """(query, token where it occurs) of one occurrence in `stride` of each query in a shard."""
    low, high = ranges[number, :, 0], ranges[number, :, 1]
    sizes = -(-(high - low) // stride)
    query = np.repeat(np.arange(len(sizes)), sizes)
    within = np.arange(len(query)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return query, index.shards[number].positions(low[query] + within * stride)


class ClauseCount(NamedTuple):
    """How often clauses occur beside each other."""

    occurrences: int
    approx: bool  # of a sample


def count_cnf(
    index: Index,
    clauses: Sequence[Sequence[Tokens]],
    *,
    max_diff_tokens: int = MAX_DIFF_TOKENS,
    max_clause_freq: int = MAX_CLAUSE_FREQ,
) -> ClauseCount:
    """Occurrences of the rarest clause beside which all others stand in its document; a clause is
    any of several n-grams.

    The others are looked for from the rarest to the commonest, each within `max_diff_tokens` of the
    span of those before it, which then reaches to the nearest of it on both sides. Where the rarest
    occurs more than `max_clause_freq` times in a shard, one occurrence in so many stands for all.
    """
    if not clauses or not all(len(clause) and all(map(len, clause)) for clause in clauses):
        raise InputError("a clause or an n-gram is empty; give at least one token of each")
    total, approx = 0, False
    ranges = [index.find(clause) for clause in clauses]
    encoded = [[index.encoding.encode(ngram) for ngram in clause] for clause in clauses]
    for shard in index.shards:
        sizes = [int(np.diff(of_clause[shard.number]).sum()) for of_clause in ranges]
        rarest, *others = sorted(range(len(clauses)), key=sizes.__getitem__)
        stride = max(1, -(-sizes[rarest] // max_clause_freq))
        anchors = np.unique(_positions(index, shard.number, ranges[rarest], stride)[1])
        for start in range(0, len(anchors), ANCHORS):
            some = anchors[start : start + ANCHORS]
            total += stride * _beside(shard, some, [encoded[i] for i in others], max_diff_tokens)
        approx |= stride > 1
    return ClauseCount(total, approx)


def _beside(
    shard: Shard,
    anchors: Int64[np.ndarray, " A"],
    clauses: Sequence[Sequence[Shaped[np.ndarray, " _"]]],
    max_diff: int,
) -> int:
    """How many of these positions have all the clauses beside them, looked for in their order."""
    first = last = anchors  # of what was found
    for clause in clauses:
        document = shard.document_numbers(first)
        begins, ends = shard.offsets[document], np.append(shard.offsets, shard.slots)[document + 1]
        low, high = np.maximum(first - max_diff, begins), np.minimum(last + max_diff, ends - 1)
        positions = low[:, None] + np.arange((high - low).max(initial=-1) + 1)
        occurs = np.zeros(positions.shape, bool)
        for ngram in clause:
            tokens = (shard.tokens_at(positions + i) == token for i, token in enumerate(ngram))
            occurs |= np.logical_and.reduce(list(tokens))
        occurs &= positions <= high[:, None]
        before = np.where(occurs & (positions <= last[:, None]), positions, -1).max(1, initial=-1)
        after = np.where(occurs & (positions >= first[:, None]), positions, shard.slots)
        after, matched = after.min(1, initial=shard.slots), occurs.any(1)
        first = np.where(before < 0, first, np.minimum(first, before))[matched]
        last = np.where(after == shard.slots, last, np.maximum(last, after))[matched]
    return len(first)
