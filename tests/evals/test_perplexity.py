import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lminf.errors import InputError
from lminf.evals import perplexity


def test_blocks_average_over_positions_and_documents():
    long, short = np.arange(1.0, 8.0), np.array([3.0, 5.0])  # positions 1-7, and 1-2
    blocks = perplexity.by_position([long, short], block=3)
    assert [(b.start, b.stop, b.tokens) for b in blocks] == [(0, 3, 4), (3, 6, 3), (6, 8, 2)]
    assert [b.nll for b in blocks] == [(1 + 2 + 3 + 5) / 4, 4.0, 6.5]


def test_blocks_of_losses_that_begin_at_another_position():
    blocks = perplexity.by_position([np.array([1.0, 2.0, 4.0])], block=4, first=6)
    assert [(b.start, b.stop, b.tokens, b.nll) for b in blocks] == [(4, 8, 2, 1.5), (8, 9, 1, 4.0)]


def test_nothing_scored_is_refused():
    with pytest.raises(InputError, match="no token was scored"):
        perplexity.by_position([np.array([])], block=4)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 400), st.integers(2, 60), st.data())
def test_rereading_scores_every_token_once_with_enough_before_it(length, trained, data):
    stride = data.draw(st.integers(1, trained - 1))
    windows = perplexity.reread(length, trained=trained, stride=stride)
    scored = [t for w in windows for t in range(w.score_from, w.stop)]
    assert scored == list(range(1, length))
    assert {w.stop - w.start for w in windows} == {min(trained, length)}
    assert all(w.score_from - w.start >= trained - stride for w in windows[1:])
    assert all(w.start >= 0 for w in windows)


def test_rereading_strides_by_half_the_trained_length():
    assert perplexity.reread(20, trained=8) == [
        (0, 8, 1),
        (4, 12, 8),
        (8, 16, 12),
        (12, 20, 16),
    ]


def test_a_stride_without_context_is_refused():
    with pytest.raises(InputError, match="stride=8"):
        perplexity.reread(20, trained=8, stride=8)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=8),
    st.integers(1, 20),
    st.integers(0, 5),
    st.booleans(),
)
def test_a_stream_holds_every_document_whole_once(sizes, chunk, seed, bos):
    documents = [np.full(size, i + 1) for i, size in enumerate(sizes)]
    chunks = list(perplexity.stream(documents, chunk=chunk, seed=seed, bos=0 if bos else None))
    joined = np.concatenate(chunks) if chunks else np.array([])
    assert all(len(c) == chunk for c in chunks[:-1])
    if bos:
        assert joined[0] == 0
        joined = joined[1:]
    assert sorted(joined) == sorted(np.concatenate(documents))
    assert np.count_nonzero(np.diff(joined)) == max(sum(size > 0 for size in sizes) - 1, 0)


def test_the_order_of_a_stream_follows_its_seed():
    documents = [np.array([i]) for i in range(20)]

    def order(seed):
        return list(np.concatenate(list(perplexity.stream(documents, chunk=7, seed=seed))))

    assert order(1) == order(1)
    assert order(1) != order(2)
