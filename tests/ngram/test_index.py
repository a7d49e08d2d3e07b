"""Every query of an index against a look at all places, on small random corpora."""

import itertools

import numpy as np
import pytest

from lminf.errors import InputError
from lminf.ngram import build, matches, next_tokens
from lminf.ngram.encoding import WIDTHS, Encoding
from lminf.ngram.shard import pointer_bytes
from tests.ngram import cases, oracle

ENCODINGS = [Encoding(width, order) for width in WIDTHS for order in ("id", "bytes")]


@pytest.fixture(scope="module", params=ENCODINGS, ids=lambda e: f"{e.width}-{e.order}")
def encoding(request):
    return request.param


@pytest.fixture(scope="module", params=[build.MOST_SLOTS, 60], ids=["one", "several"])
def any_index(request, encoding, tmp_path_factory):
    found = cases.documents(0, top=cases.TOP[encoding.width])
    folder = tmp_path_factory.mktemp("any")
    return cases.made(folder, found, encoding, shard_slots=request.param)


@pytest.fixture(scope="module", params=[build.MOST_SLOTS, 60], ids=["one", "several"])
def index(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    return cases.made(folder, cases.documents(0), shard_slots=request.param)


@pytest.fixture
def prompts():
    """Some that occur whole, some of which a part does, some of which nothing does."""
    random = np.random.default_rng(1)
    drawn = [random.integers(0, 3, n).tolist() for n in (1, 2, 3, 5, 8, 13, 21)]
    return [*drawn, [], [7], [0, 7, 1, 2], [0, 1, 7], max(cases.documents(0), key=len).tolist()]


def test_counts_are_those_of_all_places(any_index):
    shards = cases.streams(any_index)
    expected = oracle.ngram_counts(shards, 6)
    ids = sorted({token for shard in shards for token in shard})
    queries = [list(q) for n in range(7) for q in itertools.product(ids, repeat=n)]
    assert any_index.count(queries).tolist() == [expected[tuple(query)] for query in queries]
    for query in queries[::101]:  # one query is looked for in plain Python
        assert any_index.count([query]).tolist() == [expected[tuple(query)]]


def test_files_are_as_published(any_index):
    encoding, written = any_index.encoding, []
    for shard in any_index.shards:
        tokens = shard.tokens.tolist()
        table = oracle.suffix_array(tokens, encoding.width, encoding.order)
        assert (shard.positions(np.arange(shard.slots)) * encoding.width).tolist() == table
        spans = oracle.document_spans(tokens, encoding.separator)
        assert (shard.offsets + 1).tolist() == [first for first, _ in spans]
        assert [shard.span(i) for i in range(len(spans))] == spans
        written += [tokens[first:end] for first, end in spans]
    drawn = cases.documents(0, top=cases.TOP[encoding.width])
    assert written == [document.tolist() for document in drawn]


def test_a_pointer_has_the_bytes_that_offsets_need():
    sizes = (1, 256, 257, 1 << 16, (1 << 16) + 1, 2 * 10**9, 5 * 10**11)
    assert [pointer_bytes(size) for size in sizes] == [1, 1, 2, 2, 3, 4, 5]


def test_probabilities_are_ratios_of_counts(index, prompts):
    shards, tokens = cases.streams(index), [i % 4 for i in range(len(prompts))]
    found = index.prob(prompts, tokens)
    for i, (prompt, token) in enumerate(zip(prompts, tokens, strict=True)):
        whole = len(oracle.occurrences(shards, [*prompt, token]))
        expected = len(oracle.occurrences(shards, prompt)), whole
        assert (found.prompt_count[i], found.cont_count[i]) == expected
        assert found.prob[i] == (whole / expected[0] if expected[0] else -1)
        assert index.prob([prompt], [token]).prob.tolist() == [found.prob[i]]


def test_the_longest_suffix_that_occurs_is_found(index, prompts):
    expected = [oracle.longest_suffix(cases.streams(index), prompt) for prompt in prompts]
    assert index.longest_suffix(prompts).tolist() == expected
    assert [int(index.longest_suffix([prompt])[0]) for prompt in prompts] == expected
    tokens = [i % 3 for i in range(len(prompts))]
    assert index.infgram_prob(prompts, tokens).suffix_len.tolist() == expected
    assert max(expected) > 8


def test_what_follows_is_counted(index, prompts):
    shards, separator = cases.streams(index), index.encoding.separator
    found = next_tokens.ntd(index, prompts)
    backed_off = next_tokens.infgram_ntd(index, prompts)
    assert not found.approx.any()
    for i, prompt in enumerate(prompts):
        assert found.of(i) == oracle.followers(shards, prompt, separator)
        suffix = prompt[len(prompt) - int(backed_off.suffix_len[i]) :]
        assert backed_off.of(i) == oracle.followers(shards, suffix, separator)
        # P∞ of all tokens is 1: every occurrence has one token after it.
        assert sum(backed_off.of(i).values()) == backed_off.prompt_count[i] > 0


def test_a_sample_keeps_the_sum_and_comes_closer_as_it_grows(tmp_path):
    skewed = np.random.default_rng(0).geometric(0.3, 6000)
    index = cases.made(tmp_path, [skewed])
    exact = next_tokens.ntd(index, [[1]], max_support=None)
    total, distances = int(exact.prompt_count[0]), []
    for support in (8, 64, 512):
        found = next_tokens.ntd(index, [[1]], max_support=support)
        assert found.approx[0]
        assert sum(found.of(0).values()) == total
        distance = {t: found.of(0).get(t, 0) - n for t, n in exact.of(0).items()}
        distances.append(sum(map(abs, distance.values())) / 2 / total)
    assert 0 < distances[2] < distances[1] < distances[0] < 0.5
    assert exact.of(0) == oracle.followers(cases.streams(index), [1], index.encoding.separator)


def test_a_text_is_scored_as_each_of_its_positions(index):
    text = np.random.default_rng(2).integers(0, 4, 60).tolist()
    scored = matches.score_text(index, text)
    alone = index.infgram_prob([text[:i] for i in range(len(text))], text)
    for name, expected in alone._asdict().items():
        np.testing.assert_array_equal(getattr(scored.probability, name), expected)
    followers = next_tokens.infgram_ntd(index, [text[:i] for i in range(len(text))])
    sparse = [len(followers.of(i)) == 1 for i in range(len(text))]
    assert scored.sparse.tolist() == sparse
    assert 0 < sum(sparse) < len(text)
    of_trigrams = matches.score_text(index, text, max_context=2).probability
    longest = np.minimum(scored.probability.suffix_len, 2)
    np.testing.assert_array_equal(of_trigrams.suffix_len, longest)


def test_spans_are_the_longest_that_occur(index):
    shards = cases.streams(index)
    text = [9, *cases.documents(0)[2].tolist(), 9, 0, 1, 9]
    spans = matches.attribute(index, text, min_len=2)

    def occurs(start, end):
        return bool(oracle.occurrences(shards, text[start:end]))

    expected = [
        (start, end - start, len(oracle.occurrences(shards, text[start:end])))
        for start in range(len(text)) for end in range(start + 2, len(text) + 1)
        if occurs(start, end)
        and not (start and occurs(start - 1, end))
        and not (end < len(text) and occurs(start, end + 1))
    ]  # fmt: skip
    assert [tuple(span) for span in spans] == expected
    assert expected


def test_documents_are_those_around_an_occurrence(tmp_path):
    drawn = cases.documents(3, slots=2000)
    index = cases.made(tmp_path, drawn, shard_slots=600)
    query = drawn[4][5:9].tolist()
    found = index.docs(query, 5, at_most=12)
    assert len(found) == min(5, index.count([query])[0])
    spans = [oracle.document_spans(shard, 0xFFFF) for shard in cases.streams(index)]
    for document in found:
        first, end = spans[document.shard][document.number]
        whole = index.shards[document.shard].tokens[first:end].tolist()
        assert document.length == len(whole)
        shown = document.tokens.tolist()
        assert shown == whole[document.start : document.start + 12]
        assert any(shown[i : i + 4] == query for i in range(len(shown)))
    assert [d.tokens.tolist() for d in index.docs(query, 5, at_most=12)] == [
        d.tokens.tolist() for d in found
    ]


def test_documents_that_hold_most_of_a_text_are_found(tmp_path):
    random = np.random.default_rng(4)
    texts = [random.integers(0, 500, 40) for _ in range(3)]
    half = np.concatenate([texts[0][:26], random.integers(0, 500, 30)])
    found = [half, np.concatenate([random.integers(0, 500, 9), texts[1], [3]]), texts[0][:37]]
    index = cases.made(tmp_path, found, shard_slots=80)
    held = [(c.shard, c.document, c.text) for c in matches.contaminated(index, texts)]
    spans = [len(shard.offsets) for shard in index.shards]
    numbers = [sum(spans[:shard]) + document for shard, document, _ in held]
    assert [(n, t) for n, (_, _, t) in zip(numbers, held, strict=True)] == [(2, 0), (1, 1)]
    assert matches.contaminated(index, [texts[0][:12]]) == []


def beside(document, clauses, limit):
    """How often the first clause stands in a document with all others beside it, each within the
    limit of what was found before: the last that is not after that, the first not before it.
    """
    places = [
        [i for i in range(len(document)) if any(document[i : i + len(g)] == g for g in grams)]
        for grams in clauses
    ]
    total = 0
    for first in places[0]:
        last = first
        for others in places[1:]:
            left = max((i for i in others if i <= last), default=-1000)
            right = min((i for i in others if i >= first), default=1000)
            if first - left > limit and right - last > limit:
                break
            first, last = (min(first, left) if first - left <= limit else first,
                           max(last, right) if right - last <= limit else last)  # fmt: skip
        else:
            total += 1
    return total


@pytest.mark.parametrize("limit", [3, 20])
@pytest.mark.parametrize("count", [2, 4])
def test_clauses_are_counted_beside_each_other(limit, count, tmp_path):
    drawn = cases.documents(5, alphabet=5, top=5, slots=600)
    index = cases.made(tmp_path, drawn, shard_slots=700)
    rising = [[[0, 1, 2]], [[3, 3]], [[4, 0], [2, 3]], [[1]]][:count]
    expected = sum(beside(document.tolist(), rising, limit) for document in drawn)
    assert matches.count_cnf(index, rising[::-1], max_diff_tokens=limit) == (expected, False)


def test_of_a_frequent_clause_a_sample_stands_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr(matches, "ANCHORS", 16)
    drawn = cases.documents(5, alphabet=5, top=5, slots=20_000)
    index = cases.made(tmp_path, drawn)
    clauses = [[[0], [1]], [[2, 2]], [[4, 4], [3, 3]]]
    exact, _ = matches.count_cnf(index, clauses, max_diff_tokens=20)
    sampled = matches.count_cnf(index, clauses, max_diff_tokens=20, max_clause_freq=300)
    assert sampled.approx
    assert sampled.occurrences == pytest.approx(exact, rel=0.1)


def test_what_no_index_holds_is_refused(index):
    with pytest.raises(InputError, match="token id 65536 is outside the 2-byte tokens"):
        index.count([[1], [65536]])
    with pytest.raises(InputError, match="token id -1 is outside"):
        index.longest_suffix([[0, -1]])
    with pytest.raises(InputError, match="2 prompts and 1 tokens after them"):
        index.prob([[0], [1]], [1])
    with pytest.raises(InputError, match="a clause or an n-gram is empty"):
        matches.count_cnf(index, [[[]]])
    with pytest.raises(InputError, match="no rank 100000 in shard 0"):
        index.doc_at(0, 100_000)
