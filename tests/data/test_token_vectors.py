"""Vectors of tokens: who is whose neighbour, and that tokens of one use are alike."""

import numpy as np

from lminf.data import token_vectors
from lminf.data.token_vectors import LEAST_COUNT


def test_neighbours_count_by_distance_within_a_text():
    found = token_vectors.neighbours([np.array([0, 1, 2]), np.array([3]), np.array([0, 1])], 4)
    expected = np.zeros((4, 4))
    expected[0, 1] = expected[1, 0] = 1 + 1
    expected[1, 2] = expected[2, 1] = 1
    expected[0, 2] = expected[2, 0] = 1 - 1 / 5
    np.testing.assert_allclose(found.toarray(), expected)


def test_tokens_that_stand_in_each_others_place_are_alike():
    """0 and 1 stand between 4 and 5, 2 and 3 between 6 and 7; 8 is rare, 9 does not occur."""
    rng = np.random.default_rng(0)
    texts = [np.array([4, rng.integers(2), 5, 6, 2 + rng.integers(2), 7]) for _ in range(200)]
    texts += [np.array([4, 8, 5])] * (LEAST_COUNT - 1)
    vectors = token_vectors.token_vectors(texts, 10)
    directions = vectors[:8] / np.linalg.norm(vectors[:8], axis=1, keepdims=True)
    cosines = directions @ directions.T
    assert cosines[0, 1] > 0.9
    assert cosines[2, 3] > 0.9
    assert np.abs(cosines[:2, 2:4]).max() < 0.5
    assert not vectors[8:].any()
    np.testing.assert_allclose(vectors, token_vectors.token_vectors(texts, 10), atol=1e-9)


def test_texts_that_say_nothing_of_tokens_give_no_vectors():
    assert not token_vectors.token_vectors([], 5).any()
    assert not token_vectors.token_vectors([np.array([3])] * 50, 5).any()
