import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lminf.evals.repeats import far_copies


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 5), st.integers(0, 20))
def test_it_is_what_comparing_every_two_places_finds(tokens, length, beyond):
    expected = [
        any(
            tokens[end - length : end] == tokens[before - length : before]
            for before in range(length, end - beyond)
        )
        for end in range(1, len(tokens) + 1)
    ]
    found = far_copies(np.asarray(tokens, np.int32), length=length, beyond=beyond)
    # A text too short for one copy has none.
    assert list(found) == [end >= length and copy for end, copy in enumerate(expected, 1)]


def test_a_repeat_within_the_window_is_none():
    tokens = np.tile(np.arange(20, dtype=np.int32), 5)
    assert far_copies(tokens, length=17, beyond=79).sum() == 4
    assert far_copies(tokens, length=17, beyond=19).sum() == 100 - 16 - 20
    assert not far_copies(tokens, length=17, beyond=100).any()
