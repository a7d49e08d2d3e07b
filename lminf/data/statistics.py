"""What a plan makes of a corpus: how full its rows are, how much it cuts, how much is seen."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from lminf.data.plans import Selection

AT_ONCE = 1 << 16  # rows


@dataclass(frozen=True)
class Statistics:
    """Of one epoch."""

    rows: int
    tokens: int  # inputs, each with a target
    fill: float  # share of the rows' places that hold tokens
    predicted: float  # share of the corpus's tokens that are targets
    documents_cut: int  # in pieces that do not see each other
    documents_left_out: int  # without any token in a row
    mean_length: float  # tokens that see each other, over such pieces
    mean_context: float  # earlier tokens that a token sees, over tokens
    attention_pairs: int  # of a query and a key that it sees: what exact attention costs


def statistics(taken: Sequence[Selection], *, ends: Int[np.ndarray, " documents"]) -> Statistics:
    """Of the rows that an epoch takes: where that is a part of a layout, by its share of the whole.

    Cut and left-out documents are those of the whole layout.
    Source of the mean context: Pouransari et al. 2024, arXiv:2405.13226.
    """
    rows = tokens = places = pieces = pairs = 0.0
    touched = np.zeros(len(ends) + 1, np.int64)  # its running sum is a document's pieces
    for layout, count in taken:
        share = count / layout.count if layout.count else 0.0
        rows += count
        places += count * layout.length
        for first in range(0, layout.count, AT_ONCE):
            spans = layout.spans(np.arange(first, min(first + AT_ONCE, layout.count)))
            size = spans.size.astype(np.float64)
            tokens += share * size.sum()
            pieces += share * len(size)
            pairs += share * (size * (size + 1) / 2).sum()
            np.add.at(touched, np.searchsorted(ends, spans.start, side="right"), 1)
            last = spans.start + spans.size - 1
            np.add.at(touched, np.searchsorted(ends, last, side="right") + 1, -1)
    pieces_of = np.cumsum(touched[:-1])
    return Statistics(
        rows=round(rows), tokens=round(tokens), fill=tokens / places,
        predicted=tokens / float(ends[-1]), documents_cut=int((pieces_of > 1).sum()),
        documents_left_out=int((pieces_of == 0).sum()), mean_length=tokens / pieces,
        mean_context=(pairs - tokens) / tokens, attention_pairs=round(pairs),
    )  # fmt: skip
