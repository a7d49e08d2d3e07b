"""Counts by looking at every place of a corpus: lists and loops, and nothing of lminf.ngram."""

import collections


def stream(documents, separator):
    """One shard: the separator before each document, and after the last."""
    tokens = []
    for document in documents:
        tokens += [separator, *document]
    return [*tokens, separator]


def suffix_array(tokens, width, order):
    """Byte offsets of all suffixes in their order; a suffix that begins another is first."""

    def key(start):
        suffix = tokens[start:]
        return suffix if order == "id" else b"".join(t.to_bytes(width, "little") for t in suffix)

    return [width * start for start in sorted(range(len(tokens)), key=key)]


def occurrences(shards, query):
    return [
        (number, start)
        for number, tokens in enumerate(shards)
        for start in range(len(tokens))
        if tokens[start : start + len(query)] == list(query)
    ]


def count(shards, query):
    return len(occurrences(shards, query))


def followers(shards, query, separator):
    """Token -> how often it follows; the separator where a shard ends."""
    found = collections.Counter()
    for number, start in occurrences(shards, query):
        tokens = [*shards[number], separator]
        found[tokens[start + len(query)]] += 1
    return dict(found)


def longest_suffix(shards, prompt):
    return max(n for n in range(len(prompt) + 1) if count(shards, prompt[len(prompt) - n :]))
