"""Okapi BM25: how well each of some texts fits a question, by the words that they share."""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

TERM = re.compile(r"\w+")


def scores(
    documents: Sequence[str], question: str, *, k1: float = 1.2, b: float = 0.75
) -> Float[np.ndarray, " N"]:
    """The score of every document.

    score = Σ over terms t of the question of idf(t) · tf · (k1 + 1) / (tf + k1 (1 − b + b n / n̄))
    idf(t) = ln(1 + (N − N_t + 0.5) / (N_t + 0.5)), N_t of N documents having t, n of n̄ terms
    Source: Robertson and Zaragoza 2009, Foundations and Trends in Information Retrieval 3(4).
    """
    terms = [[term.lower() for term in TERM.findall(text)] for text in documents]
    lengths = np.array([len(each) for each in terms], np.float64)
    norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1))
    total = np.zeros(len(terms))
    for term in (term.lower() for term in TERM.findall(question)):
        tf = np.array([each.count(term) for each in terms], np.float64)
        having = (tf > 0).sum()
        idf = np.log(1 + (len(terms) - having + 0.5) / (having + 0.5))
        total += idf * tf * (k1 + 1) / np.maximum(tf + norm, 1e-9)
    return total
