"""Counts by looking at every place of a corpus: lists and loops, and nothing of lminf.ngram."""

import collections
import itertools


def stream(documents, separator):
    """One shard: the separator before each document, and after the last."""
    tokens = []
    for document in documents:
        tokens += [separator, *map(int, document)]
    return [*tokens, separator]


def suffix_array(tokens, width, order):
    """Byte offsets of all suffixes in their order; a suffix that begins another is first."""

    def key(start):
        suffix = tokens[start:]
        return suffix if order == "id" else b"".join(t.to_bytes(width, "little") for t in suffix)

    return [width * start for start in sorted(range(len(tokens)), key=key)]


def ngram_counts(shards, longest):
    """How often every sequence of up to `longest` tokens occurs."""
    return collections.Counter(
        tuple(tokens[start : start + n])
        for tokens in shards
        for n in range(longest + 1)
        for start in range(len(tokens) - n + (n > 0))
    )


def occurrences(shards, query):
    return [
        (number, start)
        for number, tokens in enumerate(shards)
        for start in range(len(tokens))
        if tokens[start : start + len(query)] == list(query)
    ]


def followers(shards, query, separator):
    """Token -> how often it follows; the separator where a shard ends."""
    found = collections.Counter()
    for number, start in occurrences(shards, query):
        tokens = [*shards[number], separator]
        found[tokens[start + len(query)]] += 1
    return dict(found)


def longest_suffix(shards, prompt):
    """Tokens of it."""
    return max(n for n in range(len(prompt) + 1) if occurrences(shards, prompt[len(prompt) - n :]))


def document_spans(shard, separator):
    """[first, end) of every document of a stream."""
    at = [i for i, token in enumerate(shard) if token == separator]
    return [(start + 1, end) for start, end in itertools.pairwise(at)]
