"""Vectors of tokens from the company they keep in a text: tokens of similar use have similar ones.

The positive pointwise mutual information of a token and its neighbours, factorised. Skip-gram with
negative sampling, which fastText trains, factorises that matrix too, less a constant (Levy and
Goldberg 2014, NeurIPS 27); weights of neighbours, the exponent of their frequencies and that of the
singular values are those of Levy et al. 2015, TACL 3:211. Characters inside a token play no part.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse
from scipy.sparse import linalg

WINDOW = 5  # tokens to either side; that at distance d counts 1 - (d - 1) / WINDOW
SMOOTHING = 0.75  # exponent of the frequency of a neighbour
LEAST_COUNT = 10  # occurrences; rarer tokens have no vector
DIM = 100


def token_vectors(
    texts: Sequence[Int[np.ndarray, " _"]], vocab_size: int
) -> Float[np.ndarray, "V d"]:
    """A vector for each token that occurs often enough in texts of token ids, and zeros for the
    others; d is DIM, or less of few tokens.
    """
    counts = sum((np.bincount(ids, minlength=vocab_size) for ids in texts), np.zeros(vocab_size))
    frequent = np.flatnonzero(counts >= LEAST_COUNT)
    vectors = np.zeros((vocab_size, max(1, min(DIM, len(frequent) - 1))))
    pairs = neighbours(texts, vocab_size)[frequent][:, frequent].tocoo()
    if len(frequent) < 2 or not pairs.nnz:
        return vectors
    rows, columns = pairs.sum(1), pairs.sum(0) ** SMOOTHING
    pmi = np.log(pairs.data / rows[pairs.row] * columns.sum() / columns[pairs.col])
    positive = sparse.csr_array((np.maximum(pmi, 0), (pairs.row, pairs.col)), shape=pairs.shape)
    start = np.random.default_rng(0).normal(size=len(frequent))  # the iteration's: same every time
    left, singular, _ = linalg.svds(positive, k=vectors.shape[1], v0=start)
    vectors[frequent] = left * np.sqrt(singular)
    return vectors


def neighbours(texts: Sequence[Int[np.ndarray, " _"]], vocab_size: int) -> sparse.csr_array:
    """[V, V]: how often tokens are neighbours in a text, near ones more than far ones."""
    ids = np.concatenate([np.zeros(0, np.int32), *texts])
    text_of = np.repeat(np.arange(len(texts)), [len(each) for each in texts])
    pairs: list[np.ndarray] = [np.zeros((3, 0))]
    for distance in range(1, WINDOW + 1):
        together = text_of[:-distance] == text_of[distance:]
        left, right = ids[:-distance][together], ids[distance:][together]
        pairs.append(np.stack([left, right, np.full(len(left), 1 - (distance - 1) / WINDOW)]))
    left, right, weights = np.concatenate(pairs, 1)
    places = left.astype(np.int32), right.astype(np.int32)
    one_way = sparse.coo_array((weights, places), shape=(vocab_size, vocab_size)).tocsr()
    return one_way + one_way.T
