"""An ∞-gram index: how often any sequence of tokens occurs in a corpus, and what follows it.

index = open_index("INDEX")
index.count([[5613, 4086, 9068]])       occurrences of each query, for many queries in one call
index.infgram_prob([prompt], [token])   the same of the longest suffix of a prompt that occurs

Source: Liu et al. 2024, arXiv:2401.17377 (infini-gram).
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int, Int64, Shaped

from lminf.atomic import read_bytes
from lminf.errors import InputError, refusing
from lminf.ngram.encoding import Encoding, Order, Queries, Tokens
from lminf.ngram.shard import TOKENS, Document, Shard

FACTS, PROGRESS = "index.json", "progress.json"  # PROGRESS: the index is being built
FORMAT = "lminf-ngram-1"
MAX_DISPLAYED = 1000  # tokens of a document around an occurrence

Ranges: TypeAlias = Int64[np.ndarray, "shards B 2"]  # ranks [low, high) in each shard


class Probability(NamedTuple):
    """How often prompts occur, and how often their continuation follows."""

    prompt_count: Int64[np.ndarray, " B"]
    cont_count: Int64[np.ndarray, " B"]  # of the prompt with its continuation
    suffix_len: Int64[np.ndarray, " B"]  # tokens of the prompt that were looked for

    @property
    def prob(self) -> Float[np.ndarray, " B"]:
        """-1 where the prompt does not occur."""
        ratio = self.cont_count / np.maximum(self.prompt_count, 1)
        return np.where(self.prompt_count > 0, ratio, -1.0)


@dataclass(frozen=True)
class Facts:
    """The metadata of an index that this library built; published ones have none."""

    width: int
    order: Order
    tokenizer: str  # the name it was given by
    tokenizer_digest: str  # Tokenizer.digest
    sources: dict[str, Any]  # what it was built from
    shards: list[dict[str, int]]  # slots and documents of each
    vocab_size: int | None = None  # of the tokenizer; None: not known
    format: str = FORMAT


class Index:
    """Shards whose documents are disjoint, with a common encoding."""

    def __init__(self, shards: Sequence[Shard], facts: Facts | None):
        self.shards, self.facts = list(shards), facts
        self.encoding = shards[0].encoding
        self.slots = sum(shard.slots for shard in shards)  # separators included
        self.documents = sum(len(shard.offsets) for shard in shards)

    # --- Counts -----------------------------------------------------------------------------------

    def find(self, queries: Sequence[Tokens] | Int[np.ndarray, "B T"]) -> Ranges:
        """The ranks of the suffixes that begin with each query, in every shard."""
        if len(queries) == 1:
            return self._find_one(self.encoding.encode(queries[0]), None)
        return self.find_in(Queries.of(self.encoding, queries), None)

    def count(self, queries: Sequence[Tokens] | Int[np.ndarray, "B T"]) -> Int64[np.ndarray, " B"]:
        """Occurrences of each query; for an empty one, all tokens of the index."""
        return counts(self.find(queries))

    def prob(self, prompts: Sequence[Tokens], tokens: Tokens) -> Probability:
        """The n-gram probability of one token after each prompt, over all of its occurrences."""
        _check_pairs(prompts, tokens)
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        return self._prob(prompts, tokens, lengths)

    def infgram_prob(self, prompts: Sequence[Tokens], tokens: Tokens) -> Probability:
        """The probability of one token after the longest suffix of each prompt that occurs."""
        _check_pairs(prompts, tokens)
        return self._prob(prompts, tokens, self.longest_suffix(prompts))

    def _prob(self, prompts, tokens, lengths) -> Probability:
        rows = zip(prompts, tokens, lengths.tolist(), strict=True)
        sequences = [[*prompt[len(prompt) - n :], token] for prompt, token, n in rows]
        parents = self.find([query[:-1] for query in sequences])
        if len(sequences) == 1:
            ranges = self._find_one(self.encoding.encode(sequences[0]), parents)
        else:
            ranges = self.find_in(Queries.of(self.encoding, sequences), parents)
        return Probability(counts(parents), counts(ranges), lengths)

    def _find_one(self, query: Shaped[np.ndarray, " T"], parents: Ranges | None) -> Ranges:
        ranges = np.zeros((len(self.shards), 1, 2), np.int64)
        for i, shard in enumerate(self.shards):
            low, high = (0, shard.slots) if parents is None else parents[i, 0].tolist()
            ranges[i, 0] = shard.find_one(query, low, high)
        return ranges

    def find_in(self, queries: Queries, parents: Ranges | None) -> Ranges:
        """As `find`, within the ranges of what the queries begin with."""
        ranges = np.zeros((len(self.shards), len(queries.starts), 2), np.int64)
        for i, shard in enumerate(self.shards):
            low = np.zeros(len(queries.starts), np.int64)
            high = np.full_like(low, shard.slots)
            if parents is not None:
                low, high = parents[i, :, 0], parents[i, :, 1]
            first, beyond = shard.suffixes.bound(queries, low, high)
            rows = np.flatnonzero(shard.suffixes.begins(queries, first) & (first < high))
            end, present = first.copy(), queries.take(rows)
            end[rows] = shard.suffixes.bound(present, first[rows], beyond[rows], after=True)[0]
            ranges[i] = np.stack([first, end], -1)
        return ranges

    # --- Longest matches --------------------------------------------------------------------------

    def longest_suffix(self, prompts: Sequence[Tokens]) -> Int64[np.ndarray, " B"]:
        """Tokens of the longest suffix of each prompt that occurs.

        A suffix of it occurs as well, so the length is doubled until none is found, then bisected.
        """
        if len(prompts) == 1:
            return np.array([self._longest_suffix_of_one(prompts[0])], np.int64)
        queries = Queries.of(self.encoding, prompts)
        limits = queries.lengths
        known, failed = np.zeros_like(limits), limits + 1
        while len(rows := np.flatnonzero(known + 1 < failed)):
            low, high = known[rows], failed[rows]
            doubled = np.minimum(np.maximum(2 * low, 1), limits[rows])
            length = np.where(high > limits[rows], doubled, (low + high) // 2)
            occurs = self._occurs(queries.take(rows).last(length))
            known[rows] = np.where(occurs, length, low)
            failed[rows] = np.where(occurs, high, length)
        return known

    def _longest_suffix_of_one(self, prompt: Tokens) -> int:
        tokens, limit = self.encoding.encode(prompt), len(prompt)
        known, failed = 0, limit + 1
        while known + 1 < failed:
            length = min(max(2 * known, 1), limit) if failed > limit else (known + failed) // 2
            if any(shard.contains_one(tokens[limit - length :]) for shard in self.shards):
                known = length
            else:
                failed = length
        return known

    def _occurs(self, queries: Queries) -> Bool[np.ndarray, " B"]:
        occurs = np.zeros(len(queries.starts), bool)
        for shard in self.shards:
            rows = np.flatnonzero(~occurs)
            remaining, low = queries.take(rows), np.zeros(len(rows), np.int64)
            high = np.full_like(low, shard.slots)
            first, _ = shard.suffixes.bound(remaining, low, high)
            occurs[rows] = shard.suffixes.begins(remaining, first)
        return occurs

    def longest_prefixes(self, text: Tokens) -> Int64[np.ndarray, " T"]:
        """For every token of a text, the length of the longest match that begins with it.

        The longest match of a suffix is with a neighbour of the rank where it would be inserted,
        so each token takes one search, whatever the length.
        """
        tokens, starts = self.encoding.encode(text), np.arange(len(text), dtype=np.int64)
        queries = Queries(tokens, starts, len(text) - starts)
        longest = np.zeros(len(text), np.int64)
        for shard in self.shards:
            low = np.zeros(len(text), np.int64)
            rank, _ = shard.suffixes.bound(queries, low, low + shard.slots)
            for neighbour in (rank - 1, rank):
                positions = shard.positions(np.clip(neighbour, 0, shard.slots - 1))
                longest = np.maximum(longest, shard.suffixes.lcp(queries, positions))
        return longest

    # --- Documents --------------------------------------------------------------------------------

    def doc_at(self, shard: int, rank: int, *, at_most: int = MAX_DISPLAYED) -> Document:
        """The document around the suffix of that rank, at most so many tokens of it."""
        if not 0 <= shard < len(self.shards) or not 0 <= rank < self.shards[shard].slots:
            raise InputError(f"there is no rank {rank} in shard {shard}; give one of a range that "
                             f"a query found")  # fmt: skip
        source = self.shards[shard]
        position = int(source.positions(np.array([rank], np.int64))[0])
        number = int(source.document_numbers(np.array([position], np.int64))[0])
        return source.document(number, around=position, at_most=at_most)

    def docs(
        self, query: Tokens, k: int, *, seed: int = 0, at_most: int = MAX_DISPLAYED
    ) -> list[Document]:
        """Documents around `k` occurrences of the query, drawn without replacement."""
        ranges = self.find([query])[:, 0]
        sizes = ranges[:, 1] - ranges[:, 0]
        total, ends = int(sizes.sum()), np.cumsum(sizes)
        drawn = np.random.default_rng(seed).choice(total, min(k, total), replace=False)
        shards = np.searchsorted(ends, drawn, side="right").tolist()
        ranks = drawn - (ends - sizes)[shards] + ranges[shards, 0]
        pairs = zip(shards, ranks.tolist(), strict=True)
        return [self.doc_at(shard, rank, at_most=at_most) for shard, rank in pairs]


def counts(ranges: Ranges) -> Int64[np.ndarray, " B"]:
    """The number of occurrences, summed over shards."""
    return (ranges[..., 1] - ranges[..., 0]).sum(0)


def _check_pairs(prompts: Sequence[Tokens], tokens: Tokens) -> None:
    if len(prompts) != len(tokens):
        raise InputError(f"{len(prompts)} prompts and {len(tokens)} tokens after them; give one "
                         f"token a prompt")  # fmt: skip


# --- Opening --------------------------------------------------------------------------------------


def open_index(
    folder: str | Path,
    *,
    encoding: Encoding | None = None,
    tokenizer_digest: str | None = None,
) -> Index:
    """The index in a folder. A published one does not say its `encoding`: it has to be given.

    Refuses one that is unfinished or cut short, and one that another tokenizer wrote.
    """
    path = Path(folder).expanduser()
    if (path / PROGRESS).exists():
        raise InputError(f"the index {path} is unfinished; run the same `lminf ngram build` again, "
                         f"which goes on from there")  # fmt: skip
    facts = read_facts(path) if (path / FACTS).exists() else None
    if facts is None and encoding is None:
        where = "holds no index" if not (path / f"{TOKENS}.0").exists() else f"has no {FACTS}"
        raise InputError(f"{path} {where}; build one with `lminf ngram build`, or say how a "
                         f"published one is stored with --width=2 --order=bytes")  # fmt: skip
    if facts is not None:
        stored = Encoding(facts.width, facts.order)
        if encoding not in (None, stored):
            raise InputError(
                f"the index {path} was built with {stored}, not with {encoding}; leave --width and "
                f"--order out"
            )
        encoding = stored
        if tokenizer_digest not in (None, facts.tokenizer_digest):
            raise InputError(
                f"the index {path} was built with the tokenizer {facts.tokenizer} (digest "
                f"{facts.tokenizer_digest[:12]}), not with this one (digest "
                f"{tokenizer_digest[:12]}); build it again, or use that tokenizer"
            )
    assert encoding is not None
    numbers = itertools.takewhile(lambda i: (path / f"{TOKENS}.{i}").exists(), itertools.count())
    shards = [Shard(path, i, encoding) for i in numbers]
    if not shards:
        raise InputError(f"{path} holds no {TOKENS}.0; name the folder of an index")
    if facts is not None:
        actual = [{"slots": shard.slots, "documents": len(shard.offsets)} for shard in shards]
        if actual != facts.shards:
            raise InputError(f"the index {path} is cut short: its shards are {actual}, where "
                             f"{FACTS} says {facts.shards}; build it again")  # fmt: skip
    return Index(shards, facts)


def read_facts(path: Path) -> Facts:
    """The metadata of an index that this library built."""
    with refusing(str(path / FACTS), kind="description of an index", advice="build it again"):
        facts: dict[str, Any] = json.loads(read_bytes(path / FACTS))
        if facts.get("format") != FORMAT:
            raise InputError(f"{path / FACTS} is not of the format {FORMAT}; build it again")
        return Facts(**facts)
